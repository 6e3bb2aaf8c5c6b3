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
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.linear import Linear, to_autocast
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["FiBiNET"]

CHUNK = 512  #: examples whose pairs of one left field are made at a time
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
        fields, dim = e.shape[1:]
        weight = self.weight.expand(fields - 1, dim, dim) if self.kind == "all" else self.weight
        side_by_side = weight.transpose(0, 1).flatten(1)  # (D, M·D)
        if e.device.type != "cpu" or torch.compiler.is_exporting():  # chunks fix the batch size of a graph
            left = [e[:, i] @ w for i, w in enumerate(torch.split(side_by_side, _widths(fields, side_by_side), dim=1))]
            turned = [x.view(-1, x.shape[1] // dim, dim) * e[:, i + 1 :] for i, x in enumerate(left)]
            return torch.cat(turned, dim=1)
        pairs: Tensor = _Pairs.apply(e, side_by_side)  # type: ignore[no-untyped-call]
        return pairs


def _widths(fields: int, weight: Tensor) -> list[int]:
    """Columns of `weight` [D, M·D] that belong to each left field: a matrix for each of its pairs, or one for all."""
    dim, columns = weight.shape
    own = columns > (fields - 1) * dim
    return [dim * (fields - 1 - i if own else 1) for i in range(fields - 1)]


class _Pairs(torch.autograd.Function):
    """Eq. (2): e [B, F, D] and the matrices side by side [D, M·D] -> [B, P, D], the pairs (0, 1), (0, 2), …

    All pairs of a left field are one matrix product and one multiplication with the fields behind it, which stand side
    by side already. Nothing is gathered, and what is as large as the pairs is written once: the products e_i W are made
    chunk by chunk inside the cache, forward and again backward.
    """

    @staticmethod
    def forward(ctx: Any, e: Tensor, weight: Tensor) -> Tensor:
        e, weight = to_autocast(e), to_autocast(weight)
        ctx.save_for_backward(e, weight)
        size, fields, dim = e.shape
        out = e.new_empty(size, fields * (fields - 1) // 2, dim)
        widths = _widths(fields, weight)
        for part, rest in _chunks(e, out):
            for i, (w, p) in enumerate(_by_left(weight, rest, widths)):
                turned = (part[:, i] @ w).view(len(part), w.shape[1] // dim, dim)  # (R, n or 1, D)
                torch.mul(turned, part[:, i + 1 :], out=p)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        e, weight = ctx.saved_tensors
        fields, dim = e.shape[1:]
        exact = torch.promote_types(e.dtype, torch.float32)
        to_e, to_weight = (torch.zeros_like(x, dtype=exact) for x in (e, weight))  # sums of many
        widths = _widths(fields, weight)
        for part, rest, to_part in _chunks(e, gradient.to(e.dtype), to_e):
            of_weights = torch.split(to_weight, widths, dim=1)
            for i, (w, g) in enumerate(_by_left(weight, rest, widths)):
                left, right = part[:, i], part[:, i + 1 :]
                to_part[:, i + 1 :] += g * (left @ w).view(len(part), w.shape[1] // dim, dim)
                back = g * right  # (R, n, D)
                back = back.flatten(1) if w.shape[1] == back.shape[1] * dim else back.sum(1)
                of_weights[i].add_(left.T @ back)
                to_part[:, i] += back @ w.T
        return to_e, to_weight


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    return zip(*(torch.split(t, CHUNK) for t in tensors), strict=True)


def _by_left(weight: Tensor, pairs: Tensor, widths: list[int]) -> Iterator[tuple[Tensor, Tensor]]:
    """For each left field its matrices [D, n·D or D] and its pairs [R, n, D]."""
    counts = [len(widths) - i for i in range(len(widths))]
    return zip(torch.split(weight, widths, dim=1), torch.split(pairs, counts, dim=1), strict=True)


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
        pairs = torch.cat((self.plain(e), self.gated(v)), dim=1).flatten(1)  # (B, 2 P D)
        if self.deep is None:
            return first_order + self.bias + pairs.sum(1)  # (B,)
        logit: Tensor = first_order + self.deep(pairs).squeeze(1)  # (B,)   Eq. (3)
        return logit
