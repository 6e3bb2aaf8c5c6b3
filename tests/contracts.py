"""Checks that every model of the zoo must pass, as plain functions; test_contracts.py runs them, and runs them on
models with a planted fault too, which they must catch.

`World` is a made-up data set for a `Spec`: it knows what the attributes of each user and item are, so that the item
columns of `ids` and of `history_ids` agree as they do in a real batch. A check raises AssertionError.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.schema import CategorySpec, NumberSpec, Side, Spec
from funnelrec.core.shapes import FIRST_KNOWN, UNKNOWN

BEYOND_FLOAT32 = 2**24  #: the first integer whose successor float32 cannot hold
TOLERANCE = 1e-5


# --- specs and batches ---------------------------------------------------------------------------------------------


def make_spec(categories: list[tuple[str, Side, int, int]], numbers: list[tuple[str, Side, int]] | None = None) -> Spec:
    """A Spec from (name, side, rows, slots) and (name, side, width), given in the order user, item, context."""
    fields, offset, start = [], 1, 0
    for name, side, rows, slots in categories:
        fields.append(CategorySpec(name, side, rows, offset, start, start + slots))
        offset, start = offset + rows - 1, start + slots
    columns, start = [], 0
    for name, side, width in numbers or []:
        columns.append(NumberSpec(name, side, start, start + width))
        start += width
    first = {side: next((c.rows for c in fields if c.side == side), 0) for side in ("user", "item")}
    return Spec(categories=tuple(fields), numbers=tuple(columns), num_users=first["user"], num_items=first["item"])


def full_spec() -> Spec:
    """Users, items and context, with a multi-valued field and a number on each side."""
    return make_spec(
        [
            ("user", "user", 130, 1),
            ("city", "user", 14, 1),
            ("item", "item", 62, 1),
            ("genres", "item", 9, 3),
            ("brand", "item", 12, 1),
            ("hour", "context", 10, 1),
        ],
        [("age", "user", 1), ("price", "item", 3), ("delay", "context", 1)],
    )


def rows_spec() -> Spec:
    """A plain table of rows: context categories alone."""
    return make_spec([("site", "context", 130, 1), ("app", "context", 14, 1), ("hour", "context", 10, 1)])


class World:
    """Attributes of the users and items of a `Spec`, and batches drawn from them. Deterministic in `seed`."""

    def __init__(self, spec: Spec, seed: int = 0) -> None:
        self.spec = spec
        g = torch.Generator().manual_seed(seed)
        self.user_ids = self._attributes("user", spec.num_users, g)
        self.item_ids = self._attributes("item", spec.num_items, g)
        self.user_numbers = torch.randn(spec.num_users, self._width("user"), generator=g)
        self.item_numbers = torch.randn(spec.num_items, self._width("item"), generator=g)

    def _width(self, side: Side) -> int:
        return sum(n.stop - n.start for n in self.spec.numbers if n.side == side)

    def _draw(self, field: CategorySpec, n: int, g: torch.Generator) -> Tensor:
        """Fused rows [n, slots] of known values; a multi-valued field leaves some of its later slots empty."""
        slots = field.stop - field.start
        known = field.rows - FIRST_KNOWN
        rows = field.offset - 1 + FIRST_KNOWN + _shuffled_range(n * slots, known, g).view(n, slots)
        filled = torch.randint(1, slots + 1, (n, 1), generator=g)
        return torch.where(torch.arange(slots) < filled, rows, 0)

    def _attributes(self, side: Side, n: int, g: torch.Generator) -> Tensor:
        """Row r describes user or item r: the id itself, then its attributes; row 0 is padding, row 1 all unknown."""
        fields = [c for c in self.spec.categories if c.side == side]
        if not n or not fields:
            return torch.zeros(n, 0, dtype=torch.int32)
        columns = [fields[0].offset - 1 + torch.arange(n).view(n, 1)]
        columns += [self._draw(field, n, g) for field in fields[1:]]
        table = torch.cat(columns, dim=1)
        table[0] = 0
        table[UNKNOWN] = torch.cat([_unknown(field) for field in fields])
        return table.int()

    def batch(
        self,
        size: int,
        length: int = 6,
        *,
        seed: int = 1,
        users: Tensor | None = None,
        items: Tensor | None = None,
        history: Tensor | None = None,
    ) -> Batch:
        """A batch with random labels and targets; histories of 1..length items, right-aligned."""
        g = torch.Generator().manual_seed(seed)
        spec = self.spec
        tensors: dict[str, Tensor] = {}
        ids, numbers = [], []
        if spec.num_items:
            users = _shuffled_range(size, spec.num_users - 2, g) + 2 if users is None else users
            items = _shuffled_range(size, spec.num_items - 2, g) + 2 if items is None else items
            if history is None:
                history = torch.randint(FIRST_KNOWN, spec.num_items, (size, length), generator=g)
                real = torch.arange(size) % length + 1  # (B,)
                history = torch.where(torch.arange(length) >= length - real.view(-1, 1), history, 0)
            tensors.update(user=users, item=items, target=items, **self.history(history))
            ids += [self.user_ids[users], self.item_ids[items]]
            numbers += [self.user_numbers[users], self.item_numbers[items]]
        context = [self._draw(c, size, g) for c in spec.categories if c.side == "context"]
        ids += [torch.cat(context, dim=1).int()] if context else []
        numbers += [torch.randn(size, self._width("context"), generator=g)]
        return Batch(
            **tensors,
            ids=torch.cat(ids, dim=1),
            numbers=torch.cat(numbers, dim=1),
            time=torch.full((size,), 1_000_000),
            label=torch.randint(0, 2, (size,), generator=g).float(),
            weight=torch.ones(size),
        )

    def history(self, history: Tensor) -> dict[str, Tensor]:
        """The tensors that describe a history [B, L] of item rows."""
        mask = history > 0
        ago = torch.arange(history.shape[1], 0, -1)  # a minute an item, and an hour before every second one: sessions
        times = (1_000_000 - 60 * ago - 3600 * (ago // 2)).expand_as(history)
        return {
            "history": history,
            "mask": mask,
            "history_times": torch.where(mask, times, 0),
            "history_ids": self.item_ids[history],
        }

    def checkerboard(self, *, with_diagonal: bool = False) -> Tensor:
        """Item rows [n, n // 2 - 1] that each of n users liked: those of the user's parity, all but its own number."""
        n = min(self.spec.num_users, self.spec.num_items) // 2 * 2 - 2
        own = torch.arange(n).view(-1, 1)
        liked = torch.arange(n // 2) * 2 + own % 2
        kept = liked if with_diagonal else liked[liked != own].view(n, -1)
        return kept + FIRST_KNOWN


def _shuffled_range(n: int, values: int, g: torch.Generator) -> Tensor:
    """n values of 0..values-1, none twice before all occurred."""
    rounds = [torch.randperm(values, generator=g) for _ in range(math.ceil(n / values))]
    return torch.cat(rounds)[:n]


def _unknown(field: CategorySpec) -> Tensor:
    row = torch.zeros(field.stop - field.start, dtype=torch.int64)
    row[0] = field.offset
    return row


# --- what a model gives and how it is trained ----------------------------------------------------------------------


def contract_of(model: nn.Module | type[nn.Module]) -> str:
    """ "vectors", "matcher", "reranker" or "ranker", by the methods it has."""
    for method, contract in (("encode_users", "vectors"), ("recommend", "matcher"), ("rerank", "reranker")):
        if hasattr(model, method):
            return contract
    return "ranker"


def outputs(model: nn.Module, batch: Batch) -> list[Tensor]:
    """Everything the model says of each example, as float tensors [B, ...]."""
    match contract_of(model):
        case "vectors":
            interests, valid = model.encode_users(batch)
            return [interests.masked_fill(~valid.unsqueeze(-1), 0.0), valid.float()]
        case "matcher":
            rows, scores = model.recommend(batch, 5)
            return [rows.double(), scores.nan_to_num(neginf=-1e9)]
        case _:
            return [model(batch)]


def quiet(model: nn.Module, batch: Batch) -> list[Tensor]:
    """`outputs` in eval mode, without gradients."""
    model.eval()
    with torch.no_grad():
        return outputs(model, batch)


def objective(model: nn.Module, batch: Batch, world: World, *, terms: bool = True) -> Tensor:
    """Cross-entropy of the labels, or of the target among all items; plus the paper's extra terms."""
    if contract_of(model) == "ranker":
        loss = F.binary_cross_entropy_with_logits(model(batch), batch.label)
    else:
        interests, valid = model.encode_users(batch)
        users = model.user_for_target(interests, valid, model.encode_items(batch.target))
        every = model.encode_items(torch.arange(FIRST_KNOWN, world.spec.num_items))
        # row 1 is no class: an example whose target is unknown is left out
        loss = F.cross_entropy(users @ every.T, batch.target - FIRST_KNOWN, ignore_index=UNKNOWN - FIRST_KNOWN)
        loss = loss.nan_to_num() if (batch.target == UNKNOWN).all() else loss
    if terms and hasattr(model, "training_terms"):
        loss = loss + sum(model.training_terms(batch).values(), torch.zeros(()))
    return loss


def train(model: nn.Module, world: World, batches: Iterator[Batch], lr: float) -> None:
    """Adam, in its sparse form for the parameters whose gradient is sparse."""
    optimisers: list[torch.optim.Optimizer] = []
    model.train()
    for batch in batches:
        model.zero_grad()
        objective(model, batch, world).backward()
        if not optimisers:
            with_grad = [p for p in model.parameters() if p.grad is not None]
            sparse = [p for p in with_grad if p.grad.is_sparse]
            dense = [p for p in with_grad if not p.grad.is_sparse]
            optimisers += [torch.optim.SparseAdam(sparse, lr=lr)] if sparse else []
            optimisers += [torch.optim.Adam(dense, lr=lr)] if dense else []
        for optimiser in optimisers:
            optimiser.step()


def without_dropout(model: nn.Module) -> nn.Module:
    """The same model with every dropout at 0, also where it is an attribute that a kernel reads."""
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    return model


def same(got: list[Tensor], expected: list[Tensor], *, but: Tensor | None = None) -> bool:
    """Equal within float noise; `but` bool [B]: the examples that need not agree."""
    keep = slice(None) if but is None else ~but
    return all(
        a.shape == b.shape and torch.allclose(a[keep], b[keep], atol=TOLERANCE, rtol=1e-4)
        for a, b in zip(got, expected, strict=True)
    )


def _gradients(model: nn.Module) -> dict[str, Tensor | None]:
    return {
        name: None if p.grad is None else (p.grad.coalesce().values() if p.grad.is_sparse else p.grad)
        for name, p in model.named_parameters()
    }


# --- properties of rankers and matchers ----------------------------------------------------------------------------


def check_output(model: nn.Module, world: World) -> None:
    """Shape and type of what the contract promises, all finite."""
    batch = world.batch(7)
    got = quiet(model, batch)
    assert all(x.isfinite().all() for x in got), "an output is not finite"
    match contract_of(model):
        case "ranker":
            assert got[0].shape == (7,), f"a ranker gives one logit a row, received {tuple(got[0].shape)}"
            assert got[0].dtype == torch.float32, f"logits are float32, received {got[0].dtype}"
        case "vectors":
            interests, valid = got
            assert interests.dim() == 3, f"users are [B, K, D], received {tuple(interests.shape)}"
            assert valid.shape == interests.shape[:2]
            assert valid.any(dim=1).all(), "a user with a history has no interest"
            items = model.encode_items(torch.tensor([2, 5]))
            assert items.shape == (2, interests.shape[2]), "items and users differ in width"
            assert items.dtype == interests.dtype == torch.float32
        case "matcher":
            assert got[0].shape == got[1].shape == (7, 5)


def check_gradients(model: nn.Module, world: World) -> None:
    """Every parameter receives a gradient that is neither zero nor NaN; sparse ones are read as what they hold."""
    model.train()
    model.zero_grad()
    objective(model, world.batch(64), world).backward()
    for name, gradient in _gradients(model).items():
        assert gradient is not None, f"{name} receives no gradient"
        assert gradient.isfinite().all(), f"the gradient of {name} is not finite"
        assert gradient.abs().sum() > 0, f"the gradient of {name} is zero everywhere"


def check_padding_row(model: nn.Module, world: World) -> None:
    """Training leaves the vectors of "nothing" at zero: row 0 of each embedding table."""
    train(model, world, (world.batch(32, seed=s) for s in range(3)), lr=0.1)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and parameter.shape[0] in (world.spec.table_rows, world.spec.num_items):
            assert (parameter[0] == 0).all(), f"row 0 of {name} moved away from zero"


def check_padding_length(model: nn.Module, world: World) -> None:
    """Three more padding slots in front of the history change nothing."""
    batch = world.batch(16)
    longer = batch.replace(**world.history(F.pad(batch.history, (3, 0))))
    assert same(quiet(model, longer), quiet(model, batch)), "the length of the padding changes the output"


def check_padding_content(model: nn.Module, world: World) -> None:
    """What stands where the mask is False does not matter, neither to outputs nor to the loss."""
    batch = world.batch(16)
    garbage = torch.where(batch.mask, batch.history, 7)
    times = torch.where(batch.mask, batch.history_times, 217)
    dirty = batch.replace(history=garbage, history_ids=world.item_ids[garbage], history_times=times)
    assert same(quiet(model, dirty), quiet(model, batch)), "the content of the padding changes the output"


def check_row_order(model: nn.Module, world: World) -> None:
    """Permuting the examples permutes the outputs and does nothing else."""
    batch = world.batch(16)
    order = torch.randperm(16, generator=torch.Generator().manual_seed(3))
    got, expected = quiet(model, batch.select(order)), quiet(model, batch)
    assert same(got, [x[order] for x in expected]), "an output depends on the place of its row in the batch"


def check_independence(model: nn.Module, world: World) -> None:
    """Exchanging one example leaves the outputs of the others as they were."""
    batch, other = world.batch(16), world.batch(16, seed=9)
    exchanged = torch.arange(16) == 5
    mixed = Batch(**{k: torch.where(exchanged.view(-1, *[1] * (v.dim() - 1)), other[k], v) for k, v in batch.items()})
    got, expected = quiet(model, mixed), quiet(model, batch)
    assert same(got, expected, but=exchanged), "an example's output depends on another example"


def check_eval_is_deterministic(model: nn.Module, world: World) -> None:
    """Two calls in eval mode give the same bits."""
    batch = world.batch(16)
    first, second = quiet(model, batch), quiet(model, batch)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), "two eval calls differ"


def check_batch_of_one(model: nn.Module, world: World) -> None:
    """One example alone gives what it gives in company, and can be trained on."""
    batch = world.batch(16)
    one = batch.select(torch.tensor([4]))
    got = quiet(model, one)
    assert same(got, [x[4:5] for x in quiet(model, batch)]), "an example alone gives another output"
    if contract_of(model) != "matcher":
        _check_trainable(model, world, one, "a batch of one")


def check_empty_history(model: nn.Module, world: World) -> None:
    """A user of whom nothing is known: finite outputs, finite gradients, and no interest that claims to be valid."""
    some = torch.where(torch.arange(8).view(-1, 1) < 4, 0, world.batch(8).history)
    for history, what in ((torch.zeros_like(some), "only empty histories"), (some, "some empty histories")):
        batch = world.batch(8, history=history)
        got = quiet(model, batch)
        assert all(x.isfinite().all() for x in got), f"{what}: an output is not finite"
        if contract_of(model) == "vectors":
            assert not got[1][:4].any(), f"{what}: an interest is marked valid"
        if contract_of(model) != "matcher":
            _check_trainable(model, world, batch, what)


def check_unknown(model: nn.Module, world: World) -> None:
    """Users, items and values that training never saw: finite outputs, finite gradients."""
    spec, size = world.spec, 8
    unknown = torch.full((size,), UNKNOWN)
    batch = world.batch(size)
    ids = torch.cat([_unknown(c) for c in spec.categories]).int().expand(size, -1)
    batch = batch.replace(ids=ids)
    if spec.num_items:
        history = torch.where(batch.mask, UNKNOWN, 0)
        batch = batch.replace(user=unknown, item=unknown, **world.history(history))
    got = quiet(model, batch)
    assert all(x.isfinite().all() for x in got), "an output for unknown rows is not finite"
    if contract_of(model) != "matcher":
        _check_trainable(model, world, batch, "unknown rows")


def _check_trainable(model: nn.Module, world: World, batch: Batch, what: str) -> None:
    model.train()
    model.zero_grad()
    loss = objective(model, batch, world)
    assert loss.isfinite(), f"{what}: the loss is not finite"
    if loss.requires_grad:
        loss.backward()
    for name, gradient in _gradients(model).items():
        assert gradient is None or gradient.isfinite().all(), f"{what}: the gradient of {name} is not finite"


SMALLEST: dict[str, Any] = {"feature_dims": [4], "source_tokens": 9, "target_tokens": 9, "num_tokens": 9}


def built(cls: type[Any], spec: Spec) -> Any:
    """A model with default arguments; rerankers and encoders take no spec, some encoders need the sizes of what they
    read (`SMALLEST`)."""
    parameters = inspect.signature(cls).parameters.values()
    needed = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY and p.default is p.empty]
    arguments = {name: SMALLEST[name] for name in needed}
    return cls(spec, **arguments) if "spec" in inspect.signature(cls).parameters else cls(**arguments)


