"""Losses: `loss(model, batch) -> scalar`. A model never knows which of them trains it.

| what is trained                | losses                                                            |
|--------------------------------|-------------------------------------------------------------------|
| a Ranker, by `batch.label`     | BCE, WeightedLogistic                                             |
| a classifier, by `batch.label` | CrossEntropy: logits [B, classes] against class numbers           |
| a VectorMatcher, `batch.target`| FullSoftmax, SampledSoftmax, InBatchSoftmax: all items or a sample |
|                                | SampledBCE, GBCE, BPR, BPRMax, TOP1, TOP1Max: target and negatives |
| a student, by a teacher        | learn/distil.py, learn/distil_ranking.py                          |

`pairs` turns a batch into P user vectors and the item row that each of them should find; rows 0 (padding) and 1
(unknown) are never a target and never a class. All softmax losses run through one sweep (`_LogSumExp`) that never holds
more than a few megabytes of logits.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funnelrec.core.batch import Batch
from funnelrec.core.nn.linear import product
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.samplers import Sampler, Uniform

__all__ = [
    "BCE",
    "BPR",
    "GBCE",
    "TOP1",
    "BPRMax",
    "CrossEntropy",
    "FullSoftmax",
    "InBatchSoftmax",
    "ListSoftmax",
    "Loss",
    "SampledBCE",
    "SampledSoftmax",
    "TOP1Max",
    "Terms",
    "WeightedLogistic",
    "linear_cross_entropy",
    "pairs",
    "positions",
    "shared_negatives_cross_entropy",
]

CHUNK_BYTES = 4 * 2**20  #: of logits alive at a time: they stay in the cache between the passes over them
WIDE_ROWS, WIDE_BYTES = 256, 64 * 2**20  #: large catalogues: this many rows a chunk, else the gradient's traffic costs
SCORES_BYTES = 32 * 2**20  #: of scores against negatives that are kept for the backward pass; more are computed again
LOG2_E = math.log2(math.e)
NEVER = -1e30  #: a score that no softmax sees; finite, so that nothing becomes NaN where all are such
SAFE_LOGIT = 50.0  #: exp(±50) and sums of a billion of them are far from the limits of float32


@runtime_checkable
class Loss(Protocol):
    """Anything that `fit` can minimise."""

    def __call__(self, model: Any, batch: Batch) -> Tensor: ...


@dataclass(frozen=True)
class BCE:
    """Mean binary cross-entropy of a Ranker's logits against `batch.label`, weighted by `batch.weight` if present."""

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        each = F.binary_cross_entropy_with_logits(model(batch).float(), batch.label, reduction="none")
        if "weight" not in batch:
            return each.mean()
        return (each * batch.weight).sum() / batch.weight.sum().clamp(min=torch.finfo(each.dtype).tiny)


@dataclass(frozen=True)
class ListSoftmax:
    """Softmax over lists of 1 + `negatives` rows, the first of which is the one that was taken (data/lists.py)."""

    negatives: int

    def __post_init__(self) -> None:
        if self.negatives < 1:
            raise ValueError(f"a list needs at least 1 negative, received {self.negatives}")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(batch).float().view(-1, 1 + self.negatives)  # (lists, 1 + negatives)
        return (logits.logsumexp(1) - logits[:, 0]).mean()


@dataclass(frozen=True)
class Terms:
    """Nothing of its own: for models that bring all they learn from in `training_terms`, which `fit` adds."""

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        return torch.zeros(())


