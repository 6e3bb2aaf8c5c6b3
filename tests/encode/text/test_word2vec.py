"""word2vec: planted synonyms and analogies, the two evaluations by hand, saving."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from scipy.stats import spearmanr

from funnelrec.core.nn.skipgram import SkipGram
from funnelrec.encode.text.tokens import Tokens
from funnelrec.encode.text.word2vec import Words, learn_words, spearman


def some(*vectors: list[float], counts: list[int] | None = None) -> Words:
    names = tuple("abcdefgh"[: len(vectors)])
    return Words(names, torch.tensor(vectors), torch.tensor(counts or [1] * len(vectors)))


def planted() -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """8 groups of 6 words; a text is 5 words of one group and ones that stand everywhere."""
    g = torch.Generator().manual_seed(0)
    group = torch.randint(0, 8, (3000, 1), generator=g)
    word = 6 * group + torch.randint(0, 6, (3000, 5), generator=g)
    everywhere = 48 + torch.randint(0, 3, (3000, 5), generator=g)
    rows = torch.stack([word, everywhere], 2).flatten(1)  # (3000, 10)
    tokens = Tokens.learn([" ".join(f"w{i:02d}" for i in range(51))], kind="spaces")
    return tokens, torch.arange(3000).repeat_interleave(10), rows.flatten() + 2


@pytest.mark.parametrize("shared", [None, 32])
def test_words_of_a_group_are_neighbours(shared: int | None) -> None:
    tokens, texts, rows = planted()
    train = SkipGram(embedding_dim=16, window=4, ordered=True, subsample=0.01, shared=shared, epochs=3, batch_size=512)
    words = learn_words(tokens, texts, rows, train)
    right = sum(
        int(near[1:]) // 6 == int(word[1:]) // 6 for word in words.words[:48] for near, _ in words.neighbours(word, 5)
    )
    assert right / (48 * 5) >= 0.95
    assert len(words.words) == 51
    assert int(words.counts.sum()) == len(rows)


def test_unknown_words_are_left_out() -> None:
    tokens, texts, rows = planted()
    rows[::3] = 1
    words = learn_words(tokens, texts, rows, SkipGram(embedding_dim=4, epochs=1))
    assert "<unk>" not in words and "<pad>" not in words
    with pytest.raises(ValueError, match="no known word"):
        learn_words(tokens, texts, torch.ones_like(rows), SkipGram())


def test_an_analogy_by_hand() -> None:
    """b - a + c = (0, 1, 1): e lies on it, and d only nearly; b itself, which is nearer than d, may not answer."""
    words = some([1.0, 0, 0], [1.0, 1, 0], [0.0, 0, 1], [0.0, 1, 0.2], [0.0, 3, 3.0])
    unit = torch.nn.functional.normalize(words.vectors, dim=1)
    goal = torch.nn.functional.normalize(unit[1] - unit[0] + unit[2], dim=0)
    answer = words.analogy("a", "b", "c", k=2)
    assert [w for w, _ in answer] == ["e", "d"]
    assert answer[0][1] == pytest.approx(float(unit[4] @ goal), rel=1e-5)
    right, covered = words.analogies([("a", "b", "c", "e"), ("a", "b", "c", "d"), ("a", "b", "zebra", "e")])
    assert (right, covered) == (0.5, pytest.approx(2 / 3))
    assert [w for w, _ in words.neighbours("e", 2)] == ["d", "c"]


def test_spearman_is_scipys_with_ties_too() -> None:
    g = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = (torch.randint(0, 9, (40,), generator=g).double() for _ in range(2))
        assert spearman(a, b) == pytest.approx(spearmanr(a.numpy(), b.numpy()).statistic)


def test_similarity_is_over_known_pairs() -> None:
    words = some([1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [-1.0, 0.0])
    pairs = [("a", "b", 9.0), ("a", "c", 5.0), ("a", "d", 1.0), ("a", "zebra", 7.0)]
    assert words.similarity(pairs) == (pytest.approx(1.0), 0.75)
    with pytest.raises(ValueError, match="two pairs of known words, received 1 of 1"):
        words.similarity(pairs[:1])


def test_a_text_is_the_weighed_mean_of_its_words() -> None:
    words = some([2.0, 0.0], [0.0, 3.0], counts=[999, 1])
    a, b = 1e-3 / (1e-3 + 0.999), 1e-3 / (1e-3 + 0.001)
    got = words.encode([["a", "b", "zebra"], ["b"], []])
    torch.testing.assert_close(got, torch.tensor([[a / 2, b / 2], [0.0, b], [0.0, 0.0]]))


def test_saved_words_are_the_same_words(tmp_path: Path) -> None:
    words = some([2.0, 0.0], [0.0, 3.0], counts=[5, 2])
    again = Words.open(words.save(tmp_path / "words"))
    assert again.words == words.words
    assert torch.equal(again.vectors, words.vectors) and torch.equal(again.counts, words.counts)


def test_vectors_find_their_rows_in_another_vocabulary() -> None:
    words = some([2.0, 0.0], [0.0, 3.0], [1.0, 1.0])
    tokens = Tokens.learn(["c c x a a a"], kind="spaces")
    rows, vectors = words.rows_in(tokens)
    assert [tokens.words[r] for r in rows.tolist()] == ["a", "c"]
    assert torch.equal(vectors, words.vectors[[0, 2]])


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(KeyError, match="no vector of 'zebra' among 1 words"):
        some([1.0]).row("zebra")
    with pytest.raises(ValueError, match="received 1 words, 2 vectors and 1 counts"):
        Words(("a",), torch.ones(2, 3), torch.tensor([1]))
    with pytest.raises(ValueError, match="no question has four known words, of 1 received"):
        some([1.0]).analogies([("a", "b", "c", "d")])
