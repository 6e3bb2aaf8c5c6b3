"""ComiRec-SA — K interests of a user by self-attentive pooling of the history.

Paper: Cen, Zhang, Zou, Zhou, Yang, Tang. Controllable Multi-Interest Framework for Recommendation. KDD 2020.
       arXiv:2005.09347
Idea:  one vector cannot stand for several interests; K attention heads over the same history give one vector each,
       and a target item trains only the interest that it is closest to.

Eq. (5)   a = softmax(w2ᵀ tanh(W1 H))ᵀ           ComiRecSA.attention with K = 1
Eq. (6)   A = softmax(W2ᵀ tanh(W1 H))ᵀ, V_u = H A  ComiRecSA.attention, encode_users
Eq. (7)   v_u = V_u[:, argmax(V_uᵀ e_i)]         user_for_target
Eq. (11)  f(u, i) = max_k ⟨v_k, e_i⟩              the index merges the K interests so; rerank/diversity.py goes on
Differs:
- As in the authors' code: positions enter the attention weights only, V_u pools the item vectors themselves, both
  maps have biases (we leave out that of W2, which the softmax over the items cannot see), W1 is 4 D wide.
- Positions are counted from the newest slot, so that longer padding changes nothing.
- `penalty` (0 = none, as in the paper) adds ‖A Aᵀ − I‖² of the structured self-attention that SA is built on (Lin et
  al. 2017, arXiv:1703.03130, Eq. 8), which keeps the K interests from looking at the same items.
- Items start at N(0, 0.02²) and the unknown item (row 1) at zero.
- The sampled softmax of Eq. (9)-(10) lives in learn/losses.py.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.attention import masked_softmax
from funnelrec.core.nn.items import any_known, closest_interest, item_table, newest_items
from funnelrec.core.nn.linear import Linear
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import UNKNOWN

__all__ = ["ComiRecSA"]


@keeps_config
class ComiRecSA(nn.Module):
    """K vectors a user; an item's score is its best over them.

    `embedding_dim` D of items and interests; `num_interests` K; `max_len` the longest history that is read (the
    newest items of a longer one); `penalty` weighs the overlap of the interests' attention.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_interests: int = 4,
        max_len: int = 50,
        penalty: int | float = 0.0,
    ) -> None:
        super().__init__()
        if num_interests < 1:
            raise ValueError(f"num_interests must be at least 1, received {num_interests}")
        self.spec = spec
        self.max_len = max_len
        self.penalty = penalty
        # A small start: the attention stays even until the items have grouped. From N(0, 1/D) the interests split items
        # and not topics (mutual information with planted topics .29 instead of .94).
        self.items = item_table(spec, embedding_dim, std=0.02, owner="ComiRec-SA")
        self.positions = nn.Parameter(torch.empty(max_len, embedding_dim))  # row p: p slots before the newest
        self.inner = Linear(embedding_dim, 4 * embedding_dim)  # W1
        self.outer = Linear(4 * embedding_dim, num_interests, bias=False)  # W2
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew. The unknown item (row 1) starts at zero."""
        self.items.reset_parameters()
        with torch.no_grad():
            self.items.weight[UNKNOWN].zero_()
        nn.init.normal_(self.positions, std=0.02)
        nn.init.xavier_uniform_(self.inner.weight)
        nn.init.zeros_(self.inner.bias)
        nn.init.xavier_uniform_(self.outer.weight)

    def attention(self, batch: Batch) -> Float[Tensor, "B K L"]:
        """A: how much each interest looks at each item, 0 at padding; every row sums to 1 unless all is padding."""
        return self._attention(*newest_items(batch, self.max_len))

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
        """The K interests. None is valid when no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        items = self.items(history)  # (B, L, D)
        interests = self._weights(items, mask) @ items.masked_fill(~mask.unsqueeze(-1), 0.0)  # (B, K, D) Eq. (6)
        return interests, any_known(history, mask).unsqueeze(1).expand(interests.shape[:2])

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the histories use too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """Eq. (7): the valid interest with the largest product; the others receive no gradient."""
        return closest_interest(interests, valid, target)

    def training_terms(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """`overlap`: penalty · mean ‖A Aᵀ − I‖² over the users with a history; nothing when `penalty` is 0."""
        if self.penalty == 0.0:
            return {}
        weights = self.attention(batch)  # (B, K, L)
        some = newest_items(batch, self.max_len)[1].any(1).to(weights.dtype)  # (B,)
        excess = weights @ weights.transpose(1, 2) - torch.eye(weights.shape[1], device=weights.device)  # (B, K, K)
        overlap = (excess.square().sum((1, 2)) * some).sum() / some.sum().clamp(min=1)
        return {"overlap": self.penalty * overlap}

    def _attention(self, history: Tensor, mask: Tensor) -> Tensor:
        return self._weights(self.items(history), mask)

    def _weights(self, items: Tensor, mask: Tensor) -> Tensor:
        positions = self.positions[: items.shape[1]].flip(0)  # (L, D) newest last
        scores = self.outer(torch.tanh(self.inner(items + positions)))  # (B, L, K)
        return masked_softmax(scores, mask.unsqueeze(-1), dim=1).transpose(1, 2)  # (B, K, L)