@dataclass(frozen=True)
class WeightedLogistic:
    """Logistic loss in which a click weighs `batch.weight` (its watch time, say) and everything else weighs 1.

    The odds e^logit then estimate Σ T / (N - k), the weight of the k clicks among N examples per example without one:
    about E[T], the expected weight of an impression, when clicks are rare (Covington et al. 2016, Section 4.2). The sum
    is divided by B and not by the weights, so the scale does not depend on the batch. `cap` bounds the weight of a
    click: fewer surprises from long tails, and the estimate becomes E[min(T, cap)]. A click of weight 0 vanishes.
    """

    cap: float | None = None

    def __post_init__(self) -> None:
        if self.cap is not None and not self.cap > 0:
            raise ValueError(f"cap is the largest weight of a click and must be positive, received {self.cap}")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        if "weight" not in batch:
            raise ValueError(
                "WeightedLogistic weighs clicks by batch.weight, and this batch has none; name the column of the watch "
                "time as weight in the schema"
            )
        weight = batch.weight if self.cap is None else batch.weight.clamp(max=self.cap)
        logits = model(batch).float()
        # -T y log σ(s) - (1 - y) log(1 - σ(s)), in the form that is stable on both sides
        return (weight * batch.label * F.softplus(-logits) + (1 - batch.label) * F.softplus(logits)).mean()


@dataclass(frozen=True)
class CrossEntropy:
    """Mean softmax cross-entropy of a classifier's logits [B, classes] against `batch.label`, int64 class numbers.

    A language model's logits [B, T, tokens] against labels [B, T] are a row for each token.

    A row whose label is -1 has none and is left out; a batch without any label gives 0. `class_weights`: how much a
    row of each class counts, e.g. rarer classes more; the sum is divided by the weights. `label_smoothing` as in
    Szegedy et al. 2016, Section 7.
    """

    label_smoothing: float = 0.0
    class_weights: tuple[float, ...] | None = None

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        logits: Tensor = model(batch).float().flatten(0, -2)  # (B, classes) or (B·T, tokens)
        label = batch.label.flatten().long()
        if bool((label < 0).all()):
            return 0.0 * torch.sum(logits)
        weights = None if self.class_weights is None else logits.new_tensor(self.class_weights)
        smoothing = self.label_smoothing
        loss: Tensor = F.cross_entropy(logits, label, weights, ignore_index=-1, label_smoothing=smoothing)
        return loss


@dataclass(frozen=True)
class FullSoftmax:
    """Softmax over the whole catalogue; memory is bounded, time grows with the number of items.

    The model keeps its `spec`, which says how many item rows there are. Set `dense = True` on its item table.
    `classes`: the item rows that may be targets, rising; absent, all. What nobody could take yet is no negative.
    """

    label_smoothing: float = 0.0
    temperature: float = 1.0
    classes: Int[Tensor, "c"] | None = dataclasses.field(default=None, repr=False, compare=False)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        rows = torch.arange(_num_items(model), device=target.device)
        if self.classes is not None:
            rows = torch.cat([rows[:FIRST_KNOWN], self.classes.to(target.device)])  # rows 0 and 1 are never classes
            target = torch.searchsorted(rows, target)
        items = model.encode_items(rows)
        return linear_cross_entropy(
            users, items, target, temperature=self.temperature, label_smoothing=self.label_smoothing
        )


@dataclass(frozen=True)
class SampledSoftmax:
    """Softmax over the target and `num_negatives` sampled items that all pairs of the batch share.

    With `log_q`, the log of how often the sampler is expected to draw an item (draws · q) is subtracted from the logit
    of each sampled item. The target itself is not drawn: it stands in the sum exactly once, so draws of it are left
    out and its own logit stays as it is. The sum is then an unbiased estimate of the sum over the catalogue for any
    number of negatives. `correct_target=True` also subtracts the target's own expected count, as
    `tf.nn.sampled_softmax_loss` does (Bengio and Senécal, 2008). Serving never subtracts anything.

    Only the rows of the batch and of the sample are encoded, so the item table's gradient stays sparse. `sampler`
    absent is uniform over the model's items.
    """

    num_negatives: int
    log_q: bool = True
    sampler: Sampler | None = None
    temperature: float = 1.0
    correct_target: bool = False

    def __post_init__(self) -> None:
        if self.num_negatives < 1:
            raise ValueError(f"num_negatives must be at least 1, received {self.num_negatives}")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        sampler = Uniform(_num_items(model)) if self.sampler is None else self.sampler
        negatives, log_q = sampler.sample(self.num_negatives)
        negatives, log_q = negatives.to(target.device), log_q.to(target.device)
        positive_vectors, negative_vectors = _encode_distinct(model, target, negatives)
        expected = math.log(self.num_negatives)  # expected count = draws · q
        return shared_negatives_cross_entropy(
            users,
            positive_vectors,
            negative_vectors,
            target,
            negatives,
            target_log_q=sampler.log_q_of(target) + expected if self.log_q and self.correct_target else None,
            negative_log_q=log_q + expected if self.log_q else None,
            temperature=self.temperature,
        )


