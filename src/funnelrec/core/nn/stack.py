"""The input of networks that read numbers as they are: every field's vector and every number side by side."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.schema import Spec

__all__ = ["Stack"]


class Stack(nn.Module):
    """x₀ = [vectors of the categorical fields, numbers], one row an example.

    A number is one column and has no vector, unlike in `FieldEmbedding`. `embedding` is public: models look up
    histories in it.
    """

    def __init__(self, spec: Spec, embedding_dim: int) -> None:
        super().__init__()
        self.embedding = FieldEmbedding(replace(spec, numbers=()), embedding_dim)
        self.num_fields, self.num_numbers = spec.num_fields, spec.num_numbers
        self.out_features = spec.num_fields * embedding_dim + spec.num_numbers
        if not self.out_features:
            raise ValueError("this spec has neither categories nor numbers; there is nothing to embed")

    def forward(self, batch: Batch) -> Float[Tensor, "B X"]:
        """[B, F·D + M] from `ids` and `numbers`."""
        parts = [self.embedding(batch).flatten(1)] if self.num_fields else []
        parts += [batch.numbers] if self.num_numbers else []
        return torch.cat(parts, dim=1)  # (B, F·D + M)
