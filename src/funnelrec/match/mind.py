"""MIND — K interests of a user by dynamic routing of the history into capsules.

Paper: Li, Liu, Wu, Xu, Zhao, Huang, Kang, Chen, Li, Lee. Multi-Interest Network with Dynamic Routing for
       Recommendation at Tmall. CIKM 2019. arXiv:1904.08030
Idea:  items of one interest agree with one another; routing by agreement groups them without being told how, and a
       target trains the interest it belongs to.

Eq. (6)-(7)  b_ij += u_jᵀ S e_i, one S for all pairs           core.nn.capsule.route; b starts random, MIND.routing
Alg. 1       w_i = softmax_j(b_i), z_j = Σ_i w_ij S e_i        route: over the interests, as an item divides itself
             u_j = squash(z_j)                                 squash
Eq. (9)      K'_u = max(1, min(K, ⌊log2 |I_u|⌋))               MIND.num_valid
Sec. 4.4     v_j = tower(u_j)                                  MIND.tower
Eq. (10)     v_u = V_u softmax(V_uᵀ e_i ^ p)                   user_for_target, in training only
Eq. (12)     score = max_j ⟨v_j, e⟩                            the index merges the interests so
Differs:
- The random logits are drawn once, for each slot counted from the newest, and kept among the weights: two calls give
  the same bits, and longer padding changes nothing. (Equal logits and one S would make all interests equal.)
- Attention is softmax(p · product): a power of a product flips signs or is not a number, and below 1 shrinks to even
  weights as p grows. `sharpness` None is its limit, the closest interest alone, with which the paper converges best.
- Interests beyond K'_u take no part in the routing; they are not valid.
- Only the last iteration passes a gradient, as in public code; the values are the same.
- The profile of the user is not read. The tower, which joins the two in the paper, is left out unless `hidden` names
  its layers (mutual information of interests and planted topics .91 without it, .66 with it, after as many steps); its
  last layer is linear, so that an interest can point away from an item.
- The sampled softmax of Eq. (11) lives in learn/losses.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.attention import masked_softmax
from funnelrec.core.nn.capsule import route
from funnelrec.core.nn.items import any_known, closest_interest, item_table, newest_items
from funnelrec.core.nn.linear import Linear
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.schema import Spec

__all__ = ["MIND"]


@keeps_config
class MIND(nn.Module):
    """Up to K vectors a user; an item's score is its best over the valid ones.

    `embedding_dim` D of items and interests; `num_interests` K; `adaptive`: a history of n items has ⌊log2 n⌋ interests
    at most; `iterations` of routing; `sharpness` p of the attention to the target (None: the closest interest alone);
    `hidden` layers of the tower behind the capsules; `max_len` the longest history that is read.
    """

    routing: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_interests: int = 4,
        adaptive: bool = True,
        iterations: int = 3,
        sharpness: int | float | None = None,
        hidden: Sequence[int] = (),
        max_len: int = 50,
    ) -> None:
        super().__init__()
        if num_interests < 1 or iterations < 1:
            raise ValueError(
                f"num_interests and iterations must be at least 1, received {num_interests} and {iterations}"
            )
        if sharpness is not None and sharpness < 0:
            raise ValueError(f"sharpness must be at least 0 or None, received {sharpness}")
        self.spec = spec
        self.num_interests = num_interests
        self.adaptive = adaptive
        self.iterations = iterations
        self.sharpness = sharpness
        self.max_len = max_len
        # a small start: the first agreements are those of the random logits alone, until the items have grouped
        self.items = item_table(spec, embedding_dim, std=0.02, owner="MIND")
        self.bilinear = Linear(embedding_dim, embedding_dim, bias=False)  # S
        nn.init.orthogonal_(self.bilinear.weight)
        self.register_buffer("routing", torch.randn(max_len, num_interests))  # row p: b of p slots before the newest
        self.tower = MLP(embedding_dim, (*hidden, embedding_dim)) if hidden else nn.Identity()

    def num_valid(self, mask: Bool[Tensor, "B L"]) -> Int[Tensor, "B"]:
        """K'_u, Eq. (9)."""
        count = mask.sum(1, keepdim=True)
        if not self.adaptive:
            return torch.full_like(count, self.num_interests).squeeze(1)
        powers = 2 ** torch.arange(1, self.num_interests + 1, device=mask.device)
        return (count >= powers).sum(1).clamp(min=1)

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B K D"], Bool[Tensor, "B K"]]:
        """The interests, the first K'_u of them valid; none when no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        votes = self.bilinear(self.items(history))  # (B, L, D) S e_i
        live = torch.arange(self.num_interests, device=mask.device) < self.num_valid(mask).unsqueeze(1)  # (B, K)
        logits = self.routing[: history.shape[1]].flip(0).masked_fill(~live.unsqueeze(1), -torch.inf)  # (B, L, K)
        capsules = route(votes, mask, logits, iterations=self.iterations)  # (B, K, D) Alg. 1
        return self.tower(capsules), live & any_known(history, mask).unsqueeze(1)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the table that the histories use too."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B K D"], valid: Bool[Tensor, "B K"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """Label-aware attention, Eq. (10)."""
        if self.sharpness is None:
            return closest_interest(interests, valid, target)
        products = (interests @ target.unsqueeze(-1)).squeeze(-1)  # (B, K)
        weights = masked_softmax(self.sharpness * products, valid)  # (B, K)
        return (weights.unsqueeze(1) @ interests).squeeze(1)  # (B, D)
