"""TextCNN: filters over three, four and five words, the strongest answer of each, and a linear layer.

Paper: Kim. Convolutional neural networks for sentence classification. EMNLP 2014. arXiv:1408.5882
Idea:  a filter is a soft phrase; whether a text has it anywhere is what the class depends on.

Eq. (1)  x = x_1 ⊕ … ⊕ x_n                        the words' vectors, zeros around them       encode
Eq. (2)  c_i = relu(w · x_{i:i+h-1} + b)           a filter w over h words
Eq. (3)  ĉ = max_i c_i                             over the windows that hold a word          encode
Eq. (4)  y = W (ĉ ∘ r) + b                         r a dropout mask                           forward
Differs: numbers are scaled up in training, not down at test; no bound on the norms of W's rows (weight decay stands for
    it); a window of padding alone is never the strongest, so the padding of a batch changes nothing; a text without a
    word is the zero vector. `channels` 2 is the paper's CNN-multichannel: one table is read twice, and one of the
    two stays as it began.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.config import keeps_config
from funnelrec.core.nn.pooling import masked_max
from funnelrec.core.shapes import PADDING
from funnelrec.encode.text.classifier import token_table

__all__ = ["TextCNN"]


@keeps_config
class TextCNN(nn.Module):
    """Rows [B, L], 0 at padding, to `num_classes` logits, or to the vector [B, widths · num_filters] without classes.

    `widths` h of the filters in words, `num_filters` of each; `embedding_dropout` on the words' vectors.
    """

    def __init__(
        self,
        *,
        num_tokens: int,
        num_classes: int = 2,
        embedding_dim: int = 100,
        widths: tuple[int, ...] | list[int] = (3, 4, 5),
        num_filters: int = 100,
        dropout: int | float = 0.5,
        embedding_dropout: int | float = 0.0,
    ) -> None:
        super().__init__()
        if not widths or min(widths) < 1:
            raise ValueError(
                f"widths are numbers of words, at least one of them and each at least 1, received {widths}"
            )
        self.num_features = num_filters * len(widths)
        self.table = token_table(num_tokens, embedding_dim)
        self.widths = tuple(widths)
        self.filters = nn.ModuleList(nn.Conv1d(embedding_dim, num_filters, h, padding=h - 1) for h in widths)
        self.embedding_dropout = nn.Dropout(embedding_dropout)
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def encode(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B D"]:
        """The strongest answer of each filter."""
        mask = content != PADDING
        x = self.embedding_dropout(self.table(content)).transpose(1, 2)  # (B, E, L)   Eq. (1)
        strongest = []
        for h, filters in zip(self.widths, self.filters, strict=True):
            c = filters(x).transpose(1, 2)  # (B, L + h - 1, F)
            holds = F.max_pool1d(F.pad(mask.float(), (h - 1, h - 1)), h, 1) > 0  # window i sees words i - h + 1 … i
            strongest.append(torch.relu(masked_max(c, holds)))  # (B, F)   Eq. (2)-(3): relu keeps the order
        return torch.cat(strongest, 1)

    def forward(self, content: Int[Tensor, "B L"]) -> Float[Tensor, "B K"]:
        """Logits of the classes."""
        logits: Tensor = self.out(self.dropout(self.encode(content)))  # (B, K)   Eq. (4)
        return logits
