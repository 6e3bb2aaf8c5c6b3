"""BERT4Rec — attention in both directions over a history in which some items are hidden and have to be guessed.

Paper: Sun, Liu, Wu, Pei, Lin, Ou, Jiang. BERT4Rec: Sequential Recommendation with Bidirectional Encoder
       Representations from Transformer. CIKM 2019. arXiv:1904.06690
Idea:  guess a hidden item from those on both sides of it; at serving, hide an item behind the newest one.

Eq. (1)-(2)  softmax(Q Kᵀ/√d) V, heads joined         core.nn.packed.Packed.attend, _Block.out
Eq. (3)      FFN(x) = GELU(x W1 + b1) W2 + b2          _Block
Eq. (4)      LN(x + dropout(sublayer(x)))              _Block._feed
Sec. 3.4     h⁰ = v + p                                BERT4Rec._encode
Eq. (7)      ⟨GELU(h W + b), e⟩                        BERT4Rec._head with encode_items
Sec. 3.6     Cloze: hide a share ρ, guess it           BERT4Rec.training_input; Eq. (8) is the loss over what it hides
Differs:
- As in the authors' code, not in the text: a layer norm behind the embedding and in the head, an item to be guessed is
  always hidden (no other item is put in its place), and one example in eleven hides the newest item alone, which is
  what serving asks.
- Positions are counted from the newest slot, so that longer padding changes nothing. Histories are cut to the newest
  `max_len`, where the authors' code slides a window over older parts.
- The weights of attention are not dropped out; activations are. Only real items are computed. Keys have no bias, which
  the softmax cannot see; the output has none either.
- Items and positions start at N(0, 0.02²), not truncated; linear maps Xavier-uniform: from N(0, 0.02²) they bear no
  larger learning rate (64 examples are not learnt by heart at 0.01).
- The loss belongs to learn/losses.py; padding and unknown are no classes.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.items import any_known, item_table, newest_items
from funnelrec.core.nn.linear import Linear
from funnelrec.core.nn.packed import Packed, pack
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN

__all__ = ["BERT4Rec"]

NEWEST_ALONE = 1 / 11  #: share of the training examples that hide the newest item and no other


class _Block(nn.Module):
    """Self-attention and a feed-forward layer, each with its residual and a layer norm behind it."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.query, self.value, self.out = (Linear(dim, dim) for _ in range(3))
        self.key = Linear(dim, dim, bias=False)
        self.attention_norm, self.forward_norm = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.inner, self.outer = Linear(dim, 4 * dim), Linear(4 * dim, dim)
        self.dropout = Dropout(dropout)

    def forward(self, x: Float[Tensor, "T D"], packed: Packed) -> Float[Tensor, "T D"]:
        attended = packed.attend(self.query(x), self.key(x), self.value(x), self.num_heads, causal=False)
        return self._feed(x, attended)

    def newest(self, x: Float[Tensor, "T D"], packed: Packed) -> Float[Tensor, "N D"]:
        """`forward` at the newest slots alone."""
        own = packed.newest_of(x)
        return self._feed(own, packed.attend_newest(self.query(own), self.key(x), self.value(x), self.num_heads))

    def _feed(self, x: Tensor, attended: Tensor) -> Tensor:
        x = self.attention_norm(x + self.dropout(self.out(attended)))  # Eq. (4)
        y: Tensor = self.forward_norm(x + self.dropout(self.outer(F.gelu(self.inner(x)))))  # Eq. (3)-(4)
        return y


