"""Word averaging: a text is the mean of its words, and of its pairs of neighbours if wanted.

Paper: Joulin, Grave, Bojanowski, Mikolov. Bag of tricks for efficient text classification. EACL 2017. arXiv:1607.01759
Idea:  most of what a text says of its class is in which words it has; a mean of vectors is a linear model that shares
       what it knows between words.

Eq. (1)  v = 1/n Σ_t E[w_t]                              encode
Eq. (2)  v = (Σ_t E[w_t] + Σ_t F[hash(w_t, w_{t+1})]) / n     with `buckets`, the n-gram trick of the paper's section 2
Eq. (3)  p(class) = softmax(A v + b)                     forward
Differs: dropout on v; softmax, not the hierarchical one; a text without a word is the zero vector.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.pooling import masked_mean, masked_sum
from funnelrec.core.shapes import PADDING
from funnelrec.encode.text.classifier import token_table

__all__ = ["WordAverage"]

PRIME = 1_000_003  #: pairs of rows are hashed by a · PRIME + b, modulo the buckets


@keeps_config
class WordAverage(nn.Module):
    """Rows [B, L], 0 at padding, to `num_classes` logits, or to the vector [B, embedding_dim] when there are none.

    `buckets`: vectors that pairs of neighbouring words share by a hash; absent: single words alone.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_classes: int = 2,
        embedding_dim: int = 100,
        buckets: int | None = None,
        dropout: int | float = 0.5,
    ) -> None:
        super().__init__()
        self.num_features = embedding_dim
        self.table = token_table(num_tokens, embedding_dim)
        self.pairs = token_table(buckets + 1, embedding_dim) if buckets else None
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(embedding_dim, num_classes) if num_classes else nn.Identity()

    def encode(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """The mean of the words' vectors."""
        mask = content != PADDING
        if self.pairs is None:
            return masked_mean(self.table(content), mask)  # (B, D)   Eq. (1)
        both = mask[:, 1:] & mask[:, :-1]
        rows = 1 + (content[:, :-1] * PRIME + content[:, 1:]) % (self.pairs.num_embeddings - 1)
        total = masked_sum(self.table(content), mask) + masked_sum(self.pairs(rows), both)
        return total / mask.sum(1, keepdim=True).clamp(min=1)  # (B, D)   Eq. (2)

    def forward(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.out(self.dropout(self.encode(content)))  # (B, K)   Eq. (3)
        return logits
