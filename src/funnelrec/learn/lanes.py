"""Training along session-parallel lanes: the states that are carried from step to step, and the authors' losses.

    lanes = 64
    fit(Lanes(model, lanes), Batches(SessionParallel(dataset, lanes), 1), SharedSoftmax(2048, counts), ...)

trains `model` in place. The states lie in a buffer beside the weights, so an interrupted run continues exactly.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.linear import product
from funnelrec.core.schema import Spec
from funnelrec.learn.losses import pairs
from funnelrec.learn.samplers import Popularity

__all__ = ["Lanes", "SharedBPRMax", "SharedSoftmax", "Steps"]


@runtime_checkable
class Steps(Protocol):
    """A model that reads a session item by item; `match.gru4rec.GRU4Rec` is one."""

    spec: Spec

    def no_states(self, lanes: int) -> Tensor: ...

    def step(self, rows: Tensor, states: Tensor) -> tuple[Tensor, Tensor]: ...

    def encode_items(self, rows: Tensor) -> Tensor: ...


class Lanes(nn.Module):
    """A model on `lanes` lanes: its user vectors follow from the state of their lane, which is zero where `fresh`.

    Each call of `encode_users` moves the lanes of the batch on by one item. No gradient flows into the step before.
    """

    def __init__(self, model: nn.Module, lanes: int) -> None:
        super().__init__()
        self.model = model
        self.lanes = lanes
        self.spec = self._steps.spec
        self.states: Tensor
        self.register_buffer("states", self._steps.no_states(lanes))  # (layers, lanes, D)

    @property
    def _steps(self) -> Steps:
        return cast(Steps, self.model)

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 E"], Bool[Tensor, "B 1"]]:
        """The vector after the item that each lane shows. Valid everywhere."""
        before = self.states.index_select(1, batch.lane).masked_fill_(batch.fresh.view(1, -1, 1), 0.0)
        users, after = self._steps.step(batch.history[:, -1], before)
        with torch.no_grad():
            self.states.index_copy_(1, batch.lane, after.detach().to(self.states.dtype))
        return users.unsqueeze(1), torch.ones_like(batch.mask)  # (B, 1, E), (B, 1)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N E"]:
        """Those of the model."""
        return self._steps.encode_items(rows)


@dataclass(frozen=True, eq=False)
class _Shared:
    """The targets of the batch and `num_negatives` items drawn with probability ~ count^alpha, shared by all pairs.

    counts: int64 [N], the events of each item row in training. As in the authors' code a negative that happens to be
    the pair's own target stays; equal columns are computed once and counted as often as they occur. The loss is the sum
    over the open lanes divided by the number of all lanes.
    """

    num_negatives: int
    counts: Int[Tensor, "N"] = field(repr=False)
    alpha: float = 0.5
    sampler: Popularity = field(init=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        if self.num_negatives < 0:
            raise ValueError(f"num_negatives must be at least 0, received {self.num_negatives}")
        object.__setattr__(self, "sampler", Popularity(self.counts, self.alpha))
        object.__setattr__(self, "digest", hashlib.sha256(self.counts.numpy().tobytes()).hexdigest()[:12])

    def _columns(self, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The distinct items, the column of each target, and of each drawn negative."""
        drawn = self.sampler.sample(self.num_negatives)[0].to(target.device)
        distinct, place = torch.unique(torch.cat([target, drawn]), return_inverse=True)
        return distinct, place[: len(target)], place[len(target) :]


@dataclass(frozen=True, eq=False)
class SharedSoftmax(_Shared):
    """Cross-entropy of each pair's target among the targets of the batch and the drawn items (2018, Section 3).

    log_q: from the score of a target of the batch log_q · log(count) is subtracted, from a drawn one's log_q · alpha ·
    log(count), as in the authors' code: frequent items are negatives more often than others. 0 corrects nothing.
    """

    log_q: float = 0.0

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        distinct, own, drawn = self._columns(target)
        log_count = self.counts[distinct].clamp(min=1).log().float()
        in_batch, in_sample = (torch.bincount(place, minlength=len(distinct)) for place in (own, drawn))
        damped = -self.log_q * log_count
        times = in_batch * damped.exp() + in_sample * (self.alpha * damped).exp()
        value = _swept(users, model.encode_items(distinct), _cross_entropy, own, times.log())
        return (value + self.log_q * log_count[own].mean()) * _open_share(model, batch)


@dataclass(frozen=True, eq=False)
class SharedBPRMax(_Shared):
    """-log Σ_j s_j σ(p - n_j) + penalty · Σ_j s_j n_j² over the same columns, s the softmax of the negatives' scores
    (2018, Eq. 10 and 11). elu: all scores pass through ELU with this α first.
    """

    penalty: float = 1.0
    elu: float | None = None

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        users, target = pairs(model, batch)
        distinct, own, drawn = self._columns(target)
        times = torch.bincount(torch.cat([own, drawn]), minlength=len(distinct)).float()
        if len(own) + self.num_negatives < 2:
            return users.sum() * 0.0
        value = _swept(users, model.encode_items(distinct), _bpr_max, own, times, self.penalty, self.elu)
        return value * _open_share(model, batch)


