"""DIN — deep interest network: the user's history is read anew for each item that is scored.

Paper: Zhou, Song, Zhu, et al. Deep Interest Network for Click-Through Rate Prediction. KDD 2018. arXiv:1706.06978
Idea:  a user has many interests, and only those that concern the candidate should enter the prediction; an attention
       unit weighs each history item by what it has to do with the candidate.

Eq. (1)  e_j = the fields of history item j, from the tables that embed the candidate     _items
Eq. (3)  v_U(A) = Σ_j a(e_j, v_A) e_j, a = a small MLP, the weights need not sum to 1     core.nn.target_attention
Eq. (9)  Dice, f(s) = p(s) s + (1 − p(s)) α s                                            core.nn.activation.Dice
         logit = MLP([all fields, v_U(A), v_U(A) ∘ v_A])                                 forward (σ lives in the loss)
Differs: one logit and binary cross-entropy where the paper has two outputs and a softmax (the same function). The
         attention unit sees [v_A, e_j, v_A − e_j, v_A ∘ e_j], not the outer product; v_U ∘ v_A enters the top MLP.
         `softmax=True` is the form of the authors' code. Dice keeps padding out of its statistics. The mini-batch-aware
         regularisation of Eqs. (4)-(7) belongs to the optimiser.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.activation import Activation
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.target_attention import TargetAttention
from funnelrec.core.schema import Spec

__all__ = ["DIN"]


@keeps_config
class DIN(nn.Module):
    """Logit of a click on an item by a user with a history; needs `history_ids` and `mask` in the batch."""

    reads_history = True

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (200, 80),
        attention_hidden: Sequence[int] = (80, 40),
        activation: Activation = "dice",
        softmax: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        item_fields = sum(field.side == "item" for field in spec.categories)
        if not item_fields:
            raise ValueError(
                "DIN compares the item with the history, but this spec has no item column; "
                "name user and item in the schema, or use rank/deepfm for a table of rows"
            )
        self.item_columns = spec.item_ids
        self.embedding = FieldEmbedding(spec, embedding_dim)
        item_dim = item_fields * embedding_dim
        self.attention = TargetAttention(item_dim, hidden=attention_hidden, activation=activation, softmax=softmax)
        in_features = self.embedding.output_fields * embedding_dim + 2 * item_dim
        self.top = MLP(in_features, (*hidden, 1), activation=activation, dropout=dropout)

    def _items(self, ids: Int[Tensor, "*shape C"]) -> Float[Tensor, "*shape D"]:
        """Item vectors: the fields of the item's columns side by side.   Eq. (1)"""
        return self.embedding.lookup(ids, self.item_columns).flatten(-2)  # (..., C) -> (..., fields · D)

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids`, `numbers`, `history_ids` [B, L, Ci] and `mask` [B, L]."""
        fields = self.embedding(batch).flatten(1)  # (B, F, D) -> (B, F·D)
        target = self._items(batch.ids[:, self.item_columns])  # (B, D)
        history = self._items(batch.history_ids)  # (B, L, D)
        interest = self.attention(target, history, batch.mask)  # (B, D)   Eq. (3)
        top_in = torch.cat((fields, interest, interest * target), dim=1)  # (B, (F + 2·fields)·D)
        logit: Tensor = self.top(top_in).squeeze(1)  # (B,)
        return logit
