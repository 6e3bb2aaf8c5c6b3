"""Adagrad with momentum, lazy on sparse gradients: what the authors of GRU4Rec train with."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, overload

import torch
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.adagrad import adagrad

from funnelrec.learn.rows import lazy_zeros, put, refuse_closure, require_positive, take, touched

__all__ = ["Adagrad"]


class Adagrad(Optimizer):
    """sum ← sum + g², v ← momentum · v - lr · g / √sum, p ← p + v.

    Source: Duchi, Hazan, Singer, JMLR 2011. The sum starts at eps, so that tiny first gradients make tiny steps.
    On a sparse gradient only its rows are read and written: momentum then counts the steps in which a row occurs.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float = 0.05,
        momentum: float = 0.0,
        eps: float = 1e-6,
    ) -> None:
        require_positive("lr", lr)
        require_positive("eps", eps)
        if not 0 <= momentum < 1:
            raise ValueError(f"momentum must lie in [0, 1), received {momentum}")
        super().__init__(params, {"lr": lr, "momentum": momentum, "eps": eps})

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient."""
        refuse_closure(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["step"] = torch.zeros(())
                    state["sum"] = torch.full_like(parameter, group["eps"])
                    if group["momentum"]:
                        state["velocity"] = lazy_zeros(parameter.shape, parameter)
                rows, gradient = touched(parameter.grad)
                weight, total = take(parameter, rows), take(state["sum"], rows)
                if group["momentum"]:
                    total.addcmul_(gradient, gradient)
                    velocity = take(state["velocity"], rows).mul_(group["momentum"])
                    velocity.addcdiv_(gradient, total.sqrt(), value=-group["lr"])
                    put(state["velocity"], rows, velocity)
                    weight.add_(velocity)
                else:  # torch's own, in one pass
                    adagrad(
                        [weight], [gradient.to(weight.dtype).contiguous()], [total], [state["step"]], fused=True,
                        lr=group["lr"], weight_decay=0.0, lr_decay=0.0, eps=0.0, maximize=False,
                    )  # fmt: skip
                put(state["sum"], rows, total)
                put(parameter, rows, weight)
        return None
