"""Every model of the zoo against every property of its contract; then models with a planted fault, which must fail.

A new model is tested here from its first day: nothing names it, `zoo.names()` finds it. The properties are in
tests/contracts.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import FieldEmbedding, Table
from funnelrec.core.schema import Spec
from tests import contracts as c

NOT_PERSONAL = {"match/popularity"}  # gives everyone the same list: its planted answer is another one
CONTENT_ALONE = {"rank/mm_rec"}  # reads items and histories, no context: its planted answer is in its own tests
COUNTS = {"encode/text/count_model", "encode/text/word2vec", "encode/item/content"}  # made of data at once: no config
CLASSES: dict[str, type[Any]] = {name: zoo.load(name) for name in zoo.names()}
NEEDS_ITEMS = {n for n, cls in CLASSES.items() if {"reads_history", "needs_items"} & set(dir(cls))}
RANKERS = [n for n in CLASSES if n.startswith("rank/")]
READING_ALL = set(RANKERS) - CONTENT_ALONE
MATCHERS = [n for n in CLASSES if n.startswith("match/")]
VECTORS = [n for n in MATCHERS if c.contract_of(CLASSES[n]) == "vectors"]
ANSWERING = [n for n in MATCHERS if n not in VECTORS]
RERANKERS = [n for n in CLASSES if n.startswith("rerank/")]
FULL, ROWS = c.World(c.full_spec()), c.World(c.rows_spec())
WIDE = c.World(c.make_spec([("user", "user", 130, 1), ("item", "item", 502, 1)]))  # more items than users
CASES = [pytest.param(n, FULL, id=n) for n in RANKERS + MATCHERS]
CASES += [pytest.param(n, ROWS, id=f"{n}-rows") for n in RANKERS if n not in NEEDS_ITEMS]
LEARNERS = [case for case in CASES if case.values[0] not in ANSWERING]
READERS = [case for case in CASES if case.values[1] is FULL]  # those whose batch holds a history


@pytest.fixture(autouse=True)
def _seeded() -> Any:
    """Models draw their weights from the global generator: fork it, so that each test starts from the same bits."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        yield


def build(name: str, world: c.World) -> nn.Module:
    """The model from the spec alone: every other argument of a constructor has a default."""
    return c.prepared(CLASSES[name](world.spec), world)


def test_the_zoo_holds_every_stage() -> None:
    assert {n.partition("/")[0] for n in CLASSES} >= {"match", "rank", "rerank"}


@pytest.mark.parametrize(
    "check",
    [
        c.check_output,
        c.check_row_order,
        c.check_independence,
        c.check_eval_is_deterministic,
        c.check_batch_of_one,
        c.check_unknown,
    ],
)
@pytest.mark.parametrize(("name", "world"), CASES)
def test_every_scorer(name: str, world: c.World, check: c.Check) -> None:
    check(build(name, world), world)


@pytest.mark.parametrize("check", [c.check_padding_length, c.check_padding_content, c.check_empty_history])
@pytest.mark.parametrize(("name", "world"), READERS)
def test_every_reader_of_histories(name: str, world: c.World, check: c.Check) -> None:
    check(build(name, world), world)


@pytest.mark.parametrize("check", [c.check_gradients, c.check_padding_row])
@pytest.mark.parametrize(("name", "world"), LEARNERS)
def test_every_learner(name: str, world: c.World, check: c.Check) -> None:
    check(build(name, world), world)


@pytest.mark.parametrize(("name", "world"), LEARNERS)
def test_every_learner_overfits(name: str, world: c.World) -> None:
    world = WIDE if name in VECTORS else world
    c.check_overfits(build(name, world), world)


@pytest.mark.parametrize(("name", "world"), CASES)
def test_save_and_load(name: str, world: c.World, tmp_path: Path) -> None:
    c.check_saved_and_loaded(CLASSES[name], world, tmp_path)


@pytest.mark.parametrize("name", [n for n in CLASSES if n not in COUNTS])
def test_a_model_remembers_its_configuration(name: str) -> None:
    model = c.built(CLASSES[name], FULL.spec)
    assert model.config == json.loads(json.dumps(c.config_of(CLASSES[name])))
    assert getattr(model, "spec", FULL.spec) == FULL.spec


