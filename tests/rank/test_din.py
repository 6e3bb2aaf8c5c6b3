"""DIN: what the attention does to a history, with and without softmax; it finds what concerns the candidate."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.rank.din import DIN
from tests.contracts import World, auc, full_spec, make_spec, quiet, rows_spec, train

SPEC = full_spec()
WORLD = World(SPEC)


def model(**arguments: object) -> DIN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        din = DIN(SPEC, embedding_dim=4, **arguments).eval()
        with torch.no_grad():
            din.embedding.table.weight[1:].normal_()
    return din


def interest(din: DIN, batch: Batch) -> Tensor:
    """v_U(A) of Eq. (3)."""
    target = din._items(batch.ids[:, SPEC.item_ids])
    return din.attention(target, din._items(batch.history_ids), batch.mask)


def with_history(batch: Batch, history: Tensor) -> Batch:
    return batch.replace(**WORLD.history(history))


def test_refuses_a_table_of_rows() -> None:
    with pytest.raises(ValueError, match="no item column; name user and item in the schema, or use rank/deepfm"):
        DIN(rows_spec())


def test_target_and_history_share_their_vectors() -> None:
    """An item alone in its own history, with softmax: the interest is the item's own vector."""
    din, batch = model(softmax=True), WORLD.batch(8)
    batch = with_history(batch, batch.item.view(8, 1))
    torch.testing.assert_close(interest(din, batch), din._items(batch.ids[:, SPEC.item_ids]))


def test_an_item_is_its_fields_side_by_side() -> None:
    din, batch = model(), WORLD.batch(8)
    fields = [n for n, c in enumerate(SPEC.categories) if c.side == "item"]
    torch.testing.assert_close(din._items(batch.ids[:, SPEC.item_ids]), din.embedding(batch)[:, fields].flatten(1))


def test_with_softmax_one_item_is_all_there_is() -> None:
    din, batch = model(softmax=True), WORLD.batch(8, history=torch.full((8, 1), 9))
    expected = din._items(WORLD.item_ids[9:10]).expand(8, -1)
    torch.testing.assert_close(interest(din, batch), expected)


def test_without_softmax_the_weight_is_the_score() -> None:
    din, batch = model(), WORLD.batch(8, history=torch.full((8, 1), 9))
    target, item = din._items(batch.ids[:, SPEC.item_ids]), din._items(batch.history_ids)
    score = din.attention.score(target.unsqueeze(1), item, batch.mask)[:, 0]  # (B, 1)
    torch.testing.assert_close(interest(din, batch), score * item[:, 0])


@pytest.mark.parametrize(("softmax", "factor"), [(False, 2.0), (True, 1.0)])
def test_a_doubled_history_is_a_stronger_interest_only_without_softmax(softmax: bool, factor: float) -> None:
    din, batch = model(softmax=softmax), WORLD.batch(8)
    double = with_history(batch, torch.cat([batch.history, batch.history], dim=1))
    torch.testing.assert_close(interest(din, double), factor * interest(din, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("activation", ["dice", "prelu"])
def test_the_order_of_the_history_does_not_matter(softmax: bool, activation: str) -> None:
    din, batch = model(softmax=softmax, activation=activation), WORLD.batch(8)
    torch.testing.assert_close(din(with_history(batch, batch.history.flip(1))), din(batch), rtol=1e-4, atol=1e-5)


def test_an_empty_history_is_no_interest() -> None:
    batch = WORLD.batch(8, history=torch.zeros(8, 5, dtype=torch.int64))
    assert (interest(model(), batch) == 0).all()


def test_the_target_changes_what_the_history_says() -> None:
    din, batch = model(), WORLD.batch(8, history=torch.tensor([[3, 8, 21]]).expand(8, -1))
    spread = interest(din, batch).std(0)
    assert (spread > 0).all(), "the same history must read differently beside another item"


def test_finds_whether_the_candidate_fits_the_history() -> None:
    """Label: the item's brand occurs in the history. Nothing but the attention can know."""
    world = World(make_spec([("user", "user", 40, 1), ("item", "item", 62, 1), ("brand", "item", 8, 1)]))

    def labelled(size: int, seed: int) -> Batch:
        batch = world.batch(size, 3, seed=seed)
        brands = batch.history_ids[..., 1].masked_fill(~batch.mask, -1)  # (B, L)
        return batch.replace(label=(brands == batch.ids[:, 2:3]).any(1).float())

    with torch.random.fork_rng():
        torch.manual_seed(0)
        din = DIN(world.spec, embedding_dim=8)
        train(din, world, (labelled(512, s) for s in range(150)), lr=0.01)
    test = labelled(2000, 999)
    assert auc(test.label, quiet(din, test)[0]) > 0.95
