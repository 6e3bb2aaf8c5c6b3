"""ApproximateIndex: what indexes have in common that propose candidates, which are then scored exactly.

The vectors are the truth. A library proposes candidates, whose scores are then computed from the vectors, so scores and
order are those of `ExactIndex`; only an item that was not proposed can be missing (`recall` says how often).
A saved index file is a cache: libraries read hostile files unsafely, so the file is read only when its SHA-256 matches
the digest beside it, and otherwise built anew.
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.exact import ExactIndex, checked_vectors
from funnelrec.match.index.topk import top_rows

__all__ = ["ApproximateIndex"]

SAMPLE, SAMPLE_K = 64, 100  #: queries drawn from the items, and length of the lists, on which recall is measured
USERS = 256  #: at most of those given, evenly spaced
NOISE = 0.25  #: of those queries, against the size of the item vectors they are drawn around
TARGET_RECALL = 0.95
NUMBERS_AT_ONCE = 2**24  #: gathered vector entries alive at a time, 64 MiB
FORMAT = 2

_Index = TypeVar("_Index", bound="ApproximateIndex")


class ApproximateIndex(ABC):
    """`vectors` [N, D] belong to item rows 0..N-1; `kind` names the structure, None takes what suits their number.

    `recall`: measured share of the true best 100 that searches find; the `effort` of a search is the least for which
    it is `target`. It is measured for `queries`, the vectors of real users (256 of them at most), or, where none are
    given, for queries drawn from the item vectors with noise. These are harder: users then get more than was asked
    for, more slowly. Raises ValueError for queries of another width or a target outside (0, 1].
    """

    KINDS: ClassVar[tuple[str, ...]]
    FILE: ClassVar[str]  #: of the cache
    effort: int
    recall: float

    def __init__(
        self,
        vectors: Float[Tensor, "N D"],
        kind: str | None = None,
        *,
        queries: Float[Tensor, "U K _"] | None = None,
        target: int | float = TARGET_RECALL,
    ) -> None:
        self._start(vectors, kind)
        if queries is not None and (len(queries) == 0 or queries.shape[2] != self.vectors.shape[1]):
            raise ValueError(
                f"queries must be [users, interests, {self.vectors.shape[1]}] with one user at least, "
                f"received {list(queries.shape)}"
            )
        if not 0 < target <= 1:
            raise ValueError(f"target is a recall above 0 and at most 1, received {target}")
        self._build()
        self.effort, self.recall = self._tuned(queries, target)

    def _start(self, vectors: Tensor, kind: str | None) -> None:
        if kind is not None and kind not in self.KINDS:
            raise ValueError(f"kind must be one of {', '.join(self.KINDS)} or None, received {kind!r}")
        self._require()
        self.vectors = checked_vectors(vectors)
        self.kind = kind or self._suited(len(self.vectors) - FIRST_KNOWN)
        self._exact = ExactIndex(self.vectors)

    # -------------------------------------------------------------------------------------- what a library has to do
    @staticmethod
    @abstractmethod
    def _require() -> None:
        """Raise ImportError with the way to install the library where it is missing."""

    @abstractmethod
    def _suited(self, count: int) -> str:
        """The kind for so many items."""

    @abstractmethod
    def _build(self) -> None:
        """Index `self.vectors`; position n of the library's index is item row n + 2."""

    @abstractmethod
    def _efforts(self) -> tuple[int, int]:
        """The least effort to try and the largest there is."""

    @abstractmethod
    def _propose(self, queries: np.ndarray, k: int, allowed: Tensor | None, effort: int) -> Int[Tensor, "Q m"]:
        """m ≥ k item rows for each query; 0 where fewer were found."""

    @abstractmethod
    def _content(self) -> bytes:
        """The library's index as bytes."""

    @abstractmethod
    def _restore(self, content: bytes) -> None:
        """The inverse, of bytes that were checked."""

    # -------------------------------------------------------------------------------------------------------- search
    @torch.no_grad()
    def _tuned(self, queries: Tensor | None, target: int | float) -> tuple[int, float]:
        """The least effort, to a sixteenth, that finds `target` of the best, and the recall that it reached."""
        if queries is None:
            queries = self._drawn()
        else:
            chosen = torch.linspace(0, len(queries) - 1, min(USERS, len(queries))).round().long()
            queries = queries[chosen].detach().float()
        valid = torch.ones(queries.shape[:2], dtype=torch.bool)
        k = min(SAMPLE_K, len(self.vectors) - FIRST_KNOWN)
        truth, _ = self._exact.search(queries, valid, k)
        tried: dict[int, float] = {}

        def enough(effort: int) -> bool:
            self.effort = effort
            found, _ = self._best(queries, valid, k, k, None, None)
            tried[effort] = float((truth.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean())
            return tried[effort] >= target

        low, (high, most) = 0, self._efforts()
        while not enough(high) and high < most:
            low, high = high, min(2 * high, most)
        while high - low > max(1, high // 16) and low > 0:
            middle = (low + high) // 2
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high, tried[high]

    def _drawn(self) -> Float[Tensor, "S 1 D"]:
        """Queries around item vectors."""
        generator = torch.Generator().manual_seed(0)
        count = len(self.vectors) - FIRST_KNOWN
        near = self.vectors[FIRST_KNOWN + torch.randint(count, (min(SAMPLE, count),), generator=generator)]
        noise = torch.randn(near.shape, generator=generator) * near.square().mean().sqrt()
        return (near + NOISE * noise).unsqueeze(1)

    @torch.no_grad()
    def search(
        self,
        queries: Float[Tensor, "B K D"],
        valid: Bool[Tensor, "B K"],
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """As `ExactIndex.search`. A user whose list the proposals leave short is searched exactly."""
        count, interests, dim = queries.shape
        if dim != self.vectors.shape[1]:
            raise ValueError(f"queries are {dim} wide but item vectors {self.vectors.shape[1]}; use one model for both")
        if k < 1:
            raise ValueError(f"k must be at least 1, received {k}")
        # each query alone must be able to fill the list after the user's exclusions
        fetched = min(k + (0 if exclude is None else exclude.shape[1]), len(self.vectors) - FIRST_KNOWN)
        at_once = max(1, NUMBERS_AT_ONCE // (2 * interests * fetched * dim))  # up to twice as many are proposed
        rows = torch.zeros(count, k, dtype=torch.int64)
        scores = torch.full((count, k), -torch.inf)
        for start in range(0, count, at_once):
            part = slice(start, start + at_once)
            skipped = None if exclude is None else exclude[part]
            found, values = self._best(queries[part], valid[part], k, fetched, skipped, allowed)
            rows[part, : found.shape[1]], scores[part, : found.shape[1]] = found, values
        short = ((scores[:, -1] == -torch.inf) & valid.any(1)).nonzero().squeeze(1)
        if len(short):
            skipped = None if exclude is None else exclude[short]
            rows[short], scores[short] = self._exact.search(queries[short], valid[short], k, skipped, allowed)
        return rows, scores

    def _best(
        self, queries: Tensor, valid: Tensor, k: int, fetched: int, exclude: Tensor | None, allowed: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The k best (all, where there are fewer) of what is proposed, with exact scores."""
        count, interests, dim = queries.shape
        found = self._propose(queries.reshape(-1, dim).numpy(), fetched, allowed, self.effort)
        found = found.view(count, interests, -1).masked_fill(~valid.unsqueeze(2), 0)
        rows = found.flatten(1).sort(dim=1).values  # (b, M), equal rows side by side
        vectors = F.embedding(rows, self.vectors)  # (b, M, D); indexing takes ten times as long
        products = queries @ vectors.transpose(1, 2)  # (b, K, M)
        scores = products.masked_fill(~valid.unsqueeze(2), -torch.inf).amax(1)
        never = rows == 0
        never[:, 1:] |= rows[:, 1:] == rows[:, :-1]  # an item counts once, with its best interest
        if exclude is not None and exclude.shape[1]:
            ordered = exclude.sort(dim=1).values
            place = torch.searchsorted(ordered, rows).clamp(max=ordered.shape[1] - 1)
            never |= ordered.gather(1, place) == rows
        places, scores = top_rows(scores.masked_fill(never, -torch.inf), min(k, rows.shape[1]))
        return rows.gather(1, places).masked_fill(scores == -torch.inf, 0), scores

    # --------------------------------------------------------------------------------------------------------- cache
    def save(self, folder: Path | str) -> None:
        """Write the cache into `folder`: the library's file and `index.json`. The vectors are kept by the caller."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        content = self._content()
        about = {
            "format": FORMAT,
            "kind": self.kind,
            "effort": self.effort,
            "recall": self.recall,
            "index": hashlib.sha256(content).hexdigest(),
            "vectors": _digest(self.vectors),
        }
        _write(folder / self.FILE, content)
        _write(folder / "index.json", json.dumps(about, indent=1).encode())

    @classmethod
    def load(
        cls: type[_Index],
        folder: Path | str,
        vectors: Float[Tensor, "N D"],
        kind: str | None = None,
        *,
        queries: Float[Tensor, "U K _"] | None = None,
    ) -> _Index:
        """The index of `vectors`, from the cache where that fits them bit for bit, else built anew with a warning.

        `queries` matter only then.
        """
        folder, made = Path(folder), cls.__new__(cls)
        made._start(vectors, kind)
        reason = made._read(folder, kind)
        if reason is not None:
            warnings.warn(f"the index cache in {folder} {reason}; it is built anew from the vectors", stacklevel=2)
            made.__init__(vectors, kind, queries=queries)  # type: ignore[misc]
        return made

    def _read(self, folder: Path, kind: str | None) -> str | None:
        """Take the cache over, or say what is wrong with it. The library gets no byte before the digests match."""
        try:
            about = json.loads((folder / "index.json").read_bytes())
            content = (folder / self.FILE).read_bytes()
        except (OSError, ValueError) as error:
            return f"cannot be read ({type(error).__name__})"
        if not isinstance(about, dict) or about.get("format") != FORMAT or about.get("kind") not in self.KINDS:
            return "has an unknown format"
        if about.get("index") != hashlib.sha256(content).hexdigest():
            return "does not match its digest"
        if about.get("vectors") != _digest(self.vectors):
            return "belongs to other vectors"
        if kind is not None and about["kind"] != kind:
            return f"is of kind '{about['kind']}', not '{kind}'"
        effort, recall = about.get("effort"), about.get("recall")
        if not isinstance(effort, int) or not isinstance(recall, float) or effort < 1:
            return "has an unknown format"
        self.kind, self.effort, self.recall = about["kind"], effort, recall
        self._restore(content)
        return None


def _digest(vectors: Tensor) -> str:
    shape = "x".join(str(n) for n in vectors.shape)
    return hashlib.sha256(shape.encode() + b":" + vectors.numpy().tobytes()).hexdigest()


def _write(path: Path, content: bytes) -> None:
    """Under a temporary name first, so that a reader finds the old file or the new one and nothing between."""
    temporary = path.with_name(path.name + ".part")
    with temporary.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