@pytest.mark.parametrize("name", RANKERS + MATCHERS)
def test_ids_above_float32(name: str) -> None:
    width = 4 if name in VECTORS else 2  # a layer norm leaves two numbers nothing but their order
    c.check_large_ids(
        CLASSES[name], embedding_dim=width, num_heads=1, num_neighbours=1, hidden=(4,), attention_hidden=(4,)
    )


@pytest.mark.parametrize(
    ("name", "world"), [case for case in LEARNERS if case.values[0] in set(RANKERS) - CONTENT_ALONE]
)
def test_every_ranker_learns_a_planted_rule(name: str, world: c.World) -> None:
    c.check_learns_a_rule(build(name, world), world)


@pytest.mark.parametrize("name", [n for n in MATCHERS if n not in NOT_PERSONAL])
def test_every_matcher_finds_the_withheld_item(name: str) -> None:
    world = c.World(c.make_spec([("user", "user", 50, 1), ("item", "item", 50, 1)]))
    c.check_finds_the_checkerboard(CLASSES[name](world.spec), world)


@pytest.mark.parametrize("name", ANSWERING)
def test_every_list_is_a_list(name: str) -> None:
    c.check_recommendation(build(name, FULL), FULL)


@pytest.mark.parametrize("check", [c.check_chooses_positions, c.check_ties_are_deterministic, c.check_prefix])
@pytest.mark.parametrize("name", RERANKERS)
def test_every_reranker(name: str, check: Callable[[Any], None]) -> None:
    check(c.built(CLASSES[name], FULL.spec))


# --- the checks, checked: one planted fault each -------------------------------------------------------------------


class Sound(nn.Module):
    """A ranker without a fault: the sum of a linear score of all fields and of the mean of the history."""

    def __init__(self, spec: Spec, *, embedding_dim: int = 8, hidden: Sequence[int] = (16,)) -> None:
        super().__init__()
        self.spec = spec
        self.embedding = FieldEmbedding(spec, embedding_dim, std=0.1)
        self.inner = nn.Linear(self.embedding.output_fields * embedding_dim + embedding_dim, hidden[0])
        self.outer = nn.Linear(hidden[0], 1)

    def pooled(self, items: Tensor, mask: Tensor) -> Tensor:
        return (items * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)

    def read(self, batch: Batch) -> Tensor:
        if "history_ids" not in batch:
            return self.embedding(batch)[:, 0] * 0  # (B, D)
        items = self.embedding.lookup(batch.history_ids, self.spec.item_ids).mean(2)  # (B, L, D)
        return self.pooled(items, batch.mask)

    def forward(self, batch: Batch) -> Tensor:
        joined = torch.cat([self.embedding(batch).flatten(1), self.read(batch)], dim=1)
        return self.outer(torch.relu(self.inner(joined))).squeeze(1)


class MeanOverPadding(Sound):
    def pooled(self, items: Tensor, mask: Tensor) -> Tensor:
        return items.mean(1)


class ReadsPadding(Sound):
    def pooled(self, items: Tensor, mask: Tensor) -> Tensor:
        return items.sum(1)


class DividesByNothing(Sound):
    def pooled(self, items: Tensor, mask: Tensor) -> Tensor:
        return (items * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)


class SoftmaxOfNothing(Sound):
    """The output is repaired, the gradient is not."""

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.project = nn.Linear(8, 8)

    def pooled(self, items: Tensor, mask: Tensor) -> Tensor:
        items = self.project(items)
        weights = items.sum(2).masked_fill(~mask, -torch.inf).softmax(1)
        mixed = (weights.unsqueeze(-1) * items).sum(1)
        return torch.where(mask.any(1, keepdim=True), mixed, 0.0)


class LeaksTheBatch(Sound):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return logits - 0.1 * logits.mean()


class CountsRows(Sound):
    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        return logits + torch.arange(len(logits)) * 0.01


class DeadParameter(Sound):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.forgotten = nn.Linear(2, 2)


class DeadBranch(Sound):
    """The branch is there and is multiplied by zero."""

    def read(self, batch: Batch) -> Tensor:
        return super().read(batch) * 0

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) + 0 * self.scale


