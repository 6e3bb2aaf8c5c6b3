"""The multi-layer perceptron every deep model shares."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Bool, Float
from torch import Tensor, nn

from funnelrec.core.nn.activation import Activation, Dice, MaskedBatchNorm
from funnelrec.core.nn.activation import activation as make_activation
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.linear import Linear

__all__ = ["MLP"]


class MLP(nn.Module):
    """Linear layers of the given `sizes` on the last axis.

    Every layer but the last is linear → batch norm (optional) → activation → dropout; the last one is linear alone,
    unless `activate_last`. So `MLP(64, (400, 400, 1))` has two hidden layers and gives a logit. Weights start
    Xavier-uniform, biases at 0.
    """

    def __init__(
        self,
        in_features: int,
        sizes: Sequence[int],
        *,
        activation: Activation = "relu",
        dropout: float = 0.0,
        batch_norm: bool = False,
        activate_last: bool = False,
    ) -> None:
        super().__init__()
        if not sizes or min(sizes) < 1 or in_features < 1:
            raise ValueError(f"an MLP needs positive sizes, received in_features={in_features}, sizes={tuple(sizes)}")
        self.out_features = sizes[-1]
        self.layers = nn.ModuleList()
        widths = [in_features, *sizes]
        for depth, (before, after) in enumerate(pairwise(widths), start=1):
            self.layers.append(_linear(before, after))
            if depth == len(sizes) and not activate_last:
                break
            if batch_norm:
                self.layers.append(MaskedBatchNorm(after))
            self.layers.append(make_activation(activation, after))
            if dropout > 0:
                self.layers.append(Dropout(dropout))

    def forward(
        self, x: Float[Tensor, "*shape D"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape E"]:
        """`mask` (True = real) keeps padded positions out of the statistics of Dice and batch norm."""
        return self.after_first(self.first(x), mask)  # (..., sizes[-1])

    @property
    def first(self) -> Linear:
        """The first linear layer, for a model that multiplies with its weights while it makes what it multiplies."""
        layer = self.layers[0]
        assert isinstance(layer, Linear)
        return layer

    def after_first(
        self, x: Float[Tensor, "*shape H"], mask: Bool[Tensor, "*shape"] | None = None
    ) -> Float[Tensor, "*shape E"]:
        """What follows the first linear layer, whose output is `x`."""
        for layer in self.layers[1:]:
            x = layer(x, mask) if isinstance(layer, Dice | MaskedBatchNorm) else layer(x)
        return x


def _linear(before: int, after: int) -> Linear:
    layer = Linear(before, after)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
