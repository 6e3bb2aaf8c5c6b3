"""Ranking distillation: a small matcher learns the order of a large one's first items, without its probabilities.

    loss = RankingDistillation(teacher, top=10, hard=SampledBCE(num_negatives=4))
    loss = RelaxedRankingDistillation(teacher, top=40, others=40)
    fit(student, batches, loss, epochs=10)

What the teacher recommends counts as wanted, though nobody took it yet: the best `top` items of its order at each
position, without the items of that history and its targets. Only the teacher looks at the whole catalogue; the student
at top + sample items a position, so that the gradient of its item table stays sparse. Where the catalogue is small
enough for a softmax over all of it, `CatalogueDistillation` (learn/distil.py) tells more.

Tang, Wang. Ranking Distillation. KDD 2018. arXiv:1809.07428            RankingDistillation; r counts from 1
    L   = (1 − a) · hard − a · Σ_r w_r log σ(s_{π_r})      π_1 … π_K the teacher's order, s the student's scores
    w_r ∝ exp(−r / λ) · tanh(max(μ (r̂_r − r), 0))         r̂_r the student's rank of π_r, from a sample of items
Kang, Hwang, Kweon, Yu. DE-RRD. CIKM 2020. arXiv:2012.04357             RelaxedRankingDistillation
    L   = (1 − a) · hard − a · Σ_k [s_{π_k} − log(Σ_{i ≥ k} exp s_{π_i} + Σ_l exp s_{u_l})]      u a uniform sample
Differs: in RRD the sum over k is divided by K, so that `top` does not weigh the loss, and the plain best K are taken,
as the authors' note on their code recommends; the sample is shared by the batch. In both, items of the sample that
are among the K or observed are left out.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.linear import product
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.distil import CHUNK_BYTES, Taught, taught_batch
from funnelrec.learn.losses import FullSoftmax, Loss, positions

__all__ = ["RankingDistillation", "RelaxedRankingDistillation", "discrepancy_weights", "relaxed_ranking_loss"]


def discrepancy_weights(rank: Float[Tensor, "P K"], place: float, discrepancy: float) -> Float[Tensor, "P K"]:
    """Tang and Wang's weights of the teacher's items 1 … K by their rank in the student's order, summing to 1 a row.

    0 where the student already ranks an item as high as the teacher; all 0 where it does so for all of them.
    """
    r = torch.arange(1, rank.shape[1] + 1, device=rank.device)
    weights = torch.exp(-r / place) * torch.tanh(discrepancy * (rank - r).clamp(min=0))
    normalised: Tensor = weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)
    return normalised


def relaxed_ranking_loss(
    wanted: Float[Tensor, "P K"], other: Float[Tensor, "P L"], real: Bool[Tensor, "P L"]
) -> Float[Tensor, "P"]:
    """-log of the probability that the K scores come in this order and before all `real` others, over K."""
    rest = other.masked_fill(~real, -torch.inf).logsumexp(1, keepdim=True)  # (P, 1)
    below = wanted.flip(1).logcumsumexp(1).flip(1)  # (P, K): log Σ_{i ≥ k} exp s_i
    loss: Tensor = (torch.logaddexp(below, rest) - wanted).mean(1)
    return loss


@dataclass(frozen=True, eq=False, repr=False)
class _Ranked(Taught):
    """The part that both losses share: the teacher's first items at each position, and the student's scores of them."""

    top: int = 10
    others: int = 100
    hard: Loss = field(default_factory=FullSoftmax)

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.teachers) > 1:
            raise ValueError(f"a ranking has one teacher, received {len(self.teachers)}; join them in one matcher")
        if self.top < 1 or self.others < 1:
            raise ValueError(f"top and others must be at least 1, received {self.top} and {self.others}")

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        (teacher,) = self.ready(model)
        if self.soft == 0:
            return self.hard(model, batch)
        observed = torch.cat([batch.history, batch.target.view(len(batch.history), -1)], 1).long()  # (B, L + 1 or 2 L)
        batch = taught_batch(model, (teacher,), batch)
        student = _Once(model)
        users, target, keep = positions(student, batch)
        with torch.no_grad():
            theirs, _, known = positions(teacher, batch)
            kept = (keep & known).nonzero().squeeze(1)
            example = kept // (len(target) // len(batch.history))
            wanted = self._first(teacher, theirs[kept], observed, example)  # (P, top)
        sample = torch.randint(FIRST_KNOWN, model.spec.num_items, (self.others,)).to(target.device)
        rows, place = torch.unique(torch.cat([wanted.flatten(), sample]), return_inverse=True)
        vectors = model.encode_items(rows)
        of_wanted, of_sample = place[: wanted.numel()].view(wanted.shape), place[wanted.numel() :]
        users = users[kept]
        scores = torch.einsum("pd,pkd->pk", users, F.embedding(of_wanted, vectors)).float()
        other = (users @ vectors[of_sample].T).float()  # (P, others)
        real = ~_holds(wanted, sample) & ~_holds(observed, sample)[example]
        soft = self._ranking(scores, other, real, model.spec.num_items)
        soft = soft.sum() / max(1, len(kept))
        return soft if self.soft == 1 else (1 - self.soft) * self.hard(student, batch) + self.soft * soft

    def _first(self, teacher: Any, users: Tensor, observed: Tensor, example: Tensor) -> Int[Tensor, "P K"]:
        """The teacher's best `top` items a position that the example has not got."""
        items = teacher.encode_items(torch.arange(teacher.spec.num_items, device=users.device)).to(users.dtype)
        step = max(1, CHUNK_BYTES // (4 * len(items)))
        found = []
        for start in range(0, len(users), step):
            scores = product(users[start : start + step], items).float()
            scores[:, :FIRST_KNOWN] = -torch.inf
            scores.scatter_(1, observed[example[start : start + step]], -torch.inf)
            best = scores.topk(min(self.top, scores.shape[1]))
            if self.top > scores.shape[1] or best.values.isneginf().any():
                raise ValueError(
                    f"there are no top={self.top} items that a user has not taken among {len(items) - FIRST_KNOWN}; "
                    "choose a smaller top"
                )
            found.append(best.indices)
        return torch.cat(found) if found else example.new_empty(0, self.top)

    def _ranking(self, scores: Tensor, other: Tensor, real: Tensor, num_items: int) -> Float[Tensor, "P"]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class RankingDistillation(_Ranked):
    """(1 − soft) · hard + soft · the weighted logistic loss of the teacher's first `top` items, for a VectorMatcher.

    `place` λ: ranks after which an item counts a third; `discrepancy` μ: how fast a rank that is too low counts;
    `others`: the size of the sample that ranks are estimated from. `temperature` has no meaning here.
    """

    place: float = 10.0
    discrepancy: float = 0.1

    def _ranking(self, scores: Tensor, other: Tensor, real: Tensor, num_items: int) -> Float[Tensor, "P"]:
        with torch.no_grad():
            above = ((other.unsqueeze(1) > scores.unsqueeze(2)) & real.unsqueeze(1)).sum(2)  # (P, K)
            count = real.sum(1, keepdim=True).clamp(min=1)
            rank = (above * (num_items - FIRST_KNOWN - 1) / count).floor() + 1
            weights = discrepancy_weights(rank, self.place, self.discrepancy)
        return -(weights * F.logsigmoid(scores)).sum(1)


@dataclass(frozen=True, eq=False, repr=False)
class RelaxedRankingDistillation(_Ranked):
    """(1 − soft) · hard + soft · the relaxed permutation loss of the teacher's first `top` items, for a VectorMatcher.

    Only the order of those counts, and that all of them stand above `others` sampled items, in no order.
    """

    def _ranking(self, scores: Tensor, other: Tensor, real: Tensor, num_items: int) -> Float[Tensor, "P"]:
        return relaxed_ranking_loss(scores, other, real)


def _holds(rows: Int[Tensor, "P K"], sample: Int[Tensor, "L"]) -> Bool[Tensor, "P L"]:
    """Whether each row of `rows` holds each of the items of `sample`."""
    ordered = rows.sort(1).values
    wanted = sample.expand(len(rows), -1).contiguous()
    place = torch.searchsorted(ordered, wanted).clamp(max=rows.shape[1] - 1)
    found: Tensor = ordered.gather(1, place) == wanted
    return found


class _Once:
    """A matcher whose users are encoded once for two losses, from a batch that is ready for training."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, Any] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "training_input":
            raise AttributeError(name)
        return getattr(self._model, name)

    def encode_positions(self, batch: Batch) -> Tensor:
        if "positions" not in self._kept:
            self._kept["positions"] = self._model.encode_positions(batch)  # type: ignore[operator]
        found: Tensor = self._kept["positions"]
        return found

    def encode_users(self, batch: Batch) -> tuple[Tensor, Tensor]:
        if "users" not in self._kept:
            self._kept["users"] = self._model.encode_users(batch)  # type: ignore[operator]
        users: tuple[Tensor, Tensor] = self._kept["users"]
        return users
