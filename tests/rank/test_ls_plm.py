"""LS-PLM: digits by hand, the cases in which it is one regression, stability, the problem that LR cannot solve."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.learn.optim import make_optimizers
from funnelrec.rank.logistic_regression import LogisticRegression
from funnelrec.rank.ls_plm import LSPLM
from tests.contracts import World, auc, full_spec, make_spec, quiet, train

SPEC = full_spec()
WORLD = World(SPEC)
ONE = Batch(ids=torch.tensor([[2]], dtype=torch.int32), numbers=torch.zeros(1, 0))


def random_model(num_regions: int = 4) -> LSPLM:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LSPLM(SPEC, num_regions=num_regions)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_()
            model.weight.table.weight[0] = 0
    return model


def one_value(gate: list[float], fit: list[float]) -> LSPLM:
    """One field whose known value has these u and w; the bias is zero."""
    model = LSPLM(make_spec([("a", "context", 3, 1)]), num_regions=len(gate))
    with torch.no_grad():
        model.bias.zero_()
        model.weight.table.weight[2] = torch.tensor(gate + fit)
    return model


def parts(model: LSPLM, batch: Batch) -> tuple[Tensor, Tensor]:
    """Gates and regressions [B, m] in float64."""
    sums = (model.weight(batch).sum(1) + model.bias).double()
    gate, fit = sums.split(model.num_regions, dim=1)
    return gate.softmax(1), fit.sigmoid()


def set_regions(model: LSPLM, values: slice, of: int) -> None:
    """Every region of the gate (slice(0, m)) or of the fit (slice(m, 2m)) becomes column `of`."""
    with torch.no_grad():
        for weight in (model.weight.table.weight, model.weight.number_vectors):
            weight[:, values] = weight[:, of : of + 1]
        model.bias[values] = model.bias[of]


def test_by_hand() -> None:
    """Gates 3/4 and 1/4, regressions 1/2 and 4/5: p = 0.375 + 0.2 = 0.575."""
    model = one_value([math.log(3), 0.0], [0.0, math.log(4)])
    assert model(ONE).sigmoid().tolist() == pytest.approx([0.575])
    with torch.no_grad():
        model.bias[:] = torch.tensor([-math.log(3), 0.0, math.log(4), 0.0])  # gates equal, both regressions 4/5
    assert model(ONE).sigmoid().tolist() == pytest.approx([0.8])


def test_equals_the_mixture_of_probabilities() -> None:
    model, batch = random_model(), WORLD.batch(40)
    gate, fit = parts(model, batch)
    torch.testing.assert_close(model(batch).double().sigmoid(), (gate * fit).sum(1), rtol=1e-5, atol=1e-6)


def test_mixes_probabilities_and_not_logits() -> None:
    model = one_value([0.0, 0.0], [4.0, -2.0])
    expected = (1 / (1 + math.exp(-4)) + 1 / (1 + math.exp(2))) / 2
    assert model(ONE).sigmoid().tolist() == pytest.approx([expected])
    assert expected != pytest.approx(1 / (1 + math.exp(-1)), abs=0.05), "the mean logit is another model"


def test_one_region_is_logistic_regression() -> None:
    model, batch = random_model(1), WORLD.batch(20)
    lr = LogisticRegression(SPEC)
    with torch.no_grad():
        lr.weight.table.weight[:] = model.weight.table.weight[:, 1:]
        lr.weight.number_vectors[:] = model.weight.number_vectors[:, 1:]
        lr.bias.copy_(model.bias[1])
    torch.testing.assert_close(model(batch), lr(batch), rtol=1e-4, atol=1e-4)


def test_equal_gates_give_the_mean_of_the_regressions() -> None:
    model, batch = random_model(), WORLD.batch(20)
    set_regions(model, slice(0, 4), of=0)
    torch.testing.assert_close(model(batch).double().sigmoid(), parts(model, batch)[1].mean(1), rtol=1e-5, atol=1e-6)


def test_equal_regressions_make_the_gate_irrelevant() -> None:
    model, batch = random_model(), WORLD.batch(20)
    set_regions(model, slice(4, 8), of=4)
    before = model(batch)
    with torch.no_grad():
        model.bias[:4] += torch.tensor([1.0, -2.0, 3.0, 0.0])
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-4)


def test_the_order_of_the_regions_does_not_matter() -> None:
    model, batch = random_model(), WORLD.batch(20)
    before, order = model(batch), torch.tensor([2, 0, 3, 1])
    order = torch.cat([order, order + 4])
    with torch.no_grad():
        for weight in (model.weight.table.weight, model.weight.number_vectors):
            weight.copy_(weight[:, order])
        model.bias.copy_(model.bias[order])
    torch.testing.assert_close(model(batch), before, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("far", [-300.0, 300.0])
def test_far_out_the_logit_stays_a_number_with_a_gradient(far: float) -> None:
    """p is 0 or 1 to the last bit of float32: the log of the mixture itself would be -inf."""
    model = one_value([200.0, -200.0], [far, far])
    logit = model(ONE)
    assert logit.tolist() == pytest.approx([far])
    logit.sum().backward()
    assert model.bias.grad is not None
    assert model.bias.grad[2:].sum().item() == pytest.approx(1.0), "far out it is the regression of the open region"
    assert model.bias.grad.isfinite().all()


def test_equal_regions_stay_equal_and_so_the_start_is_random() -> None:
    same, start = random_model(), LSPLM(SPEC, num_regions=4)
    set_regions(same, slice(0, 4), of=0)
    set_regions(same, slice(4, 8), of=4)
    train(same, WORLD, (WORLD.batch(64, seed=s) for s in range(3)), lr=0.1)
    for values in (same.bias[:4], same.bias[4:]):
        torch.testing.assert_close(values, values[:1].expand(4))
    assert len(set(start.bias.tolist())) == 8
    assert start.weight.table.weight[1:].std().item() == pytest.approx(0.1, rel=0.05)


def test_refuses_no_region() -> None:
    with pytest.raises(ValueError, match=r"num_regions counts .* at least 1, received 0"):
        LSPLM(SPEC, num_regions=0)


def test_a_page_is_scored_with_its_user_looked_up_once() -> None:
    """The common-feature trick: one row of the user's part beside many of the items' and the context's."""
    model = random_model()
    page = WORLD.batch(12, users=torch.full((12,), 7))
    page = page.replace(numbers=torch.cat((page.numbers[:1, :1].expand(12, 1), page.numbers[:, 1:]), dim=1))
    first = page.select(torch.tensor([0]))
    together = model.mix(model.sums(first, "user") + model.sums(page, "item", "context"))
    torch.testing.assert_close(together, model(page), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model.mix(model.sums(page, "item", "context")), model(page), rtol=1e-2)