class RandomInEval(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) + 1e-3 * torch.rand(batch.size)


class DropoutInEval(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return F.dropout(super().forward(batch), 0.5, training=True)


class FloatIds(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch.replace(ids=batch.ids.float().long()))


class NotInTheWeights(Sound):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.direction = torch.randn(())

    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * self.direction


class NotJson(Sound):
    def __init__(self, spec: Spec, *, kind: torch.dtype = torch.float32) -> None:
        super().__init__(spec)


class Doubles(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).double()


class KeepsAColumn(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).unsqueeze(1)


class SqueezesTooMuch(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch).squeeze()


class NormOfOne(Sound):
    """Standardises over the batch in training: one example has no variance."""

    def forward(self, batch: Batch) -> Tensor:
        logits = super().forward(batch)
        variance = (logits - logits.mean()).square().sum() / (len(logits) - 1)
        return logits / variance.sqrt() if self.training else logits


class LosesTheUnknown(Sound):
    def forward(self, batch: Batch) -> Tensor:
        known = (batch.ids - torch.tensor([f.offset for f in self.spec.categories for _ in range(f.start, f.stop)])) > 0
        return super().forward(batch) / known.any(1)


class MovesThePadding(Sound):
    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self.embedding.table = Table(spec.table_rows, 8, std=0.1, padding=False)


class Constant(Sound):
    def forward(self, batch: Batch) -> Tensor:
        return super().forward(batch) * 0 + self.outer.bias


@pytest.mark.parametrize(
    "check",
    [
        c.check_output,
        c.check_gradients,
        c.check_padding_row,
        c.check_padding_length,
        c.check_padding_content,
        c.check_row_order,
        c.check_independence,
        c.check_eval_is_deterministic,
        c.check_batch_of_one,
        c.check_empty_history,
        c.check_unknown,
        c.check_overfits,
        c.check_learns_a_rule,
    ],
)
def test_a_sound_model_passes(check: c.Check) -> None:
    check(Sound(FULL.spec), FULL)


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (KeepsAColumn, c.check_output, "one logit a row"),
        (Doubles, c.check_output, "float32"),
        (DeadParameter, c.check_gradients, "forgotten.weight receives no gradient"),
        (DeadBranch, c.check_gradients, "scale is zero everywhere"),
        (MovesThePadding, c.check_padding_row, "moved away from zero"),
        (MeanOverPadding, c.check_padding_length, "length of the padding"),
        (ReadsPadding, c.check_padding_content, "content of the padding"),
        (CountsRows, c.check_row_order, "place of its row"),
        (LeaksTheBatch, c.check_independence, "another example"),
        (RandomInEval, c.check_eval_is_deterministic, "two eval calls differ"),
        (DropoutInEval, c.check_eval_is_deterministic, "two eval calls differ"),
        (SqueezesTooMuch, c.check_batch_of_one, "alone gives another output"),
        (NormOfOne, c.check_batch_of_one, "loss is not finite"),
        (DividesByNothing, c.check_empty_history, "an output is not finite"),
        (SoftmaxOfNothing, c.check_empty_history, "the gradient of .* is not finite"),
        (LosesTheUnknown, c.check_unknown, "unknown rows is not finite"),
        (Constant, c.check_overfits, "not under 0.05"),
        (Constant, c.check_learns_a_rule, "rule is not learnt"),
    ],
)
def test_a_planted_fault_is_caught(fault: type[nn.Module], check: c.Check, message: str) -> None:
    with pytest.raises(AssertionError, match=message):
        check(fault(FULL.spec), FULL)


def test_ids_through_float32_are_caught() -> None:
    c.check_large_ids(Sound, embedding_dim=2)
    with pytest.raises(AssertionError, match="same output"):
        c.check_large_ids(FloatIds, embedding_dim=2)