def config_of(cls: type[nn.Module]) -> dict[str, Any]:
    """The constructor's keyword arguments with their defaults: that signature is the model's configuration."""
    parameters = list(inspect.signature(cls).parameters.values())
    return {
        p.name: SMALLEST[p.name] if p.default is p.empty else p.default for p in parameters if p.kind is p.KEYWORD_ONLY
    }


def check_saved_and_loaded(cls: type[nn.Module], world: World, folder: Path) -> None:
    """Spec and arguments through JSON, weights through safetensors: the model that comes back gives the same."""
    model = prepared(cls(world.spec), world)
    if contract_of(model) not in ("matcher", "reranker"):
        train(model, world, (world.batch(32, seed=s) for s in range(2)), lr=0.01)
    saved = json.loads(json.dumps({"spec": world.spec.to_dict(), "arguments": config_of(cls)}))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "weights.safetensors")
    torch.rand(3)  # the second model starts elsewhere
    again = cls(Spec.from_dict(saved["spec"]), **saved["arguments"])
    again.load_state_dict(load_file(folder / "weights.safetensors"))
    batch = world.batch(16)
    expected, got = quiet(model, batch), quiet(again, batch)
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True)), "the loaded model gives other outputs"


def prepared(model: nn.Module, world: World) -> nn.Module:
    """A closed-form matcher is fitted on random events, trees grow on random labels; any other model is returned as it
    is."""
    if contract_of(model) == "matcher" and hasattr(model, "fit"):
        g = torch.Generator().manual_seed(5)
        users = torch.randint(FIRST_KNOWN, world.spec.num_users, (800,), generator=g)
        items = torch.randint(FIRST_KNOWN, world.spec.num_items, (800,), generator=g)
        model.fit(users, items, torch.arange(800))
    return with_trees(model, world.batch(400, seed=6))


