"""Pairs of texts for training a translator, and batches by number of tokens."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches, Examples, counter_generator
from funnelrec.encode.text.tokens import TextExamples, Tokens

__all__ = ["SPECIAL", "PairExamples", "TokenBatches"]

SPECIAL = ("<s>", "</s>")  #: rows BEGIN and END of encode.text.decoding
_WITHIN, _AMONG = 10, 11  # counters: the order of the examples, the order of the batches


class PairExamples:
    """`source` [B, S], each with its end, and `target` [B, T] from begin to end; both as long as their longest.

    Both vocabularies are learnt with special=SPECIAL.
    """

    def __init__(
        self,
        source_tokens: Tokens,
        sources: Sequence[str],
        target_tokens: Tokens,
        targets: Sequence[str],
        *,
        max_len: int | None = None,
    ) -> None:
        if len(sources) != len(targets):
            raise ValueError(f"every source needs its target, received {len(sources)} and {len(targets)}")
        begin, end = SPECIAL
        self.sources = TextExamples(source_tokens, [text + end for text in sources], max_len=max_len)
        self.targets = TextExamples(target_tokens, [begin + text + end for text in targets], max_len=max_len)
        self.lengths = torch.stack([self.sources.lengths, self.targets.lengths], dim=1)  # (N, 2)

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """The pairs at `index`."""
        return Batch(
            source=self.sources.gather(index, None).text,
            target=self.targets.gather(index, None).text,
        )


class TokenBatches(Batches):
    """Batches of examples of similar length, at most `max_tokens` slots each, padding counted.

    `lengths` [N, C]: the lengths of an example's C texts; a batch of n examples has n · Σ_c (longest of c) slots. The
    examples of a length are drawn anew every epoch, and the batches are shuffled; how many there are stays the same.
    """

    def __init__(
        self,
        examples: Examples,
        max_tokens: int,
        lengths: Int[Tensor, "N C"],
        *,
        shuffle: bool = False,
        seed: int = 0,
    ) -> None:
        super().__init__(examples, max_tokens, shuffle=shuffle, seed=seed)
        if len(lengths) != len(examples):
            raise ValueError(f"{len(examples)} examples need as many lengths, received {len(lengths)}")
        if len(lengths) and int(lengths.sum(1).max()) > max_tokens:
            raise ValueError(
                f"max_tokens={max_tokens} is less than the longest example of {int(lengths.sum(1).max())} tokens; "
                "raise it or cut the texts with max_len"
            )
        key = torch.zeros(len(lengths), dtype=torch.int64)
        for column in lengths.T:
            key = key * (int(lengths.max()) + 1 if len(lengths) else 1) + column
        self._key = key
        self._cuts = _cuts(lengths[key.argsort(stable=True)].tolist(), max_tokens)

    def __len__(self) -> int:
        return len(self._cuts) - 1

    def _indices(self, number: int, start: int) -> Iterator[Tensor]:
        order, batches = torch.arange(len(self._key)), torch.arange(len(self))
        if self.shuffle:
            order = torch.randperm(len(order), generator=counter_generator(self.seed, number, _WITHIN))
            batches = torch.randperm(len(batches), generator=counter_generator(self.seed, number, _AMONG))
        order = order[self._key[order].argsort(stable=True)]  # the same lengths in the same places in every epoch
        for batch in batches[start:].tolist():
            yield order[self._cuts[batch] : self._cuts[batch + 1]]


def _cuts(lengths: list[list[int]], most: int) -> list[int]:
    """Where batches begin, and the end: each takes as many examples as fit."""
    cuts, longest = [0], [0] * (len(lengths[0]) if lengths else 0)
    for place, one in enumerate(lengths):
        longest = [max(pair) for pair in zip(longest, one, strict=True)]
        if (place + 1 - cuts[-1]) * sum(longest) > most:
            cuts.append(place)
            longest = one
    return [*cuts, len(lengths)] if lengths else cuts
