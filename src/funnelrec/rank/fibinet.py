"""FiBiNET — fields weighed by what they hold, and a product with a matrix inside.

Paper: Huang, Zhang, Zhang. FiBiNET: Combining Feature Importance and Bilinear Feature Interaction for Click-Through
       Rate Prediction. RecSys 2019. arXiv:1905.09433
Idea:  a squeeze-and-excitation gate says how much each field counts in this example, and pairs interact through a
       matrix between the two vectors, finer than an inner product and than a Hadamard product.

Numbered here: Eq. (1) z_i = mean_d e_id, A = σ₂(W₂ σ₁(W₁ z)), v_i = a_i e_i                _Gate
               Eq. (2) p_ij = (e_i W) ∘ e_j for i < j, W for all, of field i, or of the pair  _Bilinear
               Eq. (3) logit = ⟨w, x⟩ + MLP([p, q]), p of the vectors e, q of the gated v    forward
Differs: the two bilinear layers have parameters of their own. `gate="sigmoid"` is ours: a ReLU can close a field for
         good. `hidden=()` is the paper's shallow form, which adds all entries of p and q up.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import count
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import Linear, linear, product, to_autocast
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["FiBiNET"]

ROWS = 2048  #: examples whose pairs are alive at a time
WIDE = 2048  #: numbers of these pairs from which on they are multiplied and forgotten
KINDS = ("all", "each", "interaction")
GATES = {"relu": torch.relu, "sigmoid": torch.sigmoid}


class _Gate(nn.Module):
    """SENET: one weight a field from the means of all vectors."""

    def __init__(self, fields: int, reduction: int, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.squeeze = Linear(fields, max(1, fields // reduction), bias=False)
        self.excite = Linear(max(1, fields // reduction), fields, bias=False)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B F"]:
        z = e.mean(2)  # (B, F)
        return GATES[self.gate](self.excite(torch.relu(self.squeeze(z))))  # Eq. (1)


class _Bilinear(nn.Module):
    """p_ij = (e_i W) ∘ e_j for the pairs i < j."""

    def __init__(self, fields: int, dim: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        pairs = fields * (fields - 1) // 2
        matrices = {"all": 1, "each": fields - 1, "interaction": pairs}[kind]  # the last field stands left nowhere
        self.weight = nn.Parameter(torch.empty(matrices, dim, dim))
        for matrix in self.weight:
            nn.init.xavier_normal_(matrix)

    def forward(self, e: Float[Tensor, "B F D"]) -> Float[Tensor, "B P D"]:
        """The pairs (0, 1), (0, 2), …   Eq. (2)"""
        matrices = self._side_by_side(e.shape[1])
        turned = _turned(e, 0, torch.split(matrices, _widths(e.shape[1], matrices), dim=1))
        return torch.cat([t * e[:, i + 1 :] for i, t in enumerate(turned)], dim=1)

    def times(self, e: Float[Tensor, "B F D"], weight: Float[Tensor, "N PD"]) -> Float[Tensor, "B N"]:
        """The product of all pairs, side by side, with the weights of a network; on CPU they are never all there."""
        if e.device.type != "cpu" or torch.compiler.is_exporting():  # chunks fix the batch size of a graph
            return linear(self(e).flatten(1), weight)
        out: Tensor = _PairsTimes.apply(e, self._side_by_side(e.shape[1]), weight)  # type: ignore[no-untyped-call]
        return out

    def _side_by_side(self, fields: int) -> Tensor:
        weight = self.weight.expand(fields - 1, -1, -1) if self.kind == "all" else self.weight
        return weight.transpose(0, 1).flatten(1)  # (D, M·D)


def _widths(fields: int, matrices: Tensor) -> list[int]:
    """Columns of `matrices` [D, M·D] that belong to each left field: one for each of its pairs, or one for all."""
    dim, columns = matrices.shape
    own = columns > (fields - 1) * dim
    return [dim * (fields - 1 - i if own else 1) for i in range(fields - 1)]


def _turned(e: Tensor, first: int, matrices: Sequence[Tensor]) -> list[Tensor]:
    """e_i W [R, n_i or 1, D] for the left fields from `first` on: all pairs of a field are one product."""
    size, _, dim = e.shape
    return [(e[:, i] @ w).view(size, w.shape[1] // dim, dim) for i, w in enumerate(matrices, first)]


class _PairsTimes(torch.autograd.Function):
    """e [B, F, D], the matrices side by side [D, M·D] and weights [N, P·D] -> [B, N], float32.

    The pairs are (F - 1) / 2 times what goes in. They are made for some left fields and some examples at a time,
    multiplied inside the cache and forgotten, forward and again backward.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, matrices: Tensor, weight: Tensor) -> Tensor:
        e, matrices, weight = (to_autocast(t) for t in (e, matrices, weight))
        ctx.save_for_backward(e, matrices, weight)
        out = torch.zeros(len(e), len(weight), dtype=torch.promote_types(e.dtype, torch.float32))
        for first, group, columns in _groups(e, matrices):
            for rows in _rows(e):
                pairs = _pairs(e[rows], first, _turned(e[rows], first, group))
                out[rows] += product(pairs.flatten(1), weight[:, columns])
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        e, matrices, weight = ctx.saved_tensors
        g = gradient.to(e.dtype)
        to_e, to_matrices = (torch.zeros_like(x, dtype=gradient.dtype) for x in (e, matrices))  # sums of many
        to_weight = torch.empty_like(weight, dtype=gradient.dtype)
        of_matrices = torch.split(to_matrices, _widths(e.shape[1], matrices), dim=1)
        for first, group, columns in _groups(e, matrices):
            total = torch.zeros_like(weight[:, columns].T, dtype=gradient.dtype)
            for rows in _rows(e):
                part, turned = e[rows], _turned(e[rows], first, group)
                total += product(_pairs(part, first, turned).flatten(1).T, g[rows].T)
                to_pairs = product(g[rows], weight[:, columns].T)
                by_left = _by_left(to_pairs, part, first, len(group))
                for i, w, t, back in zip(count(first), group, turned, by_left, strict=False):
                    to_e[rows, i + 1 :] += back * t
                    back = back * part[:, i + 1 :]  # (R, n, D), the gradient of e_i W
                    back = back.flatten(1) if t.shape == back.shape else back.sum(1)
                    of_matrices[i].add_(part[:, i].T @ back)
                    to_e[rows, i] += back @ w.T
            to_weight[:, columns] = total.T
        return to_e, to_matrices, to_weight