def test_structural_prior() -> None:
    """Users divide, items fit: another item leaves the gate, another user leaves the regressions as they are."""
    model = LSPLM(SPEC, num_regions=3, dividing=["user", "age"], fitting=["item", "price"])
    one, other = WORLD.batch(8), WORLD.batch(8, seed=5)
    columns = torch.arange(one.ids.shape[1])
    item = (columns >= SPEC.item_ids.start) & (columns < SPEC.item_ids.stop)
    for swapped, kept in ((item, slice(0, 3)), (~item, slice(3, 6))):
        mixed = one.replace(ids=torch.where(swapped, other.ids, one.ids))
        before, after = model.sums(one), model.sums(mixed)
        torch.testing.assert_close(before[:, kept], after[:, kept])
        assert not torch.allclose(before, after)
    with pytest.raises(ValueError, match="dividing names 'shop', which is no field; there are user, city, item"):
        LSPLM(SPEC, dividing=["shop"])


def test_proximal_steps_drop_whole_values() -> None:
    """L2,1 over the 2m numbers of a value: those that tell nothing vanish as a whole, those that do stay."""
    spec = make_spec([("good", "context", 4, 1), ("noise", "context", 40, 1)])
    world = World(spec)

    def labelled(seed: int) -> Batch:
        batch = world.batch(256, seed=seed)
        return batch.replace(label=(batch.ids[:, 0] == 2).float())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = LSPLM(spec, num_regions=2)
    optimizers = make_optimizers(model, lr=0.02, proximal={"weight": {"l1": 0.1, "l21": 0.9}})
    for seed in range(150):
        optimizers.zero_grad()
        batch = labelled(seed)
        torch.nn.functional.binary_cross_entropy_with_logits(model(batch), batch.label).backward()
        optimizers.step()
    weight = model.weight.table.weight
    vanished = (weight == 0).all(1)
    assert vanished[5:].float().mean() > 0.8
    assert not vanished[2:4].any()
    assert auc(labelled(999).label, quiet(model, labelled(999))[0]) > 0.99


def test_two_regions_solve_what_one_regression_cannot() -> None:
    """Label: two binary fields agree. No sum of their weights says so."""
    world = World(make_spec([("a", "context", 4, 1), ("b", "context", 4, 1)]))

    def labelled(size: int, seed: int) -> Batch:
        batch = world.batch(size, seed=seed)
        return batch.replace(label=((batch.ids[:, 0] - batch.ids[:, 1]) == -3).float())

    def area(model: torch.nn.Module) -> float:
        train(model, world, (labelled(256, s) for s in range(150)), lr=0.05)
        test = labelled(1000, 999)
        return auc(test.label, quiet(model, test)[0])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert area(LSPLM(world.spec, num_regions=2)) > 0.99
        assert abs(area(LogisticRegression(world.spec)) - 0.5) < 0.05
