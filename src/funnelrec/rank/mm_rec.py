"""MM-Rec: news ranked by titles and pictures together, and by what in a history matters to the candidate.

Paper: Wu, Wu, Qi, Zhang, Huang, Xu. MM-Rec: Visiolinguistic Model Empowered Multimodal News Recommendation. SIGIR 2022.
    arXiv:2104.07407.
Idea:  words and regions of a picture attend to one another, so that a title can say what matters in a picture; a user
    is four sums over the history, weighted by how the candidate's title and picture agree with each title and picture.

| paper                                                        | here                                          |
|--------------------------------------------------------------|-----------------------------------------------|
| Eq. (1) words LN(e + p); regions LN(W_f f + W_l loc)          | `_Words`, `_Regions`                          |
| Eq. (2) C_t = softmax(Q_t K_vᵀ/√d) V_v, C_v the other way     | `_CoLayer`                                    |
| Eq. (3) a = softmax_i(q · (W h_i + b)), r = Σ a_i z_i         | `_Pool`: r^t and r^v                          |
| Eq. (4) w^ab_i = softmax_i(r^a_c · r^b_i), a, b ∈ {t, v}      | `user`                                        |
| Eq. (5) u_c = Σ_a Σ_b Σ_i w^ab_i r^b_i                        | `user`                                        |
| Eq. (6) y_c = u_c · (r^t_c + r^v_c)                           | `forward`                                     |

Differs:
- Masks are everywhere: padded words, regions and history slots, and pictures that are absent. The released code gives
  its encoder none of them. A picture that an item lacks gives r^v = 0 and takes no part in the history.
- The products of Eq. (4) are divided by √D; unscaled, the softmax picks one item.
- Learnt from the start at a small width, in the place of ViLBERT. Words are token ids, or the item's own columns of the
  schema (`num_tokens=0`); regions are vectors that any image encoder gave.
- A bias is added to the score, for losses that are no softmax over a list.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from funnelrec.core.batch import Batch
from funnelrec.core.config import keeps_config
from funnelrec.core.nn.attention import MultiHeadAttention, masked_softmax
from funnelrec.core.nn.embedding import Table
from funnelrec.core.schema import Spec

__all__ = ["MMRec"]

LOCATION = 5  #: of a region: top, left, bottom, right and area, as shares of the picture


class _Words(nn.Module):
    """Tokens [N, T] to vectors; 0 is padding."""

    def __init__(self, rows: int, length: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.table = Table(rows, dim, std=0.02)
        self.positions = nn.Parameter(torch.randn(length, dim) * 0.02)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, tokens: Int[Tensor, "N T"]) -> Float[Tensor, "N T D"]:
        x: Tensor = self.dropout(self.norm(self.table(tokens) + self.positions))
        return x


class _Regions(nn.Module):
    """Regions of a picture [N, R, F] and where they are [N, R, 5] to vectors."""

    def __init__(self, region_dim: int, dim: int, dropout: float) -> None:
        super().__init__()
        self.features, self.place = nn.Linear(region_dim, dim), nn.Linear(LOCATION, dim, bias=False)
        self.norm, self.dropout = nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(self, regions: Float[Tensor, "N R F"], places: Float[Tensor, "N R 5"]) -> Float[Tensor, "N R D"]:
        x: Tensor = self.dropout(self.norm(self.features(regions) + self.place(places)))  # Eq. (1)
        return x


class _Attended(nn.Module):
    """LN(x + attention to `keys`), then LN(x + MLP(x)). With itself a layer of one stream, else half of a co-layer."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = MultiHeadAttention(dim, num_heads)
        self.mlp = nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))
        self.first, self.second, self.dropout = nn.LayerNorm(dim), nn.LayerNorm(dim), nn.Dropout(dropout)

    def forward(
        self, x: Float[Tensor, "N T D"], keys: Float[Tensor, "N S D"], mask: Bool[Tensor, "N S"]
    ) -> Float[Tensor, "N T D"]:
        x = self.first(x + self.dropout(self.attention(x, keys, mask)))
        out: Tensor = self.second(x + self.dropout(self.mlp(x)))
        return out


