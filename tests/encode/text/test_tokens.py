"""Tokens: rows by count, five ways to cut a text, and what comes back after saving."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest
import torch

from funnelrec.data.batches import Batches
from funnelrec.encode.text.tokens import Kind, TextExamples, Tokens, text_mask

TEXTS = ["The cat saw the cat.", "the DOG didn't see it"]


def test_rows_are_ordered_by_count_then_by_word() -> None:
    tokens = Tokens.learn(TEXTS, special=("<s>",))
    assert tokens.words[:5] == ["<pad>", "<unk>", "<s>", "the", "cat"]
    assert sorted(tokens.words[5:]) == tokens.words[5:] == [".", "didn't", "dog", "it", "saw", "see"]
    assert tokens.rows(["the cat <s> barked", ""]).tolist() == [[3, 4, 2, 1], [0, 0, 0, 0]]
    assert tokens.row("dog") == 7
    assert "dog" in tokens and "Dog" not in tokens
    assert text_mask(tokens.rows(["the cat", "the"])).tolist() == [[True, True], [True, False]]
    assert tokens.rows([""]).shape == (1, 1), "a text without a token is one slot of padding"


def test_rare_words_and_words_beyond_the_size_are_unknown() -> None:
    assert Tokens.learn(TEXTS, min_count=2).words == ["<pad>", "<unk>", "the", "cat"]
    assert Tokens.learn(TEXTS, size=3).words == ["<pad>", "<unk>", "the"]


def test_spaces_keep_what_is_split_already() -> None:
    tokens = Tokens.learn(["it 's <unk> , fine\n"], kind="spaces")
    assert tokens.rows(["it 's <unk> , fine"]).tolist() == [[tokens.row(w) for w in ("it", "'s", "<unk>", ",", "fine")]]


@pytest.mark.parametrize("kind", get_args(Kind))
def test_saved_tokens_are_the_same_tokens(kind: Kind, tmp_path: Path) -> None:
    texts = [*TEXTS, "äöü – naïve\nsecond line"]
    tokens = Tokens.learn(texts, kind=kind, size=400)
    again = Tokens.open(tokens.save(tmp_path / "tokens.json"))
    assert again.digest == tokens.digest != Tokens.learn(TEXTS, kind=kind, size=380).digest
    assert torch.equal(again.rows(texts), tokens.rows(texts))
    assert len(again) == len(tokens) == len(tokens.words)


@pytest.mark.parametrize("kind", ["characters", "bpe"])
def test_a_text_comes_back_as_it_was(kind: Kind) -> None:
    text = "To be,\n  or not — to be?"
    tokens = Tokens.learn([text], kind=kind, size=300)
    assert tokens.text(tokens.stream(text).unsqueeze(0)) == [text]


def test_words_come_back_with_single_spaces() -> None:
    tokens = Tokens.learn(TEXTS)
    assert tokens.text(tokens.rows(["the  dog saw", "it"])) == ["the dog saw", "it"]


def test_pieces_of_a_word_come_back_as_the_word() -> None:
    tokens = Tokens.learn(["low lower lowest newer newest wide wider widest"] * 9, kind="wordpiece", size=40)
    assert tokens.text(tokens.rows(["lower widest"])) == ["lower widest"]
    assert tokens.rows(["newester"]).shape[1] > 1, "an unseen word is cut into pieces"


def test_examples_are_padded_to_the_longest_of_the_batch() -> None:
    tokens = Tokens.learn(TEXTS)
    examples = TextExamples(tokens, ["the", "the cat", "", "the cat saw it"], torch.tensor([3, 2, 1, 0]), max_len=3)
    short, long = Batches(examples, 2).epoch(0)
    assert short.text.tolist() == [[2, 0], [2, 3]]
    assert long.text.shape == (2, 3) and not long.text[0].any()
    assert long.label.tolist() == [1, 0]
    assert "label" not in next(Batches(TextExamples(tokens, TEXTS), 2).epoch(0))


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ValueError, match=r"kind must be one of words, .*received 'letters'"):
        Tokens.learn(TEXTS, kind="letters")
    with pytest.raises(ValueError, match="size counts all rows, 3 special ones too"):
        Tokens.learn(TEXTS, size=3, special=("<s>",))
    with pytest.raises(ValueError, match="must differ from each other"):
        Tokens.learn(TEXTS, special=("<pad>",))
    with pytest.raises(KeyError, match="has no 'zebra'"):
        Tokens.learn(TEXTS).row("zebra")
    with pytest.raises(ValueError, match="2 texts need as many labels, received 1"):
        TextExamples(Tokens.learn(TEXTS), TEXTS, torch.tensor([1]))