def with_trees(model: nn.Module, batch: Batch, times: int = 1) -> nn.Module:
    """A model that stands on trees, with trees grown before its weights are trained, on `batch` so many times over
    (trees part no group of few rows); any other model as it is."""
    if hasattr(model, "fit_trees"):
        model.fit_trees([batch] * times)
    return model


# --- learning ------------------------------------------------------------------------------------------------------


def check_overfits(model: nn.Module, world: World, *, steps: int = 300) -> None:
    """64 examples with random answers are learnt by heart: loss under 0.05.

    A matcher gets histories of even item rows and odd targets, out of a large catalogue: a model that scores items by
    the vectors it reads them with cannot put A above B after B and B above A after A, and one that only mixes the
    vectors of the history cannot tell 64 users apart by a few items.
    """
    if contract_of(model) == "vectors":
        assert world.spec.num_items > 400, "a matcher needs a world of many items here"
    batch = world.batch(64, seed=11)
    if contract_of(model) == "vectors":
        g = torch.Generator().manual_seed(12)
        half = (world.spec.num_items - FIRST_KNOWN) // 2
        history = torch.rand(64, half, generator=g).argsort(1)[:, :6] * 2 + FIRST_KNOWN
        targets = torch.randint(half, (64,), generator=g) * 2 + FIRST_KNOWN + 1
        batch = world.batch(64, seed=11, items=targets, history=history)
    without_dropout(with_trees(model, batch, times=8))
    loss = math.inf

    def batches() -> Iterator[Batch]:
        nonlocal loss
        for step in range(1, steps + 1):
            yield batch
            if step % 25 == 0:
                with torch.no_grad():
                    loss = objective(model, batch, world, terms=False).item()
                if loss < 0.05:
                    return

    train(model, world, batches(), lr=0.01 if contract_of(model) == "vectors" else 0.03)
    assert loss < 0.05, f"after {steps} steps the loss on 64 examples is {loss:.3f}, not under 0.05"


