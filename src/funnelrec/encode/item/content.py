"""Content vectors: words and categories of an item, weighed by rarity, in a few dimensions, beside given vectors.

Source: Deerwester, Dumais, Furnas, Landauer, Harshman. Indexing by latent semantic analysis. JASIS 1990.
Idea:   items whose words and attributes occur together are near; a new item needs nothing but its own row.

    x_ij = n_ij ln((1 + N) / (1 + n_j)),  each item's x divided by its length          Eq. (1)
    X ≈ U S Vᵀ,  content of an item = x V, and the standardised given vectors            Eq. (2)

Words of a text are told apart from values of a category of the same spelling. Everything is learnt from the rows given
to `learn`; an item without any known word has content zero, which readers take for missing.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

import polars as pl
import torch
from jaxtyping import Float
from torch import Tensor

from funnelrec.core.schema import Category, Field, Text, Vector

__all__ = ["ContentEncoder"]

WORD = r"[\p{L}\p{N}]+"
MAX_TOKENS = 50_000


class ContentEncoder:
    """Rows of an items table to content vectors [n, M]. Make one with `learn` or `from_members`."""

    def __init__(
        self,
        *,
        texts: Sequence[str],
        categories: Sequence[str],
        vectors: Sequence[str],
        tokens: Sequence[str],
        rarity: Float[Tensor, "V"],
        directions: Float[Tensor, "V D"],
        mean: Float[Tensor, "W"],
        deviation: Float[Tensor, "W"],
    ) -> None:
        self.texts, self.categories, self.vectors = list(texts), list(categories), list(vectors)
        self.tokens = list(tokens)
        self.rarity, self.directions, self.mean, self.deviation = rarity, directions, mean, deviation
        self._rows = pl.DataFrame({"token": self.tokens}, schema={"token": pl.String}).with_row_index("column")

    @classmethod
    def learn(
        cls, items: pl.DataFrame, fields: Sequence[Field], *, dim: int = 64, min_count: int = 2, seed: int = 0
    ) -> ContentEncoder:
        """From the rows of known items. `min_count`: words of fewer items are left out.

        Raises ValueError when no field is a text, a category or a vector.
        """
        kinds = {kind: [f.name for f in fields if isinstance(f, kind)] for kind in (Text, Category, Vector)}
        if not any(kinds.values()):
            raise ValueError("items have no content: name a Text, Category or Vector field of theirs in the schema")
        counted = _tokens(items, kinds[Text], kinds[Category])
        known = (
            counted.group_by("token").agg(pl.len().alias("items")).filter(pl.col("items") >= min_count)
            .sort(["items", "token"], descending=[True, False]).head(MAX_TOKENS)
        )  # fmt: skip
        rarity = torch.log((1 + len(items)) / (1 + torch.tensor(known["items"].to_list(), dtype=torch.float64)))
        given = _given(items, kinds[Vector])
        made = cls(
            texts=kinds[Text],
            categories=kinds[Category],
            vectors=kinds[Vector],
            tokens=known["token"].to_list(),
            rarity=rarity.float(),
            directions=torch.zeros(len(known), 0),
            mean=given.mean(0) if len(given) else given.sum(0),
            deviation=given.std(0).clamp(min=1e-6) if given.numel() > given.shape[1] else torch.ones(given.shape[1]),
        )
        x = made._weighed(counted, len(items))
        width = min(dim, *x.shape)
        if width:
            with torch.random.fork_rng():
                torch.manual_seed(seed)
                directions = torch.svd_lowrank(x, q=min(width + 10, *x.shape), niter=6)[2][:, :width]
            signs = directions.gather(0, directions.abs().argmax(0, keepdim=True)).sign()  # else they are arbitrary
            made.directions = (directions * signs).contiguous()
        return made

    @property
    def width(self) -> int:
        """M."""
        return self.directions.shape[1] + len(self.mean)

    @property
    def digest(self) -> str:
        """SHA-256 of all that the encoder knows: vectors of equal digest may be kept."""
        (file,) = self.to_members().values()
        return hashlib.sha256(file).hexdigest()

    def encode(self, items: pl.DataFrame) -> Float[Tensor, "n M"]:
        """Content of each row; zero where nothing of it is known. Raises ValueError for a missing column."""
        missing = [c for c in (*self.texts, *self.categories, *self.vectors) if c not in items.columns]
        if missing:
            raise ValueError(f"the items need the column '{missing[0]}'; there are {', '.join(items.columns)}")
        words = self._weighed(_tokens(items, self.texts, self.categories), len(items))
        latent = torch.sparse.mm(words, self.directions) if len(items) else torch.zeros(0, self.directions.shape[1])
        given = _given(items, self.vectors, len(self.mean))
        present = given.any(1, keepdim=True) if given.shape[1] else torch.zeros(len(items), 1, dtype=torch.bool)
        return torch.cat([latent, (given - self.mean) / self.deviation * present], 1)  # Eq. (2)

    def _weighed(self, counted: pl.DataFrame, size: int) -> Tensor:
        """Eq. (1), sparse [size, V]."""
        found = counted.join(self._rows, on="token", how="inner").sort(["row", "column"])
        places = torch.tensor([found["row"].to_list(), found["column"].to_list()], dtype=torch.int64).view(2, -1)
        values = torch.tensor(found["count"].to_list(), dtype=torch.float32) * self.rarity[places[1]]
        length = torch.zeros(size).index_add_(0, places[0], values.square()).sqrt().clamp(min=1e-12)
        shape = (size, len(self.tokens))
        return torch.sparse_coo_tensor(places, values / length[places[0]], shape, check_invariants=False).coalesce()

    # ---------------------------------------------------------------------------------------------------- on disk
    def to_members(self) -> dict[str, bytes]:
        """Files of an artifact; `from_members` is the inverse."""
        from safetensors.torch import save

        learnt = {n: getattr(self, n).contiguous() for n in ("rarity", "directions", "mean", "deviation")}
        told = {n: getattr(self, n) for n in ("texts", "categories", "vectors", "tokens")}
        return {"content.safetensors": save(learnt, metadata={"told": json.dumps(told, ensure_ascii=False)})}

    @classmethod
    def from_members(cls, members: Mapping[str, bytes]) -> ContentEncoder | None:
        """Read what `to_members` wrote; None where there is nothing."""
        from safetensors.torch import load

        if "content.safetensors" not in members:
            return None
        file = members["content.safetensors"]
        header = json.loads(file[8 : 8 + int.from_bytes(file[:8], "little")])
        told: dict[str, Any] = json.loads(header["__metadata__"]["told"])
        learnt: dict[str, Any] = load(file)
        return cls(**told, **learnt)


def _tokens(items: pl.DataFrame, texts: Sequence[str], categories: Sequence[str]) -> pl.DataFrame:
    """Columns row, token, count: "word" of a text, "field=value" of a category."""
    parts = []
    for name in texts:
        words = items[name].cast(pl.String).str.to_lowercase().str.extract_all(WORD)
        parts.append(pl.DataFrame({"row": pl.int_range(len(items), eager=True), "token": words}).explode("token"))
    for name in categories:
        column = items[name]
        values = column.cast(pl.List(pl.String)) if isinstance(column.dtype, pl.List) else column.cast(pl.String)
        frame = pl.DataFrame({"row": pl.int_range(len(items), eager=True), "token": values})
        frame = frame.explode("token") if isinstance(values.dtype, pl.List) else frame
        parts.append(frame.with_columns((pl.lit(f"{name}=") + pl.col("token")).alias("token")))
    if not parts:
        return pl.DataFrame(schema={"row": pl.Int64, "token": pl.String, "count": pl.UInt32})
    return pl.concat(parts).drop_nulls().group_by(["row", "token"]).agg(pl.len().alias("count"))


def _given(items: pl.DataFrame, vectors: Sequence[str], width: int | None = None) -> Float[Tensor, "n W"]:
    """The vector columns side by side, `width` numbers in all; zeros where one is null.

    Raises ValueError for vectors of unequal length.
    """
    if width is not None and all(items[name].null_count() == len(items) for name in vectors):
        return torch.zeros(len(items), width)
    parts = []
    for name in vectors:
        lists = items[name].cast(pl.List(pl.Float32))
        widths = lists.list.len().drop_nulls().unique().to_list()
        if len(widths) > 1:
            raise ValueError(f"the vectors of '{name}' must have one length, received {sorted(widths)}")
        own = widths[0] if widths else 0
        parts.append(torch.tensor([[0.0] * own if v is None else list(v) for v in lists]).view(len(items), own))
    given = torch.cat(parts, 1) if parts else torch.zeros(len(items), 0)
    if width is not None and given.shape[1] != width:
        raise ValueError(f"the vectors of {', '.join(vectors)} have {width} numbers in all, received {given.shape[1]}")
    return given
