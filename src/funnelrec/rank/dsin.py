"""DSIN — deep session interest network: one interest a session, and how the interests follow one another.

Paper: Feng, Lv, Shen, et al. Deep Session Interest Network for Click-Through Rate Prediction. IJCAI 2019.
       arXiv:1905.06482
Idea:  what a user does within half an hour belongs together, what comes later may not. Self-attention reads each
       session on its own, a Bi-LSTM reads the sessions in order, and the candidate chooses among both.

Sec. 3   a new session begins after a pause of more than 30 minutes                  _session_slots
Eq. (2)  Q ← Q + BE, BE_(k,t,c) = w^K_k + w^T_t + w^C_c                              _BiasEncoding
Eq. (3)-(6) one block of self-attention and feed-forward for all sessions            _SessionBlock
Eq. (7)  I_k = mean over the items of session k                                      _interests
         H = Bi-LSTM(I_1, …, I_K)                                                    _evolved
Eq. (9)  a_k = softmax_k(I_k W^I x), U^I = Σ a_k I_k                                 self.choose
Eq. (10) the same over H with W^H: U^H; logit = MLP([fields, U^I, U^I ∘ x, U^H])      self.choose_evolved, forward
Differs: only real items and sessions enter means, softmaxes and the LSTM, where the authors' code has padding in all
         three. Short sessions stay. k counts from the newest session, t from the first kept item of a session. x is
         the candidate's vector; U^I ∘ x enters the top MLP, as in rank/din. The times must be seconds: in a
         leave-last-out data set they count events, and then a history is one session.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.utils.rnn import pack_padded_sequence, pad_packed_sequence

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.activation import Activation
from funnelrec.core.nn.attention import BilinearScore, MultiHeadAttention, masked_softmax
from funnelrec.core.nn.dropout import Dropout
from funnelrec.core.nn.embedding import FieldEmbedding
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.pooling import masked_mean
from funnelrec.core.schema import Spec

__all__ = ["DSIN"]


def _session_slots(
    times: Int[Tensor, "B L"], mask: Bool[Tensor, "B L"], gap: int, sessions: int, length: int
) -> Int[Tensor, "B K T"]:
    """The history position at each place of each session, -1 where there is none.

    The newest `sessions` sessions, oldest of them first and starting at 0; of each the newest `length` items, in order.
    A pause of exactly `gap` seconds stays in the session. The real positions must stand together, in order of time.
    """
    size, positions = mask.shape
    begins = mask.clone()
    begins[:, 1:] &= ~mask[:, :-1] | (times.diff(dim=1) > gap)
    number = begins.cumsum(1)  # (B, L) 1, 2, … in order of time
    total = number[:, -1:]
    k = number - 1 - (total - sessions).clamp(min=0)  # below 0: too old
    place = torch.arange(positions, device=mask.device).expand(size, -1)
    first = torch.where(begins, place, 0).cummax(1).values  # where the session of each position begins
    count = mask.new_zeros(size, positions + 1, dtype=torch.int64).scatter_add(1, number, mask.long())
    many = count.gather(1, number)  # items of the session of each position
    t = place - first - (many - length).clamp(min=0)
    kept = mask & (k >= 0) & (t >= 0)
    slots = torch.where(kept, k * length + t, sessions * length)  # the last slot collects what is not kept
    out = place.new_full((size, sessions * length + 1), -1).scatter(1, slots, place)
    return out[:, :-1].view(size, sessions, length)


class _BiasEncoding(nn.Module):
    """w^K_k + w^T_t + w^C_c: K + T + D numbers that tell sessions, places and channels apart. They start at 0."""

    def __init__(self, sessions: int, length: int, dim: int) -> None:
        super().__init__()
        self.session = nn.Parameter(torch.zeros(sessions))  # by age: 0 is the newest
        self.place = nn.Parameter(torch.zeros(length))
        self.channel = nn.Parameter(torch.zeros(dim))

    def forward(self, x: Float[Tensor, "S T D"], age: Int[Tensor, "S"]) -> Float[Tensor, "S T D"]:
        """`age` of each of the S sessions."""
        return x + self.session[age].view(-1, 1, 1) + self.place.view(1, -1, 1) + self.channel


class _SessionBlock(nn.Module):
    """Self-attention and a feed-forward layer, each with a residual and a layer norm."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, num_heads, dropout=dropout)
        self.feed_forward = MLP(dim, (4 * dim, dim), dropout=dropout)
        self.norms = nn.ModuleList(nn.LayerNorm(dim) for _ in range(2))
        self.drop = Dropout(dropout)

    def forward(self, x: Float[Tensor, "S T D"], mask: Bool[Tensor, "S T"]) -> Float[Tensor, "S T D"]:
        x = self.norms[0](x + self.drop(self.attention(x, mask=mask)))
        out: Tensor = self.norms[1](x + self.drop(self.feed_forward(x)))
        return out


