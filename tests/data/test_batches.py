"""Batches: every example once, and an order that is a function of the counters alone."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches, counter_generator


class Numbered:
    """Examples that are their own numbers, with one random draw each."""

    def __init__(self, size: int) -> None:
        self.size = size

    def __len__(self) -> int:
        return self.size

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        return Batch(number=index, draw=torch.rand(len(index), generator=generator))


OPTIONS = st.fixed_dictionaries(
    {
        "batch_size": st.integers(1, 9),
        "shuffle": st.booleans(),
        "drop_last": st.booleans(),
        "block": st.sampled_from([None, 1, 2, 5]),
        "seed": st.integers(0, 3),
    }
)


@given(st.integers(0, 60), OPTIONS, st.integers(0, 3), st.data())
@settings(max_examples=200, deadline=None)
def test_an_epoch_holds_every_example_once_and_its_tail_is_its_tail(
    size: int, options: dict[str, object], epoch: int, data: st.DataObject
) -> None:
    batches = Batches(Numbered(size), **options)  # type: ignore[arg-type]
    whole = list(batches.epoch(epoch))
    assert len(whole) == len(batches)
    numbers = torch.cat([b.number for b in whole]).tolist() if whole else []
    if batches.drop_last:
        assert len(set(numbers)) == len(numbers) == size // batches.batch_size * batches.batch_size
        assert all(b.size == batches.batch_size for b in whole)
    else:
        assert sorted(numbers) == list(range(size))
        assert all(b.size == batches.batch_size for b in whole[:-1])
    start = data.draw(st.integers(0, len(batches)))
    tail = list(batches.epoch(epoch, start))
    assert len(tail) == len(whole) - start
    for left, right in zip(tail, whole[start:], strict=True):
        assert torch.equal(left.number, right.number) and torch.equal(left.draw, right.draw)


@pytest.mark.parametrize("block", [None, 16])
def test_the_order_follows_seed_and_epoch(block: int | None) -> None:
    def order(seed: int, epoch: int) -> list[int]:
        batches = Batches(Numbered(500), 64, shuffle=True, seed=seed, block=block)
        return torch.cat([b.number for b in batches.epoch(epoch)]).tolist()

    assert order(1, 1) == order(1, 1)
    orders = [order(1, 1), order(1, 2), order(2, 1), order(0, 3)]
    assert len({tuple(o) for o in orders}) == 4
    # uniform enough: the mean distance of an example from its place is a third of n, as for a random permutation
    moved = (torch.tensor(orders[0]) - torch.arange(500)).abs().double().mean().item()
    assert 0.25 < moved / 500 < 0.42


def test_blocks_stay_together_in_their_buffer() -> None:
    batches = Batches(Numbered(64 * 32), 256, shuffle=True, block=32)  # a buffer is 8 blocks of 32 rows
    for batch in batches.epoch(0):
        assert len(set((batch.number // 32).tolist())) == 8


def test_the_global_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    list(Batches(Numbered(50), 8, shuffle=True, block=8).epoch(0))
    assert torch.equal(state, torch.get_rng_state())


def test_counters_that_are_near_give_streams_that_are_far() -> None:
    draws = [torch.rand(4, generator=counter_generator(s, e, b)) for s in range(4) for e in range(4) for b in range(4)]
    assert len({tuple(d.tolist()) for d in draws}) == 64


def test_faults_are_named() -> None:
    with pytest.raises(ValueError, match=r"batch_size must be at least 1, received 0"):
        Batches(Numbered(3), 0)
    with pytest.raises(ValueError, match=r"block is a number of rows"):
        Batches(Numbered(3), 1, block=0)
    with pytest.raises(ValueError, match=r"start between 0 and 3, received 0 and 4"):
        next(Batches(Numbered(3), 1).epoch(0, 4))
