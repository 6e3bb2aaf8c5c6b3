"""YouTubeDNN (retrieval) — a tower of ReLU layers over the mean of what was watched and the age of the example.

Paper: Covington, Adams, Sargin. Deep Neural Networks for YouTube Recommendations. RecSys 2016, Section 3.
       doi:10.1145/2959100.2959190
Idea:  retrieval is a classification among all videos; a network turns the watches into a vector, and a video's row of
       the softmax layer is its vector. Telling it how old an example is lets it ask for what is liked today.

Eq. (1)   P(w = i | U) = exp(⟨v_i, u⟩) / Σ_j exp(⟨v_j, u⟩)    encode_users gives u, encode_items v; learn.losses
Fig. 3    u = ReLU tower [mean of the watches, example age]    encode_users
Sec. 3.3  example age = t_max - t in training, 0 at serving    YouTubeDNN.age
Sec. 3.4  as many examples a user; only the past as input      data.examples.NextItem(mode="cut"), Histories.before
Sec. 3.5  watches and searches without order                   the mean
Differs:
- Age enters as log(1 + days). t_max is the latest moment that training met so far; in a data set whose times are
  ordinals (the leave-last-out split) ages are next to zero.
- Searches, place, device, gender are not read: the batches of retrieval hold the history and the moment alone.
- A history without a known item has the mean zero and is not valid.
- The sampled softmax lives in learn/losses.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import DAY
from funnelrec.core.nn.items import any_known, item_table, newest_items
from funnelrec.core.nn.mlp import MLP
from funnelrec.core.nn.pooling import masked_mean
from funnelrec.core.schema import Spec

__all__ = ["YouTubeDNN"]


@keeps_config
class YouTubeDNN(nn.Module):
    """One vector a user (K = 1), none of whose coordinates is negative.

    `embedding_dim` D of the watched items, of the tower's last layer and of the items that are scored, which are two
    tables; `hidden` layers before the last; `dropout` behind each layer; `max_len` watches that are averaged.
    """

    latest: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        hidden: Sequence[int] = (256, 128),
        dropout: int | float = 0.0,
        max_len: int = 50,
    ) -> None:
        super().__init__()
        self.spec = spec
        self.max_len = max_len
        self.watched = item_table(spec, embedding_dim, std=embedding_dim**-0.5, owner="YouTubeDNN")
        self.items = item_table(spec, embedding_dim, std=0.02, owner="YouTubeDNN")  # the softmax layer
        self.tower = MLP(embedding_dim + 1, (*hidden, embedding_dim), dropout=dropout, activate_last=True)
        self.register_buffer("latest", torch.tensor(torch.iinfo(torch.int64).min))  # t_max, seconds

    def age(self, batch: Batch) -> Float[Tensor, "B"]:
        """Days between each example and the newest one of training; 0 in evaluation."""
        if not self.training or "time" not in batch:
            return torch.zeros(batch.size, device=batch.history.device)
        with torch.no_grad():
            torch.maximum(self.latest, batch.time.max(), out=self.latest)
        return (self.latest - batch.time).double().div(DAY).float()

    def encode_users(self, batch: Batch) -> tuple[Float[Tensor, "B 1 D"], Bool[Tensor, "B 1"]]:
        """The output of the tower. Not valid: no item of the history is known."""
        history, mask = newest_items(batch, self.max_len)
        mean = masked_mean(self.watched(history), mask)  # (B, D)
        user = self.tower(torch.cat([mean, self.age(batch).log1p().unsqueeze(1)], dim=1))  # (B, D)
        return user.unsqueeze(1), any_known(history, mask).unsqueeze(1)  # (B, 1, D), (B, 1)

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """Rows of the softmax layer, which is not the table of the watches."""
        vectors: Tensor = self.items(rows)
        return vectors

    def user_for_target(
        self, interests: Float[Tensor, "B 1 D"], valid: Bool[Tensor, "B 1"], target: Float[Tensor, "B D"]
    ) -> Float[Tensor, "B D"]:
        """The only vector there is."""
        return interests[:, 0]