@keeps_config
class BERT4Rec(nn.Module):
    """One vector a user (K = 1): what is expected in a hidden slot behind the newest item.

    `embedding_dim` D; `max_len` slots that are read, the hidden one included; `num_layers` blocks of `num_heads` heads;
    `dropout` of the embedding and behind each sublayer; `mask_share` ρ of a training example's items that are hidden.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        max_len: int = 200,
        num_layers: int = 2,
        num_heads: int = 2,
        dropout: int | float = 0.2,
        mask_share: float = 0.2,
    ) -> None:
        super().__init__()
        if embedding_dim % num_heads:
            raise ValueError(f"num_heads must divide embedding_dim, received {num_heads} and {embedding_dim}")
        if not 0 < mask_share < 1:
            raise ValueError(f"mask_share must lie between 0 and 1, received {mask_share}")
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, received {num_layers}")
        if max_len < 2:
            raise ValueError(f"max_len must be at least 2, an item and the hidden slot, received {max_len}")
        self.spec = spec
        self.max_len = max_len
        self.mask_share = mask_share
        self.items = item_table(spec, embedding_dim, std=0.02, owner="BERT4Rec")
        self.hidden = nn.Parameter(torch.empty(embedding_dim))  # what is read where an item is hidden
        self.positions = nn.Parameter(torch.empty(max_len, embedding_dim))  # row p: p slots before the newest
        self.norm = nn.LayerNorm(embedding_dim)
        self.blocks = nn.ModuleList(_Block(embedding_dim, num_heads, dropout) for _ in range(num_layers))
        self.head, self.head_norm = Linear(embedding_dim, embedding_dim), nn.LayerNorm(embedding_dim)
        self.dropout = Dropout(dropout)
        for parameter in (self.hidden, self.positions):
            nn.init.normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    @property
    def hidden_row(self) -> int:
        """What stands in `history` where an item is hidden: the row behind the last item."""
        return self.spec.num_items

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 D"], Bool[Tensor, "B 1"]]:
        """The vector of a hidden slot behind the newest item. Not valid: no item of the history is known."""
        history, mask = newest_items(batch, self.max_len - 1)
        slots, real = F.pad(history, (0, 1), value=self.hidden_row), F.pad(mask, (0, 1), value=True)
        states, packed = self._encode(slots, real, newest=True)
        return self._head(packed.by_example(states)).unsqueeze(1), any_known(history, mask).unsqueeze(1)

    def encode_positions(self, batch: Batch) -> Float[Tensor, "B L D"]:
        """The vector of each slot; of use where the history holds `hidden_row`. L may not exceed `max_len`."""
        length = batch.history.shape[1]
        if length > self.max_len:
            raise ValueError(f"histories of {length} slots exceed max_len={self.max_len}; make batches of max_len")
        states, packed = self._encode(*newest_items(batch, self.max_len))
        return packed.grid(self._head(states))

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the input uses too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B 1 D"], valid: Bool[Tensor, "B 1"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """The only vector there is."""
        return interests[:, 0]

    def training_input(self, batch: Batch) -> Batch:
        """Cloze: the whole sequence of a user with some items hidden; `target` [B, L] holds what was hidden.

        `batch` has one next item for each position (`NextItem` of mode "all"); its sequence is the history and the
        last target. max(1, round(ρ n)) of its n items are hidden at random, or the newest alone; in evaluation always
        the newest alone. A batch with one target a user stays as it is: serving's input is a Cloze too.
        """
        if batch.target.dim() == 1:
            return batch
        history, mask = newest_items(batch, batch.history.shape[1])
        last = batch.target[:, -1:]  # (B, 1), 0 where nothing came strictly later
        history = history.masked_fill(~mask, 0)
        items = torch.where(last > 0, torch.cat([history, last], 1), F.pad(history, (1, 0)))[:, -self.max_len :]
        chosen = self._chosen(items)  # (B, L)
        return Batch(
            history=items.masked_fill(chosen, self.hidden_row),
            mask=items > 0,
            target=items.masked_fill(~chosen, 0),
        )

    def _chosen(self, items: Int[Tensor, "B L"]) -> Bool[Tensor, "B L"]:
        """Which items to hide; unknown ones have nothing to be guessed by."""
        known = items >= FIRST_KNOWN
        newest = (known & (known.flip(1).cumsum(1).flip(1) == 1)) & known.any(1, keepdim=True)
        if not self.training:
            return newest
        count = (self.mask_share * known.sum(1, keepdim=True) + 0.5).long().clamp(min=1)
        draw = torch.rand(items.shape, device=items.device).masked_fill(~known, 2.0)
        scattered = known & (draw.argsort(1).argsort(1) < count)
        alone = torch.rand(len(items), 1, device=items.device) < NEWEST_ALONE
        return torch.where(alone, newest, scattered)

    def _encode(self, history: Tensor, mask: Tensor, *, newest: bool = False) -> tuple[Tensor, Packed]:
        """The states [T, D] of all slots, or those [N, D] of the newest ones, for which the last block is shorter."""
        packed = pack(mask)
        rows = history[packed.example, packed.column]  # (T,)
        hidden = rows == self.hidden_row
        x = torch.where(hidden.unsqueeze(1), self.hidden, self.items(rows.masked_fill(hidden, 0)))  # (T, D)
        x = x + self.positions[history.shape[1] - 1 - packed.column]
        x = self.dropout(self.norm(x))
        for block in self.blocks:
            assert isinstance(block, _Block)
            x = block.newest(x, packed) if newest and block is self.blocks[-1] else block(x, packed)
        return x, packed

    def _head(self, states: Float[Tensor, "*shape D"]) -> Float[Tensor, "*shape D"]:
        vectors: Tensor = self.head_norm(F.gelu(self.head(states)))  # Eq. (7)
        return vectors
