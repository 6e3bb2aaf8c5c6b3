"""Wide & Deep: which crosses fire, that both parts share one loss, and what each is alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.learn.optim import make_optimizers
from funnelrec.rank.logistic_regression import LogisticRegression
from funnelrec.rank.wide_deep import WideDeep
from tests.contracts import World, auc, full_spec, make_spec, quiet, train

SPEC = make_spec([("a", "context", 4, 1), ("b", "context", 5, 1), ("c", "context", 6, 1)])
WORLD = World(SPEC)


def silence(part: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in part.parameters():
            parameter.zero_()


def ids(*vocabulary_rows: int) -> torch.Tensor:
    """One row of ids from vocabulary rows (0 missing, 1 unknown) of the fields a, b, c."""
    fused = [0 if v == 0 else c.offset + v - 1 for c, v in zip(SPEC.categories, vocabulary_rows, strict=True)]
    return torch.tensor([fused], dtype=torch.int32)


def test_by_hand() -> None:
    """a = 3, b = 2: weights .5 and .25, their cross 2, the network's bias 10."""
    model = WideDeep(SPEC, crosses=[["a", "b"]], hidden=(2,))
    silence(model.deep)
    with torch.no_grad():
        model.deep.layers[-1].bias.fill_(10.0)
        model.wide.values.table.weight[ids(3, 2, 2)[0].long()] = torch.tensor([[0.5], [0.25], [0.0]])
        model.wide.combinations.weight[1 + 3 * 5 + 2] = 2.0
    batch = Batch(ids=torch.cat((ids(3, 2, 2), ids(3, 3, 2))), numbers=torch.zeros(2, 0))
    torch.testing.assert_close(model(batch), torch.tensor([12.75, 10.5]))


def test_a_cross_fires_if_all_its_parts_are_known() -> None:
    wide = WideDeep(SPEC, crosses=[["a", "b"], ["a", "b", "c"]]).wide
    assert (wide.cross_rows(ids(2, 2, 2)) > 0).all()
    assert wide.cross_rows(ids(2, 2, 0)).tolist()[0][1] == 0
    assert wide.cross_rows(ids(2, 2, 1)).tolist()[0][1] == 0
    assert wide.cross_rows(ids(2, 2, 1)).tolist()[0][0] > 0
    assert wide.cross_rows(ids(0, 2, 2)).tolist() == [[0, 0]]


def test_every_combination_has_a_weight_of_its_own_where_there_is_room() -> None:
    wide = WideDeep(SPEC, crosses=[["a", "b"], ["b", "c"]]).wide
    every = torch.cat([ids(a, b, c) for a in range(2, 4) for b in range(2, 5) for c in range(2, 6)])
    rows = wide.cross_rows(every)
    assert rows[:, 0].unique().numel() == 2 * 3
    assert rows[:, 1].unique().numel() == 3 * 4
    assert not set(rows[:, 0].tolist()) & set(rows[:, 1].tolist()), "two crosses share a weight"


def test_a_large_cross_is_spread_over_its_buckets() -> None:
    spec = make_spec([("a", "context", 3002, 1), ("b", "context", 3002, 1)])
    wide = WideDeep(spec, crosses=[["a", "b"]], buckets=1000).wide
    g = torch.Generator().manual_seed(0)
    drawn = torch.randint(2, 3002, (100_000, 2), generator=g) + torch.tensor([0, 3001])
    counts = wide.cross_rows(drawn).flatten().bincount(minlength=1001)
    assert counts[0] == 0
    assert len(counts) == 1001
    # even: chi-square of 999 degrees of freedom stays under 1,200 with probability 1 − 10⁻⁵
    assert ((counts[1:] - 100).double().square() / 100).sum() < 1200


