"""Distillation: a small model learns from the probabilities of a large one, or of several, as well as from labels.

    loss = Distillation(teacher, temperature=2.0, soft=0.9)                          # rankers
    loss = Distillation(teacher, temperature=2.0, soft=0.9, hard=CrossEntropy())     # classifiers
    loss = CatalogueDistillation(teacher, soft=0.9)                                  # matchers
    fit(student, batches, loss, epochs=10)

Hinton, Vinyals, Dean. Distilling the knowledge in a neural network. 2015. arXiv:1503.02531, for one logit:

    q = mean over teachers of σ(t / T)                             the soft target
    L = (1 − a) · hard(s, y) + a · T² · [BCE(s / T, q) − H(q)]     BCE − H is KL(q ‖ σ(s / T)), 0 where s = t
    dL_soft / ds = T · (σ(s / T) − q)                              (s − t) / 4 for large T: T² keeps its size

At T = 1, where to begin with clicks, the teacher's probability is a label without its noise, and L has the gradient of
a cross-entropy against the mixture (1 − a) y + a q. A student copies the teacher's calibration: calibrate that first.
Several teachers are averaged as probabilities: a mean of logits would be surer than their average is.

For the logits of classes, q = softmax(t / T) and L_soft = T² · KL(q ‖ softmax(s / T)), the mean over the rows and not,
as `nn.KLDivLoss` has it when nothing else is said, over rows and classes.

Rows of rankers and classifiers without a label (NaN, for classes -1) learn from the teacher alone: there are usually
many more rows than labels.

A matcher's classes are all items, at every position of a history; the order of the teacher's first items alone, for
catalogues too large for that, is learnt by learn/distil_ranking.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.nn.linear import product
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.learn.losses import BCE, LOG2_E, Loss, chunk_rows, positions

__all__ = [
    "Answers",
    "CatalogueDistillation",
    "Distillation",
    "WithTeacher",
    "bernoulli_kl",
    "softmax_kl",
    "taught_batch",
]

TINY = torch.finfo(torch.float32).tiny


def bernoulli_kl(
    logits: Float[Tensor, "B"], target: Float[Tensor, "B"], temperature: float = 1.0
) -> Float[Tensor, "B"]:
    """T² · KL(target ‖ σ(logits / T)) of each row; `target` is a probability in [0, 1]."""
    entropy = torch.special.entr(target) + torch.special.entr(1 - target)
    cross = F.binary_cross_entropy_with_logits(logits / temperature, target, reduction="none")
    divergence: Tensor = temperature**2 * (cross - entropy)
    return divergence


def softmax_kl(
    logits: Float[Tensor, "B K"], target: Float[Tensor, "B K"], temperature: float = 1.0
) -> Float[Tensor, "B"]:
    """T² · KL(target ‖ softmax(logits / T)) of each row; `target` holds the probabilities of K classes."""
    surprise = -(logits / temperature).log_softmax(1)  # (B, K)
    divergence: Tensor = temperature**2 * (target * surprise - torch.special.entr(target)).sum(1)
    return divergence


class WithTeacher:
    """What every loss with a `teacher`, one or several, and a share `soft` of what it says has in common."""

    teacher: nn.Module | Sequence[nn.Module]
    soft: float

    def __post_init__(self) -> None:
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft is the share of the soft loss, between 0 and 1, received {self.soft}")
        if not self.teachers:
            raise ValueError("distillation needs at least one teacher, received none")
        if not getattr(self, "temperature", 1.0) > 0:
            raise ValueError(f"temperature must be positive, received {getattr(self, 'temperature', 1.0)}")

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """The teacher, or all of them."""
        return (self.teacher,) if isinstance(self.teacher, nn.Module) else tuple(self.teacher)

    def ready(self, model: Any) -> tuple[nn.Module, ...]:
        """The teachers in eval mode, none of which is the student."""
        for teacher in self.teachers:
            if teacher is model:
                raise ValueError("a model cannot be its own teacher: it would learn nothing; pass another as teacher")
            if any(module.training for module in teacher.modules()):
                teacher.eval()
        return self.teachers

    def __repr__(self) -> str:
        """Names the teachers by their weights, so that a checkpoint of a run with others is refused."""
        teachers = ", ".join(f"{type(t).__name__}:{_digest(t)}" for t in self.teachers)
        rest = ", ".join(f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.name != "teacher")  # type: ignore[arg-type]
        return f"{type(self).__name__}({teachers}, {rest})"


@dataclass(frozen=True, eq=False, repr=False)
class Distillation(WithTeacher):
    """(1 − soft) · hard loss + soft · T² · KL to the teachers' probabilities, a loss for `fit` and any Ranker or
    classifier.

    teacher: a trained model of the student's kind, or several; kept in eval mode, never given a gradient, on the device
    of the batches. It reads the same batch as the student and may read more of it (a history, say).
    temperature: T. soft: a in [0, 1], the share of the soft loss. hard: the loss of the labels, any that asks the model
    for nothing but its logits. Where a batch has weights, both losses are weighted.
    """

    teacher: nn.Module | Sequence[nn.Module]
    temperature: float = 1.0
    soft: float = 0.5
    hard: Loss = field(default_factory=BCE)

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        """The whole loss; with soft=0 it is the hard loss of the labelled rows and no teacher is asked."""
        parts = self.parts(model, batch)
        if self.soft == 0:
            return parts["hard"]
        if self.soft == 1:
            return parts["soft"]
        return (1 - self.soft) * parts["hard"] + self.soft * parts["soft"]

    def parts(self, model: Any, batch: Batch) -> dict[str, Tensor]:
        """The losses before they are mixed, {"hard", "soft"}; one whose share is 0 is left out."""
        self.ready(model)
        logits = model(batch)
        if logits.dim() == 2 and self.soft < 1 and isinstance(self.hard, BCE):
            raise ValueError("the labels of a classifier are class numbers, not BCE's: pass hard=CrossEntropy()")
        parts = {}
        if self.soft < 1:
            parts["hard"] = self._hard(logits, batch)
        if self.soft > 0:
            divergence = softmax_kl if logits.dim() == 2 else bernoulli_kl
            each = divergence(logits.float(), self.targets(batch), self.temperature)  # (B,)
            parts["soft"] = _mean(each, batch)
        return parts

    @torch.no_grad()
    def targets(self, batch: Batch) -> Float[Tensor, "B *K"]:
        """The teachers' mean probability at the temperature, a constant."""
        total: Tensor | None = None
        for teacher in self.ready(None):
            answer = teacher(batch).float() / self.temperature
            one = answer.softmax(1) if answer.dim() == 2 else answer.sigmoid()
            total = one if total is None else total + one
        assert total is not None
        return total / len(self.teachers)

    def _hard(self, logits: Tensor, batch: Batch) -> Tensor:
        known = ~batch.label.isnan()
        if bool(known.all()):
            return self.hard(lambda _: logits, batch)  # the forward pass is not made twice
        if not bool(known.any()):
            return logits.sum() * 0.0
        return self.hard(lambda _: logits[known], batch.select(known))


