"""FaissIndex: approximate maximum inner product search for large catalogues by faiss, scored exactly.

Faiss: Douze et al. The Faiss library. 2024. arXiv:2401.08281. HNSW: Malkov, Yashunin. 2016. arXiv:1603.09320.
Products as distances: Bachrach et al. Speeding up the Xbox recommender system. RecSys 2014.
What an index of proposals is, and what is done with its file: index/approximate.py.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.approximate import SAMPLE_K, ApproximateIndex

__all__ = ["FaissIndex"]

FLAT_UP_TO = 20_000  #: items up to which the exhaustive index is the quickest that is exact
LEVELS = 16  #: that a number of an item in a list can have
WIDER = 2  #: lists propose so many times more than is asked for: four bits a number order items roughly
POINTS, ROUNDS = 48, 5  #: of k-means: vectors a list that it looks at, and rounds; more changes the lists little


def _faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise ImportError(
            "FaissIndex needs faiss, which is not installed; pip install 'funnelrec[faiss]' or use ExactIndex"
        ) from error
    return faiss


class FaissIndex(ApproximateIndex):
    """`kind`: "flat" (exact), "ivf" (inverted lists of half bytes), "hnsw" (graph); None: flat to 20,000, then ivf.

    `effort` is how many lists are visited, or how broadly the graph is searched.
    """

    KINDS: ClassVar[tuple[str, ...]] = ("flat", "ivf", "hnsw")
    FILE: ClassVar[str] = "index.faiss"

    @staticmethod
    def _require() -> None:
        _faiss()

    def _suited(self, count: int) -> str:
        return "flat" if count <= FLAT_UP_TO else "ivf"

    def _build(self) -> None:
        faiss = _faiss()
        known = self.vectors[FIRST_KNOWN:].numpy()
        count, dim = known.shape
        if self.kind == "flat":
            self._index = faiss.IndexFlatIP(dim)
        elif self.kind == "ivf":
            lists = max(1, min(int(4 * math.sqrt(count)), count // 39))  # faiss wants 39 vectors a list to train
            if count < LEVELS:
                raise ValueError(f"kind 'ivf' needs at least {LEVELS} items, received {count}; use kind='flat'")
            # four bits a number, of what is left of an item without its list's centre: a visit reads an eighth of the
            # memory, by look-ups within registers; twice as many items are proposed, as their scores are computed anew
            self._index = faiss.IndexIVFPQFastScan(
                faiss.IndexFlatIP(dim), dim, lists, dim, 4, faiss.METRIC_INNER_PRODUCT
            )
            self._index.by_residual = True
            self._index.cp.max_points_per_centroid, self._index.cp.niter = POINTS, ROUNDS
            self._index.train(known)
        else:
            # among products a graph has items that no path leads to, and a recall that no effort lifts
            self._index = faiss.IndexHNSWFlat(dim + 1, 32, faiss.METRIC_L2)
            self._index.hnsw.efConstruction = 100
            known = _as_distances(known)
        self._index.add(known)

    def _efforts(self) -> tuple[int, int]:
        most = {"flat": 1, "ivf": getattr(self._index, "nlist", 1), "hnsw": 2 * int(self._index.ntotal)}[self.kind]
        return min(SAMPLE_K if self.kind == "hnsw" else 8, most), most

    def _propose(self, queries: np.ndarray, k: int, allowed: Tensor | None, effort: int) -> Int[Tensor, "Q m"]:
        faiss = _faiss()
        options: dict[str, Any] = {}
        if allowed is not None:
            bits = np.packbits(allowed[FIRST_KNOWN:].numpy(), bitorder="little")
            options["sel"] = faiss.IDSelectorBitmap(bits)
        if self.kind == "ivf":
            parameters = faiss.SearchParametersIVF(nprobe=effort, **options)
            k = min(WIDER * k, int(self._index.ntotal))
        elif self.kind == "hnsw":
            parameters = faiss.SearchParametersHNSW(efSearch=max(effort, k), **options)
            queries = np.pad(queries, ((0, 0), (0, 1)))
        else:
            parameters = faiss.SearchParameters(**options)
        _, positions = self._index.search(np.ascontiguousarray(queries, dtype=np.float32), k, params=parameters)
        rows = torch.from_numpy(positions)
        return torch.where(rows >= 0, rows + FIRST_KNOWN, 0)

    def _content(self) -> bytes:
        content: bytes = _faiss().serialize_index(self._index).tobytes()
        return content

    def _restore(self, content: bytes) -> None:
        self._index = _faiss().deserialize_index(np.frombuffer(content, dtype=np.uint8))


def _as_distances(vectors: np.ndarray) -> np.ndarray:
    """[N, D] → [N, D + 1], all of one length: the nearest to (query, 0) has the largest product with the query."""
    squared = np.square(vectors).sum(1, keepdims=True)
    return np.concatenate([vectors, np.sqrt(squared.max() - squared)], axis=1)
