"""FFM — field-aware factorisation machine: a value has one vector for each field that it may meet.

Paper: Juan, Zhuang, Chin, Lin. Field-aware Factorization Machines for CTR Prediction. RecSys 2016.
       doi:10.1145/2959100.2959134
Idea:  how a site goes with an advertiser and how it goes with a gender are two questions, so it answers them with two
       vectors; each may be much shorter than the one vector of an FM.

Eq. (4)  φ(x) = Σ_{a<b} ⟨v_{a,f_b}, v_{b,f_a}⟩ x_a x_b     _FieldPairs: a and b are fields, v_{a,f_b} is row a against b
         φ(x / ‖x‖), at training and at serving            forward: instance normalisation, as libffm has it
         v ~ Uniform[0, 1/√k]                              reset_parameters, as libffm has it
Differs: a bias and first-order weights are added (libffm has neither; a table of one column would have no model).
         AdaGrad, the penalty and early stopping belong to the loop. A number is a field of its own. A field of many
         values is the mean of their rows and counts as one value of 1; an empty field counts nothing.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import PADDING

__all__ = ["FFM"]

CHUNK_BYTES = 2**20  #: of vectors multiplied at a time, so that the products stay in the cache


class _FieldPairs(torch.autograd.Function):
    """Σ_{a<b} ⟨t[a, b], t[b, a]⟩ of t [B, F, F, K]; nothing of t's size is made but the gradient itself."""

    @staticmethod
    def forward(ctx: Any, t: Tensor) -> Tensor:
        ctx.save_for_backward(t)
        step = max(1, CHUNK_BYTES // max(1, t[:1].numel() * t.element_size()))
        parts = [t] if torch.compiler.is_exporting() else torch.split(t, step)  # chunks would fix a graph's batch size
        sums = [(part * part.transpose(1, 2)).sum((1, 2, 3)) for part in parts]
        own = t.diagonal(dim1=1, dim2=2).square().sum((1, 2))  # a value does not meet its own field
        return 0.5 * (torch.cat(sums) - own)  # (B,)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, outer: Tensor) -> Tensor:
        (t,) = ctx.saved_tensors
        gradient: Tensor = t.transpose(1, 2) * outer.view(-1, 1, 1, 1)  # (B, F, F, K)
        gradient.diagonal(dim1=1, dim2=2).zero_()
        return gradient


@keeps_config
class FFM(nn.Module):
    """Logit of a click from first-order weights and all pairs of fields, each pair with vectors of its own."""

    def __init__(self, spec: Spec, *, embedding_dim: int = 4, normalise: bool = True) -> None:
        super().__init__()
        self.categories = spec.categories
        self.normalise = normalise
        self.fields = spec.num_fields + spec.num_numbers
        self.vector_dim = embedding_dim
        self.embedding = FieldEmbedding(spec, self.fields * embedding_dim, linear=True)
        self.bias = nn.Parameter(torch.zeros(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Vectors from Uniform[0, 1/√k]; first-order weights and the bias are 0."""
        with torch.no_grad():
            for weight in (self.embedding.table.weight, self.embedding.number_vectors):
                if weight is not None:
                    weight[:, : self.embedding.dim].uniform_(0.0, 1 / math.sqrt(self.vector_dim))
                    weight[:, self.embedding.dim].zero_()
            self.embedding.table.weight[PADDING].zero_()
            self.bias.zero_()

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids` and `numbers`."""
        first_order, vectors = self.embedding.with_linear(batch)  # (B,), (B, F, F·K)
        pairs: Tensor = _FieldPairs.apply(vectors.unflatten(2, (self.fields, self.vector_dim)))  # type: ignore[no-untyped-call]
        if self.normalise:
            scale = self._inverse_norm(batch)  # (B,)
            first_order, pairs = first_order * scale, pairs * scale.square()
        return self.bias + first_order + pairs  # (B,)   Eq. (4)

    def _inverse_norm(self, batch: Batch) -> Float[Tensor, "B"]:
        """1 / ‖x‖, x being 1 for every field that has a value, and the numbers; 1 where x is all zero."""
        present = [(batch.ids[:, c.start : c.stop] != PADDING).any(1) for c in self.categories]
        square = batch.numbers.square().sum(1)  # (B,)
        if present:
            square = square + torch.stack(present).sum(0)
        return torch.where(square > 0, square, 1.0).rsqrt()
