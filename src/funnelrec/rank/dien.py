"""DIEN — deep interest evolution network: how an interest came about, read with the candidate in mind.

Paper: Zhou, Mou, Fan, et al. Deep Interest Evolution Network for Click-Through Rate Prediction. AAAI 2019.
       arXiv:1809.03672
Idea:  a GRU turns clicks into interests, and each is taught to tell the next click from another item; a second GRU
       follows only those interests that concern the candidate, because attention steers its update gate.

Eq. (2)-(5) h = GRU(e_1, …, e_T), the extractor               states, core.nn.recurrent
         L_aux = −mean_t [log σ(h_t·e_{t+1}) + log(1 − σ(h_t·ê_{t+1}))], ê an item not clicked   training_terms
         a_t = softmax_t(h_t W e_a), e_a the candidate         core.nn.attention.BilinearScore
         AIGRU / AGRU / AUGRU over h, the evolution            core.nn.recurrent; `evolution`
         logit = MLP([fields, Σ e_t, e_a ∘ Σ e_t, h'_T])       forward (σ lives in the loss)
Differs: AUGRU as in the paper (a_t = 0 keeps the state); the authors' code turns the gate round. Attention is the
         paper's bilinear form and the auxiliary score its inner product, where that code has an MLP for each. The
         auxiliary loss is the mean over real steps and the sum of the history leaves padding out. ê is the item of
         another history step of the same batch; where it is the very item that was clicked, it does not count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.activation import Activation
from funnelrec.core.nn.attention import BilinearScore
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.packed import Steps, steps
from funnelrec.core.nn.recurrent import GRU
from funnelrec.core.schema import Spec

__all__ = ["DIEN"]


def _auxiliary_loss(
    states: Float[Tensor, "T D"], items: Float[Tensor, "T D"], rows: Int[Tensor, "T"], order: Steps
) -> Float[Tensor, ""]:
    """L_aux over the pairs of neighbouring items; the negatives are drawn from the items of the batch."""
    before, clicked = order.pairs()  # (Q,) each
    if before.numel() == 0:
        return states.sum() * 0.0
    other = torch.randint(len(rows), clicked.shape, device=rows.device)
    h = states[: len(before)]  # (Q, D); those without a next item stand last
    positive = (h * items.index_select(0, clicked)).sum(1)
    negative = (h * items.index_select(0, other)).sum(1)
    counts = rows[other] != rows[clicked]
    return F.softplus(-positive).mean() + (F.softplus(negative) * counts).sum() / counts.sum().clamp(min=1)


@keeps_config
class DIEN(nn.Module):
    """Logit of a click on an item by a user with a history; needs `history_ids` and `mask` in the batch.

    `penalty` is the weight α of the auxiliary loss.
    """

    reads_history = True

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (200, 80),
        evolution: Literal["aigru", "agru", "augru"] = "augru",
        activation: Activation = "dice",
        penalty: float = 1.0,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        item_fields = sum(field.side == "item" for field in spec.categories)
        if not item_fields:
            raise ValueError(
                "DIEN compares the item with the history, but this spec has no item column; "
                "name user and item in the schema, or use rank/deepfm for a table of rows"
            )
        if penalty < 0:
            raise ValueError(f"penalty is the weight of the auxiliary loss, at least 0, received {penalty}")
        self.penalty = penalty
        self.item_columns = spec.item_ids
        self.embedding = FieldEmbedding(spec, embedding_dim)
        item_dim = item_fields * embedding_dim
        self.extractor = GRU(item_dim, item_dim)  # as wide as an item: the auxiliary score is an inner product
        self.score = BilinearScore(item_dim, item_dim)
        self.evolution = GRU(item_dim, item_dim, kind=evolution)
        self.top = MLP(
            self.embedding.output_fields * embedding_dim + 3 * item_dim,
            (*hidden, 1),
            activation=activation,
            dropout=dropout,
        )
        self._extracted: tuple[Batch, Steps, Tensor, Tensor] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """A copy starts without what was kept between forward and `training_terms`."""
        return {**self.__dict__, "_extracted": None}

    def _items(self, ids: Int[Tensor, "*shape C"]) -> Float[Tensor, "*shape D"]:
        """Item vectors: the fields of the item's columns side by side."""
        return self.embedding.lookup(ids, self.item_columns).flatten(-2)  # (..., C) -> (..., fields · D)

    def states(self, batch: Batch, order: Steps) -> tuple[Float[Tensor, "T D"], Float[Tensor, "T D"]]:
        """The vectors e of the items of the histories and the interests h after each."""
        items = self._items(order.take(batch.history_ids))
        return items, self.extractor.over(items, order)

    def attention(self, states: Float[Tensor, "T D"], target: Float[Tensor, "B D"], order: Steps) -> Float[Tensor, "T"]:
        """a, which adds up to 1 over the items of a history."""
        return order.softmax(self.score.of_pairs(target, states, order.example))

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids`, `numbers`, `history_ids` [B, L, Ci] and `mask` [B, L]."""
        fields = self.embedding(batch).flatten(1)  # (B, F, D) -> (B, F·D)
        target = self._items(batch.ids[:, self.item_columns])  # (B, D)
        order = steps(batch.mask)
        items, states = self.states(batch, order)
        if self.training and self.penalty:
            self._extracted = (batch, order, items, states)
        evolved = order.last(self.evolution.over(states, order, self.attention(states, target, order)))  # (B, D)
        total = order.sum(items)  # (B, D)
        logit: Tensor = self.top(torch.cat((fields, total, total * target, evolved), dim=1)).squeeze(1)  # (B,)
        return logit

    def training_terms(self, batch: Batch) -> dict[str, Tensor]:
        """α L_aux; the negatives come from torch's global generator. Reuses the states of a forward on this batch."""
        if not self.penalty:
            return {}
        kept, self._extracted = self._extracted, None  # a graph may be used once, and must not outlive the step
        if kept is None or kept[0] is not batch:
            order = steps(batch.mask)
            kept = (batch, order, *self.states(batch, order))
        _, order, items, states = kept
        return {"auxiliary": self.penalty * _auxiliary_loss(states, items, order.take(batch.history), order)}
