"""word2vec: words that stand in the same places get vectors that lie close.

Paper: Mikolov, Chen, Corrado, Dean. Efficient estimation of word representations. 2013. arXiv:1301.3781 ·
       Mikolov, Sutskever, Chen, Corrado, Dean. Distributed representations. NIPS 2013. arXiv:1310.4546
Idea:  foretell the words around a word, each against a few that were drawn; what foretells alike means alike.

Eq. (1)  log σ(u_wᵀ v_c) + Σ_k log σ(−u_wᵀ v_k)                  core/nn/skipgram.py, which items share
Eq. (2)  a : b is as c : d, d = argmax cos(x, b − a + c), the u of length 1, a, b and c left out      Words.analogy
Eq. (3)  a text is Σ_w a / (a + p_w) u_w / n, p_w the share of w among all words                       Words.encode
Differs: training as in core/nn/skipgram.py; Eq. (3) is Arora, Liang, Ma (ICLR 2017), without the removal of a
    direction that all texts share: a linear layer behind can do that.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import load_file, save_file
from torch import Tensor

from funnelrec.core.nn.skipgram import SkipGram
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.encode.text.tokens import Tokens

__all__ = ["Words"]

WEIGHTS, VOCABULARY = "words.safetensors", "words.json"
RARE = 1e-3  #: a of Eq. (3)


@dataclass(frozen=True, eq=False)
class Words:
    """Words with their vectors [N, D] and how often each occurred [N]. Made by `learn_words` or `open`."""

    words: tuple[str, ...]
    vectors: Tensor
    counts: Tensor

    def __post_init__(self) -> None:
        if not len(self.words) == len(self.vectors) == len(self.counts):
            raise ValueError(
                f"each word needs a vector and a count, received {len(self.words)} words, {len(self.vectors)} vectors "
                f"and {len(self.counts)} counts"
            )
        object.__setattr__(self, "_rows", {word: row for row, word in enumerate(self.words)})
        object.__setattr__(self, "_unit", F.normalize(self.vectors, dim=1))

    def __contains__(self, word: str) -> bool:
        return word in self._rows  # type: ignore[attr-defined]

    def row(self, word: str) -> int:
        """Where a word stands. Raises KeyError for one there is not."""
        if word not in self:
            raise KeyError(f"there is no vector of {word!r} among {len(self.words)} words")
        return int(self._rows[word])  # type: ignore[attr-defined]

    def neighbours(self, word: str, k: int = 10) -> list[tuple[str, float]]:
        """The k nearest words by cosine, itself left out."""
        return self._nearest(self._unit[self.row(word)], [word], k)  # type: ignore[attr-defined]

    def analogy(self, a: str, b: str, c: str, k: int = 1) -> list[tuple[str, float]]:
        """What is to c as b is to a (Eq. (2)): analogy("man", "woman", "king")."""
        unit: Tensor = self._unit  # type: ignore[attr-defined]
        goal = unit[self.row(b)] - unit[self.row(a)] + unit[self.row(c)]
        return self._nearest(F.normalize(goal, dim=0), [a, b, c], k)

    def similarity(self, pairs: Sequence[tuple[str, str, float]]) -> tuple[float, float]:
        """Spearman's correlation of cosines with people's scores, over the pairs whose words are known, and the share
        of those pairs."""
        known = [(self.row(a), self.row(b), s) for a, b, s in pairs if a in self and b in self]
        if len(known) < 2:
            raise ValueError(f"a correlation needs two pairs of known words, received {len(known)} of {len(pairs)}")
        a, b, scores = (torch.tensor(column) for column in zip(*known, strict=True))
        unit: Tensor = self._unit  # type: ignore[attr-defined]
        return spearman((unit[a] * unit[b]).sum(1).double(), scores.double()), len(known) / len(pairs)

    def analogies(self, questions: Sequence[tuple[str, str, str, str]]) -> tuple[float, float]:
        """The share answered rightly of the questions whose four words are known, and the share of those."""
        rows = torch.tensor([[self.row(w) for w in q] for q in questions if all(w in self for w in q)]).view(-1, 4)
        if not len(rows):
            raise ValueError(f"no question has four known words, of {len(questions)} received")
        unit: Tensor = self._unit  # type: ignore[attr-defined]
        right = 0
        for part in torch.split(rows, 512):
            scores = (unit[part[:, 1]] - unit[part[:, 0]] + unit[part[:, 2]]) @ unit.T
            right += int((scores.scatter(1, part[:, :3], -torch.inf).argmax(1) == part[:, 3]).sum())
        return right / len(rows), len(rows) / len(questions)

    def rows_in(self, tokens: Tokens) -> tuple[Int[Tensor, "n"], Float[Tensor, "n D"]]:
        """The rows of another vocabulary whose words are known here, and their vectors: for `classifier.begin_from`."""
        pairs = [(row, self.row(word)) for row, word in enumerate(tokens.words) if row >= FIRST_KNOWN and word in self]
        own, here = torch.tensor(pairs, dtype=torch.int64).view(-1, 2).unbind(1)
        return own, self.vectors[here]

    def encode(self, texts: Sequence[Sequence[str]]) -> Float[Tensor, "B D"]:
        """Texts, given as their words, as the mean of their known words' directions, frequent ones counting less
        (Eq. (3)); zero for a text without any."""
        unit: Tensor = self._unit  # type: ignore[attr-defined]
        weight = RARE / (RARE + self.counts / self.counts.sum())
        lists = [[self.row(w) for w in text if w in self] for text in texts]
        flat = torch.tensor([r for rows in lists for r in rows], dtype=torch.int64)
        lengths = torch.tensor([len(rows) for rows in lists], dtype=torch.int64)
        place = torch.repeat_interleave(torch.arange(len(lists)), lengths)
        total = torch.zeros(len(lists), unit.shape[1]).index_add_(0, place, unit[flat] * weight[flat].unsqueeze(1))
        return total / lengths.clamp(min=1).unsqueeze(1)

    def save(self, folder: Path | str) -> Path:
        """Write vectors and counts as safetensors, words as JSON."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        save_file({"vectors": self.vectors.contiguous(), "counts": self.counts}, folder / WEIGHTS)
        (folder / VOCABULARY).write_text(json.dumps(self.words, ensure_ascii=False), encoding="utf-8")
        return folder

    @classmethod
    def open(cls, folder: Path | str) -> Words:
        """Read what `save` wrote."""
        tensors = load_file(Path(folder) / WEIGHTS)
        words = tuple(json.loads((Path(folder) / VOCABULARY).read_text(encoding="utf-8")))
        return cls(words, tensors["vectors"], tensors["counts"])

    def _nearest(self, goal: Tensor, but: Iterable[str], k: int) -> list[tuple[str, float]]:
        scores: Tensor = self._unit @ goal  # type: ignore[attr-defined]
        scores[[self.row(word) for word in but]] = -torch.inf
        best = scores.topk(min(k, len(scores)))
        return [
            (self.words[row], score) for score, row in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]


