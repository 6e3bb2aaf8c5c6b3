from __future__ import annotations

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.encode.text.decoding import BEGIN, END
from funnelrec.encode.text.pairs import SPECIAL, PairExamples, TokenBatches
from funnelrec.encode.text.tokens import Tokens

GERMAN = ["ein hund", "eine kleine katze schläft", "hund", "ein mann mit hut"]
ENGLISH = ["a dog", "a small cat sleeps now", "dog", "a man in a hat"]


def examples() -> tuple[PairExamples, Tokens, Tokens]:
    german = Tokens.learn(GERMAN, kind="spaces", special=SPECIAL)
    english = Tokens.learn(ENGLISH, kind="spaces", special=SPECIAL)
    return PairExamples(german, GERMAN, english, ENGLISH), german, english


def test_a_source_has_its_end_and_a_target_begin_and_end() -> None:
    pairs, german, english = examples()
    assert (english.row(SPECIAL[0]), english.row(SPECIAL[1])) == (BEGIN, END)
    batch = pairs.gather(torch.tensor([2, 0]), None)
    assert batch.source.tolist() == [[german.row("hund"), END, 0], [german.row("ein"), german.row("hund"), END]]
    assert batch.target[0].tolist() == [BEGIN, english.row("dog"), END, 0]
    assert english.text(batch.target) == ["dog", "a dog"]
    assert pairs.lengths.tolist() == [[3, 4], [5, 7], [2, 3], [5, 7]]
    with pytest.raises(ValueError, match="received 1 and 2"):
        PairExamples(german, ["a"], english, ["b", "c"])


class Numbers:
    """Five hundred examples of which only the number matters."""

    def __len__(self) -> int:
        return 500

    def gather(self, index: torch.Tensor, generator: torch.Generator | None) -> Batch:
        return Batch(item=index)


def test_batches_by_tokens_hold_every_example_once_and_no_more_than_fits() -> None:
    lengths = torch.randint(1, 30, (500, 2), generator=torch.Generator().manual_seed(0))

    batches = TokenBatches(Numbers(), 256, lengths, shuffle=True)
    epochs = [list(batches._indices(number, 0)) for number in (0, 1)]
    for epoch in epochs:
        assert len(epoch) == len(batches)
        assert torch.cat(epoch).sort().values.equal(torch.arange(500))
        slots = [len(index) * int(lengths[index].max(0).values.sum()) for index in epoch]
        assert max(slots) <= 256
        # examples of like length share a batch: two thirds of the slots and more are tokens; at random a half
        assert int(lengths.sum()) / sum(slots) > 0.66
    assert not torch.cat(epochs[0]).equal(torch.cat(epochs[1]))
    tail = list(batches._indices(1, 7))
    assert all(a.equal(b) for a, b in zip(tail, epochs[1][7:], strict=True))
    still = TokenBatches(Numbers(), 256, lengths)
    assert torch.cat(list(still._indices(0, 0))).equal(torch.cat(list(still._indices(1, 0))))
    random = Batches(Numbers(), 10, shuffle=True)
    slots = [len(index) * int(lengths[index].max(0).values.sum()) for index in random._indices(0, 0)]
    assert int(lengths.sum()) / sum(slots) < 0.66  # the control


def test_what_is_refused() -> None:
    pairs, _, _ = examples()
    with pytest.raises(ValueError, match=r"max_tokens=11 is less than the longest example of 12 tokens"):
        TokenBatches(pairs, 11, pairs.lengths)
    with pytest.raises(ValueError, match="4 examples need as many lengths, received 3"):
        TokenBatches(pairs, 100, pairs.lengths[:3])
