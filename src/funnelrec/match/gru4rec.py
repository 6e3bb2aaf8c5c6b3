"""GRU4Rec — a gated recurrence over the items; its state after the newest one is the user's vector.

Paper: Hidasi, Karatzoglou, Baltrunas, Tikk. Session-based Recommendations with Recurrent Neural Networks. ICLR 2016.
       arXiv:1511.06939. Losses and shared vectors: Hidasi, Karatzoglou. Recurrent Neural Networks with Top-k Gains for
       Session-based Recommendations. CIKM 2018. arXiv:1706.03847
Idea:  a session is a sequence, and what comes next depends on all of it; a state that each item updates holds as much
       of it as the next item needs.

Eq. (1)     h_t = (1 − z_t) h_{t−1} + z_t ĥ_t          core.nn.recurrent.GRU, z named u there
Eq. (2)     z_t = σ(W_z x_t + U_z h_{t−1})             the same; and r_t, Eq. (4)
Eq. (3)     ĥ_t = tanh(W x_t + r_t ∘ (U h_{t−1}))      the same: r after the matrix product, as in torch
Sec. 3      r̂_{s,i} = ⟨y_i, h⟩ + b_i                   encode_positions / encode_users with encode_items
2018, 4.4   the item vectors y are the input too       `constrained`
Eq. (5)-(6) TOP1, BPR; 2018: cross-entropy, TOP1-max, BPR-max     learn.losses, with any sampler
Differs:
- Two ways to train. On histories, gradients flow through all that the batch holds, sessions share no state, and a
  dropped-out state feeds the next layer alone. On lanes (data/lanes.py, learn/lanes.py) as the authors do: one event a
  step, gradients cut between steps, and the dropped-out state is the one that is carried on.
- `pooling` "mean" gives the mean of the states up to a position, which remembers what the last state forgets.
- All layers have the width of the items. `item_bias` adds b_i, as one more coordinate of both vectors.
- Matrices start gate by gate, Xavier-uniform for inputs and orthogonal for states; items at N(0, 0.02²).
"""

from __future__ import annotations

from typing import cast

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.embedding import Table
from funnelrec.core.nn.items import any_known, item_table, newest_items
from funnelrec.core.nn.recurrent import GRU
from funnelrec.core.schema import Spec

__all__ = ["GRU4Rec"]


@keeps_config
class GRU4Rec(nn.Module):
    """One vector a user (K = 1).

    `embedding_dim` D of items and of every layer; `num_layers` recurrences on top of each other; `dropout` behind
    each; `embedding_dropout` of the items that are read; `constrained`: they are those that are scored (else a table
    of their own); `pooling`: "last" or "mean" of the states; `max_len` the longest history that is read.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_layers: int = 1,
        dropout: int | float = 0.1,
        embedding_dropout: int | float = 0.1,
        constrained: bool = True,
        pooling: str = "last",
        item_bias: bool = False,
        max_len: int = 200,
    ) -> None:
        super().__init__()
        if num_layers < 1:
            raise ValueError(f"num_layers must be at least 1, received {num_layers}")
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be last or mean, received {pooling!r}")
        self.spec = spec
        self.max_len = max_len
        self.pooling = pooling
        self.items = item_table(spec, embedding_dim, std=0.02, owner="GRU4Rec")
        self.read = None if constrained else item_table(spec, embedding_dim, std=0.02, owner="GRU4Rec")
        self.bias = Table(spec.num_items, 1, std=0.0) if item_bias else None
        self.embedding_dropout = Dropout(embedding_dropout)
        self.layers = nn.ModuleList(GRU(embedding_dim, embedding_dim) for _ in range(num_layers))
        self.dropout = Dropout(dropout)

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 E"], Bool[Tensor, "B 1"]]:
        """The vector after the newest item. Not valid: no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        states = self._states(history, mask)
        if self.pooling == "last":
            user = states[:, -1]
        else:
            user = states.masked_fill(~mask.unsqueeze(-1), 0.0).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
        return self._with_one(user).unsqueeze(1), any_known(history, mask).unsqueeze(1)  # (B, 1, E), (B, 1)

    def encode_positions(self, batch: Batch) -> Float[Tensor, "B L E"]:
        """The vector after each item of the history, of no meaning at padding. L may not exceed `max_len`."""
        if batch.history.shape[1] > self.max_len:
            raise ValueError(
                f"histories of {batch.history.shape[1]} slots exceed max_len={self.max_len}; make batches of max_len"
            )
        history, mask = newest_items(batch, self.max_len)
        states = self._states(history, mask)  # (B, L, D)
        if self.pooling == "mean":
            real = mask.unsqueeze(-1)
            states = states.masked_fill(~real, 0.0).cumsum(1) / real.cumsum(1).clamp(min=1)
        return self._with_one(states)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N E"]:
        """Vectors of the items, with their bias as the last coordinate when there is one; E is D or D + 1."""
        vectors: Tensor = self.items(rows)
        return vectors if self.bias is None else torch.cat([vectors, self.bias(rows)], dim=1)

    def no_states(self, lanes: int) -> Float[Tensor, "G B D"]:
        """The states of all G layers before the first item of `lanes` sessions."""
        return self.items.weight.new_zeros(len(self.layers), lanes, self.items.dim)

    def step(
        self, rows: Int[Tensor, "B"], states: Float[Tensor, "G B D"]
    ) -> tuple[Float[Tensor, "B E"], Float[Tensor, "G B D"]]:
        """The vectors after one more item of each session, and the states to carry on. Needs `pooling` "last"."""
        if self.pooling != "last":
            raise ValueError(f"one step knows the last state only; pooling must be last, it is {self.pooling!r}")
        x: Tensor = self.embedding_dropout((self.items if self.read is None else self.read)(rows))  # (B, D)
        after = []
        for layer, state in zip(self.layers, states, strict=True):
            x = self.dropout(cast(GRU, layer).step(x, state))
            after.append(x)
        return self._with_one(x), torch.stack(after)

    def user_for_target(
        self, interests: Float[Tensor, "B 1 E"], valid: Bool[Tensor, "B 1"], target: Float[Tensor, "B E"]
    ) -> Float[Tensor, "B E"]:
        """The only vector there is."""
        return interests[:, 0]

    def _states(self, history: Tensor, mask: Tensor) -> Tensor:
        """The state of the last layer after each slot; padding leaves a state as it is."""
        x: Tensor = self.embedding_dropout((self.items if self.read is None else self.read)(history))  # (B, L, D)
        for layer in self.layers:
            x = self.dropout(layer(x, mask))  # Eq. (1)-(4)
        return x

    def _with_one(self, users: Tensor) -> Tensor:
        return users if self.bias is None else F.pad(users, (0, 1), value=1.0)
