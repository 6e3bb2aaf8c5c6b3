"""DIEN: the auxiliary loss in digits and over real steps only, the three evolutions, and order that DIN cannot see."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.core.nn.packed import Steps
from funnelrec.rank import dien as module
from funnelrec.rank.dien import DIEN, _auxiliary_loss
from funnelrec.rank.din import DIN
from tests.contracts import World, auc, full_spec, make_spec, quiet, rows_spec, train

SPEC = full_spec()
WORLD = World(SPEC)
KINDS = ["aigru", "agru", "augru"]


def model(**arguments: object) -> DIEN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        dien = DIEN(SPEC, embedding_dim=4, **arguments).eval()
        with torch.no_grad():
            dien.embedding.table.weight[1:].normal_()
    return dien


def auxiliary(dien: DIEN, batch: Batch, seed: int = 0) -> Tensor:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return dien.training_terms(batch)["auxiliary"]


def test_refuses_a_table_of_rows_and_a_negative_weight() -> None:
    with pytest.raises(ValueError, match="no item column; name user and item in the schema, or use rank/deepfm"):
        DIEN(rows_spec())
    with pytest.raises(ValueError, match="auxiliary loss, at least 0, received -1"):
        DIEN(SPEC, penalty=-1.0)


def test_the_auxiliary_loss_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """One user, e = 1, 2, 3 and h = 0.5, 1, 9: the pairs (0.5, 2) and (1, 3); both negatives are e = 1.

    The last state and the first item are in no positive pair.
    """
    monkeypatch.setattr(module.torch, "randint", lambda high, shape, device: torch.zeros(shape, dtype=torch.int64))
    items, states = torch.tensor([[1.0], [2.0], [3.0]]), torch.tensor([[0.5], [1.0], [9.0]])
    rows, order = torch.tensor([4, 5, 6]), Steps(torch.tensor([[False, True, True, True]]))

    def log_sigmoid(x: float) -> float:
        return -math.log1p(math.exp(-x))

    expected = -(log_sigmoid(1.0) + log_sigmoid(3.0)) / 2 - (log_sigmoid(-0.5) + log_sigmoid(-1.0)) / 2
    assert _auxiliary_loss(states, items, rows, order).item() == pytest.approx(expected)
    rows = torch.tensor([4, 4, 6])  # the first pair's negative is the item that was clicked: it does not count
    expected = -(log_sigmoid(1.0) + log_sigmoid(3.0)) / 2 - log_sigmoid(-1.0)
    assert _auxiliary_loss(states, items, rows, order).item() == pytest.approx(expected)


def test_at_zero_scores_the_auxiliary_loss_is_log_4() -> None:
    dien, batch = model(penalty=0.5), WORLD.batch(32)
    with torch.no_grad():
        dien.embedding.table.weight.zero_()
    assert auxiliary(dien, batch).item() == pytest.approx(0.5 * math.log(4))


def test_the_auxiliary_loss_is_over_real_steps_only() -> None:
    dien, batch = model(), WORLD.batch(32)
    longer = batch.replace(**WORLD.history(F.pad(batch.history, (5, 0))))
    torch.testing.assert_close(auxiliary(dien, longer), auxiliary(dien, batch))
    single = WORLD.batch(4, history=torch.tensor([[0, 9]]).expand(4, -1))  # one item has no next one
    assert auxiliary(dien, single).item() == 0.0
    assert auxiliary(dien, WORLD.batch(4, history=torch.zeros(4, 3, dtype=torch.int64))).item() == 0.0
    assert auxiliary(dien, WORLD.batch(4, history=torch.full((4, 1), 9))).item() == 0.0


def test_the_negatives_are_real_items_of_the_batch_and_differ_each_time() -> None:
    dien, batch = model(), WORLD.batch(32)
    assert auxiliary(dien, batch, seed=1) != auxiliary(dien, batch, seed=2)
    assert auxiliary(dien, batch, seed=1) == auxiliary(dien, batch, seed=1)
    padded = batch.replace(history_ids=torch.where(batch.mask.unsqueeze(-1), batch.history_ids, 1))
    assert auxiliary(dien, padded) == auxiliary(dien, batch), "what stands at padding is never drawn"


def test_forward_and_terms_share_one_extraction_and_give_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    dien, batch = model().train(), WORLD.batch(32)
    fresh = auxiliary(dien, batch)
    calls = []
    extract = dien.extractor.over
    monkeypatch.setattr(dien.extractor, "over", lambda *x: calls.append(1) or extract(*x))
    dien(batch)
    shared = auxiliary(dien, batch)
    assert len(calls) == 1
    torch.testing.assert_close(shared, fresh)
    dien(batch)
    torch.testing.assert_close(auxiliary(dien, batch.replace()), fresh)  # another batch object: extracted anew
    assert len(calls) == 3
    dien(batch)
    assert copy.deepcopy(dien)._extracted is None


def test_without_the_auxiliary_loss_the_extractor_still_learns() -> None:
    dien, batch = model(penalty=0.0).train(), WORLD.batch(32)
    assert dien.training_terms(batch) == {}
    F.binary_cross_entropy_with_logits(dien(batch), batch.label).backward()
    assert dien.extractor.recurrent.grad is not None
    assert dien.extractor.recurrent.grad.abs().sum() > 0


@pytest.mark.parametrize("evolution", KINDS)
def test_all_three_evolutions_train_every_parameter(evolution: str) -> None:
    dien, batch = model(evolution=evolution).train(), WORLD.batch(32)
    loss = F.binary_cross_entropy_with_logits(dien(batch), batch.label) + auxiliary(dien, batch)
    loss.backward()
    assert not [name for name, p in dien.named_parameters() if p.grad is None or not p.grad.to_dense().any()]


def test_attention_is_a_softmax_over_the_real_steps_and_depends_on_the_target() -> None:
    dien, batch = model(), WORLD.batch(12)
    order = Steps(batch.mask)
    _, states = dien.states(batch, order)
    target = dien._items(batch.ids[:, SPEC.item_ids])
    weights = dien.attention(states, target, order)
    torch.testing.assert_close(order.sum(weights.unsqueeze(1)), torch.ones(12, 1))
    assert not torch.allclose(dien.attention(states, target.flip(0), order), weights)


def test_finds_out_which_came_last() -> None:
    """Label: the item is the last one of a history that holds it once. Only a model that reads order can know."""
    world = World(make_spec([("user", "user", 40, 1), ("item", "item", 14, 1)]))

    def labelled(size: int, seed: int) -> Batch:
        g = torch.Generator().manual_seed(seed)
        history = torch.rand(size, 12, generator=g).argsort(1)[:, :3] + 2
        label = torch.randint(0, 2, (size,), generator=g)
        item = torch.where(label == 1, history[:, 2], history[:, 0])
        return world.batch(size, seed=seed, items=item, history=history).replace(label=label.float())

    def area(ranker: torch.nn.Module) -> float:
        train(ranker, world, (labelled(256, s) for s in range(120)), lr=0.01)
        test = labelled(2000, 999)
        return auc(test.label, quiet(ranker, test)[0])

    with torch.random.fork_rng():
        torch.manual_seed(0)
        assert area(DIEN(world.spec, embedding_dim=8, hidden=(32,))) > 0.9
        assert abs(area(DIN(world.spec, embedding_dim=8, hidden=(32,))) - 0.5) < 0.05