@keeps_config
class DSIN(nn.Module):
    """Logit of a click on an item by a user with a history; needs `history_ids`, `history_times` and `mask`."""

    reads_history = True

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 16,
        hidden: Sequence[int] = (200, 80),
        num_sessions: int = 5,
        session_length: int = 10,
        session_gap: int = 1800,
        num_heads: int = 1,
        activation: Activation = "relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        item_fields = sum(field.side == "item" for field in spec.categories)
        if not item_fields:
            raise ValueError(
                "DSIN compares the item with the history, but this spec has no item column; "
                "name user and item in the schema, or use rank/deepfm for a table of rows"
            )
        if min(num_sessions, session_length) < 1 or session_gap < 0:
            raise ValueError(
                "num_sessions and session_length must be at least 1 and session_gap at least 0 seconds, "
                f"received {num_sessions}, {session_length} and {session_gap}"
            )
        self.num_sessions = num_sessions
        self.session_length = session_length
        self.session_gap = session_gap
        self.item_columns = spec.item_ids
        self.embedding = FieldEmbedding(spec, embedding_dim)
        dim = item_fields * embedding_dim
        self.bias_encoding = _BiasEncoding(num_sessions, session_length, dim)
        self.block = _SessionBlock(dim, num_heads, dropout)
        self.evolution = nn.LSTM(dim, dim, batch_first=True, bidirectional=True)
        self.choose = BilinearScore(dim, dim)
        self.choose_evolved = BilinearScore(dim, 2 * dim)
        in_features = self.embedding.output_fields * embedding_dim + 4 * dim
        self.top = MLP(in_features, (*hidden, 1), activation=activation, dropout=dropout)

    def _items(self, ids: Int[Tensor, "*shape C"]) -> Float[Tensor, "*shape D"]:
        """Item vectors: the fields of the item's columns side by side."""
        return self.embedding.lookup(ids, self.item_columns).flatten(-2)  # (..., C) -> (..., fields · D)

    def _interests(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
        """I, oldest session first, and which of the K there are."""
        slots = _session_slots(
            batch.history_times, batch.mask, self.session_gap, self.num_sessions, self.session_length
        )
        real = slots >= 0  # (B, K, T)
        sessions = real.any(2)  # (B, K)
        user, k = sessions.nonzero(as_tuple=True)  # (S,) each: only sessions that exist are computed
        slots, real = slots[user, k], real[user, k]  # (S, T)
        ids = batch.history_ids[user.unsqueeze(1), slots.clamp(min=0)].masked_fill(~real.unsqueeze(2), 0)
        age = sessions.sum(1)[user] - 1 - k
        x = self.block(self.bias_encoding(self._items(ids), age), real)  # (S, T, D)   Eq. (2)-(6)
        pooled = masked_mean(x, real)  # (S, D)   Eq. (7)
        interests = pooled.new_zeros(*sessions.shape, pooled.shape[1]).index_put((user, k), pooled)
        return interests, sessions

    def _evolved(self, interests: Float[Tensor, "B K D"], sessions: Bool[Tensor, "B K"]) -> Float[Tensor, "B K E"]:
        """H: both directions of the LSTM over the sessions that there are."""
        lengths = sessions.sum(1).clamp(min=1).cpu()  # a packed sequence has no empty rows; those are masked later
        packed = pack_padded_sequence(interests, lengths, batch_first=True, enforce_sorted=False)
        evolved, _ = pad_packed_sequence(self.evolution(packed)[0], batch_first=True, total_length=sessions.shape[1])
        return evolved

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `ids`, `numbers`, `history_ids` [B, L, Ci], `history_times` [B, L] and `mask` [B, L]."""
        fields = self.embedding(batch).flatten(1)  # (B, F, D) -> (B, F·D)
        target = self._items(batch.ids[:, self.item_columns]).unsqueeze(1)  # (B, 1, D)
        interests, sessions = self._interests(batch)  # (B, K, D)
        evolved = self._evolved(interests, sessions)  # (B, K, 2D)
        allowed = sessions.unsqueeze(1)  # (B, 1, K)
        of_interests = masked_softmax(self.choose(target, interests), allowed) @ interests  # (B, 1, D)   Eq. (9)
        of_evolved = masked_softmax(self.choose_evolved(target, evolved), allowed) @ evolved  # (B, 1, 2D)   Eq. (10)
        chosen = torch.cat((of_interests, of_interests * target, of_evolved), dim=2).squeeze(1)  # (B, 4D)
        top_in = torch.cat((fields, chosen), dim=1)
        logit: Tensor = self.top(top_in).squeeze(1)  # (B,)
        return logit
