"""Distillation: a small model learns from the probabilities of a large one, or of several, as well as from labels.

    loss = Distillation(teacher, temperature=2.0, soft=0.9)                          # rankers
    loss = Distillation(teacher, temperature=2.0, soft=0.9, hard=CrossEntropy())     # classifiers
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

Rows without a label (NaN, for classes -1) learn from the teacher alone: there are usually many more rows than labels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.learn.losses import BCE, Loss

__all__ = ["Distillation", "bernoulli_kl", "softmax_kl"]


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


@dataclass(frozen=True, eq=False, repr=False)
class Distillation:
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

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be positive, received {self.temperature}")
        if not 0 <= self.soft <= 1:
            raise ValueError(f"soft is the share of the soft loss, between 0 and 1, received {self.soft}")
        if not self.teachers:
            raise ValueError("distillation needs at least one teacher, received none")

    @property
    def teachers(self) -> tuple[nn.Module, ...]:
        """The teacher, or all of them."""
        return (self.teacher,) if isinstance(self.teacher, nn.Module) else tuple(self.teacher)

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
        if any(model is teacher for teacher in self.teachers):
            raise ValueError("a model cannot be its own teacher: it would learn nothing; pass another as teacher")
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
        for teacher in self.teachers:
            if any(module.training for module in teacher.modules()):
                teacher.eval()
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

    def __repr__(self) -> str:
        """Names the teachers by their weights, so that a checkpoint of a run with others is refused."""
        teachers = ", ".join(f"{type(t).__name__}:{_digest(t)}" for t in self.teachers)
        return f"Distillation({teachers}, temperature={self.temperature}, soft={self.soft}, hard={self.hard!r})"


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