def learn_words(tokens: Tokens, texts: Int[Tensor, "E"], rows: Int[Tensor, "E"], train: SkipGram) -> Words:
    """Vectors of all known words from a corpus as one stream: the text each token stands in, ascending, and its row.

    Padding, the unknown and special tokens of the corpus are left out before windows are laid.
    """
    real = rows >= FIRST_KNOWN
    texts, rows = texts[real], rows[real]
    if not len(rows):
        raise ValueError("the corpus has no known word; learn the vocabulary from it first")
    known, numbered = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
    place = texts.unique_consecutive(return_inverse=True)[1]  # type: ignore[no-untyped-call]
    vectors, _, _ = train(place, numbered)
    words = tokens.words
    return Words(tuple(words[row] for row in known.tolist()), vectors, torch.bincount(numbered))


def spearman(a: Float[Tensor, "n"], b: Float[Tensor, "n"]) -> float:
    """The correlation of the ranks, ties at the mean of their ranks."""
    ranks = torch.stack([_ranks(a), _ranks(b)])
    return float(torch.corrcoef(ranks)[0, 1])


def _ranks(x: Tensor) -> Tensor:
    _, place, counts = x.unique(return_inverse=True, return_counts=True)  # type: ignore[no-untyped-call]
    last = counts.cumsum(0).double()
    ranks: Tensor = (last - (counts - 1) / 2)[place]
    return ranks
