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
    L   = hard − λ · Σ_k [s_{π_k} − log(Σ_{i ≥ k} exp s_{π_i} + Σ_l exp s_{u_l})]      u a uniform sample
Differs: both weights of RD count from the first step on, where the authors begin with the first alone; the student's
rank is exact among the K and estimated among the others. RRD is mixed like RD, (1 − a) · hard + a · soft, its sum over
k divided by K, and the plain best K are taken, as the authors' note on their code recommends. The sample is shared by
the batch; items of it that are among the K or observed are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from funnelrec.core.batch import Batch
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.distil import Answers, WithTeacher, taught_batch
from funnelrec.learn.losses import SCORES_BYTES, Loss, SampledBCE, SampledSoftmax, chunk_rows, positions

__all__ = ["RankingDistillation", "RelaxedRankingDistillation", "discrepancy_weights", "relaxed_ranking_loss"]


def discrepancy_weights(rank: Float[Tensor, "P K"], place: float, discrepancy: float) -> Float[Tensor, "P K"]:
    """Tang and Wang's weights of the teacher's items 1 … K by their rank in the student's order, summing to 1 a row.

    0 where the student already ranks an item as high as the teacher; all 0 where it does so for all of them.
    """
    r = torch.arange(1, rank.shape[1] + 1, device=rank.device)
    weights = torch.exp(-r.double() / place) * torch.tanh(discrepancy * (rank - r).clamp(min=0))  # (P, K)
    return (weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(torch.float64).tiny)).to(rank.dtype)


def relaxed_ranking_loss(
    wanted: Float[Tensor, "P K"], other: Float[Tensor, "P L"], real: Bool[Tensor, "P L"]
) -> Float[Tensor, "P"]:
    """-log of the probability that the K scores come in this order and before all `real` others, over K."""
    rest = other.masked_fill(~real, -torch.inf).logsumexp(1, keepdim=True)  # (P, 1)
    below = wanted.flip(1).logcumsumexp(1).flip(1)  # (P, K): log Σ_{i ≥ k} exp s_i
    loss: Tensor = (torch.logaddexp(below, rest) - wanted).mean(1)
    return loss


