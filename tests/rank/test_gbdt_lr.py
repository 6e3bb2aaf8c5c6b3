from __future__ import annotations

import copy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import UNKNOWN
from funnelrec.data.batches import Batches
from funnelrec.evaluate.metrics import auc, normalised_entropy
from funnelrec.learn.fit import fit
from funnelrec.learn.losses import BCE
from funnelrec.rank.gbdt_lr import GBDTLR
from tests.contracts import World, full_spec, make_spec

lightgbm = pytest.importorskip("lightgbm", reason="GBDT+LR needs the extra 'trees'")

ONE_NUMBER = make_spec([], [("x", "context", 1)])
MIXED = make_spec([("site", "context", 8, 1), ("tags", "context", 9, 3)], [("x", "context", 2)])


def numbers(x: Tensor, label: Tensor) -> Batch:
    return Batch(ids=torch.zeros(len(x), 0, dtype=torch.int32), numbers=x.view(-1, 1), label=label)


def two_groups() -> Batch:
    """100 rows: of the 50 with x = 0 ten are clicks, of the 50 with x = 1 forty."""
    x = torch.arange(100) // 50
    return numbers(x.float(), torch.cat([torch.arange(50) < 10, torch.arange(50) < 40]).float())


def grown(spec: Spec = MIXED, **arguments: int) -> tuple[GBDTLR, Batch]:
    batch = World(spec).batch(600, seed=4)
    model = GBDTLR(spec, **({"num_trees": 20, "num_leaves": 5} | arguments))
    return model.fit_trees([batch.select(torch.arange(400)), batch.select(torch.arange(400, 600))]), batch


def test_one_tree_by_hand() -> None:
    """The base rate is 1/2, so the tree starts at logit 0, p = 1/2. For x = 1 the gradients Σ (p - y) are 25 - 40 and
    the curvatures Σ p (1 - p) are 12.5: the leaf is 15 / 12.5 = 1.2, times the shrinkage of .5 it is .6; for x = 0
    it is -.6."""
    model = GBDTLR(ONE_NUMBER, num_trees=1, num_leaves=2).fit_trees([two_groups()], shrinkage=0.5)
    logits = model(numbers(torch.tensor([0.0, 1.0, 7.0]), torch.zeros(3)))
    torch.testing.assert_close(logits.detach(), torch.tensor([-0.6, 0.6, 0.6]), atol=1e-6, rtol=0)
    assert sorted(model.weight.weight.detach().flatten().tolist()) == pytest.approx([-0.6, 0.6])


def test_one_tree_of_one_leaf_is_the_base_rate() -> None:
    """Where nothing can be split all rows share one leaf, whose logit is that of the share of clicks: ln(30/70)."""
    batch = numbers(torch.zeros(100), (torch.arange(100) < 30).float())
    model = GBDTLR(ONE_NUMBER, num_trees=3).fit_trees([batch])
    assert model.leaves(batch).tolist() == [[0]] * 100
    logits = model(batch).detach()
    torch.testing.assert_close(logits, torch.full((100,), np.log(30 / 70), dtype=torch.float32))
    assert normalised_entropy(batch.label.numpy(), logits.numpy()) == pytest.approx(1.0)
    model.fit_trees([batch], start="zero")
    assert model(batch).abs().max() == 0
    fit(model, Batches(Whole(batch), 100), BCE(), epochs=300, lr=0.02, progress=False)
    assert torch.sigmoid(model(batch)).mean().item() == pytest.approx(0.3, abs=1e-3)  # and so learns the regression


def test_a_row_has_one_leaf_in_the_block_of_each_tree() -> None:
    model, batch = grown()
    leaves = model.leaves(batch)
    assert leaves.shape == (600, 20)
    block = 5 * torch.arange(20)
    assert ((leaves >= block) & (leaves < block + 5)).all()
    used = [len(column.unique()) for column in leaves.T]
    assert max(used) == 5  # the trees do split: offsets matter
    one_hot = torch.zeros(600, 100).scatter_add(1, leaves, torch.ones(600, 20))
    assert (one_hot.view(600, 20, 5).sum(2) == 1).all()


def test_leaf_values_as_weights_are_the_boosted_trees() -> None:
    model, batch = grown()
    theirs = model._booster().predict(model._columns(batch), raw_score=True)
    np.testing.assert_allclose(model(batch).detach().numpy(), theirs, atol=1e-6)
    with torch.no_grad():
        model.weight.weight.copy_(model.weight.weight.roll(5, dims=0))  # each tree gets the values of the one before
    assert np.abs(model(batch).detach().numpy() - theirs).max() > 0.01


def test_with_fields_the_regression_reads_them_too() -> None:
    model, batch = grown()
    both = GBDTLR(MIXED, num_trees=20, num_leaves=5, with_fields=True)
    both.fit_trees([batch.select(torch.arange(400)), batch.select(torch.arange(400, 600))])
    torch.testing.assert_close(both(batch)[:9], model(batch)[:9] + both.fields(batch).sum((1, 2))[:9])
    with torch.no_grad():
        both.fields.table.weight[batch.ids[0, 0].item()] += 1.0
    moved = both(batch) - model(batch)
    assert (moved[batch.ids[:, 0] == batch.ids[0, 0]] > 0.9).all()


def test_trees_read_categories_as_sets() -> None:
    """Clicks on the odd sites of eight: one split into two sets, which no threshold on a number could make."""
    spec = make_spec([("site", "context", 10, 1)])
    site = torch.arange(2000) % 8
    batch = Batch(ids=(2 + site).view(-1, 1).int(), numbers=torch.zeros(2000, 0), label=(site % 2).float())
    model = GBDTLR(spec, num_trees=1, num_leaves=2).fit_trees([batch])
    assert len(model.leaves(batch).unique()) == 2
    assert auc(batch.label.numpy(), model(batch).detach().numpy()) == 1.0