@dataclass(frozen=True, eq=False, repr=False)
class CatalogueDistillation(WithTeacher):
    """(1 − soft) · cross-entropy + soft · T² · KL(q ‖ softmax(s / T)) over the whole catalogue, a loss for `fit` and
    any VectorMatcher: what the teachers would recommend at each position of a history is worth more than the one item
    that came.

    teacher: one trained matcher on the same catalogue, or several, whose probabilities are averaged; it may be larger,
    or of another kind, and scores as it serves, by the best of its interests. Positions of which it knows nothing are
    left out. A score is a logit as it is: it means nothing here in a model that was trained with a temperature of its
    own (`FullSoftmax(temperature=.1)`). Memory is bounded; time grows with the number of items. Set `dense = True` on
    the student's item table.
    """

    teacher: nn.Module | Sequence[nn.Module]
    temperature: float = 1.0
    soft: float = 0.5

    def __call__(self, model: Any, batch: Batch) -> Tensor:
        teachers = self.ready(model) if self.soft else ()
        batch = taught_batch(model, teachers, batch)
        users, target, keep = positions(model, batch)
        device = users.device.type
        half = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.bfloat16
        kind = torch.bfloat16 if half else torch.float32
        answers = [Answers(teacher, batch, model.spec.num_items, kind) for teacher in teachers]
        for answer in answers:
            keep = keep & answer.known
        kept = keep.nonzero().squeeze(1)
        if len(kept) == 0:
            return users.sum() * 0.0
        items = model.encode_items(torch.arange(FIRST_KNOWN, model.spec.num_items, device=target.device))
        own = (users[kept].float(), items.float(), target[kept] - FIRST_KNOWN)
        total: Tensor = _SoftTargets.apply(*own, answers, kept, kind, self.temperature, self.soft)  # type: ignore[no-untyped-call]
        return total


def taught_batch(model: Any, teachers: Sequence[Any], batch: Batch) -> Batch:
    """What both read of a batch: the student's `training_input` where it has one, e.g. items hidden."""
    own = getattr(type(model), "training_input", None)
    for teacher in teachers:
        if batch.target.dim() == 2 and getattr(type(teacher), "training_input", None) is not own:
            raise ValueError(
                f"{type(model).__name__} cannot be taught by {type(teacher).__name__}: one of them trains on another "
                "input (training_input), so that their positions do not ask the same; take a teacher of its kind"
            )
    return batch if own is None else model.training_input(batch)


