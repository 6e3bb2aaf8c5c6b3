"""Penalties on the rows that a batch touches, at a cost that does not depend on the table.

`RowL2` pulls rows towards zero through their gradient; `Proximal` sets weights, or whole rows, to exactly zero.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import overload

import torch
from jaxtyping import Int
from torch import Tensor
from torch.optim import Optimizer

from funnelrec.data.batches import Batches
from funnelrec.learn.rows import put, refuse_closure, require_positive, take, touched

__all__ = ["Proximal", "RowL2"]


@dataclass(frozen=True, eq=False, repr=False)
class RowL2:
    """strength / 2 · ‖row‖² for each distinct row of the batch; with `counts`, strength / (2 n_r) · ‖row r‖².

    Without counts rare values are held as firmly as common ones. With the counts n_r of the values in the training
    examples it is the mini-batch-aware regularisation of DIN (Zhou et al. 2018, Eqs. 4-7): rare values are held more
    firmly, common ones hardly at all.
    """

    strength: int | float
    counts: Int[Tensor, "V"] | None = None

    def __post_init__(self) -> None:
        require_positive("strength", self.strength)

    @classmethod
    def mini_batch_aware(cls, strength: int | float, batches: Batches, rows: int) -> RowL2:
        """With the counts of `ids` and `history_ids` over one epoch of `batches`; `rows` is `spec.table_rows`."""
        counts = torch.zeros(rows, dtype=torch.int64)
        for batch in batches.epoch(0):
            for name in ("ids", "history_ids"):
                if name in batch:
                    counts += batch[name].flatten().bincount(minlength=rows)
        return cls(strength, counts)

    def add_to(self, parameter: Tensor) -> None:
        """Add the penalty's gradient to a gradient that is there. Raises ValueError for a table of another size."""
        if parameter.grad is None:
            return
        rows, gradient = touched(parameter.grad)
        held: Tensor | float = self.strength
        if self.counts is not None:
            if len(self.counts) != len(parameter):
                raise ValueError(
                    f"counts of {len(self.counts)} rows do not belong to a table of {len(parameter)}; "
                    "count with rows=spec.table_rows"
                )
            held = (self.strength / take(self.counts, rows).clamp(min=1)).unsqueeze(1)  # (R, 1)
        gradient.add_(held * take(parameter.detach(), rows))
        if rows is not None:  # `touched` may have summed repeated rows into a new tensor
            parameter.grad = torch.sparse_coo_tensor(
                rows.unsqueeze(0), gradient, parameter.shape, is_coalesced=True, check_invariants=False
            )

    def __repr__(self) -> str:
        counts = "" if self.counts is None else hashlib.sha256(self.counts.numpy().tobytes()).hexdigest()[:16]
        return f"RowL2({self.strength}{', ' if counts else ''}{counts})"


class Proximal(Optimizer):
    """Soft thresholds after the step of another optimiser: what falls below them is exactly zero.

    For each touched row w of a parameter, with the learning rate η: w ← sign(w) (|w| − η l1)₊ number by number, then
    w ← w (1 − η l21 / ‖w‖)₊ as a group, so that a value of a field can vanish as a whole (Gai et al. 2017, Eq. 5). A
    parameter of one dimension knows l1 only. Behind Adam, whose steps are about η whatever the gradient's size,
    strengths of .1 to 1 keep what is pulled one way and drop what is pulled to and fro.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, l1: float = 0.0, l21: float = 0.0) -> None:
        require_positive("lr", lr)
        if min(l1, l21) < 0 or l1 + l21 == 0:
            raise ValueError(f"l1 and l21 must not be negative and one of them positive, received {l1} and {l21}")
        super().__init__(params, {"lr": lr, "l1": l1, "l21": l21})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Shrink the rows that have a gradient."""
        refuse_closure(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                rows, _ = touched(parameter.grad)
                weight = take(parameter, rows)
                shrunk = weight.sign() * (weight.abs() - group["lr"] * group["l1"]).clamp(min=0)
                if group["l21"] and weight.dim() > 1:
                    length = shrunk.norm(dim=1, keepdim=True)
                    tiny = torch.finfo(length.dtype).tiny
                    shrunk *= (1 - group["lr"] * group["l21"] / length.clamp(min=tiny)).clamp(min=0)
                put(parameter, rows, shrunk)
        return None
