"""x Wᵀ + b in float32, as fast on AMD processors as elsewhere.

torch multiplies float32 matrices on CPU with MKL, which keeps its fast code for Intel's processors: on one core of an
EPYC it does 44 GFLOP/s where oneDNN, which torch brings too, does 130 (docs/decisions/0002-float32-products.md). So on
such a processor large products go to oneDNN; all others, all other types, and graphs that are compiled or exported are
`torch.nn.functional.linear`. The sums are the same float32 sums in another order.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["Linear", "linear", "product", "to_autocast"]

LARGE = 2**24  #: multiplications from which oneDNN is faster even for a shape that it meets for the first time
FEW = 4  #: rows below which reading W is all the work


def to_autocast(x: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    """`x` in the type that autocast computes in, `x` itself outside of it."""
    device = x.device.type
    return x.to(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else x


@cache
def _mkl_is_slow() -> bool:
    """Whether products go to MKL on a processor that is not Intel's, and oneDNN's operator is at hand."""
    processor = str(torch.cpu.get_capabilities().get("cpu_name", ""))
    return processor.startswith("AMD") and torch._C.has_mkl and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(x, _dense(weight), bias, "none", [], "")
    return product


def _dense(weight: Tensor) -> Tensor:
    """A matrix without gaps: for part of a wider one oneDNN has only its reference code, a thousand times as slow."""
    return weight if weight.is_contiguous() or weight.t().is_contiguous() else weight.contiguous()


def _better(x: Tensor, weight: Tensor) -> bool:
    """Whether oneDNN is the faster of the two for x Wᵀ."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.numel() * len(weight) >= LARGE
        and x.numel() >= FEW * x.shape[-1]
        and x.device.type == "cpu"
        and _mkl_is_slow()
        and bool(torch.backends.mkldnn.enabled)
    )


class _OneDNN(torch.autograd.Function):
    """Three products: y = x Wᵀ + b forward, dx = g W and dW = gᵀ x backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _onednn(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        rows, of_x = grad.reshape(-1, grad.shape[-1]), x.reshape(-1, x.shape[-1])
        short = len(rows) <= weight.numel()  # MKL is no slower in long sums for a small matrix
        return (
            _onednn(grad, weight.t(), None) if to_x else None,
            None if not to_weight else _onednn(rows.t(), of_x.t(), None) if short else rows.t() @ of_x,
            rows.sum(0) if to_bias else None,
        )


def product(a: Float[Tensor, "n k"], b: Float[Tensor, "m k"]) -> Float[Tensor, "n m"]:
    """a bᵀ for use inside a hand-written gradient: nothing is recorded and autocast does not touch it."""
    if _better(a, b):
        return _onednn(a, b, None)
    return torch.mm(a, b.T, out=a.new_empty(len(a), len(b)))


def linear(
    x: Float[Tensor, "*batch in_features"],
    weight: Float[Tensor, "out_features in_features"],
    bias: Float[Tensor, " out_features"] | None = None,
) -> Float[Tensor, "*batch out_features"]:
    """`torch.nn.functional.linear`, by the faster of torch's two libraries; differentiable once where it is oneDNN."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu") or not _better(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled():
        result: Tensor = _OneDNN.apply(x, weight, bias)  # type: ignore[no-untyped-call]
        return result
    return _onednn(x, weight, bias)


class Linear(nn.Linear):
    """`nn.Linear`, its product by `linear`."""

    def forward(self, input: Float[Tensor, "*batch in_features"]) -> Float[Tensor, "*batch out_features"]:
        """x Wᵀ + b for inputs [..., in_features]."""
        return linear(input, self.weight, self.bias)
