"""Pipeline: match -> rank -> rerank for many users at once. Rows in, rows out; knows no ids, files or HTTP.

    match    `candidates` items of the whole catalogue, by the matcher (or its fallback where nothing is known)
    rank     one logit for each of them, by the ranker; without a ranker the matcher's score stays
    rerank   the list as a whole: k of them, by the reranker; without one the k best

No step loops over candidates in Python; re-ranking is a short greedy loop over the k places of each list.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher, Reranker
from funnelrec.data.features import Features

__all__ = ["Pace", "Pipeline", "Ranked"]

RANKED_AT_ONCE = 65_536  #: (user, candidate) pairs that one forward pass of the ranker takes


@dataclass(frozen=True, slots=True)
class Ranked:
    """The answer for B users: best first, row 0 where fewer than k items qualify.

    `scores` are what the list was ordered by before re-ranking: logits of the ranker, else the matcher's scores;
    `match_scores` and `match_places` (0 = first) say what retrieval alone thought of the item, `rank_places` where the
    scores alone would have put it.
    """

    rows: Int[Tensor, "B k"]
    scores: Float[Tensor, "B k"]
    match_scores: Float[Tensor, "B k"]
    match_places: Int[Tensor, "B k"]
    rank_places: Int[Tensor, "B k"]


@runtime_checkable
class Pace(Protocol):
    """Somebody who waits for an answer, and is told how it goes."""

    def may_rank(self) -> bool:
        """Asked once retrieval is done; False leaves the candidates in its order."""
        ...

    def done(self, stage: str) -> None:
        """ "match", "rank" or "rerank" is done."""
        ...


class Pipeline:
    """The hot path of a funnel.

    `categories` int64 [N, G] and `vectors` float [N, D] of the items are what the reranker measures diversity on.
    """

    def __init__(
        self,
        *,
        features: Features,
        matcher: Matcher,
        ranker: nn.Module | None = None,
        categories: Int[Tensor, "N G"],
        vectors: Float[Tensor, "N D"],
        candidates: int = 500,
        max_len: int = 50,
    ) -> None:
        if candidates < 1:
            raise ValueError(f"candidates must be at least 1, received {candidates}")
        self.features = features
        self.matcher = matcher
        self.ranker = ranker
        self.categories = categories
        self.vectors = vectors
        self.candidates = candidates
        self.max_len = max_len

    def without_ranker(self) -> Pipeline:
        """The same matcher alone."""
        return Pipeline(
            features=self.features,
            matcher=self.matcher,
            categories=self.categories,
            vectors=self.vectors,
            candidates=self.candidates,
            max_len=self.max_len,
        )

    @torch.inference_mode()
    def run(
        self,
        batch: Batch,
        k: int,
        *,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
        context_ids: Int[Tensor, "B Cc"] | None = None,
        context_numbers: Float[Tensor, "B Mc"] | None = None,
        reranker: Reranker | None = None,
        pace: Pace | None = None,
    ) -> Ranked:
        """The k best items for each example of `batch` (`user`, `time`, `history`, `mask`, `history_times`).

        `reranker` is the pipeline's own or another one for this answer; None leaves the order of the scores. A `pace`
        hears of each stage and may leave out the ranker.
        """
        rows, match_scores = self.matcher.recommend(batch, max(k, self.candidates), exclude, allowed)  # (B, C)
        scores = match_scores
        if pace is not None:
            pace.done("match")
        if self.ranker is not None and (pace is None or pace.may_rank()):
            scores = self.rank(batch, rows, context_ids, context_numbers)
            scores = scores.masked_fill(rows == 0, -torch.inf)
            if pace is not None:
                pace.done("rank")
        elif self.ranker is not None:
            reranker = None  # its knob is in units of the ranker's scores
        by_score = scores.sort(dim=1, descending=True, stable=True).indices  # equal scores keep the matcher's order
        order = by_score[:, :k] if reranker is None else self._rerank(reranker, rows, scores, by_score, k)
        if pace is not None:
            pace.done("rerank")
        return Ranked(
            rows=rows.gather(1, order),
            scores=scores.gather(1, order),
            match_scores=match_scores.gather(1, order),
            match_places=order,
            rank_places=by_score.argsort(1).gather(1, order),
        )

    @torch.inference_mode()
    def rank(
        self, batch: Batch, rows: Tensor, context_ids: Tensor | None, context_numbers: Tensor | None
    ) -> Float[Tensor, "B C"]:
        """The ranker's logits of every candidate of every user."""
        assert self.ranker is not None
        count, width = rows.shape
        # Slots that are padding for everyone cost as much as real ones, so only the longest history is kept.
        length = min(self.max_len, max(1, int(batch.mask.sum(1).max())))
        history, mask, times = (t[:, -length:] for t in (batch.history, batch.mask, batch.history_times))
        history_ids = self.features.history_ids(history)
        users_at_once = max(1, RANKED_AT_ONCE // width)
        logits = []
        for start in range(0, count, users_at_once):
            part = slice(start, min(start + users_at_once, count))
            owner = torch.arange(part.start, part.stop).repeat_interleave(width)  # user of each pair
            gathered = self.features.gather(
                batch.user[owner],
                rows[part].flatten(),
                None if context_ids is None else context_ids[owner],
                None if context_numbers is None else context_numbers[owner],
            )
            pairs = Batch(
                **gathered,
                user=batch.user[owner],
                item=rows[part].flatten(),
                time=batch.time[owner],
                history=history[owner],
                mask=mask[owner],
                history_times=times[owner],
                history_ids=history_ids[owner],
            )
            logits.append(self.ranker(pairs).view(-1, width))
        return torch.cat(logits) if logits else rows.new_zeros(rows.shape, dtype=torch.float32)

    def _rerank(self, reranker: Reranker, rows: Tensor, scores: Tensor, order: Tensor, k: int) -> Int[Tensor, "B k"]:
        """Places of the chosen items, a list at a time; the filler of a short list stays behind its real items."""
        chosen = order[:, :k].clone()
        for i, (row, score, places) in enumerate(zip(rows, scores, order, strict=True)):
            places = places[row[places] > 0]
            if len(places) == 0:
                continue
            items = row[places]
            picked = reranker.rerank(score[places], k, categories=self.categories[items], vectors=self.vectors[items])
            chosen[i, : len(picked)] = places[picked]
        return chosen