def _open_share(model: Any, batch: Batch) -> float:
    """Open lanes / all lanes. At the end of an epoch few lanes are left; were each batch a mean, these would decide."""
    return batch.size / model.lanes if isinstance(model, Lanes) else 1.0


class _Swept(torch.autograd.Function):
    """`each(scores, …)` gives the mean loss of scores [P, S] = users · itemsᵀ and its gradient; both products of that
    gradient are made at once, while it is in the cache. Under autocast the products are in bfloat16, sums are not."""

    @staticmethod
    def forward(ctx: Any, users: Tensor, items: Tensor, each: Any, *rest: Any) -> Tensor:
        device = users.device.type
        low = torch.is_autocast_enabled(device)
        left, right = (users.bfloat16(), items.bfloat16()) if low else (users, items)
        with torch.autocast(device, enabled=False):
            value, gradient = each(product(left, right).float(), *rest)
            gradient = gradient.to(left.dtype)
            to_users, to_items = product(gradient, right.T), product(gradient.T, left.T)
        ctx.save_for_backward(to_users, to_items)
        ctx.dtypes = users.dtype, items.dtype
        ctx.arguments = len(rest)
        return cast(Tensor, value)

    @staticmethod
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise RuntimeError("this loss can be differentiated once only; call backward without create_graph")
        users, items = (saved.to(dtype) * outer for saved, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True))
        return users, items, None, *[None] * ctx.arguments


def _swept(users: Tensor, items: Tensor, each: Any, *rest: Any) -> Tensor:
    total: Tensor = _Swept.apply(users, items, each, *rest)  # type: ignore[no-untyped-call]
    return total


def _cross_entropy(
    scores: Float[Tensor, "P S"], own: Int[Tensor, "P"], log_times: Float[Tensor, "S"]
) -> tuple[Float[Tensor, ""], Float[Tensor, "P S"]]:
    """Mean of log Σ_j exp(scores_j + log_times_j) - scores_own, and its gradient."""
    chosen = own.unsqueeze(1)
    positive = scores.gather(1, chosen)  # (P, 1)
    scores.add_(log_times)
    top = scores.amax(1, keepdim=True)
    share = scores.sub_(top).exp_()
    total = share.sum(1, keepdim=True)
    value = (total.log() + top - positive).mean()
    share.div_(total * len(own))
    return value, share.scatter_add_(1, chosen, share.new_full(chosen.shape, -1 / len(own)))


def _bpr_max(
    scores: Float[Tensor, "P S"], own: Int[Tensor, "P"], times: Float[Tensor, "S"], penalty: float, elu: float | None
) -> tuple[Float[Tensor, ""], Float[Tensor, "P S"]]:
    """The mean BPR-max of the scores, column j counted times_j times (one less where it is the pair's own).

    Of L = -log b + penalty · m with w_j = σ(p - x_j), b = Σ_j s_j w_j and m = Σ_j s_j x_j² the gradient is
    ∂L/∂x_j = s_j (1 + penalty (x_j² + 2 x_j - m)) - s_j w_j² / b, and ∂L/∂p = Σ_j s_j w_j² / b - 1.
    """
    chosen, rows = own.unsqueeze(1), len(own)
    if elu is not None:
        slope = scores.clamp(max=0).exp_()
        scores.clamp_(min=0).add_(slope, alpha=elu).sub_(elu)
        if elu != 1:  # d elu(x) is 1 above 0 and elu · exp(x) below
            slope.mul_(elu).add_(scores > 0, alpha=1 - elu)
    positive = scores.gather(1, chosen)  # (P, 1)
    share = (scores + times.log()).scatter_(1, chosen, positive + (times[own] - 1).log().unsqueeze(1))
    share = torch.softmax(share, 1)  # s
    wins = torch.sub(positive, scores).sigmoid_()
    won = share * wins
    total = won.sum(1, keepdim=True)
    beaten = total + 1e-24  # (P, 1)
    total.div_(beaten)  # 1, but where all is lost
    won.mul_(wins).div_(beaten)
    weighted = share * scores
    size = torch.linalg.vecdot(weighted, scores).unsqueeze(1)  # (P, 1)
    value = (penalty * size - beaten.log()).mean()
    gradient = share.mul_(total - penalty * size).sub_(won)
    gradient.addcmul_(weighted, scores.add_(2), value=penalty)
    gradient.scatter_add_(1, chosen, won.sum(1, keepdim=True) - total)
    if elu is not None:
        gradient.mul_(slope)
    return value, gradient.div_(rows)