def test_values_that_the_trees_never_saw() -> None:
    """Unknown values, padding and huge numbers go some way in every tree, and always the same one."""
    model, batch = grown()
    strange = batch.select(torch.arange(3)).replace(
        ids=torch.tensor([[UNKNOWN, 8, 0, 0], [0, 0, 0, 0], [7, 16, 15, 14]], dtype=torch.int32),
        numbers=torch.tensor([[1e30, -1e30], [0.0, 0.0], [-5.0, 5.0]]),
    )
    assert model(strange).isfinite().all()
    assert torch.equal(model.leaves(strange), model.leaves(strange))


def test_several_batches_are_one_table() -> None:
    model, batch = grown()
    whole = GBDTLR(MIXED, num_trees=20, num_leaves=5).fit_trees([batch])
    assert torch.equal(whole.trees, model.trees)
    assert torch.equal(whole(batch), model(batch))


def test_weights_of_examples_count() -> None:
    """Clicks that weigh nine times move the base rate from 1/2 to 9/10."""
    batch = two_groups()
    batch = batch.replace(numbers=torch.zeros(100, 1), weight=1 + 8 * batch.label)
    logits = GBDTLR(ONE_NUMBER, num_trees=1).fit_trees([batch])(batch)
    assert torch.sigmoid(logits[0]).item() == pytest.approx(0.9, abs=1e-6)


def test_growing_stops_on_the_validation_rows() -> None:
    batch, other = (
        World(MIXED).batch(600, seed=4),
        World(MIXED).batch(300, seed=5),
    )  # labels by chance: nothing to learn
    model = GBDTLR(MIXED, num_trees=60).fit_trees([batch], [other], patience=5)
    assert 1 <= model.leaves(batch).shape[1] < 20
    assert GBDTLR(MIXED, num_trees=60).fit_trees([batch]).leaves(batch).shape[1] == 60


def test_what_was_saved_comes_back_into_a_model_that_has_other_trees() -> None:
    model, batch = grown()
    again, _ = grown(num_leaves=5)
    again.fit_trees([World(MIXED).batch(300, seed=8)])
    assert not torch.equal(again(batch), model(batch))  # which has read its own trees by now
    again.load_state_dict(model.state_dict())
    assert torch.equal(again(batch), model(batch))
    assert torch.equal(copy.deepcopy(again)(batch), model(batch))
    assert "Tree=19" in bytes(model.trees.tolist()).decode()  # LightGBM's text, nothing pickled


def test_without_trees_it_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    model, batch = GBDTLR(ONE_NUMBER), two_groups()
    with pytest.raises(ValueError, match="no trees yet; call fit_trees"):
        model(batch)
    with pytest.raises(ValueError, match="received no batch"):
        model.fit_trees([])
    with pytest.raises(ValueError, match="at least 1 tree of 2 leaves, received num_trees=5, num_leaves=1"):
        GBDTLR(ONE_NUMBER, num_trees=5, num_leaves=1)
    monkeypatch.setitem(sys.modules, "lightgbm", None)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funnelrec\[trees\]'"):
        model.fit_trees([batch])


class Whole:
    """All rows of a batch as examples."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch

    def __len__(self) -> int:
        return self.batch.size

    def gather(self, index: Tensor, generator: torch.Generator | None) -> Batch:
        return self.batch.select(index)


def planted(rows: int, seed: int, shift: float) -> Batch:
    """A click where both numbers have one sign, or both tell another story after `shift`; some labels are wrong."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, 2, generator=g)
    logit = 2.0 * torch.sign(x[:, 0] * x[:, 1]) + shift * (x[:, 0] > 0)
    return Batch(
        ids=torch.zeros(rows, 0, dtype=torch.int32),
        numbers=x,
        label=(torch.rand(rows, generator=g) < torch.sigmoid(logit)).float(),
    )


def test_the_regression_learns_what_has_changed_since() -> None:
    """The paper's point: the trees' cells still hold, their values are out of date. A linear model of the two numbers
    is no better than chance on the crossing, and old trees do not know of the shift."""
    spec = make_spec([], [("x", "context", 2)])
    before, after, test = planted(4000, 0, 0.0), planted(4000, 1, -1.5), planted(4000, 2, -1.5)
    model = GBDTLR(spec, num_trees=30, num_leaves=6).fit_trees([before])

    def entropy() -> float:
        with torch.no_grad():
            return normalised_entropy(test.label.numpy(), model(test).numpy())

    trees = entropy()
    with torch.random.fork_rng():
        fit(model, Batches(Whole(after), 200, shuffle=True), BCE(), epochs=5, lr=0.005, progress=False)
    assert entropy() < trees - 0.05
    best = normalised_entropy(test.label.numpy(), _truth(test).numpy())
    assert entropy() < best + 0.03


def _truth(batch: Batch) -> Tensor:
    x = batch.numbers
    return 2.0 * torch.sign(x[:, 0] * x[:, 1]) - 1.5 * (x[:, 0] > 0)


def test_it_survives_the_artifact(tmp_path: Path) -> None:
    """The weights of a saved funnel are safetensors; the model is built again from its configuration alone."""
    from funnelrec.serve import funnel

    model, batch = grown(full_spec())
    described = funnel._described(model)
    again = GBDTLR(full_spec(), **described["config"])
    again.load_state_dict(load(funnel._weights(model)))
    assert torch.equal(again(batch), model(batch))
    assert described["name"] == "rank/gbdt_lr"