def check_learns_a_rule(model: nn.Module, world: World) -> None:
    """A ranker: the label follows from two attributes; on examples it never saw, AUC over 0.95."""
    singles = [c for c in world.spec.categories if c.stop - c.start == 1 and c.rows < 20][-2:]
    g = torch.Generator().manual_seed(21)
    worth = [torch.randn(c.rows, generator=g) for c in singles]

    def labelled(size: int, seed: int) -> Batch:
        batch = world.batch(size, seed=seed)
        values = [batch.ids[:, c.start].long() - c.offset + 1 for c in singles]
        score = sum(w[v] for w, v in zip(worth, values, strict=True))
        return batch.replace(label=(score > score.median()).float())

    train(without_dropout(model), world, (labelled(512, 100 + s) for s in range(80)), lr=0.02)
    test = labelled(2000, 99)
    area = auc(test.label, quiet(model, test)[0])
    assert area > 0.95, f"the planted rule is not learnt: AUC {area:.3f}"


def auc(labels: Tensor, scores: Tensor) -> float:
    """Probability that a positive stands before a negative, ties half, by counting all pairs."""
    difference = scores[labels == 1].view(-1, 1) - scores[labels == 0].view(1, -1)
    return ((difference > 0).double() + 0.5 * (difference == 0)).mean().item()


