"""Item2Vec — items that the same people take get vectors that lie close: skip-gram with negative sampling over sets.

Paper: Barkan, Koenigstein. Item2Vec: Neural Item Embedding for Collaborative Filtering. 2016. arXiv:1603.04259
       Skip-gram: Mikolov, Sutskever, Chen, Corrado, Dean. NIPS 2013. arXiv:1310.4546
Idea:  a user's items are a sentence without an order; predict an item from another one of the same user.

Eq. (1)-(2)  every item of a set is context to every other    skipgram.Pairs: a window over the set, shuffled each epoch
Eq. (3)      log σ(u_iᵀ v_j) + Σ_k log σ(−u_iᵀ v_k)           skipgram.Tables.step
             k drawn with probability ∝ count^¾               skipgram.Noise, `alpha`
Eq. (4)      an item stays with probability √(t/f) + t/f      skipgram.Pairs: drawn each epoch, `subsample` is t
Sec. 3       similarity is the cosine of the u_i              recommend, encode_items
Differs:
- A window over a fresh shuffle instead of all pairs: the same pairs in expectation, each user weighing by the number of
  items and not by its square. `ordered` slides it over time with a random radius, as word2vec does over words.
- An item stays with the probability of the published word2vec code; the paper has 1 − √(t/f) of its leaving.
- Mini-batches with Adagrad (one rate a vector, falling to zero with training) instead of one pair after the other.
- The paper stops at similarities. Here a user is the mean of the directions of her items (`pooling` "last": the newest
  one), and gets the items of the largest cosine; items that training never saw, and everything for a user of whom
  nothing is known, come behind those by popularity.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.interactions import Events, distinct_pairs
from funnelrec.core.nn.items import any_known, newest_items
from funnelrec.core.nn.pooling import masked_last, masked_mean
from funnelrec.core.nn.skipgram import SkipGram
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.match.index.topk import top_rows

__all__ = ["Item2Vec"]

CELLS_AT_ONCE = 2**23  #: scores held at a time: users asking × items


@keeps_config
class Item2Vec(nn.Module):
    """Recommends by cosine. `fit` trains it; it needs no other loop.

    `embedding_dim` D; `window` contexts on each side of an item; `num_negatives` a pair, drawn by count^`alpha`;
    `subsample`: t, above which share of all events an item is thinned out (None: never); `ordered`: sequences and not
    sets; `pooling` of the history, its newest `max_len` items.
    """

    vectors: Tensor
    contexts: Tensor
    popularity: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        window: int = 10,
        num_negatives: int = 5,
        alpha: int | float = 0.75,
        subsample: int | float | None = 1e-3,
        ordered: bool = False,
        pooling: str = "mean",
        max_len: int = 50,
    ) -> None:
        super().__init__()
        if window < 1 or num_negatives < 1:
            raise ValueError(f"window and num_negatives must be at least 1, received {window} and {num_negatives}")
        if subsample is not None and subsample <= 0:
            raise ValueError(f"subsample is a share above 0 or None, received {subsample}")
        if pooling not in ("last", "mean"):
            raise ValueError(f"pooling must be last or mean, received {pooling!r}")
        self.spec = spec
        self.window, self.num_negatives, self.alpha = window, num_negatives, alpha
        self.subsample, self.ordered = subsample, ordered
        self.pooling, self.max_len = pooling, max_len
        self.register_buffer("vectors", torch.zeros(spec.num_items, embedding_dim))  # (N, D) u; 0: never seen
        self.register_buffer("contexts", torch.zeros(spec.num_items, embedding_dim), persistent=False)  # (N, D) v
        self.register_buffer("popularity", torch.zeros(spec.num_items))  # (N,) share of the users of the top item
        self.losses: list[float] = []  # the mean of each epoch

    @torch.no_grad()
    def fit(
        self,
        users: Events,
        items: Events,
        times: Events,
        *,
        epochs: int = 20,
        lr: float = 0.3,
        batch_size: int = 4096,
        seed: int = 0,
    ) -> Item2Vec:
        """Train on the positive events of the training part: user rows, item rows, seconds. Starts anew each time."""
        user, item, _ = distinct_pairs(users, items, times)
        counts = torch.bincount(item, minlength=self.spec.num_items)  # (N,)
        self.popularity = counts / counts.max().clamp(min=1)
        self.vectors, self.contexts = torch.zeros_like(self.vectors), torch.zeros_like(self.contexts)
        self.losses = []
        if not len(user):
            return self
        known, item = item.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        user = user.unique_consecutive(return_inverse=True)[1]  # type: ignore[no-untyped-call]
        train = SkipGram(
            embedding_dim=self.vectors.shape[1], window=self.window, num_negatives=self.num_negatives, alpha=self.alpha,
            subsample=self.subsample, ordered=self.ordered, epochs=epochs, lr=lr, batch_size=batch_size, seed=seed,
        )  # fmt: skip
        self.vectors[known], self.contexts[known], self.losses = train(user, item)
        return self

    def encode_items(self, rows: Int[Tensor, "N"]) -> Float[Tensor, "N D"]:
        """The directions of the items: vectors of length 1; zero for one that training never saw."""
        return F.normalize(self.vectors[rows], dim=1)

    @torch.no_grad()
    def recommend(
        self,
        batch: Batch,
        k: int,
        exclude: Int[Tensor, "B X"] | None = None,
        allowed: Bool[Tensor, "N"] | None = None,
    ) -> tuple[Int[Tensor, "B k"], Float[Tensor, "B k"]]:
        """Items by cosine with the user; behind them, below -1, the others by popularity."""
        items = self.encode_items(torch.arange(self.spec.num_items))
        behind = self.popularity - 2
        parts = []
        for part in torch.split(torch.arange(batch.size), max(1, CELLS_AT_ONCE // self.spec.num_items)):
            user, valid = self._users(batch.select(part), items)
            scores = torch.where(valid.unsqueeze(1) & (items != 0).any(1), user @ items.T, behind)  # (b, N)
            if allowed is not None:
                scores.masked_fill_(~allowed, -torch.inf)
            if exclude is not None:
                scores.scatter_(1, exclude[part], -torch.inf)
            scores[:, :FIRST_KNOWN] = -torch.inf
            parts.append(top_rows(scores, k))
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])

    def _users(self, batch: Batch, items: Tensor) -> tuple[Float[Tensor, "b D"], Bool[Tensor, "b"]]:
        history, mask = newest_items(batch, self.max_len)
        mask = mask & (self.popularity[history] > 0)
        pooled = (masked_mean if self.pooling == "mean" else masked_last)(items[history], mask)
        return F.normalize(pooled, dim=1), any_known(history, mask)
