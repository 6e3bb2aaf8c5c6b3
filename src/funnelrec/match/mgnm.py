"""MGNM — interests at several levels: a graph over the history, convolved again and again, routed at each step.

Paper: Tian, Chang, Niu, Song, Li. When Multi-Level Meets Multi-Interest: A Multi-Grained Neural Model for Sequential
       Recommendation. SIGIR 2022. arXiv:2205.01286
Idea:  what a user wants is a single item at times and a whole family at others. Items of her history exchange what they
       know along a graph that depends on her; each round gives coarser items, and each level its own K interests.

Eq. (a)  A_ij = σ((x_i ∘ x_j) · x_u)                          MGNM.graph
Eq. (b)  Ã = D^{−1/2} (A + I) D^{−1/2}, D the row sums        MGNM.levels
Eq. (c)  H⁰ = X, H^{l+1} = LeakyReLU(Ã H^l W_l + b_l)         MGNM.levels
Eq. (d)  routing by agreement; after its first round a
         Bi-LSTM along the history is added to the votes      _SequentialCapsules
Eq. (e)  v_l = Σ_k softmax_k(⟨z_k^l, e⟩) z_k^l                 user_for_target
Eq. (f)  score = max_l ⟨v_l, e⟩                                user_for_target in evaluation; the index: max_{l,k}
Eq. (g)  loss = Σ_l loss(v_l) + λ ‖A‖₁                        one level an example, at random; training_terms
Differs:
- The authors' code is not followed where it departs from the paper: it leaves the user out of the graph, convolves the
  raw items at every level, has weights for one level only, and its Bi-LSTM mixes examples of the batch.
- Each training example trains one level drawn at random: in expectation the mean of the levels' losses, whatever the
  loss. The index takes the best single interest of all levels, where Eq. (e)-(f) take a softmax mean of each level.
- Slots are counted from the newest; the Bi-LSTM skips padding and has D/2 states in each direction. What it adds stays
  until the last round, where the authors' code takes it back. Routing starts at zero, since each interest has maps of
  its own, and only its last round passes a gradient.
- In training a user is unknown at times (`user_dropout`), so that the graph of a stranger has been trained. ‖A‖₁ is the
  mean over the pairs of real items.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.capsule import SlotVotes, route
from funnelrec.core.nn.embedding import Table
from funnelrec.core.nn.items import any_known, item_table, newest_items
from funnelrec.core.nn.linear import Linear
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN, UNKNOWN

__all__ = ["MGNM"]

SLOPE = 0.2  #: of LeakyReLU below 0


class _SequentialCapsules(nn.Module):
    """K interests of one level, Eq. (d)."""

    def __init__(self, max_len: int, dim: int, num_interests: int, iterations: int) -> None:
        super().__init__()
        self.iterations = iterations
        self.votes = SlotVotes(max_len, dim, num_interests)
        # one recurrence a user: it reads what an item says of all interests
        self.forwards, self.backwards = (nn.LSTM(num_interests * dim, dim // 2, batch_first=True) for _ in range(2))
        self.out = Linear(dim, num_interests * dim, bias=False)
        nn.init.xavier_uniform_(self.out.weight)

    def forward(self, x: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B K D"]:
        votes = self.votes(x)  # (B, L, K, D)
        with torch.no_grad():
            first = route(votes, mask, iterations=1)  # (B, K, D)
            agreement = torch.einsum("bkd,blkd->blk", first, votes)
        ordered = self.in_order(votes.flatten(2), mask).view(votes.shape)
        return route(votes + ordered, mask, agreement, iterations=self.iterations - 1)

    def in_order(self, votes: Float[Tensor, "B L E"], mask: Bool[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
        """The Bi-LSTM along the history. Padding is moved behind the end in both directions, wherever it stood; what
        comes out there has no meaning."""
        length = mask.shape[1]
        oldest_first = (~mask).to(torch.uint8).argsort(dim=1, stable=True)  # (B, L) real items, then padding
        newest_first = length - 1 - (~mask.flip(1)).to(torch.uint8).argsort(dim=1, stable=True)
        states = []
        for order, lstm in ((oldest_first, self.forwards), (newest_first, self.backwards)):
            walked = lstm(_rearranged(votes, order))[0]  # (B, L, D / 2)
            states.append(_rearranged(walked, order.argsort(dim=1)))
        out: Tensor = self.out(torch.cat(states, dim=2))  # (B, L, E)
        return out


def _rearranged(x: Float[Tensor, "B L E"], order: Int[Tensor, "B L"]) -> Float[Tensor, "B L E"]:
    """x[b, order[b, l]]."""
    return x.gather(1, order.unsqueeze(2).expand_as(x))


@keeps_config
class MGNM(nn.Module):
    """(num_layers + 1) · K vectors a user, K of each level, those of the raw items first.

    `embedding_dim` D, even; `num_interests` K; `num_layers` convolutions; `iterations` of routing; `penalty` λ of the
    graph; `user_dropout` share of the training examples whose user is taken for unknown; `max_len` the longest history
    that is read.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_interests: int = 4,
        num_layers: int = 2,
        iterations: int = 3,
        penalty: int | float = 1e-3,
        user_dropout: int | float = 0.1,
        max_len: int = 50,
    ) -> None:
        super().__init__()
        if num_interests < 1 or num_layers < 0 or iterations < 2:
            raise ValueError(
                "MGNM needs at least 1 interest, 0 layers and 2 iterations, received "
                f"num_interests={num_interests}, num_layers={num_layers}, iterations={iterations}"
            )
        if embedding_dim % 2:
            raise ValueError(f"embedding_dim is shared by two directions and must be even, received {embedding_dim}")
        if spec.num_users <= FIRST_KNOWN:
            raise ValueError(f"MGNM needs users; the spec has {spec.num_users} user rows, name the user column")
        self.spec = spec
        self.num_interests = num_interests
        self.penalty = penalty
        self.user_dropout = user_dropout
        self.max_len = max_len
        self.items = item_table(spec, embedding_dim, std=0.1, owner="MGNM")
        self.users = Table(spec.num_users, embedding_dim, std=embedding_dim**-0.5)
        with torch.no_grad():
            self.users.weight[UNKNOWN].zero_()
        convolutions = [Linear(embedding_dim, embedding_dim) for _ in range(num_layers)]
        for linear in convolutions:
            nn.init.orthogonal_(linear.weight)
            nn.init.zeros_(linear.bias)
        self.convolutions = nn.ModuleList(convolutions)
        self.capsules = nn.ModuleList(
            _SequentialCapsules(max_len, embedding_dim, num_interests, iterations) for _ in range(num_layers + 1)
        )

    def graph(
        self, items: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"], user: Int[Tensor, "B"]
    ) -> Float[Tensor, "B L L"]:
        """A, Eq. (a): how much two items of the history have to do with each other for this user; 0 at padding."""
        linked = (items * self.users(user).unsqueeze(1)) @ items.transpose(1, 2)  # (B, L, L)
        return torch.sigmoid(linked).masked_fill(~(mask.unsqueeze(1) & mask.unsqueeze(2)), 0.0)

    def levels(
        self, items: Float[Tensor, "B L D"], mask: Bool[Tensor, "B L"], graph: Float[Tensor, "B L L"]
    ) -> list[Float[Tensor, "B L D"]]:
        """H of each level, Eq. (b)-(c); the first is the items."""
        levels = [items.masked_fill(~mask.unsqueeze(-1), 0.0)]
        scale = (graph.sum(2, keepdim=True) + 1).rsqrt()  # (B, L, 1)
        for convolution in self.convolutions:
            h = scale * levels[-1]
            mixed = scale * (graph @ h + h)
            levels.append(F.leaky_relu(convolution(mixed), SLOPE).masked_fill(~mask.unsqueeze(-1), 0.0))
        return levels

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
        """All interests of all levels. None is valid when no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        items = self.items(history)  # (B, L, D)
        levels = self.levels(items, mask, self.graph(items, mask, self._user(batch)))
        interests = torch.cat([routed(h, mask) for routed, h in zip(self.capsules, levels, strict=True)], dim=1)
        return interests, any_known(history, mask).unsqueeze(1).expand(interests.shape[:2])

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the histories use too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """Eq. (e) of one level: in training of a random one for each example, in evaluation of the best, Eq. (f)."""
        size, count, dim = interests.shape
        of_level = interests.view(size, count // self.num_interests, self.num_interests, dim)  # (B, levels, K, D)
        scores = (of_level @ target[:, None, :, None]).squeeze(-1)  # (B, levels, K)
        read: Tensor = (scores.softmax(2).unsqueeze(2) @ of_level).squeeze(2)  # (B, levels, D)
        if self.training:
            chosen = torch.randint(read.shape[1], (len(read),), device=read.device)
        else:
            chosen = (read @ target.unsqueeze(-1)).squeeze(-1).argmax(1)
        return read[torch.arange(len(read), device=read.device), chosen]  # (B, D)

    def training_terms(self, batch: Batch) -> dict[str, Float[Tensor, ""]]:
        """`graph`: penalty · mean of A over the pairs of real items; nothing when `penalty` is 0."""
        if self.penalty == 0:
            return {}
        history, mask = newest_items(batch, self.max_len)
        graph = self.graph(self.items(history), mask, self._user(batch))
        return {"graph": self.penalty * graph.sum() / mask.sum(1).square().sum().clamp(min=1)}

    def _user(self, batch: Batch) -> Int[Tensor, "B"]:
        if "user" not in batch:
            return torch.full((batch.size,), UNKNOWN, device=batch.history.device)
        if not self.training or self.user_dropout == 0:
            return batch.user
        return batch.user.masked_fill(torch.rand(batch.size, device=batch.user.device) < self.user_dropout, UNKNOWN)