def recommend(model: nn.Module, world: World, batch: Batch, k: int, exclude: Tensor) -> Tensor:
    """Item rows [B, k]; of a vector matcher, the best over the user's valid vectors, over the whole catalogue."""
    if contract_of(model) == "matcher":
        rows, _ = model.recommend(batch, k, exclude)
        return rows
    interests, valid = model.encode_users(batch)
    scores = interests @ model.encode_items(torch.arange(world.spec.num_items)).T  # (B, K, N)
    scores = scores.masked_fill(~valid.unsqueeze(-1), -math.inf).amax(1)  # (B, N)
    scores[:, :FIRST_KNOWN] = -math.inf
    return scores.scatter(1, exclude, -math.inf).topk(k).indices


def check_finds_the_checkerboard(model: nn.Module, world: World, *, steps: int = 120, lr: float = 0.01) -> None:
    """A matcher: users like the items of their parity; the one withheld from each user must be found first."""
    liked = world.checkerboard()
    n = len(liked)
    users = torch.arange(n) + FIRST_KNOWN
    if contract_of(model) == "matcher":
        model.fit(users.repeat_interleave(liked.shape[1]), liked.flatten(), torch.arange(liked.numel()))
    else:
        train(without_dropout(model), world, (_cut(world, liked, users, seed) for seed in range(steps)), lr=lr)
    model.eval()
    with torch.no_grad():
        found = recommend(model, world, world.batch(n, users=users, items=users, history=liked), 1, liked)
    hits = (found[:, 0] == users).double().mean().item()
    assert hits == 1.0, f"the withheld item comes first for {hits:.0%} of the users, not for all"


