"""FTRL-proximal: linear weights that end at exact zeros.

Source: McMahan et al. Ad Click Prediction: a View from the Trenches. KDD 2013, algorithm 1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import overload

import torch
from torch import Tensor
from torch.optim import Optimizer

from funnelrec.learn.rows import lazy_zeros, put, refuse_closure, require_positive, take, touched

__all__ = ["FTRL"]


class FTRL(Optimizer):
    """Per coordinate, with g its gradient (Algorithm 1):

        σ = (√(n + g²) − √n) / α,   z ← z + g − σ w,   n ← n + g²
        w = 0 where |z| ≤ l1, else −(z − sign(z) l1) / ((β + √n) / α + l2)

    Without penalties this is gradient descent at the rate α / (β + √Σg²). A coordinate whose gradient is 0 stays as it
    is, bit for bit, and of a sparse gradient only the rows are touched. A weight that is not 0 at the start is taken
    over: z begins where the closed form gives that weight back.

    The paper sums the gradients of examples, our losses average them: `scale`, the batch size, turns one into the
    other. l1 is in units of that sum. A mini-batch is one step: n grows by the square of the sum. `alpha` cannot change
    during a run, as z remembers it: the schedule of a `fit` leaves these weights alone, their rate falls by itself.
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        alpha: float = 0.05,
        beta: float = 1.0,
        l1: float = 0.0,
        l2: float = 0.0,
        scale: int | float = 1.0,
    ) -> None:
        for name, value in (("alpha", alpha), ("scale", scale)):
            require_positive(name, value)
        if min(beta, l1, l2) < 0:
            raise ValueError(f"beta, l1 and l2 must not be negative, received {beta}, {l1} and {l2}")
        options = {"lr": alpha, "alpha": alpha, "beta": beta, "l1": l1, "l2": l2, "scale": scale}
        super().__init__(params, options)

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update of every parameter that has a gradient. Raises ValueError when its rate was changed."""
        refuse_closure(closure)
        for group in self.param_groups:
            alpha, beta, l1, l2 = (group[name] for name in ("alpha", "beta", "l1", "l2"))
            if group["lr"] != alpha:
                raise ValueError("FTRL remembers its rate and cannot change it in a run; leave its lr alone")
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["z"] = lazy_zeros(parameter.shape, parameter)
                    state["n"] = lazy_zeros(parameter.shape, parameter)
                rows, gradient = touched(parameter.grad)
                g = gradient * group["scale"]
                weight, z, n = (take(x, rows) for x in (parameter, state["z"], state["n"]))
                begun = torch.where(n == 0, -(weight * (beta / alpha + l2) + weight.sign() * l1), z)
                more = n + g.square()
                sigma = (more.sqrt() - n.sqrt()) / alpha
                new_z = begun + g - sigma * weight
                shrunk = new_z.sign() * (new_z.abs() - l1).clamp(min=0)
                new_weight = -shrunk / ((beta + more.sqrt()) / alpha + l2)
                moved = g != 0
                put(parameter, rows, torch.where(moved, new_weight, weight))
                put(state["z"], rows, torch.where(moved, new_z, z))
                put(state["n"], rows, torch.where(moved, more, n))
        return None