def _pairs(e: Tensor, first: int, turned: Sequence[Tensor]) -> Tensor:
    """The pairs [R, n, D] of these left fields, the fields behind one standing side by side already."""
    pairs = e.new_empty(len(e), sum(e.shape[1] - 1 - i for i in range(first, first + len(turned))), e.shape[2])
    for i, t, out in zip(count(first), turned, _by_left(pairs, e, first, len(turned)), strict=False):
        torch.mul(t, e[:, i + 1 :], out=out)
    return pairs


def _by_left(pairs: Tensor, e: Tensor, first: int, lefts: int) -> Sequence[Tensor]:
    """The pairs of each left field."""
    counts = [e.shape[1] - 1 - i for i in range(first, first + lefts)]
    return torch.split(pairs.view(len(e), -1, e.shape[2]), counts, dim=1)


def _groups(e: Tensor, matrices: Tensor) -> Iterator[tuple[int, list[Tensor], slice]]:
    """Neighbouring left fields: the first one, the matrices of each, and the columns of their pairs."""
    _, fields, dim = e.shape
    first, start, stop, group = 0, 0, 0, []
    for i, w in enumerate(torch.split(matrices, _widths(fields, matrices), dim=1)):
        group.append(w)
        stop += (fields - 1 - i) * dim
        if stop - start >= WIDE or i == fields - 2:
            yield first, group, slice(start, stop)
            first, start, group = i + 1, stop, []


def _rows(e: Tensor) -> list[slice]:
    return [slice(start, start + ROWS) for start in range(0, len(e), ROWS)]


@keeps_config
class FiBiNET(nn.Module):
    """Logit of a click from first-order weights and an MLP over bilinear pairs of plain and of gated vectors.

    `bilinear`: "all" fields share one matrix, "each" field has one, each "interaction" has one. `reduction`: fields per
    hidden unit of the gate. The first layer of the MLP reads F (F - 1) D numbers.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 10,
        bilinear: str = "interaction",
        reduction: int = 3,
        gate: str = "relu",
        hidden: Sequence[int] = (400, 400, 400),
        dropout: float = 0.0,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        if bilinear not in KINDS or gate not in GATES or reduction < 1:
            raise ValueError(
                f"bilinear is one of {', '.join(KINDS)}, gate of {', '.join(GATES)} and reduction at least 1, "
                f"received {bilinear!r}, {gate!r} and {reduction}"
            )
        self.embedding = FieldEmbedding(spec, embedding_dim, linear=True)
        fields = self.embedding.output_fields
        if fields < 2:
            raise ValueError("FiBiNET multiplies pairs of fields and this spec has only one; use rank/deepfm")
        self.gate = _Gate(fields, reduction, gate)
        self.plain = _Bilinear(fields, embedding_dim, bilinear)
        self.gated = _Bilinear(fields, embedding_dim, bilinear)
        self.bias = nn.Parameter(torch.zeros(())) if not hidden else 0.0
        in_features = fields * (fields - 1) * embedding_dim
        self.deep = MLP(in_features, (*hidden, 1), dropout=dropout, batch_norm=batch_norm) if hidden else None

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, e = self.embedding.with_linear(batch)  # (B,), (B, F, D)
        v = self.gate(e).unsqueeze(2) * e
        if self.deep is None:
            pairs: Tensor = self.plain(e) + self.gated(v)  # (B, P, D)
            return first_order + self.bias + pairs.sum((1, 2))  # (B,)
        to_plain, to_gated = self.deep.first.weight.chunk(2, dim=1)  # (H, P D) each
        hidden = self.plain.times(e, to_plain) + self.gated.times(v, to_gated) + self.deep.first.bias
        logit: Tensor = first_order + self.deep.after_first(hidden).squeeze(1)  # (B,)   Eq. (3)
        return logit
