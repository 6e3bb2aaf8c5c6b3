"""The protocol: how a model is measured, the same way for every model.

Matchers rank the whole catalogue; there are no sampled negatives, because sampled metrics order models differently.
Equal scores count against the model, so a scorer that cannot tell items apart scores at chance or below. Every result
carries a digest of the questions asked, and results of different questions refuse to be compared.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher, Ranker, VectorMatcher
from funnelrec.core.nn.linear import linear
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.evaluate import metrics
from funnelrec.evaluate.significance import PairedAUC, PairedTest, paired_auc_difference, paired_test

__all__ = [
    "EpochSource",
    "MatchResult",
    "QuerySource",
    "RankResult",
    "compare",
    "compare_rankers",
    "evaluate_matcher",
    "evaluate_ranker",
    "full_rank",
    "require_comparable",
]

Ties = Literal["conservative", "as_ranked"]


@runtime_checkable
class QuerySource(Protocol):
    """What `evaluate_matcher` asks of its questions; `data.examples.Queries` is one.

    One row a user: `gather` gives a batch with `user`, `history` and `mask`, all as of the moment being asked about;
    `relevant` is a CSR (offsets int64 [n + 1], items int64) of what the user did next, each item once; `seen` gives the
    item rows from before that moment, 0 padded. `fingerprint` or `dataset.fingerprint`, if present, names the split.
    """

    @property
    def relevant(self) -> tuple[Any, Any]: ...

    def __len__(self) -> int: ...

    def gather(self, index: Tensor) -> Batch: ...

    def seen(self, index: Tensor) -> Tensor: ...


@runtime_checkable
class EpochSource(Protocol):
    """Batches that are asked for epoch by epoch; `data.batches.Batches` is one."""

    def epoch(self, number: int) -> Iterator[Batch]: ...


# ------------------------------------------------------------------------------------------------------ results
@dataclass(frozen=True)
class MatchResult:
    """Per-user metrics of one matcher; a line per user that had something to find.

    `metrics["recall@10"]` is float32 [U]; `user` int64 [U]; `history_length` int64 [U].
    `item_slices["items seen in training"]["recall@10"]` is the same metric when only such targets count, NaN for users
    without one. `beyond` holds numbers of the lists as a whole: coverage@k, novelty@k (bits), diversity@k, and the same
    per user, where there is a value per user, stands in `per_list`.
    `queries` digests the questions, `split` is the fingerprint of the data's split ("" if unknown).
    """

    ks: tuple[int, ...]
    user: Int[np.ndarray, "U"]
    metrics: Mapping[str, Float[np.ndarray, "U"]]
    history_length: Int[np.ndarray, "U"]
    item_slices: Mapping[str, Mapping[str, Float[np.ndarray, "U"]]]
    beyond: Mapping[str, float]
    per_list: Mapping[str, Float[np.ndarray, "U"]]
    queries: str
    split: str
    exclude_seen: bool
    ties: str
    skipped: int
    seconds: float
    short: int = 10

    @property
    def means(self) -> dict[str, float]:
        """The mean of each metric over users, then the numbers of `beyond`."""
        return {name: float(v.mean(dtype=np.float64)) for name, v in self.metrics.items()} | dict(self.beyond)

    def slices(self) -> dict[str, dict[str, Float[np.ndarray, "..."]]]:
        """Metrics of parts of the users (by length of history) and of parts of the targets (warm, cold items)."""
        length, short = self.history_length, self.short
        parts = {
            "no history": length == 0,
            f"history of 1–{short}": (length > 0) & (length <= short),
            f"history over {short}": length > short,
        }
        result = {name: {m: v[part] for m, v in self.metrics.items()} for name, part in parts.items() if part.any()}
        for name, values in self.item_slices.items():
            kept = {m: v[~np.isnan(v)] for m, v in values.items()}
            if all(v.size for v in kept.values()):
                result[name] = kept
        return result


@dataclass(frozen=True)
class RankResult:
    """Rows scored by one ranker: float32 `logits` and `labels` [n], int64 `user` [n] (None if the data has none).

    `user` tells people apart, also those whom training never saw: it is the batch's `person` where there is one.
    `parts` are rows of their own interest: which belong to items that training saw, which to new ones.
    """

    logits: Float[np.ndarray, "n"]
    labels: Float[np.ndarray, "n"]
    user: Int[np.ndarray, "n"] | None
    queries: str
    split: str
    seconds: float
    means: Mapping[str, float] = field(default_factory=dict)
    parts: Mapping[str, Bool[np.ndarray, "n"]] = field(default_factory=dict)

    @classmethod
    def of(
        cls,
        logits: Float[np.ndarray, "n"],
        labels: Float[np.ndarray, "n"],
        user: Int[np.ndarray, "n"] | None,
        *,
        parts: Mapping[str, Bool[np.ndarray, "n"]] | None = None,
        split: str = "",
        seconds: float = 0.0,
        bins: int = 15,
    ) -> RankResult:
        """Measure given scores, e.g. those of an oracle; `bins` of the calibration error.

        Raises ValueError for labels other than 0 and 1, or logits that are not finite.
        """
        if not np.isfinite(logits).all():
            raise ValueError(
                f"{int((~np.isfinite(logits)).sum())} of {logits.size} logits are not finite; mend the model"
            )
        means = {
            "auc": metrics.auc(labels, logits),
            "log_loss": metrics.log_loss(labels, logits),
            "normalised_entropy": metrics.normalised_entropy(labels, logits),
            "ece": metrics.ece(labels, metrics.sigmoid(logits), bins),
        }
        if user is not None:
            means["gauc"] = metrics.gauc(labels, logits, user)
        queries = _digest(labels) if user is None else _digest(labels, user)
        return cls(logits, labels, user, queries, split, seconds, means, parts or {})

    @property
    def probabilities(self) -> Float[np.ndarray, "n"]:
        """Predicted probabilities, float64 [n]."""
        return metrics.sigmoid(self.logits)


# ----------------------------------------------------------------------------------------------------- matchers
@torch.inference_mode()
def evaluate_matcher(
    matcher: Matcher,
    queries: QuerySource,
    *,
    ks: Sequence[int] = (10, 50),
    batch_size: int = 1024,
    exclude_seen: bool = True,
    ties: Ties = "conservative",
    item_counts: Int[np.ndarray, "N"] | None = None,
    item_attribute: Int[np.ndarray, "N G"] | None = None,
    split: str = "",
    short: int = 10,
) -> MatchResult:
    """Rank the catalogue for each query, batch after batch; only per-user numbers are kept.

    `item_counts[n]`: training events of item row n; gives coverage, novelty and the slices of warm and cold targets
    (cold: never in training). `item_attribute`: int64 [N, G], gives diversity. `ties="as_ranked"` trusts the order of
    lists whose scores say nothing (a re-ranker's). `split`: the fingerprint of the split; taken from the queries when
    they have one. Users without relevant items are left out and counted in `skipped`.
    Raises ValueError if the matcher breaks its contract or there is no user left.
    """
    began = time.perf_counter()
    ks = _require_ks(ks)
    offsets, items = (np.asarray(part, dtype=np.int64) for part in queries.relevant)
    chosen = np.flatnonzero(np.diff(offsets) > 0)
    tally = _Tally(chosen.size, ks, ties, item_counts, item_attribute)
    if not chosen.size:
        raise ValueError(f"none of the {len(queries)} queries has a relevant item; is this part of the split empty?")
    with _evaluating(matcher) as device:
        for start in range(0, chosen.size, batch_size):
            rows = chosen[start : start + batch_size]
            index = torch.from_numpy(rows)
            batch = queries.gather(index)
            exclude = queries.seen(index) if exclude_seen else None
            if device is not None:
                batch, exclude = batch.to(device), None if exclude is None else exclude.to(device)
            # one place more than is wanted, so that a tie across the cut is seen
            ranked, scores = matcher.recommend(batch, ks[-1] + 1, exclude)
            tally.add(start, batch, ranked.cpu().numpy(), scores.float().cpu().numpy(), *_rows_of(offsets, items, rows))
    return MatchResult(
        ks=ks,
        queries=_digest(chosen, tally.kept["user"], offsets, items),
        split=split or _split_of(queries),
        exclude_seen=exclude_seen,
        ties=ties,
        skipped=len(queries) - chosen.size,
        seconds=time.perf_counter() - began,
        short=short,
        **tally.results(),
    )


@torch.inference_mode()
def full_rank(
    model: VectorMatcher,
    queries: QuerySource,
    num_items: int,
    *,
    batch_size: int = 1024,
    exclude_seen: bool = True,
    max_scores: int = 16_000_000,
) -> Int[np.ndarray, "R"]:
    """The exact rank, 1 = best, of every relevant item among all real items, ties against it.

    Returns one rank per entry of `queries.relevant`'s items. `num_items` counts rows 0 and 1. A user's score of an item
    is the best over the valid interests. Targets that are no real item (rows 0 and 1) rank last, as do all targets of
    a user without a valid interest. At most `max_scores` scores are held at once (40 bytes each while sorted).
    """
    offsets, items = (np.asarray(part, dtype=np.int64) for part in queries.relevant)
    ranks = np.full(items.shape, max(num_items - FIRST_KNOWN, 1), dtype=np.int64)
    step = max(1, min(batch_size, max_scores // max(num_items, 1)))
    with _evaluating(model) as device:
        vectors = model.encode_items(torch.arange(num_items, device=device))  # (N, D)
        for start in range(0, len(queries), step):
            rows = np.arange(start, min(start + step, len(queries)))
            index = torch.from_numpy(rows)
            batch = queries.gather(index) if device is None else queries.gather(index).to(device)
            scores = _best_scores(model, batch, vectors)  # (B, N)
            scores[:, :FIRST_KNOWN] = -torch.inf
            if exclude_seen:
                scores.scatter_(1, queries.seen(index).to(scores.device), -torch.inf)
            own, wanted = _rows_of(offsets, items, rows)
            owner = torch.from_numpy(np.repeat(np.arange(rows.size), np.diff(own))).to(scores.device)
            target = torch.from_numpy(wanted).to(scores.device)
            value = scores[owner, target.clamp(0, num_items - 1)]
            if bool(value.isnan().any()):
                raise ValueError("the score of a target is NaN; a model that gives NaN cannot be ranked, mend it")
            real = value.isfinite() & (target >= FIRST_KNOWN) & (target < num_items)
            place = offsets[start] + np.flatnonzero(real.cpu().numpy())
            ranks[place] = (num_items - _below(scores)[owner[real], target[real]]).cpu().numpy()
    return ranks


def _best_scores(model: VectorMatcher, batch: Batch, vectors: Float[Tensor, "N D"]) -> Float[Tensor, "B N"]:
    """The score of every item for every user: the best over the valid interests, one interest at a time."""
    interests, valid = model.encode_users(batch)
    best = torch.full((interests.shape[0], vectors.shape[0]), -torch.inf, device=vectors.device)
    for k in range(interests.shape[1]):
        scores = linear(interests[:, k], vectors).float()  # (B, N)
        best = torch.maximum(best, scores.masked_fill(~valid[:, k, None], -torch.inf))
    return best


def _below(scores: Float[Tensor, "B N"]) -> Int[Tensor, "B N"]:
    """How many scores of the same line are lower than each score; one sort answers for all targets of a user."""
    ordered, order = scores.sort(dim=1)
    start = torch.arange(scores.shape[1], device=scores.device).repeat(scores.shape[0], 1)
    start[:, 1:].masked_fill_(ordered[:, 1:] == ordered[:, :-1], 0)
    first_of_tie = start.cummax(dim=1).values  # (B, N)
    return torch.empty_like(order).scatter_(1, order, first_of_tie)


class _Tally:
    """What is kept of each batch: one number a user and metric, in arrays as long as there are users."""

    def __init__(
        self,
        users: int,
        ks: tuple[int, ...],
        ties: Ties,
        item_counts: Int[np.ndarray, "N"] | None,
        item_attribute: Int[np.ndarray, "N G"] | None,
    ) -> None:
        self.ks, self.ties, self.item_counts, self.item_attribute = ks, ties, item_counts, item_attribute
        self.parts_of_items = _item_slices(item_counts)
        self.listed = {k: np.zeros(0 if item_counts is None else item_counts.size, dtype=bool) for k in ks}
        self.kept: dict[str, Any] = {"user": np.zeros(users, np.int64), "length": np.zeros(users, np.int64)}

    def add(
        self,
        start: int,
        batch: Batch,
        ranked: Int[np.ndarray, "B k"],
        scores: Float[np.ndarray, "B k"],
        offsets: Int[np.ndarray, "B1"],
        items: Int[np.ndarray, "R"],
    ) -> None:
        """Count the lists of users `start`, `start` + 1, …, whose relevant items are the CSR."""
        ranked = _require_lists(ranked, scores, self.item_counts)
        hit = self._hits(ranked, scores, offsets, items)
        self._keep(start, "metric", metrics.list_metrics(hit, np.diff(offsets), self.ks))
        for name, belongs in self.parts_of_items.items():
            member = belongs[np.minimum(items, belongs.size - 1)]
            own = np.concatenate([[0], np.cumsum(member)])[offsets]
            hit = self._hits(ranked, scores, own, items[member])
            self._keep(start, f"slice {name}", metrics.list_metrics(hit, np.diff(own), self.ks))
        for k in self.ks:
            top = ranked[:, :k]
            if self.item_counts is not None:
                self.listed[k][top[top > 0]] = True
                self._keep(start, "list", {f"novelty@{k}": metrics.novelty(top, self.item_counts)})
            if self.item_attribute is not None:
                self._keep(start, "list", {f"diversity@{k}": metrics.attribute_diversity(top, self.item_attribute)})
        rows = slice(start, start + batch.size)
        self.kept["user"][rows] = batch.user.cpu().numpy()
        self.kept["length"][rows] = batch.mask.sum(dim=1).cpu().numpy()

    def _hits(
        self,
        ranked: Int[np.ndarray, "B k"],
        scores: Float[np.ndarray, "B k"],
        offsets: Int[np.ndarray, "B1"],
        items: Int[np.ndarray, "R"],
    ) -> Bool[np.ndarray, "B j"]:
        hit = metrics.hits(ranked, offsets, items)
        if self.ties == "as_ranked":
            return hit[:, : self.ks[-1]]
        return metrics.pessimistic_hits(hit, scores, self.ks[-1])

    def _keep(self, start: int, group: str, values: Mapping[str, Float[np.ndarray, "B"]]) -> None:
        for name, value in values.items():
            key = f"{group}/{name}"
            if key not in self.kept:
                self.kept[key] = np.empty(self.kept["user"].size, np.float32)
            self.kept[key][start : start + value.size] = value

    def _group(self, group: str) -> dict[str, Any]:
        prefix = f"{group}/"
        return {name.removeprefix(prefix): v for name, v in self.kept.items() if name.startswith(prefix)}

    def results(self) -> dict[str, Any]:
        per_list = self._group("list")
        beyond = {name: float(np.nanmean(v, dtype=np.float64)) for name, v in per_list.items() if not np.isnan(v).all()}
        if self.item_counts is not None:
            real = max(self.item_counts.size - FIRST_KNOWN, 1)
            beyond = {f"coverage@{k}": float(self.listed[k].sum() / real) for k in self.ks} | beyond
        return {
            "user": self.kept["user"],
            "metrics": self._group("metric"),
            "history_length": self.kept["length"],
            "item_slices": {name: self._group(f"slice {name}") for name in self.parts_of_items},
            "beyond": beyond,
            "per_list": per_list,
        }


def _item_slices(item_counts: Int[np.ndarray, "N"] | None) -> dict[str, Bool[np.ndarray, "N"]]:
    if item_counts is None:
        return {}
    return {"items seen in training": item_counts > 0, "items new since training": item_counts == 0}


def _rows_of(
    offsets: Int[np.ndarray, "n1"], items: Int[np.ndarray, "R"], rows: Int[np.ndarray, "B"]
) -> tuple[Int[np.ndarray, "B1"], Int[np.ndarray, "r"]]:
    """The CSR of some rows, in rising order."""
    size = np.diff(offsets)[rows]
    own = np.concatenate([[0], np.cumsum(size)])
    place = np.repeat(offsets[rows] - own[:-1], size) + np.arange(own[-1])
    return own, items[place]


def _require_ks(ks: Sequence[int]) -> tuple[int, ...]:
    ordered = tuple(sorted(set(ks)))
    if not ordered or ordered[0] < 1:
        raise ValueError(f"ks must hold cut-offs of at least 1, received {tuple(ks)}; (10, 50) is usual")
    return ordered


def _require_lists(
    ranked: Int[np.ndarray, "B k"], scores: Float[np.ndarray, "B k"], item_counts: Int[np.ndarray, "N"] | None
) -> Int[np.ndarray, "B k"]:
    """The lists with row 0 wherever nothing was found; a list that names an item twice or scores NaN is refused."""
    if np.isnan(scores).any():
        raise ValueError("the matcher returned a score of NaN; a model that gives NaN cannot be measured, mend it")
    ranked = np.where(np.isneginf(scores) | (ranked < FIRST_KNOWN), 0, ranked)
    ordered = np.sort(ranked, axis=1)
    twice = (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] > 0)
    if twice.any():
        item = int(ordered[:, 1:][twice][0])
        raise ValueError(f"the matcher returned item row {item} twice in one list; a list names each item once")
    if item_counts is not None and ranked.max(initial=0) >= item_counts.size:
        raise ValueError(
            f"the matcher returned item row {int(ranked.max())}, but item_counts has {item_counts.size} rows; "
            "count with minlength=the number of item rows"
        )
    return ranked


# ------------------------------------------------------------------------------------------------------ rankers
@torch.inference_mode()
def evaluate_ranker(
    model: Ranker,
    batches: Iterable[Batch] | EpochSource,
    *,
    item_counts: Int[np.ndarray, "N"] | None = None,
    split: str = "",
    bins: int = 15,
) -> RankResult:
    """Score every row once; `means` holds auc, gauc (when rows have users), log_loss, normalised_entropy, ece.

    `item_counts[n]`: training events of item row n; gives the parts of known and new items.
    `batches` must not be shuffled, so that two models score the same rows in the same order.
    Raises ValueError for no rows, labels other than 0 and 1, or logits that are not finite.
    """
    began = time.perf_counter()
    logits, labels, users, items = [], [], [], []
    with _evaluating(model) as device:
        for batch in batches.epoch(0) if isinstance(batches, EpochSource) else batches:
            score = model.forward(batch if device is None else batch.to(device))
            logits.append(score.float().cpu().numpy())
            labels.append(batch.label.float().cpu().numpy())
            # `user` is one row for everyone whom training never saw, but they are different people
            who = next((name for name in ("person", "user") if name in batch), None)
            if who is not None:
                users.append(batch[who].cpu().numpy().astype(np.int64))
            if item_counts is not None and "item" in batch:
                items.append(batch.item.cpu().numpy())
    if not logits:
        raise ValueError("no batches to score; is this part of the split empty?")
    return RankResult.of(
        np.concatenate(logits),
        np.concatenate(labels),
        np.concatenate(users) if users else None,
        parts={name: part[np.concatenate(items)] for name, part in _item_slices(item_counts).items()} if items else {},
        split=split or _split_of(batches),
        seconds=time.perf_counter() - began,
        bins=bins,
    )


# --------------------------------------------------------------------------------------------------- comparison
def require_comparable(results: Mapping[str, MatchResult] | Mapping[str, RankResult]) -> None:
    """Raise ValueError unless all results answer the same questions of the same split under the same protocol."""
    names = list(results)
    for name in names[1:]:
        a, b = results[names[0]], results[name]
        aspects = {"split fingerprint": (a.split, b.split), "questions": (a.queries, b.queries)}
        if isinstance(a, MatchResult) and isinstance(b, MatchResult):
            aspects |= {
                "exclude_seen": (str(a.exclude_seen), str(b.exclude_seen)),
                "ties": (a.ties, b.ties),
                "ks": (str(a.ks), str(b.ks)),
            }
        for aspect, (left, right) in aspects.items():
            if left != right:
                raise ValueError(
                    f"'{names[0]}' and '{name}' cannot be compared, their {aspect} differ: "
                    f"{left[:16] or 'none'} and {right[:16] or 'none'}; evaluate both on the same split and options"
                )


def compare(a: MatchResult, b: MatchResult, metric: str, *, seed: int = 0) -> PairedTest:
    """Paired test of a − b on one per-user metric. Raises ValueError if the two answered different questions."""
    require_comparable({"a": a, "b": b})
    if metric not in a.metrics:
        raise ValueError(f"no metric '{metric}'; these were measured: {', '.join(a.metrics)}")
    return paired_test(a.metrics[metric], b.metrics[metric], seed=seed)


def compare_rankers(a: RankResult, b: RankResult) -> PairedAUC:
    """Paired AUC difference a − b, over users if there are any. Raises ValueError if the rows scored differ."""
    require_comparable({"a": a, "b": b})
    return paired_auc_difference(a.labels, a.logits, b.logits, a.user)


def _split_of(source: object) -> str:
    """The fingerprint of the split that questions or batches come from, "" if they do not say."""
    for name in ("examples", "dataset"):
        source = getattr(source, name, source)
    return str(getattr(source, "fingerprint", ""))


def _digest(*arrays: Float[np.ndarray, "..."] | Int[np.ndarray, "..."]) -> str:
    state = hashlib.sha256()
    for array in arrays:
        state.update(f"{array.dtype.str}{array.shape}".encode())
        state.update(np.ascontiguousarray(array).data)
    return state.hexdigest()


@contextmanager
def _evaluating(model: object) -> Iterator[torch.device | None]:
    """The model in evaluation mode, put back afterwards, and the device it lives on (None: not known, leave data)."""
    if not isinstance(model, nn.Module):
        yield None
        return
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        tensor = next(chain(model.parameters(), model.buffers()), None)
        yield None if tensor is None else tensor.device
    finally:
        for module, training in modes.items():
            module.training = training