class _CoLayer(nn.Module):
    """Words look at regions and regions at words, both at what the other was before. Eq. (2)"""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.words, self.regions = _Attended(dim, num_heads, dropout), _Attended(dim, num_heads, dropout)

    def forward(self, t: Tensor, t_mask: Tensor, v: Tensor, v_mask: Tensor) -> tuple[Tensor, Tensor]:
        return self.words(t, v, v_mask), self.regions(v, t, t_mask)


class _Pool(nn.Module):
    """One vector of many, by how much each agrees with a learnt query; zero where there are none. Eq. (3)"""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.project, self.query = nn.Linear(dim, dim), nn.Linear(dim, 1, bias=False)

    def forward(self, x: Float[Tensor, "N T D"], mask: Bool[Tensor, "N T"]) -> Float[Tensor, "N D"]:
        z = self.project(x)
        weights = masked_softmax(self.query(z).squeeze(2), mask)  # (N, T)
        pooled: Tensor = (weights.unsqueeze(1) @ z).squeeze(1)
        return pooled


@keeps_config
class MMRec(nn.Module):
    """Logit of a click on a candidate, from its title and picture and those of the history.

    `num_tokens` rows of the word table (0: an item's words are its columns of the schema), `title_len` words of a
    title, `num_regions` regions of `region_dim` numbers (0: no pictures). Titles and regions are given by `set_content`
    and saved with the weights.
    """

    reads_history = True
    titles: Tensor
    regions: Tensor
    places: Tensor
    region_mask: Tensor

    def __init__(
        self,
        spec: Spec,
        *,
        embedding_dim: int = 64,
        num_tokens: int = 0,
        title_len: int = 24,
        num_regions: int = 0,
        region_dim: int = 0,
        num_layers: int = 1,
        num_co_layers: int = 1,
        num_heads: int = 4,
        dropout: int | float = 0.1,
    ) -> None:
        super().__init__()
        if not spec.num_items:
            raise ValueError("MM-Rec reads items and histories; name user and item in the schema, or use rank/deepfm")
        if (num_regions > 0) != (region_dim > 0):
            raise ValueError(
                f"pictures need both num_regions and region_dim, received {num_regions} and {region_dim}; 0 is none"
            )
        self.item_columns = spec.item_ids
        self.has_words, self.has_pictures = num_tokens > 0, num_regions > 0
        length = title_len if self.has_words else self.item_columns.stop - self.item_columns.start
        common = (embedding_dim, num_heads, float(dropout))
        self.words = _Words(num_tokens or spec.table_rows, length, embedding_dim, float(dropout))
        self.word_layers = nn.ModuleList(_Attended(*common) for _ in range(num_layers))
        self.word_pool = _Pool(embedding_dim)
        self.bias = nn.Parameter(torch.zeros(()))
        self.register_buffer("titles", torch.zeros(spec.num_items if self.has_words else 0, length, dtype=torch.int32))
        pictures = spec.num_items if self.has_pictures else 0
        self.register_buffer("regions", torch.zeros(pictures, num_regions, region_dim))
        self.register_buffer("places", torch.zeros(pictures, num_regions, LOCATION))
        self.register_buffer("region_mask", torch.zeros(pictures, num_regions, dtype=torch.bool))
        if self.has_pictures:
            self.region_embedding = _Regions(region_dim, embedding_dim, float(dropout))
            self.region_layers = nn.ModuleList(_Attended(*common) for _ in range(num_layers))
            self.co_layers = nn.ModuleList(_CoLayer(*common) for _ in range(num_co_layers))
            self.region_pool = _Pool(embedding_dim)
        self._known: tuple[Tensor, Tensor, Tensor] | None = None  # of all items, while evaluating

    def set_content(
        self,
        titles: Int[Tensor, "N T"] | None = None,
        regions: Float[Tensor, "N R F"] | None = None,
        places: Float[Tensor, "N R 5"] | None = None,
        region_mask: Bool[Tensor, "N R"] | None = None,
    ) -> None:
        """Titles (token ids, 0 is padding) and pictures of all items, row r those of item row r.

        Regions without `places` are nowhere; without `region_mask` those are real that are not all zero.
        """
        if regions is not None and region_mask is None:
            region_mask = regions.abs().amax(2) > 0
        given = {"titles": titles, "regions": regions, "places": places, "region_mask": region_mask}
        for name, value in given.items():
            own = getattr(self, name)
            if value is None:
                continue
            if value.shape != own.shape:
                raise ValueError(f"{name} of this model are {list(own.shape)}, received {list(value.shape)}")
            own.copy_(value)
        self._known = None

    def train(self, mode: bool = True) -> MMRec:
        """Training forgets the vectors that `prepare` made."""
        self._known = None
        super().train(mode)
        return self

    @torch.no_grad()
    def prepare(self) -> None:
        """Encode every item once, for serving. Only where titles were given: columns come with a request."""
        if self.has_words and not self.training:
            rows = torch.arange(len(self.titles), device=self.titles.device)
            parts = [self._encode(self.titles[part], part) for part in torch.split(rows, 2048)]
            self._known = tuple(torch.cat(p) for p in zip(*parts, strict=True))  # type: ignore[assignment]

    def _encode(self, words: Tensor, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """r^t [n, D], r^v [n, D] and which items have a picture [n]."""
        t_mask = words > 0
        t = self.words(words)
        for layer in self.word_layers:
            t = layer(t, t, t_mask)
        if not self.has_pictures:
            text = self.word_pool(t, t_mask)
            return text, torch.zeros_like(text), torch.zeros(words.shape[0], dtype=torch.bool, device=words.device)
        v_mask = self.region_mask[rows]
        v = self.region_embedding(self.regions[rows], self.places[rows])
        for layer in self.region_layers:
            v = layer(v, v, v_mask)
        for layer in self.co_layers:
            t, v = layer(t, t_mask, v, v_mask)
        return self.word_pool(t, t_mask), self.region_pool(v, v_mask), v_mask.any(1)

    def _items(self, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """r^t, r^v [B, 1 + L, D] and the pictures there are [B, 1 + L]: the candidate, then the history.

        An item that occurs often in a batch is encoded once.
        """
        rows = torch.cat([batch.item.unsqueeze(1), batch.history], 1)  # (B, 1 + L)
        if self._known is not None:
            text, picture, real = (x[rows] for x in self._known)
            return text, picture, real
        if torch.compiler.is_exporting():  # a graph holds no shape that depends on data
            distinct, place = rows.flatten(), torch.arange(rows.numel(), device=rows.device).view(rows.shape)
        else:
            distinct, place = rows.unique(return_inverse=True)  # type: ignore[no-untyped-call]
        if self.has_words:
            words = self.titles[distinct]
        else:
            columns = torch.cat([batch.ids[:, None, self.item_columns], batch.history_ids], 1).flatten(0, 1)
            first = torch.empty_like(distinct).scatter_(0, place.flatten(), torch.arange(rows.numel()).to(rows.device))
            words = columns[first]  # any of an item's occurrences: they are equal
        text, picture, real = (x[place] for x in self._encode(words, distinct))
        return text, picture, real

    @staticmethod
    def user(
        candidate: tuple[Float[Tensor, "B D"], Float[Tensor, "B D"]],
        history: tuple[Float[Tensor, "B L D"], Float[Tensor, "B L D"]],
        masks: tuple[Bool[Tensor, "B L"], Bool[Tensor, "B L"]],
    ) -> Float[Tensor, "B D"]:
        """u_c from titles and pictures (first and second of each pair), Eq. (4)-(5); zero for an empty history."""
        total = torch.zeros_like(candidate[0])
        for query in candidate:
            for keys, mask in zip(history, masks, strict=True):
                scores = (keys @ query.unsqueeze(2)).squeeze(2) / query.shape[1] ** 0.5  # (B, L)
                total = total + (masked_softmax(scores, mask).unsqueeze(1) @ keys).squeeze(1)
        return total

    def forward(self, batch: Batch) -> Float[Tensor, "B"]:
        """Logits [B] from `item`, `history` [B, L], `mask` [B, L], and `ids` and `history_ids` where they are words."""
        text, picture, real = self._items(batch)
        masks = (batch.mask, batch.mask & real[:, 1:])
        own = (text[:, 0], picture[:, 0])
        u = self.user(own, (text[:, 1:], picture[:, 1:]), masks)  # (B, D)
        logit: Tensor = (u * (own[0] + own[1])).sum(1) + self.bias  # Eq. (6)
        return logit
