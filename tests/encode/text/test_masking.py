from __future__ import annotations

from pathlib import Path

import pytest
import torch

from funnelrec.data.batches import Batches
from funnelrec.encode.text.masking import (
    CLS,
    FIRST_WORD,
    MASK,
    SEP,
    SPECIAL,
    MaskedPairs,
    MaskedTexts,
    hide_tokens,
    public_wordpiece,
    wrapped,
)
from funnelrec.encode.text.tokens import Tokens

WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "saw", "two", "dogs", "run", "over", "green", "hills"]


def tokens() -> Tokens:
    return Tokens.learn([" ".join(WORDS)], kind="words", special=SPECIAL)


def shares(text: torch.Tensor, read: torch.Tensor, hidden: torch.Tensor) -> list[float]:
    """Of the words: the share that is taken. Of those: shares that are [MASK], another, unchanged."""
    taken = hidden != 0
    known = text[taken]
    masked, same = read[taken] == MASK, read[taken] == known
    return [
        float(taken.sum() / (text >= FIRST_WORD).sum()),
        float(masked.double().mean()),
        float((~masked & ~same).double().mean()),
        float(same.double().mean()),
    ]


def test_what_is_hidden() -> None:
    generator = torch.Generator().manual_seed(0)
    text = torch.randint(FIRST_WORD, 1000, (400, 42), generator=generator)
    text[:, 0], text[:, 41] = CLS, SEP
    text[::2, 21:] = 0  # 40 words, or 20: 15 % of both are whole numbers
    read, hidden = hide_tokens(text, 1000, generator)
    found = shares(text, read, hidden)
    for share, expected, reach in zip(found, (0.15, 0.8, 0.1, 0.1), (0.005, 0.015, 0.015, 0.015), strict=True):
        assert abs(share - expected) < reach, found
    assert torch.equal(read[text < FIRST_WORD], text[text < FIRST_WORD])  # padding and special tokens stay
    assert bool((hidden[text < FIRST_WORD] == 0).all())
    assert torch.equal(hidden[hidden != 0], text[hidden != 0])
    assert bool((read[hidden != 0] >= MASK).all())  # no special token is put in, [MASK] apart
    assert bool(((hidden != 0).sum(1) >= 1).all())
    wrong = shares(text, torch.where(hidden != 0, MASK, text), hidden)  # the control: masks alone
    assert abs(wrong[1] - 0.8) > 0.015


def test_a_row_without_words_has_nothing_to_hide() -> None:
    read, hidden = hide_tokens(torch.tensor([[CLS, SEP, 0], [CLS, FIRST_WORD, SEP]]), 50)
    assert read[0].tolist() == [CLS, SEP, 0]
    assert hidden.tolist() == [[0, 0, 0], [0, FIRST_WORD, 0]]


def test_texts_are_cut_into_pieces() -> None:
    vocabulary = tokens()
    examples = MaskedTexts(vocabulary, [" ".join(WORDS), "the cat"], max_len=8, shortest=3)
    rows = [vocabulary.row(word) for word in WORDS]
    assert (
        [piece.tolist() for piece in examples.pieces]
        == [
            [CLS, *rows[:6], SEP],
            [CLS, *rows[6:12], SEP],  # the last two words are fewer than `shortest`
            [CLS, *rows[:2], SEP],
        ]
    )
    first, again, later = (next(Batches(examples, 3, shuffle=True).epoch(epoch)) for epoch in (0, 0, 1))
    assert torch.equal(first.text, again.text)
    assert not torch.equal(first.hidden.sort(0).values, later.hidden.sort(0).values)  # drawn anew
    fixed = [examples.gather(torch.arange(3), None).hidden for _ in range(2)]
    assert torch.equal(*fixed)
    with pytest.raises(ValueError, match="at least 4, received 3"):
        MaskedTexts(vocabulary, ["the"], max_len=3)


def test_pairs_follow_or_come_from_another_document() -> None:
    words = [f"w{i}" for i in range(60)]
    vocabulary = Tokens.learn([" ".join(words)], kind="words", special=SPECIAL)
    documents = [[f"w{6 * d + 2 * s} w{6 * d + 2 * s + 1}" for s in range(3)] for d in range(10)]
    examples = MaskedPairs(vocabulary, [*documents, ["w0 w1"]], max_len=16)
    assert len(examples) == 10  # the document of one sentence is left out
    index = torch.arange(10).repeat(40)
    batch = examples.gather(index, torch.Generator().manual_seed(1))
    assert batch.text.shape == batch.hidden.shape == batch.segment.shape
    assert 0.42 < float(batch.follows.double().mean()) < 0.58
    truth = torch.where(batch.hidden != 0, batch.hidden, batch.text)
    for row, segment, follows, own in zip(truth, batch.segment, batch.follows, index.tolist(), strict=True):
        ends = (row == SEP).nonzero().flatten().tolist()
        assert row[0] == CLS
        assert len(ends) == 2
        assert segment.tolist() == [0] * (ends[0] + 1) + [1] * (ends[1] - ends[0]) + [0] * (len(row) - ends[1] - 1)
        of = [int(vocabulary.words[t][1:]) // 6 for t in row.tolist() if t >= FIRST_WORD]
        first, second = of[: ends[0] - 1], of[ends[0] - 1 :]
        assert set(first) == {own}
        assert (set(second) == {own}) == bool(follows)
    with pytest.raises(ValueError, match="received 1 such"):
        MaskedPairs(vocabulary, [documents[0], ["w1"]])


def test_long_pairs_are_cut() -> None:
    vocabulary = tokens()
    line = " ".join(WORDS)
    examples = MaskedPairs(vocabulary, [[line, "the cat", line], [line, line]], max_len=12)
    batch = examples.gather(torch.arange(len(examples)).repeat(10), torch.Generator().manual_seed(0))
    assert batch.text.shape[1] <= 12
    assert bool(((batch.text == SEP).sum(1) == 2).all())


def test_a_published_vocabulary(tmp_path: Path) -> None:
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "un", "##aff", "##able", "the"]))
    vocabulary = public_wordpiece(path)
    unaffable = [vocabulary.row(piece) for piece in ("un", "##aff", "##able")]
    assert vocabulary.lists(wrapped(["Únaffable", "the xunaff"])) == [
        [vocabulary.row("[CLS]"), *unaffable, vocabulary.row("[SEP]")],
        [vocabulary.row("[CLS]"), vocabulary.row("the"), vocabulary.row("[UNK]"), vocabulary.row("[SEP]")],
    ]
    assert vocabulary.text(vocabulary.rows(["the unaffable"])) == ["the unaffable"]
    path.write_text("one\ntwo\n")
    with pytest.raises(ValueError, match=r"has 2 lines and no \[UNK\]"):
        public_wordpiece(path)