@dataclass(frozen=True, eq=False)
class InBatchSoftmax:
    """Softmax over the targets of the batch: every pair's target is a negative of the others (Yi et al., 2019).

    `sampler` gives an item's share of the training targets for the log-Q correction (`Popularity(counts)`), which is
    that of `SampledSoftmax` with the P - 1 other pairs as draws; absent, nothing is corrected and frequent items are
    pushed down. A column that holds the pair's own target again is left out. `correct_target=True` also corrects the
    target's own logit, as in the paper.
    """

    sampler: Sampler | None = None
    temperature: float = 1.0
    correct_target: bool = False

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        (vectors,) = _encode_distinct(model, target)
        draws = max(len(target) - 1, 1)
        log_q = None if self.sampler is None else self.sampler.log_q_of(target) + math.log(draws)
        return shared_negatives_cross_entropy(
            users,
            vectors,
            vectors,
            target,
            target,
            target_log_q=log_q if self.correct_target else None,
            negative_log_q=log_q,
            temperature=self.temperature,
        )


@dataclass(frozen=True)
class _AgainstNegatives:
    """The mean over the pairs of `_each`, a function of a target's score and the scores of its negatives.

    num_negatives: items that `sampler` draws (absent: uniform over the model's items). shared: the same for all pairs,
    which is one matrix product, so there can be thousands; else each pair draws its own. in_batch: the targets of the
    other pairs are negatives too (shared ones only). A negative that is the pair's own target is left out.
    """

    num_negatives: int = 1
    sampler: Sampler | None = None
    shared: bool = False
    in_batch: bool = False

    def __post_init__(self) -> None:
        if self.num_negatives < (0 if self.in_batch else 1):
            raise ValueError(f"num_negatives must be at least 1 (0 with in_batch), received {self.num_negatives}")
        if self.in_batch and not self.shared:
            raise ValueError("in_batch negatives are shared by the batch: set shared=True too")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        if len(target) == 0:
            return users.sum() * 0.0
        sampler = Uniform(_num_items(model)) if self.sampler is None else self.sampler
        rows = sampler.sample(self.num_negatives * (1 if self.shared else len(target)))[0].to(target.device)
        rows = torch.cat([rows, target]) if self.in_batch else rows if self.shared else rows.view(len(target), -1)
        distinct, place = torch.unique(torch.cat([target, rows.flatten()]), return_inverse=True)
        own, other = place[: len(target)], place[len(target) :].view(rows.shape)
        users, vectors = _scaled(users, model.encode_items(distinct), 1.0)
        expected = sampler.log_q_of(target).exp() * self.num_negatives  # (P,) times that a target is drawn
        row_bytes = users.element_size() * rows.shape[-1] * (1 if self.shared else users.shape[1])
        step = max(1, SCORES_BYTES // row_bytes)
        shared = (vectors, other, rows) if self.shared else None
        total = users.new_zeros(())
        with torch.autocast(users.device.type, enabled=False):
            for start in range(0, len(target), step):
                part = slice(start, start + step)
                against = shared or (vectors, other[part], rows[part])
                chunk = (users[part], own[part], target[part], expected[part], *against)
                total = total + (
                    self._sum(*chunk)
                    if step >= len(target)
                    else checkpoint(self._sum, *chunk, use_reentrant=False, preserve_rng_state=False)
                )
        return total / len(target)

    def _sum(
        self,
        users: Tensor,
        own: Tensor,
        target: Tensor,
        expected: Tensor,
        vectors: Tensor,
        other: Tensor,
        rows: Tensor,
    ) -> Tensor:
        """Sum over p pairs; `own` [p] and `other` [S] or [p, S] point into `vectors`."""
        positive = (users * F.embedding(own, vectors)).sum(1)  # (p,)
        against = F.embedding(other, vectors)  # (S, D) or (p, S, D)
        scores = users @ against.T if self.shared else torch.einsum("pd,psd->ps", users, against)  # (p, S)
        return self._each(positive, scores, rows != target.unsqueeze(1), expected).sum()

    def _each(
        self,
        positive: Float[Tensor, "p"],
        negative: Float[Tensor, "p S"],
        real: Bool[Tensor, "p S"],
        expected: Float[Tensor, "p"],
    ) -> Float[Tensor, "p"]:
        raise NotImplementedError


@dataclass(frozen=True)
class SampledBCE(_AgainstNegatives):
    """-[log σ(p) + Σ_j log σ(-n_j)] / (1 + negatives): is it the target or not (SASRec, Eq. 9, with one negative).

    It teaches too much confidence where negatives are few, since most items never contradict: see GBCE.
    """

    def _each(self, positive: Tensor, negative: Tensor, real: Tensor, expected: Tensor) -> Tensor:
        refused = (F.softplus(negative) * real).sum(1)
        return (self._weight(expected) * F.softplus(-positive) + refused) / (1 + negative.shape[1])

    def _weight(self, expected: Tensor) -> Tensor | float:
        return 1.0


@dataclass(frozen=True)
class GBCE(SampledBCE):
    """SampledBCE whose term of the target weighs β = 1 - calibration · (1 - α), α the expected number of times that
    the target is drawn as a negative (Petrov and Macdonald, gSASRec, RecSys 2023, arXiv:2308.07192).

    calibration 0 is SampledBCE; at 1, σ(score) learns to be the probability of the item. For a uniform sampler α is
    the paper's sampling rate, negatives / items, and β its β (its t is `calibration`); it stays right for any other.
    """

    num_negatives: int = 256
    shared: bool = True
    calibration: float = 0.75

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.calibration <= 1:
            raise ValueError(f"calibration must lie in [0, 1], received {self.calibration}")
        if self.in_batch:
            raise ValueError("GBCE must know how often an item is drawn as a negative, so in_batch must be False")

    def _weight(self, expected: Tensor) -> Tensor | float:
        return 1 - self.calibration * (1 - expected)


@dataclass(frozen=True)
class BPR(_AgainstNegatives):
    """Mean over the negatives of -log σ(p - n_j) (Rendle et al. 2009, arXiv:1205.2618; GRU4Rec, Eq. 5)."""

    def _each(self, positive: Tensor, negative: Tensor, real: Tensor, expected: Tensor) -> Tensor:
        return _masked_mean(F.softplus(negative - positive.unsqueeze(1)), real)


@dataclass(frozen=True)
class TOP1(_AgainstNegatives):
    """Mean over the negatives of σ(n_j - p) + σ(n_j²) (Hidasi et al. 2016, arXiv:1511.06939, Eq. 6)."""

    num_negatives: int = 2048
    shared: bool = True

    def _each(self, positive: Tensor, negative: Tensor, real: Tensor, expected: Tensor) -> Tensor:
        return _masked_mean(_top1(positive, negative), real)


@dataclass(frozen=True)
class TOP1Max(TOP1):
    """TOP1 weighted by the softmax of the negatives' scores: the strongest decide (arXiv:1706.03847, Eq. 8)."""

    def _each(self, positive: Tensor, negative: Tensor, real: Tensor, expected: Tensor) -> Tensor:
        share = negative.masked_fill(~real, NEVER).softmax(1)
        return (share * _top1(positive, negative)).sum(1) * real.any(1)


@dataclass(frozen=True)
class BPRMax(_AgainstNegatives):
    """-log Σ_j s_j σ(p - n_j) + penalty · Σ_j s_j n_j², s the softmax of the negatives' scores (arXiv:1706.03847, Eq.
    10 and 11).

    elu: scores pass through ELU with this α first, as in the authors' code; they bound how low a score can go.
    """

    num_negatives: int = 2048
    shared: bool = True
    penalty: float = 1.0
    elu: float | None = None

    def _each(self, positive: Tensor, negative: Tensor, real: Tensor, expected: Tensor) -> Tensor:
        if self.elu is not None:
            positive, negative = F.elu(positive, self.elu), F.elu(negative, self.elu)
        log_share = negative.masked_fill(~real, NEVER).log_softmax(1)
        wins = torch.logsumexp(log_share + F.logsigmoid(positive.unsqueeze(1) - negative), 1)
        return (self.penalty * (log_share.exp() * negative.square()).sum(1) - wins) * real.any(1)


def _top1(positive: Tensor, negative: Tensor) -> Tensor:
    return torch.sigmoid(negative - positive.unsqueeze(1)) + torch.sigmoid(negative.square())


def _masked_mean(each: Tensor, real: Tensor) -> Tensor:
    return (each * real).sum(1) / real.sum(1).clamp(min=1)


def pairs(model: Any, batch: Batch) -> tuple[Float[Tensor, "P D"], Int[Tensor, "P"]]:
    """The user vectors to train and the item row each should find; positions without a target are dropped.

    `batch.target` [B, L] uses `encode_positions`; [B] uses `encode_users` and, when there are several vectors a user,
    `user_for_target`. A user of whom nothing is known (no valid vector) is dropped too. A model's own `training_input`
    makes of the batch what its paper trains on.
    """
    if hasattr(model, "training_input"):
        batch = model.training_input(batch)
    users, target, keep = positions(model, batch)
    kept = keep.nonzero().squeeze(1)
    if len(kept) == len(target):
        return users, target
    return users.index_select(0, kept), target.index_select(0, kept)


def positions(model: Any, batch: Batch) -> tuple[Float[Tensor, "P D"], Int[Tensor, "P"], Bool[Tensor, "P"]]:
    """User vectors and targets of a batch at all its positions, and which of them count: what `pairs` keeps."""
    target = batch.target
    if target.dim() == 2:
        users = model.encode_positions(batch).flatten(0, 1)  # (B·L, D)
        target = target.flatten()
        return users, target, target >= FIRST_KNOWN
    interests, valid = model.encode_users(batch)  # (B, K, D), (B, K)
    users = (
        interests[:, 0]
        if interests.shape[1] == 1
        else model.user_for_target(interests, valid, model.encode_items(target))
    )  # (B, D)
    return users, target, (target >= FIRST_KNOWN) & valid.any(1)


def linear_cross_entropy(
    users: Float[Tensor, "P D"],
    items: Float[Tensor, "N D"],
    target: Int[Tensor, "P"],
    *,
    temperature: float = 1.0,
    label_smoothing: float = 0.0,
) -> Float[Tensor, ""]:
    """Mean of -log softmax(users · itemsᵀ / temperature)[target], never holding the [P, N] logits.

    Equal to `F.cross_entropy` over classes 2..N-1 (rows 0 and 1 are no classes). Rows of `target` below 2 do not
    count; with none left the result is 0. Can be differentiated once.
    """
    users, items = _scaled(users, items, temperature)
    if not 0 <= label_smoothing < 1:
        raise ValueError(f"label_smoothing must lie in [0, 1), received {label_smoothing}")
    kept = (target >= FIRST_KNOWN).nonzero().squeeze(1)
    if len(kept) < len(target):
        users, target = users.index_select(0, kept), target.index_select(0, kept)
    if len(target) == 0:
        return users.sum() * 0.0
    classes = items[FIRST_KNOWN:]
    total = _mean_log_sum_exp(users, classes, None, None, None, target - FIRST_KNOWN, 1 - label_smoothing)
    if label_smoothing:
        total = total - label_smoothing * (users.mean(0) @ classes.mean(0))
    return total


def shared_negatives_cross_entropy(
    users: Float[Tensor, "P D"],
    positives: Float[Tensor, "P D"],
    negatives: Float[Tensor, "S D"],
    target: Int[Tensor, "P"],
    negative_rows: Int[Tensor, "S"],
    *,
    target_log_q: Float[Tensor, "P"] | None = None,
    negative_log_q: Float[Tensor, "S"] | None = None,
    temperature: float = 1.0,
) -> Float[Tensor, ""]:
    """Mean of -log(exp(p) / (exp(p) + Σ_j exp(n_j))) with p = ⟨user, positive⟩ / temperature - log Q, n_j likewise.

    Negatives whose row is the pair's target are left out of its sum. The [P, S] logits are never held.
    """
    users, positives = _scaled(users, positives, temperature)
    if len(users) == 0:
        return users.sum() * 0.0 + negatives.sum() * 0.0
    own = (users * positives).sum(1)  # (P,)
    if target_log_q is not None:
        own = own - target_log_q
    bias = None if negative_log_q is None else -negative_log_q.to(users.dtype)
    hits = _hits(target, negative_rows)
    total = _mean_log_sum_exp(users, negatives.to(users.dtype), bias, own, hits, None, 0.0)
    return total - own.mean()


class _LogSumExp(torch.autograd.Function):
    """Mean over rows p of log(Σ_n exp(⟨u_p, e_n⟩ + b_n) [+ exp(own_p)]) [- share · ⟨u_p, e_target⟩].

    The gradient is made in the forward sweep, chunk by chunk, while the exponentials E of the chunk are in the cache:
    with z = the row sums, d/du = E e / z and d/de = Eᵀ (u / z); dividing u instead of E saves a pass over E.
    Where the norms of u and e prove that no exponential can overflow, no maximum is sought either.
    Under bfloat16 autocast the three products and E are in bfloat16, the sums and the gradients in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        hits: tuple[Tensor, Tensor] | None,
        target: Tensor | None,
        share: float,
    ) -> Tensor:
        device = users.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        with torch.autocast(device, enabled=False):
            return _LogSumExp._sweep(ctx, users.detach(), items.detach(), bias, own, hits, target, share, half)

    @staticmethod
    def _sweep(
        ctx: Any,
        users: Tensor,
        items: Tensor,
        bias: Tensor | None,
        own: Tensor | None,
        hits: tuple[Tensor, Tensor] | None,
        target: Tensor | None,
        share: float,
        half: bool,
    ) -> Tensor:
        count, columns = len(users), len(items)
        kind = torch.bfloat16 if half else users.dtype
        step = min(count, chunk_rows(columns * kind.itemsize))
        safe = _exponentials_are_safe(users, items, bias, own)
        need_users, need_items, _, need_own, *_ = ctx.needs_input_grad
        grad_users = torch.empty_like(users) if need_users else None
        grad_items = torch.zeros_like(items) if need_items else None
        sums, tops = users.new_empty(count), users.new_zeros(count)
        scale = LOG2_E if safe else 1.0  # exp(x) = 2^(x log2 e), and exp2 takes a third of the time of exp
        scaled, vectors = (users * scale).to(kind), items.to(kind)
        shift = None if bias is None else bias * scale
        for start in range(0, count, step):
            stop = min(start + step, count)
            e = product(scaled[start:stop], vectors)  # (step, N)
            if shift is not None:
                e.add_(shift)
            if hits is not None:
                first, last = torch.searchsorted(hits[0], torch.tensor([start, stop], device=e.device)).tolist()
                e[hits[0][first:last] - start, hits[1][first:last]] = -torch.inf
            if not safe:
                top = e.amax(1) if own is None else torch.maximum(e.amax(1), own[start:stop])
                tops[start:stop] = top
                e.sub_(top.unsqueeze(1))
            e = e.exp2_() if safe else e.exp_()
            z = torch.sum(e, 1, dtype=users.dtype, out=sums[start:stop])
            if own is not None:
                z.add_((own[start:stop] - tops[start:stop]).exp())
            if grad_users is not None:
                grad_users[start:stop] = product(e, vectors.T)
            if grad_items is not None:
                divided = (users[start:stop] / (z * count).unsqueeze(1)).to(kind)
                grad_items.add_(product(e.T, divided.T))
        logs = sums.log().add_(tops)
        weight = (sums * count).reciprocal_()  # (P,)
        if grad_users is not None:
            grad_users.mul_(weight.unsqueeze(1))
        if target is not None:
            chosen = items.index_select(0, target)
            logs.sub_((users * chosen).sum(1), alpha=share)
            if grad_users is not None:
                grad_users.sub_(chosen, alpha=share / count)
            if grad_items is not None:
                grad_items.index_add_(0, target, users, alpha=-share / count)
        grad_own = (own - tops).exp_().mul_(weight) if own is not None and need_own else None
        ctx.save_for_backward(*(g for g in (grad_users, grad_items, grad_own) if g is not None))
        ctx.kept = [g is not None for g in (grad_users, grad_items, grad_own)]
        return logs.mean()

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # create_graph=True; a constant here would be a wrong second derivative, silently
            raise RuntimeError(
                "the chunked softmax can be differentiated once only; call backward without create_graph"
            )
        saved = iter(ctx.saved_tensors)
        users, items, own = (next(saved) * outer if kept else None for kept in ctx.kept)
        return users, items, None, own, None, None, None


def _mean_log_sum_exp(*arguments: Any) -> Tensor:
    total: Tensor = _LogSumExp.apply(*arguments)  # type: ignore[no-untyped-call]
    return total


def chunk_rows(row_bytes: int) -> int:
    """Rows of logits to hold at a time."""
    return max(1, CHUNK_BYTES // row_bytes, min(WIDE_ROWS, WIDE_BYTES // row_bytes))


def _exponentials_are_safe(users: Tensor, items: Tensor, bias: Tensor | None, own: Tensor | None) -> bool:
    """Whether |logit| <= SAFE_LOGIT is certain: |⟨u, e⟩| <= |u| |e|."""
    if users.dtype not in (torch.float32, torch.float64):
        return False
    bound = users.norm(dim=1).amax() * items.norm(dim=1).amax()
    if bias is not None:
        bound = bound + bias.abs().amax()
    if own is not None:
        bound = torch.maximum(bound, own.detach().abs().amax())
    return bool(bound <= SAFE_LOGIT)


def _hits(target: Tensor, negative_rows: Tensor) -> tuple[Tensor, Tensor] | None:
    """Where negatives equal a pair's own target: (pair, column) sorted by pair, or None when nowhere."""
    rows, column = negative_rows.sort(stable=True)
    wanted = target.contiguous()
    first, last = torch.searchsorted(rows, wanted), torch.searchsorted(rows, wanted, right=True)
    many = last - first  # (P,)
    pair = torch.arange(len(target), device=target.device).repeat_interleave(many)
    if len(pair) == 0:
        return None
    before = many.cumsum(0) - many
    offset = torch.arange(len(pair), device=target.device) - before[pair]
    return pair, column[first[pair] + offset]


def _encode_distinct(model: Any, *rows: Tensor) -> tuple[Tensor, ...]:
    """The vectors of several lists of item rows, each distinct row encoded once."""
    distinct, place = torch.unique(torch.cat(rows), return_inverse=True)
    vectors = model.encode_items(distinct)
    return tuple(vectors.index_select(0, p) for p in place.split([len(r) for r in rows]))


def _scaled(users: Tensor, items: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Users divided by the temperature; both in float32 at least, since a sum of exponentials needs it."""
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, received {temperature}")
    users = users / temperature if temperature != 1 else users
    dtype = torch.promote_types(torch.promote_types(users.dtype, items.dtype), torch.float32)
    return users.to(dtype), items.to(dtype)


def _num_items(model: Any) -> int:
    spec = getattr(model, "spec", None)
    if spec is None or not spec.num_items:
        raise ValueError(f"{type(model).__name__} must keep its `spec` (self.spec = spec) with num_items above 0")
    return int(spec.num_items)


def describe(loss: Any) -> str:
    """The loss and its options as text, for the fingerprint of a checkpoint."""
    return repr(loss) if dataclasses.is_dataclass(loss) else getattr(loss, "__qualname__", type(loss).__qualname__)


def extra_terms(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """What the model's paper adds to the loss; empty when it adds nothing."""
    terms = getattr(model, "training_terms", None)
    return {} if terms is None else dict(terms(batch))
