"""AnnoyIndex: approximate maximum inner product search by a forest of random projections, scored exactly.

Annoy: Bernhardsson, github.com/spotify/annoy.
What an index of proposals is, and what is done with its file: index/approximate.py.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.approximate import ApproximateIndex

__all__ = ["AnnoyIndex"]

TREES = 32
MARGIN = 1.25  #: annoy knows no filters: of the items that a filter lets pass, so many times more are fetched


def _annoy(dim: int) -> Any:
    try:
        import annoy
    except ImportError as error:
        raise ImportError(
            "AnnoyIndex needs annoy, which is not installed; pip install 'funnelrec[annoy]' or use ExactIndex"
        ) from error
    return annoy.AnnoyIndex(dim, "dot")


class AnnoyIndex(ApproximateIndex):
    """`effort` is how many nodes of the trees a search inspects."""

    KINDS: ClassVar[tuple[str, ...]] = ("trees",)
    FILE: ClassVar[str] = "index.annoy"

    @staticmethod
    def _require() -> None:
        _annoy(1)

    def _suited(self, count: int) -> str:
        return "trees"

    def _build(self) -> None:
        self._index = _annoy(self.vectors.shape[1])
        self._index.set_seed(1)
        for position, vector in enumerate(self.vectors[FIRST_KNOWN:].numpy()):
            self._index.add_item(position, vector)
        self._index.build(TREES, 1)  # one thread: more would make another forest each time

    def _efforts(self) -> tuple[int, int]:
        most = TREES * int(self._index.get_n_items())
        return min(1024, most), most

    def _propose(self, queries: np.ndarray, k: int, allowed: Tensor | None, effort: int) -> Int[Tensor, "Q k"]:
        count = int(self._index.get_n_items())
        share = 1.0 if allowed is None else float(allowed[FIRST_KNOWN:].float().mean())
        fetched = min(count, int(MARGIN * k / max(share, 1e-9)) if share < 1 else k)
        rows = torch.zeros(len(queries), k, dtype=torch.int64)
        if share == 0:
            return rows
        search = max(effort, effort * fetched // k)
        for place, query in enumerate(queries):
            found = torch.tensor(self._index.get_nns_by_vector(query, fetched, search), dtype=torch.int64) + FIRST_KNOWN
            if allowed is not None:
                found = found[allowed[found]]
            found = found[:k]
            rows[place, : len(found)] = found
        return rows

    def _content(self) -> bytes:
        with tempfile.TemporaryDirectory() as folder:  # the index goes on from its file, which stays mapped
            file = Path(folder) / self.FILE
            self._index.save(str(file))
            return file.read_bytes()

    def _restore(self, content: bytes) -> None:
        self._index = _annoy(self.vectors.shape[1])
        with tempfile.TemporaryDirectory() as folder:  # the bytes that were checked, and not what the file now holds
            file = Path(folder) / self.FILE
            file.write_bytes(content)
            self._index.load(str(file))