def _cut(world: World, liked: Tensor, users: Tensor, seed: int) -> Batch:
    """One item of each user as the target, the others, in a random order, as the history."""
    g = torch.Generator().manual_seed(seed)
    shuffled = liked.gather(1, torch.rand(liked.shape, generator=g).argsort(1))
    return world.batch(len(liked), users=users, items=shuffled[:, 0], history=shuffled[:, 1:], seed=seed)


def check_large_ids(cls: type[nn.Module], **small: Any) -> None:
    """Two ids that float32 cannot tell apart give two outputs. `small`: arguments that keep the table small."""
    arguments = {k: v for k, v in small.items() if k in config_of(cls)}
    rows = BEYOND_FLOAT32 + 8
    with_items = contract_of(cls) != "ranker"
    item_spec = make_spec([("user", "user", 5, 1), ("item", "item", rows, 1)])
    row_spec = make_spec([("site", "context", rows, 1)])
    try:
        spec = item_spec if with_items else row_spec
        model = cls(spec, **arguments)
    except ValueError:  # a ranker that needs items
        spec, with_items = item_spec, True
        model = cls(spec, **arguments)
    pair = torch.tensor([BEYOND_FLOAT32, BEYOND_FLOAT32 + 1])
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2 and parameter.shape[0] > BEYOND_FLOAT32:
                offset = spec.categories[-1].offset - 1 if parameter.shape[0] == spec.table_rows else 0
                sign = torch.tensor([[1.0], [-1.0]])
                parameter[pair + offset] = sign * torch.arange(1, parameter.shape[1] + 1)
    ids = (pair + spec.categories[-1].offset - 1).int().view(2, 1)
    tensors = {"ids": ids, "numbers": torch.zeros(2, 0)}
    if with_items:
        mask = torch.ones(2, 1, dtype=torch.bool)
        tensors = {
            "ids": torch.cat([torch.full((2, 1), 2, dtype=torch.int32), ids], dim=1),
            "numbers": torch.zeros(2, 0),
            "history": pair.view(2, 1),
            "history_ids": ids.view(2, 1, 1),
            "history_times": torch.ones(2, 1, dtype=torch.int64),
            "mask": mask,
            "user": torch.full((2,), 2),
            "item": pair,
            "time": torch.full((2,), 10),
        }
    batch = Batch(**tensors)
    if contract_of(model) == "matcher":
        model.fit(torch.tensor([2, 2, 3]), torch.cat([pair, pair[:1]]), torch.tensor([1, 2, 3]))
        found, _ = model.recommend(batch.select(torch.tensor([0])), 2)
        assert int(found[0, 0]) in pair.tolist(), f"items {pair.tolist()} were fitted, {found[0].tolist()} came back"
        return
    with_trees(model, batch.replace(label=torch.tensor([0.0, 1.0])), times=200)
    first, second = quiet(model, batch)[0]
    assert not torch.allclose(first, second, atol=1e-4), "two ids above 2^24 give the same output"
    if contract_of(model) == "vectors":
        one, two = model.encode_items(pair)
        assert not torch.allclose(one, two, atol=1e-4), "two items above 2^24 have the same vector"


