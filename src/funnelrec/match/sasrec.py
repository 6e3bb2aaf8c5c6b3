"""SASRec — causal self-attention over a user's items; the state after the newest one is the user's vector.

Paper: Kang, McAuley. Self-Attentive Sequential Recommendation. ICDM 2018. arXiv:1808.09781
Idea:  every position of a history predicts the item that comes next, and may look only at what came before it.

Eq. (1)     Ê = √d M[s] + P                      SASRec._encode
Eq. (2)     softmax(Q Kᵀ/√d) V                   core.nn.packed.Packed.attend
Eq. (3)     S = SA(Ê): Q, K, V are projections   _Block.forward, newest
Eq. (4)     FFN(s) = ReLU(s W1 + b1) W2 + b2     _Block._feed
Eq. (5)-(6) blocks on blocks                     SASRec._encode
Eq. (7)     r_{i,t} = ⟨F_t, M_i⟩                 encode_positions / encode_users with encode_items
Differs:
- Residuals follow the authors' published code and not the text: the query is LN(x), keys and values are x itself, and
  the residual adds the normalised query (the text has x + Dropout(g(LN(x)))). No output projection, as in both.
- Positions are counted from the newest slot, so that longer padding changes nothing.
- The weights of attention are not dropped out; activations are. Only real items are computed (padding is left out and
  not masked), so a step costs what its items cost.
- A user's vector asks for the last block at the newest item alone (`newest`).
- Keys have no bias: it adds the same to all scores of a query, which the softmax cannot see.
- M and P start at N(0, 0.02²), the unknown item (row 1) at zero; linear maps Xavier-uniform.
- The loss belongs to learn/losses.py: the paper's binary cross-entropy, or the full softmax, which does much better.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.items import any_known, item_table, newest_items
from funnelrec.core.nn.linear import Linear
from funnelrec.core.nn.packed import Packed, pack
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import PADDING, UNKNOWN

__all__ = ["SASRec"]


class _Block(nn.Module):
    """One self-attention layer and one feed-forward layer over packed items."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.attention_norm = nn.LayerNorm(dim)
        self.query, self.value = Linear(dim, dim), Linear(dim, dim)
        self.key = Linear(dim, dim, bias=False)
        self.forward_norm = nn.LayerNorm(dim)
        self.inner, self.outer = Linear(dim, dim), Linear(dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "T D"], packed: Packed) -> Float[Tensor, "T D"]:
        query = self.attention_norm(x)
        attended = packed.attend(self.query(query), self.key(x), self.value(x), self.num_heads, causal=True)
        return self._feed(query + attended)  # Eq. (2)-(3)

    def newest(self, x: Float[Tensor, "T D"], packed: Packed) -> Float[Tensor, "N D"]:
        """`forward` at the newest items alone."""
        query = self.attention_norm(packed.newest_of(x))
        attended = packed.attend_newest(self.query(query), self.key(x), self.value(x), self.num_heads)
        return self._feed(query + attended)

    def _feed(self, attended: Tensor) -> Tensor:
        y = self.forward_norm(attended)
        out: Tensor = y + self.dropout(self.outer(self.dropout(torch.relu(self.inner(y)))))  # Eq. (4)
        return out


@keeps_config
class SASRec(nn.Module):
    """One vector a user (K = 1): the state of the transformer at the newest item.

    `embedding_dim` D of items and of every layer; `max_len` the longest history that is read (the newest items of a
    longer one); `num_layers` blocks; `num_heads` divides D; `dropout` of embeddings and feed-forward layers.
    `items` is the one table for input and output. Its gradient is sparse, which sampled softmax on a large catalogue
    needs; set `model.items.dense = True` where the loss touches every row anyway.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        max_len: int = 200,
        num_layers: int = 2,
        num_heads: int = 1,
        dropout: int | float = 0.1,
    ) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, received {num_heads} and {embedding_dim}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, received {num_layers}")
        self.spec = spec
        self.max_len = max_len
        self.items = item_table(spec, embedding_dim, std=0.02, owner="SASRec")
        self.positions = nn.Parameter(torch.empty(max_len, embedding_dim))  # row p: p slots before the newest
        self.blocks = nn.ModuleList(_Block(embedding_dim, num_heads, dropout) for _ in range(num_layers))
        self.norm = nn.LayerNorm(embedding_dim)
        self.dropout = Dropout(dropout)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw all weights anew."""
        self.items.reset_parameters()
        nn.init.normal_(self.positions, std=0.02)
        with torch.no_grad():
            self.items.weight[UNKNOWN].zero_()
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 D"], Bool[Tensor, "B 1"]]:
        """The state after the newest item. Not valid: no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        states, packed = self._encode(history, mask, newest=True)
        return packed.by_example(states).unsqueeze(1), any_known(history, mask).unsqueeze(1)  # (B, 1, D), (B, 1)

    def encode_positions(self, batch: Batch) -> Float[Tensor, "B L D"]:
        """The state after each item of the history, zero at padding. L may not exceed `max_len`."""
        length = batch.history.shape[1]
        if length > self.max_len:
            raise ValueError(f"histories of {length} slots exceed max_len={self.max_len}; make batches of max_len")
        states, packed = self._encode(batch.history, batch.mask)
        return packed.grid(states)  # (B, L, D)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the input uses too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B 1 D"], valid: Bool[Tensor, "B 1"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """The only vector there is."""
        return interests[:, 0]

    def _encode(self, history: Tensor, mask: Tensor, *, newest: bool = False) -> tuple[Tensor, Packed]:
        """The states [T, D] of all items, or those [N, D] of the newest ones, for which the last block is shorter."""
        packed = pack(mask & (history != PADDING))
        x = self.items(history[packed.example, packed.column]) * self.items.dim**0.5  # (T, D)
        x = self.dropout(x + self.positions[history.shape[1] - 1 - packed.column])  # Eq. (1)
        for block in self.blocks:  # Eq. (5)-(6)
            assert isinstance(block, _Block)
            x = block.newest(x, packed) if newest and block is self.blocks[-1] else block(x, packed)
        return self.norm(x), packed
