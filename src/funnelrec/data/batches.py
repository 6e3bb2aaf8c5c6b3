"""Batches: whole tensors taken by an index, in an order that is a function of (seed, epoch).

No per-example Python and no worker processes: a batch is one gather over a slice of a permutation. The permutation is
counter-based, so the position in the epoch is all the state: `epoch(e, start=k)` gives exactly the tail of `epoch(e)`.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch

__all__ = ["Batches", "Examples", "counter_generator"]

BLOCKS_PER_BUFFER = 8  #: blocks that are shuffled together; 8 blocks of 65,536 rows are 4 MiB of index


@runtime_checkable
class Examples(Protocol):
    """What a batch is taken from (data/examples.py)."""

    def __len__(self) -> int: ...

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch: ...


def _mix(*counters: int) -> int:
    """A 64-bit seed from whole numbers: the finaliser of SplitMix64 after each, so that near counters are far apart."""
    state = 0
    for counter in counters:
        state = (state + counter + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state


def counter_generator(*counters: int) -> torch.Generator:
    """A CPU generator whose numbers are a function of the counters alone, e.g. (seed, epoch, batch)."""
    return torch.Generator().manual_seed(_mix(*counters))


# The first counter after the seed and the epoch keeps the streams apart.
_ORDER, _BUFFER, _BATCH = 0, 1, 2


class Batches:
    """The batches of one epoch after another.

    shuffle: a new order every epoch. block: rows of a block when the examples lie in a memory map larger than memory;
    blocks are taken in random order, 8 at a time, and shuffled inside (65,536 is a good size); None shuffles all rows.
    The generator that `gather` receives depends on (seed, epoch, batch number) alone.
    """

    def __init__(
        self,
        examples: Examples,
        batch_size: int,
        *,
        shuffle: bool = False,
        seed: int = 0,
        drop_last: bool = False,
        block: int | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, received {batch_size}")
        if block is not None and block < 1:
            raise ValueError(f"block is a number of rows, at least 1, or None, received {block}")
        self.examples = examples
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.seed = seed
        self.drop_last = drop_last
        self.block = block

    def __len__(self) -> int:
        """Batches in an epoch."""
        whole, rest = divmod(len(self.examples), self.batch_size)
        return whole + (1 if rest and not self.drop_last else 0)

    def epoch(self, number: int, start: int = 0) -> Iterator[Batch]:
        """The batches of epoch `number` from batch `start` on."""
        if number < 0 or not 0 <= start <= len(self):
            raise ValueError(f"epoch must be >= 0 and start between 0 and {len(self)}, received {number} and {start}")
        for position, index in enumerate(self._indices(number, start), start=start):
            yield self.examples.gather(index, counter_generator(self.seed, number, _BATCH, position))

    def rows(self, number: int, position: int) -> Tensor:
        """The example numbers of batch `position` of epoch `number`, for saying which examples a batch held."""
        return next(self._indices(number, position))

    def _indices(self, number: int, start: int) -> Iterator[Tensor]:
        """The example numbers of each batch from batch `start` on."""
        n, size = len(self.examples), self.batch_size
        stop = len(self) * size if self.drop_last else n
        if not self.shuffle:
            yield from (torch.arange(at, min(at + size, stop)) for at in range(start * size, stop, size))
        elif self.block is None:
            order = torch.randperm(n, generator=counter_generator(self.seed, number, _ORDER))
            yield from (order[at : min(at + size, stop)] for at in range(start * size, stop, size))
        else:
            yield from self._blocked(number, start * size, stop, self.block)

    def _blocked(self, number: int, at: int, stop: int, block: int) -> Iterator[Tensor]:
        """Batches over rows shuffled by blocks, from position `at` of the epoch's order to position `stop`."""
        n = len(self.examples)
        blocks = torch.randperm(-(-n // block), generator=counter_generator(self.seed, number, _ORDER))
        begins = blocks * block
        sizes = (begins + block).clamp(max=n) - begins
        begun = 0  # position of the buffer in the epoch's order
        rest = torch.empty(0, dtype=torch.int64)
        for buffer in range(0, len(blocks), BLOCKS_PER_BUFFER):
            chosen = slice(buffer, buffer + BLOCKS_PER_BUFFER)
            length = int(sizes[chosen].sum())
            if begun + length > at:  # buffers before the start are stepped over, never drawn
                order = self._buffer(number, buffer, begins[chosen], sizes[chosen])
                rest = torch.cat([rest, order[max(at - begun, 0) : max(stop - begun, 0)]])
                whole = len(rest) // self.batch_size * self.batch_size
                yield from torch.split(rest[:whole], self.batch_size) if whole else ()
                rest = rest[whole:]
            begun += length
        if len(rest):
            yield rest

    def _buffer(self, number: int, buffer: int, begins: Tensor, sizes: Tensor) -> Tensor:
        """The rows of some blocks in random order."""
        ends = sizes.cumsum(0)
        rows = torch.arange(int(ends[-1])) + torch.repeat_interleave(begins - (ends - sizes), sizes)
        return rows[torch.randperm(len(rows), generator=counter_generator(self.seed, number, _BUFFER, buffer))]
