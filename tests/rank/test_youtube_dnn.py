"""YouTubeDNN ranking: what enters the tower, and that e^s is the watch time it was trained on."""

from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.learn.losses import BCE, WeightedLogistic
from funnelrec.rank.youtube_dnn import YouTubeDNN
from tests.contracts import World, full_spec, make_spec, quiet, rows_spec

SPEC = full_spec()
WORLD = World(SPEC)


def model() -> YouTubeDNN:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = YouTubeDNN(SPEC, embedding_dim=4, hidden=(8,)).eval()
        with torch.no_grad():
            network.embedding.table.weight[1:].normal_()
    return network


def test_refuses_a_table_of_rows() -> None:
    with pytest.raises(ValueError, match="no item column; name user and item in the schema, or use rank/deepfm"):
        YouTubeDNN(rows_spec())


def test_by_hand() -> None:
    """One layer with weights 1 adds up: the item (2), the mean of the watched (3 and 5: 4), the number 0.5."""
    spec = make_spec([("user", "user", 4, 1), ("item", "item", 6, 1)], [("age", "user", 1)])
    network = YouTubeDNN(spec, embedding_dim=1, hidden=())
    with torch.no_grad():
        network.embedding.table.weight[:, 0] = torch.tensor(
            [0.0, 0, 0, 0, 0, 2, 3, 5, 9]
        )  # items: rows 4.. of the table
        network.tower.layers[0].weight.fill_(1.0)
        network.tower.layers[0].bias.fill_(0.25)
    batch = Batch(
        ids=torch.tensor([[2, 5]], dtype=torch.int32),
        numbers=torch.tensor([[0.5]]),
        history_ids=torch.tensor([[[8], [6], [7]]], dtype=torch.int32),
        mask=torch.tensor([[False, True, True]]),
    )
    assert network(batch).tolist() == pytest.approx([2 + 4 + 0.5 + 0.25])
    assert network.watch_time(batch).tolist() == pytest.approx([2.718281828**6.75], rel=1e-5)
    empty = batch.replace(mask=torch.zeros(1, 3, dtype=torch.bool))
    assert network(empty).tolist() == pytest.approx([2 + 0.5 + 0.25])


def test_the_order_and_the_repetition_of_the_history_do_not_matter() -> None:
    network, batch = model(), WORLD.batch(8)
    for history in (batch.history.flip(1), torch.cat([batch.history, batch.history], dim=1)):
        other = batch.replace(**WORLD.history(history))
        torch.testing.assert_close(network(other), network(batch), rtol=1e-4, atol=1e-5)


def test_watch_time_orders_as_the_logits_do_and_stays_finite() -> None:
    network, batch = model(), WORLD.batch(30)
    assert torch.equal(network.watch_time(batch).argsort(), network(batch).argsort())
    with torch.no_grad():
        network.tower.layers[-1].bias.fill_(1e4)
    assert network.watch_time(batch).isfinite().all()


def trained(loss: object, batch: Batch, spec: object) -> YouTubeDNN:
    network = YouTubeDNN(spec, embedding_dim=4, hidden=(16,))
    table = torch.optim.SparseAdam([network.embedding.table.weight], lr=0.02)
    tower = torch.optim.Adam(network.tower.parameters(), lr=0.02)
    for _ in range(250):
        network.zero_grad()
        loss(network, batch).backward()
        table.step()
        tower.step()
    return network


def test_odds_are_the_watch_time_of_each_group() -> None:
    """Trained to the end, e^s of a group is its Σ T over clicks / its impressions without one, ≈ watch time a view."""
    spec = make_spec([("user", "user", 4, 1), ("item", "item", 5, 1)])
    world, size = World(spec), 3000
    g = torch.Generator().manual_seed(0)
    group = torch.arange(size) % 3
    click = (torch.rand(size, generator=g) < torch.tensor([0.02, 0.05, 0.1])[group]).float()
    seconds = 60 + 240 * torch.rand(size, generator=g)
    batch = world.batch(
        size, users=torch.full((size,), 2), items=group + 2, history=torch.zeros(size, 1, dtype=torch.int64)
    ).replace(label=click, weight=seconds)
    expected = torch.stack([(click * seconds)[group == n].sum() / (click == 0)[group == n].sum() for n in range(3)])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = trained(WeightedLogistic(), batch, spec)
        unweighted = trained(BCE(), batch.replace(weight=torch.ones(size)), spec)
    three = batch.select(torch.arange(3))
    torch.testing.assert_close(network.watch_time(three), expected, rtol=0.03, atol=0.0)
    rate = torch.stack([click[group == n].mean() for n in range(3)])
    torch.testing.assert_close(quiet(unweighted, three)[0].sigmoid(), rate, rtol=0.03, atol=0.002)