# --- matchers that answer themselves -------------------------------------------------------------------------------


def check_recommendation(model: nn.Module, world: World) -> None:
    """Real rows, none twice, none excluded, best first, ties to the lower row; (0, -inf) where too few qualify."""
    batch = world.batch(6)
    items = world.spec.num_items
    everything = torch.arange(FIRST_KNOWN, items).expand(6, -1)
    for exclude, k in ((None, 10), (batch.history, 10), (everything[:, :-3], 10), (None, items + 5)):
        rows, scores = model.recommend(batch, k, exclude)
        assert rows.shape == scores.shape == (6, k), f"k={k} gives {tuple(rows.shape)}"
        for b in range(6):
            found = rows[b][rows[b] > 0]
            assert len(set(found.tolist())) == len(found), "an item is returned twice"
            assert (found >= FIRST_KNOWN).all(), "padding or the unknown row is returned"
            assert (rows[b][len(found) :] == 0).all(), "row 0 stands before a real row"
            assert (scores[b][len(found) :] == -math.inf).all(), "a missing item has a score"
            assert scores[b][: len(found)].isfinite().all(), "a returned item has no finite score"
            if exclude is not None:
                assert not set(found.tolist()) & set(exclude[b].tolist()), "an excluded item is returned"
            pairs = list(zip((-scores[b]).tolist(), rows[b].tolist(), strict=True))[: len(found)]
            assert pairs == sorted(pairs), "the list is not best first with ties to the lower row"


