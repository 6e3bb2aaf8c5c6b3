"""ComiRec-DR — K interests of a user by dynamic routing, with a map of its own for each slot and interest.

Paper: Cen, Zhang, Zou, Zhou, Yang, Tang. Controllable Multi-Interest Framework for Recommendation. KDD 2020.
       arXiv:2005.09347
Idea:  each item of a history votes for each interest through a matrix of that place and that interest; routing by
       agreement settles which interest gets it.

Eq. (1)   ê_{j|i} = W_ij e_i                       core.nn.capsule.SlotVotes
Eq. (2)   s_j = Σ_i c_ij ê_{j|i}                   core.nn.capsule.route
Eq. (3)   c_ij = softmax_j(b_ij)                   route: over the interests, at each item
Eq. (4)   v_j = squash(s_j)                        squash
Alg. 1    b = 0, r times: c, s, v, b_ij += v_jᵀ ê  route, `iterations`
Eq. (8)   v_u = V_u[:, argmax(V_uᵀ e_i)]           user_for_target
Eq. (11)  f(u, i) = max_j ⟨v_j, e_i⟩               the index merges the K interests so; rerank/diversity.py goes on
Differs:
- Slots are counted from the newest item and not from the oldest that is kept, so that longer padding changes nothing.
- Only the last iteration passes a gradient, as in the authors' code; the values are the same.
- W starts at I + N(0, 1/D), where the authors' code has N(0, 1), and items at N(0, 0.02²). From maps that have nothing
  in common an item's votes say where it stands and not what it is: mutual information of interests and planted topics
  .98 from here, .41 without the identity, after as many steps.
- The sampled softmax of Eq. (9)-(10) lives in learn/losses.py.
"""

from __future__ import annotations

from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.capsule import SlotVotes, route
from funnelrec.core.nn.items import any_known, closest_interest, item_table, newest_items
from funnelrec.core.schema import Spec

__all__ = ["ComiRecDR"]


@keeps_config
class ComiRecDR(nn.Module):
    """K vectors a user; an item's score is its best over them.

    `embedding_dim` D of items and interests; `num_interests` K; `iterations` of routing; `max_len` L, the longest
    history that is read (the newest items of a longer one). W has L · K · D² numbers.
    """

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_interests: int = 4,
        iterations: int = 3,
        max_len: int = 50,
    ) -> None:
        super().__init__()
        if num_interests < 1 or iterations < 1:
            raise ValueError(
                f"num_interests and iterations must be at least 1, received {num_interests} and {iterations}"
            )
        self.spec = spec
        self.iterations = iterations
        self.max_len = max_len
        self.items = item_table(spec, embedding_dim, std=0.02, owner="ComiRec-DR")
        self.votes = SlotVotes(max_len, embedding_dim, num_interests)  # W

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
        """The K interests. None is valid when no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        interests = route(self.votes(self.items(history)), mask, iterations=self.iterations)  # (B, K, D) Alg. 1
        return interests, any_known(history, mask).unsqueeze(1).expand(interests.shape[:2])

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the histories use too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """Eq. (8): the interest with the largest product; the others receive no gradient."""
        return closest_interest(interests, valid, target)