class Answers:
    """What a teacher says of every real item at each position of a batch, a few positions at a time.

    `known` [P]: where it knows anything of the user. Several interests answer as in serving, by the best of them. The
    products are in `kind`, the scores in float32.
    """

    @torch.no_grad()
    def __init__(self, teacher: Any, batch: Batch, num_items: int, kind: torch.dtype = torch.float32) -> None:
        own = getattr(getattr(teacher, "spec", None), "num_items", num_items)
        if own != num_items:
            raise ValueError(f"teacher and student need the same catalogue, received {own} and {num_items} item rows")
        if batch.target.dim() == 2:
            users = teacher.encode_positions(batch).flatten(0, 1).unsqueeze(1)  # (P, 1, D)
            valid = torch.ones(users.shape[:2], dtype=torch.bool, device=users.device)
        else:
            users, valid = teacher.encode_users(batch)  # (P, K, D), (P, K)
        items = teacher.encode_items(torch.arange(FIRST_KNOWN, num_items, device=users.device))
        self.users, self.items = users.detach().to(kind), items.detach().to(kind)
        self.valid, self.known = valid, valid.any(1)

    def scores(self, rows: Int[Tensor, "p"]) -> Float[Tensor, "p N"]:
        """Scores of all real items at these positions."""
        users = self.users[rows]  # (p, K, D)
        found = product(users.flatten(0, 1), self.items).float()
        if users.shape[1] == 1:
            return found
        found = found.view(*users.shape[:2], -1).masked_fill_(~self.valid[rows].unsqueeze(2), -torch.inf)
        return found.amax(1)


class _SoftTargets(torch.autograd.Function):
    """The mean over rows p of (1 − a) · CE(s_p, target_p) + a · T² · KL(q_p ‖ softmax(s_p / T)), s = u Eᵀ.

    The gradient of s, (1 − a) (softmax(s) − onehot) + a T (softmax(s / T) − q), is made chunk by chunk in the forward
    sweep, so that [P, N] scores are never held. Its products are in `kind`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        users: Float[Tensor, "P D"],
        items: Float[Tensor, "N D"],
        target: Int[Tensor, "P"],
        answers: Sequence[Answers],
        kept: Int[Tensor, "P"],
        kind: torch.dtype,
        temperature: float,
        soft: float,
    ) -> Float[Tensor, ""]:
        with torch.autocast(users.device.type, enabled=False):
            own = items.to(kind)
            grad_users, grad_items = torch.empty_like(users), torch.zeros_like(items)
            total, share = users.new_zeros(()), soft * temperature**2
            step = chunk_rows(4 * len(items))
            for start in range(0, len(users), step):
                part = slice(start, start + step)
                mine, row = users[part].to(kind), target[part].unsqueeze(1)
                scores = product(mine, own).float()  # (p, N)
                logs = (scores / temperature).log_softmax(1)
                grad = (logs * LOG2_E).exp2_()  # softmax(s / T); exp2 takes a third of the time of exp
                if answers:
                    q = torch.zeros_like(scores)
                    for answer in answers:
                        said = answer.scores(kept[part]).div_(temperature)
                        q.add_(said.softmax(1), alpha=1 / len(answers))
                    total += share * torch.linalg.vecdot(q, q.clamp(min=TINY).log_().sub_(logs)).sum()
                    grad.sub_(q if temperature != 1 else q.mul_(soft))
                if temperature != 1:
                    logs = scores.log_softmax(1)
                    grad.mul_(soft * temperature).add_((logs * LOG2_E).exp2_(), alpha=1 - soft)
                total -= (1 - soft) * logs.gather(1, row).sum()
                grad.scatter_add_(1, row, grad.new_full(row.shape, soft - 1))
                grad = grad.to(kind)
                grad_users[part] = product(grad, own.T)
                grad_items.add_(product(grad.T, mine.T))
        ctx.save_for_backward(grad_users.div_(len(users)), grad_items.div_(len(users)))
        return total / len(users)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> tuple[Tensor | None, ...]:
        users, items = ctx.saved_tensors
        return users * outer, items * outer, *[None] * 6


def _mean(each: Tensor, batch: Batch) -> Tensor:
    if "weight" not in batch:
        return each.mean()
    return (each * batch.weight).sum() / batch.weight.sum().clamp(min=torch.finfo(each.dtype).tiny)


def _digest(model: nn.Module) -> str:
    state = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        state.update(name.encode())
        state.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return state.hexdigest()[:12]