# --- rerankers -----------------------------------------------------------------------------------------------------


def candidates(n: int, seed: int = 0) -> dict[str, Tensor]:
    """Scores, categories [n, 2] and vectors [n, 4] of n candidates."""
    g = torch.Generator().manual_seed(seed)
    return {
        "scores": torch.randn(n, generator=g),
        "categories": torch.randint(0, 5, (n, 2), generator=g),
        "vectors": torch.randn(n, 4, generator=g),
    }


def _rerank(model: Any, given: dict[str, Tensor], k: int) -> list[int]:
    chosen = model.rerank(given["scores"], k, categories=given["categories"], vectors=given["vectors"])
    assert chosen.dtype == torch.int64, f"positions are int64, received {chosen.dtype}"
    return chosen.tolist()


def check_chooses_positions(model: Any) -> None:
    """min(k, C) positions of the candidates, none twice, for every k and C; the inputs stay as they were."""
    for n in (1, 2, 5, 30):
        given = candidates(n, seed=n)
        before = {name: x.clone() for name, x in given.items()}
        for k in (1, 3, n, n + 7):
            chosen = _rerank(model, given, k)
            assert len(chosen) == min(k, n), f"k={k} of {n} candidates gives {len(chosen)} positions"
            assert len(set(chosen)) == len(chosen), "a candidate is chosen twice"
            assert set(chosen) <= set(range(n)), "a position is none of the candidates"
        assert all(torch.equal(before[name], x) for name, x in given.items()), "an input was changed"


def check_ties_are_deterministic(model: Any) -> None:
    """Candidates that cannot be told apart come in their given order, each time."""
    given = {
        "scores": torch.ones(20),
        "categories": torch.ones(20, 2, dtype=torch.int64),
        "vectors": torch.ones(20, 4),
    }
    first = _rerank(model, given, 20)
    assert first == _rerank(model, given, 20), "two calls differ"
    assert first == list(range(20)), f"equal candidates do not keep their order: {first}"


def check_prefix(model: Any) -> None:
    """The best candidate comes first whatever k is, and a shorter list is the beginning of a longer one."""
    given = candidates(25, seed=4)
    long = _rerank(model, given, 25)
    assert all(_rerank(model, given, k) == long[:k] for k in (1, 4, 11)), "a shorter list is not a prefix"
    assert long[0] == int(given["scores"].argmax()), "the best candidate does not come first"


Check = Callable[[nn.Module, World], None]
