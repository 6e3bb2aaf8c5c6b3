"""Reading and writing the rows that a gradient names, which is what makes an optimiser lazy."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from funnelrec.core.nn.embedding import coalesced

__all__ = ["lazy_zeros", "put", "refuse_closure", "require_positive", "subtract", "take", "touched"]


def touched(gradient: Tensor) -> tuple[Tensor | None, Tensor]:
    """A gradient as (rows, their summed values); rows is None for a dense gradient, which holds all of them."""
    if not gradient.is_sparse:
        return None, gradient
    gradient = coalesced(gradient)
    return gradient.indices()[0], gradient.values()


def take(state: Tensor, rows: Tensor | None) -> Tensor:
    """The touched rows of a state, or the state itself."""
    return state if rows is None else state.index_select(0, rows)


def put(state: Tensor, rows: Tensor | None, values: Tensor) -> None:
    """state[rows] = values; nothing to do where `values` is the state itself, changed in place."""
    if rows is not None:
        state.index_copy_(0, rows, values)
    elif values is not state:
        state.copy_(values)


def subtract(parameter: Tensor, rows: Tensor | None, change: Tensor, rate: float) -> None:
    """parameter[rows] -= rate · change."""
    if rows is None:
        parameter.add_(change, alpha=-rate)
    else:
        # the rows are distinct; index_add_, which must allow repeated ones, takes about twice as long on CPU
        parameter.index_copy_(0, rows, parameter.index_select(0, rows).sub_(change, alpha=rate))


def lazy_zeros(shape: torch.Size, like: Tensor) -> Tensor:
    """Zeros that cost memory only once written: numpy asks the system for zero pages, torch.zeros writes them."""
    if like.device.type != "cpu" or like.dtype != torch.float32:
        return torch.zeros(shape, dtype=like.dtype, device=like.device)
    return torch.from_numpy(np.zeros(tuple(shape), dtype=np.float32))


def require_positive(name: str, value: int | float) -> None:
    """Raises ValueError unless value > 0."""
    if not value > 0:
        raise ValueError(f"{name} must be positive, received {value}")


def refuse_closure(closure: object) -> None:
    """Raises ValueError when a step is given a closure."""
    if closure is not None:
        raise ValueError("step takes no closure; compute the loss and its gradients before step()")