class _Ranked(WithTeacher):
    """The part that both losses share: the teacher's first items at each position, and the student's scores of them."""

    top: int
    others: int
    hard: Loss

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
        observed = torch.cat([batch.history, batch.target.view(len(batch.history), -1)], 1)  # (B, L + 1 or 2 L)
        batch = taught_batch(model, (teacher,), batch)
        student = _Once(model)
        soft = self._soft(student, Answers(teacher, batch, model.spec.num_items), batch, observed)
        return soft if self.soft == 1 else (1 - self.soft) * self.hard(student, batch) + self.soft * soft

    def _soft(self, student: Any, answers: Answers, batch: Batch, observed: Tensor) -> Tensor:
        """The mean over the positions that count and of which the teacher knows anything."""
        users, target, keep = positions(student, batch)
        kept = (keep & answers.known).nonzero().squeeze(1)  # (P,)
        seen = observed[kept // (len(target) // len(observed))]
        wanted = self._first(answers, kept, seen)  # (P, K)
        sample = torch.randint(FIRST_KNOWN, student.spec.num_items, (self.others,)).to(target.device)
        rows, place = torch.unique(torch.cat([wanted.flatten(), sample]), return_inverse=True)
        vectors = student.encode_items(rows)
        of_wanted, of_sample = place[: wanted.numel()].view(wanted.shape), place[wanted.numel() :]
        step = max(1, SCORES_BYTES // (4 * (self.top * users.shape[1] + self.top * self.others)))
        total = users.sum() * 0.0
        for start in range(0, len(kept), step):
            part = slice(start, start + step)
            out = torch.cat([wanted[part], seen[part]], 1).sort(1).values  # (p, K + L)
            real = ~_holds(out, sample)
            rest = student.spec.num_items - FIRST_KNOWN - _distinct(out)  # (p, 1) items that `real` stands for
            chunk = (users[kept[part]], vectors, of_wanted[part], of_sample, real, rest)
            total = total + (
                self._sum(*chunk) if step >= len(kept) else checkpoint(self._sum, *chunk, use_reentrant=False)
            )
        return total / max(1, len(kept))

    def _first(self, answers: Answers, kept: Tensor, seen: Tensor) -> Int[Tensor, "P K"]:
        """The teacher's best `top` item rows at each position, without those in `seen`."""
        found = [kept.new_empty(0, self.top)]
        count = len(answers.items)
        step = chunk_rows(4 * count)
        for start in range(0, len(kept), step):
            part = slice(start, start + step)
            scores = F.pad(answers.scores(kept[part]), (FIRST_KNOWN, 0), value=-torch.inf)  # (p, rows)
            best = scores.scatter_(1, seen[part], -torch.inf).topk(min(self.top, count))
            if self.top > count or best.values.isneginf().any():
                raise ValueError(
                    f"there are no top={self.top} items that a user has not taken among {count}; choose a smaller top"
                )
            found.append(best.indices)
        return torch.cat(found)

    def _sum(
        self, users: Tensor, vectors: Tensor, wanted: Tensor, sample: Tensor, real: Tensor, rest: Tensor
    ) -> Tensor:
        """Sum over p positions; `wanted` [p, K] and `sample` [L] point into `vectors`."""
        scores = torch.einsum("pd,pkd->pk", users, F.embedding(wanted, vectors)).float()
        return self._ranking(scores, (users @ vectors[sample].T).float(), real, rest).sum()

    def _ranking(
        self,
        scores: Float[Tensor, "p K"],
        other: Float[Tensor, "p L"],
        real: Bool[Tensor, "p L"],
        rest: Int[Tensor, "p one"],
    ) -> Float[Tensor, "p"]:
        raise NotImplementedError


@dataclass(frozen=True, eq=False, repr=False)
class RankingDistillation(_Ranked):
    """(1 − soft) · hard + soft · the weighted logistic loss of the teacher's first `top` items, for a VectorMatcher.

    `place` λ: ranks after which an item counts a third; `discrepancy` μ: how fast a rank that is too low counts;
    `others`: the size of the sample that ranks are estimated from. `hard` must know negatives: the soft part has none.
    Of several interests the one that the target chose is taught.
    """

    teacher: nn.Module | Sequence[nn.Module]
    soft: float = 0.5
    top: int = 10
    others: int = 100
    hard: Loss = field(default_factory=SampledBCE)
    place: float = 10.0
    discrepancy: float = 0.1

    def _ranking(self, scores: Tensor, other: Tensor, real: Tensor, rest: Tensor) -> Float[Tensor, "p"]:
        with torch.no_grad():
            above = ((other.unsqueeze(1) > scores.unsqueeze(2)) & real.unsqueeze(1)).sum(2)  # (p, K)
            outside = (above * rest / real.sum(1, keepdim=True).clamp(min=1)).floor()
            within = (scores.unsqueeze(1) > scores.unsqueeze(2)).sum(2)  # (p, K)
            weights = discrepancy_weights(1 + outside + within, self.place, self.discrepancy)
        return -(weights * F.logsigmoid(scores)).sum(1)


@dataclass(frozen=True, eq=False, repr=False)
class RelaxedRankingDistillation(_Ranked):
    """(1 − soft) · hard + soft · the relaxed permutation loss of the teacher's first `top` items, for a VectorMatcher.

    Only the order of those counts, and that all of them stand above `others` sampled items, in no order. Of several
    interests the one that the target chose is taught.
    """

    teacher: nn.Module | Sequence[nn.Module]
    soft: float = 0.5
    top: int = 40
    others: int = 40
    hard: Loss = field(default_factory=lambda: SampledSoftmax(100))

    def _ranking(self, scores: Tensor, other: Tensor, real: Tensor, rest: Tensor) -> Float[Tensor, "p"]:
        return relaxed_ranking_loss(scores, other, real)


def _holds(ordered: Int[Tensor, "P K"], sample: Int[Tensor, "L"]) -> Bool[Tensor, "P L"]:
    """Whether each of the ordered rows holds each of the items of `sample`."""
    wanted = sample.expand(len(ordered), -1).contiguous()
    place = torch.searchsorted(ordered, wanted).clamp(max=ordered.shape[1] - 1)
    found: Tensor = ordered.gather(1, place) == wanted
    return found


def _distinct(ordered: Int[Tensor, "P K"]) -> Int[Tensor, "P one"]:
    """How many real items each of the ordered rows holds."""
    first = torch.ones_like(ordered, dtype=torch.bool)
    torch.ne(ordered[:, 1:], ordered[:, :-1], out=first[:, 1:])
    count: Tensor = (first & (ordered >= FIRST_KNOWN)).sum(1, keepdim=True)
    return count


class _Once:
    """A matcher whose users are encoded once for two losses, from a batch that is ready for training."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._kept: dict[str, tuple[Batch, Any]] = {}

    def __getattr__(self, name: str) -> Any:
        if name == "training_input":
            raise AttributeError(name)
        return getattr(self._model, name)

    def encode_positions(self, batch: Batch) -> Any:
        return self._encoded("encode_positions", batch)

    def encode_users(self, batch: Batch) -> Any:
        return self._encoded("encode_users", batch)

    def _encoded(self, how: str, batch: Batch) -> Any:
        if how not in self._kept or self._kept[how][0] is not batch:
            self._kept[how] = batch, getattr(self._model, how)(batch)
        return self._kept[how][1]