def test_what_the_weights_do_not_hold_is_caught(tmp_path: Path) -> None:
    c.check_saved_and_loaded(Sound, FULL, tmp_path)
    with pytest.raises(AssertionError, match="gives other outputs"):
        c.check_saved_and_loaded(NotInTheWeights, FULL, tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        c.check_saved_and_loaded(NotJson, FULL, tmp_path)


class SoundList(nn.Module):
    """Recommends by a fixed score of each item."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.scores = (torch.arange(spec.num_items) % 7).float()

    def fit(self, users: Tensor, items: Tensor, times: Tensor) -> None:
        self.scores = torch.bincount(items, minlength=len(self.scores)).float()

    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        scores = self.scores.repeat(batch.size, 1)
        scores[:, :2] = -torch.inf
        if exclude is not None:
            scores = scores.scatter(1, exclude, -torch.inf)
        best, rows = F.pad(scores, (0, k), value=-torch.inf).sort(dim=1, descending=True, stable=True)
        best, rows = best[:, :k], rows[:, :k]
        return torch.where(best > -torch.inf, rows, 0), best


class IgnoresExclude(SoundList):
    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        return super().recommend(batch, k)


class RepeatsItself(SoundList):
    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, scores = super().recommend(batch, k, exclude)
        rows[:, 1], scores[:, 1] = rows[:, 0], scores[:, 0]
        return rows, scores


class TiesToTheHigherRow(SoundList):
    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, scores = super().recommend(batch, k, exclude)
        order = (-scores.double() - rows * 1e-9).argsort(1)
        return rows.gather(1, order), scores.gather(1, order)


class ReturnsPadding(SoundList):
    def recommend(self, batch: Batch, k: int, exclude: Tensor | None = None) -> tuple[Tensor, Tensor]:
        rows, scores = super().recommend(batch, k, exclude)
        return torch.where(rows == 2, 1, rows), scores


def test_a_faulty_list_is_caught() -> None:
    c.check_recommendation(SoundList(FULL.spec), FULL)
    for fault, message in (
        (IgnoresExclude, "excluded item"),
        (RepeatsItself, "twice"),
        (TiesToTheHigherRow, "ties to the lower row"),
        (ReturnsPadding, "unknown row"),
    ):
        with pytest.raises(AssertionError, match=message):
            c.check_recommendation(fault(FULL.spec), FULL)


def test_a_list_for_everyone_does_not_find_the_checkerboard() -> None:
    world = c.World(c.make_spec([("user", "user", 50, 1), ("item", "item", 50, 1)]))
    with pytest.raises(AssertionError, match="not for all"):
        c.check_finds_the_checkerboard(SoundList(world.spec), world)


class SoundOrder:
    """Sorts by score."""

    def rerank(self, scores: Tensor, k: int, *, categories: Tensor, vectors: Tensor) -> Tensor:
        return scores.argsort(descending=True, stable=True)[:k]


class ChoosesTwice(SoundOrder):
    def rerank(self, scores: Tensor, k: int, *, categories: Tensor, vectors: Tensor) -> Tensor:
        chosen = super().rerank(scores, k, categories=categories, vectors=vectors)
        return chosen.repeat(2)[:k]


class RandomTies(SoundOrder):
    def rerank(self, scores: Tensor, k: int, *, categories: Tensor, vectors: Tensor) -> Tensor:
        return (scores + 1e-6 * torch.rand(len(scores))).argsort(descending=True)[:k]


class WritesScores(SoundOrder):
    def rerank(self, scores: Tensor, k: int, *, categories: Tensor, vectors: Tensor) -> Tensor:
        scores += 1
        return super().rerank(scores, k, categories=categories, vectors=vectors)


class WorstFirst(SoundOrder):
    def rerank(self, scores: Tensor, k: int, *, categories: Tensor, vectors: Tensor) -> Tensor:
        return scores.argsort(stable=True)[:k]


@pytest.mark.parametrize(
    ("fault", "check", "message"),
    [
        (ChoosesTwice, c.check_chooses_positions, "positions"),
        (WritesScores, c.check_chooses_positions, "input was changed"),
        (RandomTies, c.check_ties_are_deterministic, "differ|order"),
        (WorstFirst, c.check_prefix, "best candidate"),
    ],
)
def test_a_faulty_order_is_caught(fault: type[Any], check: Callable[[Any], None], message: str) -> None:
    for every in (c.check_chooses_positions, c.check_ties_are_deterministic, c.check_prefix):
        every(SoundOrder())
    with pytest.raises(AssertionError, match=message):
        check(fault())