def test_each_part_alone() -> None:
    batch = WORLD.batch(16)
    model = WideDeep(SPEC, crosses=[["a", "b"]], hidden=(4,)).eval()
    with torch.no_grad():
        model.wide.values.table.weight[1:].normal_()
    deep_only = quiet(model, batch)[0] - model.wide(batch)
    lr = LogisticRegression(SPEC)
    with torch.no_grad():
        lr.weight.table.weight.copy_(model.wide.values.table.weight)
        lr.bias.zero_()
    torch.testing.assert_close(model.wide(batch), lr(batch))
    silence(model.wide)
    torch.testing.assert_close(quiet(model, batch)[0], deep_only, rtol=1e-4, atol=1e-5)


def test_one_loss_for_both_parts() -> None:
    """∂loss/∂wide logit = ∂loss/∂deep logit = p − y: a joint model and no ensemble of two."""
    model, batch = WideDeep(SPEC, crosses=[["a", "b"]]), WORLD.batch(16)
    parts = []
    model.wide.register_forward_hook(lambda _m, _i, out: parts.append(out.retain_grad() or out))
    model.deep.register_forward_hook(lambda _m, _i, out: parts.append(out.retain_grad() or out))
    logit = model(batch)
    F.binary_cross_entropy_with_logits(logit, batch.label, reduction="sum").backward()
    wide, deep = parts
    torch.testing.assert_close(wide.grad, deep.grad.squeeze(1))
    torch.testing.assert_close(wide.grad, logit.detach().sigmoid() - batch.label)


def test_the_crosses_learn_what_single_values_cannot() -> None:
    spec = make_spec([("a", "context", 4, 1), ("b", "context", 4, 1)])
    world = World(spec)

    def labelled(size: int, seed: int) -> Batch:
        batch = world.batch(size, seed=seed)
        return batch.replace(label=((batch.ids[:, 1] - batch.ids[:, 0]) == 3).float())

    def area(model: WideDeep) -> float:
        train(model.wide, world, (labelled(256, s) for s in range(100)), lr=0.05)
        test = labelled(1000, 999)
        return auc(test.label, quiet(model.wide, test)[0])

    assert area(WideDeep(spec, crosses=[["a", "b"]])) > 0.99
    assert abs(area(WideDeep(spec)) - 0.5) < 0.05


@pytest.mark.parametrize("l1", [1e-4, 1e4])
def test_ftrl_on_the_wide_part_and_its_exact_zeros(l1: float) -> None:
    """With a huge L1 no wide weight ever leaves zero, and the model is its deep part; with a tiny one none stays."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = WideDeep(SPEC, crosses=[["a", "b"]], hidden=(8,))
        start = model.deep.layers[0].weight.detach().clone()
    optimizers = make_optimizers(model, ftrl={"wide": {"l1": l1, "scale": 64}})
    for seed in range(10):
        optimizers.zero_grad()
        batch = WORLD.batch(64, seed=seed)
        F.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
        optimizers.step()
    known = WORLD.batch(500).ids
    rows = model.wide.cross_rows(known).flatten()
    assert (model.wide.combinations.weight[rows] == 0).all() == (l1 > 1)
    assert (model.wide.values.table.weight[known.flatten().long()] == 0).all() == (l1 > 1)
    assert not torch.equal(model.deep.layers[0].weight, start), "the deep part learns by its own optimiser"
    if l1 > 1:
        batch = WORLD.batch(16)
        torch.testing.assert_close(quiet(model, batch)[0], model.deep(model.stack(batch)).squeeze(1))


def test_refuses() -> None:
    with pytest.raises(ValueError, match="'d', which is no categorical field; there are a, b, c"):
        WideDeep(SPEC, crosses=[["a", "d"]])
    with pytest.raises(ValueError, match="'genres', which holds many values"):
        WideDeep(full_spec(), crosses=[["genres", "hour"]])
    with pytest.raises(ValueError, match="needs a categorical field for its wide part"):
        WideDeep(make_spec([], [("n", "context", 1)]))
    with pytest.raises(ValueError, match="at least 1, received 0"):
        WideDeep(SPEC, buckets=0)
