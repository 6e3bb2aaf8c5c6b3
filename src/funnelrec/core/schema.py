"""Schema: what the columns of the user's tables mean. Spec: what a schema compiled to, all that a model may know.

`Schema` is written by a person (or by `Schema.infer`) and names columns; `Spec` is made by the Dataset after the
vocabularies were fitted and holds only sizes and column positions. Both are plain data: JSON in, JSON out, and an
unknown key is an error, so a misspelt option can never be ignored.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import polars as pl

__all__ = [
    "Category",
    "CategorySpec",
    "Field",
    "Image",
    "Number",
    "NumberSpec",
    "Past",
    "Schema",
    "Side",
    "Spec",
    "Text",
    "Vector",
]

Side = Literal["user", "item", "context"]
Transform = Literal["quantile", "powers", "log", "standard"]
TRANSFORMS: tuple[Transform, ...] = ("quantile", "powers", "log", "standard")


def _require_name(name: str) -> None:
    if not isinstance(name, str) or not name:
        raise ValueError(f"a field needs the name of its column, received {name!r}")


@dataclass(frozen=True, slots=True)
class Category:
    """A column of ids or words.

    `many`: the column holds lists (genres, tags); at most `max_values` of them are kept, the first ones.
    `min_count`: values rarer than this in the training part share the unknown row.
    `hash_buckets`: no vocabulary; values are hashed into this many rows (for unbounded ids).
    """

    name: str
    many: bool = False
    min_count: int = 1
    hash_buckets: int | None = None
    max_values: int = 8

    def __post_init__(self) -> None:
        _require_name(self.name)
        if self.min_count < 1:
            raise ValueError(f"min_count of '{self.name}' must be at least 1, received {self.min_count}")
        if self.hash_buckets is not None and self.hash_buckets < 1:
            raise ValueError(f"hash_buckets of '{self.name}' must be at least 1, received {self.hash_buckets}")
        if self.max_values < 1:
            raise ValueError(f"max_values of '{self.name}' must be at least 1, received {self.max_values}")


@dataclass(frozen=True, slots=True)
class Number:
    """A numeric column. `transform` is fitted on the training part (data/numeric.py):

    "quantile" -> x~ = CDF(x) in [0, 1]; "powers" -> x~, x~^2, sqrt(x~); "log" -> sign(x) log(1+|x|), standardised;
    "standard" -> (x - mean) / std.
    """

    name: str
    transform: Transform = "quantile"

    def __post_init__(self) -> None:
        _require_name(self.name)
        if self.transform not in TRANSFORMS:
            raise ValueError(
                f"transform of '{self.name}' must be one of {', '.join(TRANSFORMS)}, received {self.transform!r}"
            )


@dataclass(frozen=True, slots=True)
class Text:
    """A column of text, kept as it is for display and for the text encoders."""

    name: str

    def __post_init__(self) -> None:
        _require_name(self.name)


@dataclass(frozen=True, slots=True)
class Image:
    """A column of pictures (paths or encoded bytes), kept as it is for display and for the image encoders."""

    name: str

    def __post_init__(self) -> None:
        _require_name(self.name)


@dataclass(frozen=True, slots=True)
class Vector:
    """A column of vectors computed elsewhere, all of one length."""

    name: str

    def __post_init__(self) -> None:
        _require_name(self.name)


@dataclass(frozen=True, slots=True)
class Past:
    """A number that is no column: what a person did strictly before the moment, with items like the one scored.

    `of`: what makes items alike, the item column itself or a categorical item field with one value an item.
    `what`: "since" (seconds since the last such event; more than ever where there was none) or "count" (how many).
    `shown`: every event counts, also an impression that was passed over; else positive events alone.
    `transform`: as of a Number. Computed by data/past.py.
    """

    name: str
    of: str
    what: Literal["since", "count"] = "since"
    shown: bool = False
    transform: Transform = "powers"

    def __post_init__(self) -> None:
        Number(self.name, self.transform)  # the same rules
        if self.what not in ("since", "count"):
            raise ValueError(f"what of '{self.name}' must be since or count, received {self.what!r}")


Field = Category | Number | Text | Image | Vector
FIELD_KINDS: dict[str, type[Category | Number | Text | Image | Vector]] = {
    "category": Category,
    "number": Number,
    "text": Text,
    "image": Image,
    "vector": Vector,
}


def _field_from_dict(data: Mapping[str, Any]) -> Field:
    kind = data.get("kind")
    if kind not in FIELD_KINDS:
        raise ValueError(f"a field's kind must be one of {', '.join(FIELD_KINDS)}, received {kind!r}")
    field: Field = _from_dict(FIELD_KINDS[kind], {k: v for k, v in data.items() if k != "kind"})
    return field


def _field_to_dict(field: Field) -> dict[str, Any]:
    kind = next(name for name, cls in FIELD_KINDS.items() if isinstance(field, cls))
    return {"kind": kind, **dataclasses.asdict(field)}


def _describe_field(field: Field) -> str:
    """A field with the options that differ from their defaults: "genres  Category(many=True)"."""
    options = [
        f"{f.name}={getattr(field, f.name)!r}"
        for f in dataclasses.fields(field)
        if f.name != "name" and (getattr(field, f.name) != f.default or f.name == "transform")
    ]
    return f"{field.name}  {type(field).__name__}({', '.join(options)})".removesuffix("()")


def _from_dict(cls: type[Any], data: Mapping[str, Any]) -> Any:
    known = [f.name for f in dataclasses.fields(cls)]
    unknown = sorted(set(data) - set(known))
    if unknown:
        raise ValueError(f"{cls.__name__} does not know the key '{unknown[0]}'; it knows {', '.join(known)}")
    return cls(**data)


@dataclass(frozen=True, slots=True, kw_only=True)
class Schema:
    """What the columns of `events`, `users` and `items` mean.

    `user`, `item`, `time`, `label`, `weight` name columns of the events table; `user` and `item` also name the key
    columns of the users and items tables. A table without `user` and `item` is a plain rows table (CTR logs).
    `label` absent means that every event is positive. `positive`: events whose label is at least this are positive:
    they enter histories and are the targets of retrieval. `click`: a label at least this high is 1 for the rankers,
    else 0 (e.g. 4 for five-star ratings); absent, the label is used as it stands. `past`: further context numbers,
    computed from earlier events.
    """

    user: str | None = None
    item: str | None = None
    time: str | None = None
    label: str | None = None
    weight: str | None = None
    positive: int | float = 0.5
    click: int | float | None = None
    context: tuple[Field, ...] = ()
    users: tuple[Field, ...] = ()
    items: tuple[Field, ...] = ()
    past: tuple[Past, ...] = ()

    def __post_init__(self) -> None:
        for side in ("context", "users", "items", "past"):
            object.__setattr__(self, side, tuple(getattr(self, side)))
        # 4 and 4.0 are one rule and must be one text in JSON, or equal schemas would get two fingerprints.
        object.__setattr__(self, "positive", float(self.positive))
        object.__setattr__(self, "click", None if self.click is None else float(self.click))
        names = [c for c in (self.user, self.item, self.time, self.label, self.weight) if c is not None]
        names += [f.name for f in (*self.context, *self.users, *self.items, *self.past)]
        twice = sorted({n for n in names if names.count(n) > 1})
        if twice:
            raise ValueError(f"column '{twice[0]}' is named twice in the schema; each column has one meaning")
        if (self.user is None) != (self.item is None):
            raise ValueError(
                f"a schema names both user and item or neither, received user={self.user} item={self.item}"
            )
        if self.user is None and (self.users or self.items):
            raise ValueError("fields of users or items need the columns 'user' and 'item' of the events table")
        alike = [self.item, *(f.name for f in self.items if isinstance(f, Category) and not f.many)]
        for past in self.past:
            if self.user is None or self.time is None:
                raise ValueError(f"'{past.name}' is of the past: it needs the columns 'user', 'item' and 'time'")
            if past.of not in alike:
                raise ValueError(
                    f"'{past.name}' is of '{past.of}', which is neither the item column nor a categorical item field "
                    f"with one value; there are {', '.join(str(a) for a in alike)}"
                )

    @property
    def is_rows(self) -> bool:
        """True for a plain rows table: no user, no item."""
        return self.user is None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` is the inverse."""
        data = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        for side in ("context", "users", "items"):
            data[side] = [_field_to_dict(f) for f in data[side]]
        past = [dataclasses.asdict(p) for p in data.pop("past")]
        return data | {"past": past} if past else data  # schemas without one keep the text, and fingerprint, they had

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Schema:
        """Read what `to_dict` wrote. Raises ValueError on any unknown key or kind."""
        sides = {s: tuple(_field_from_dict(f) for f in data.get(s, ())) for s in ("context", "users", "items")}
        past = tuple(_from_dict(Past, p) for p in data.get("past", ()))
        schema: Schema = _from_dict(cls, {**data, **sides, "past": past})
        return schema

    @classmethod
    def infer(
        cls, events: pl.DataFrame, users: pl.DataFrame | None = None, items: pl.DataFrame | None = None
    ) -> Schema:
        """Guess the meaning of the columns from their names and contents; `describe` shows what was guessed.

        The rules are in core/infer.py. Raises ValueError when only one of user and item is recognised, or when a
        users or items table shares no key column with the events.
        """
        from funnelrec.core.infer import infer_schema  # polars is needed here only

        return infer_schema(events, users, items)

    def describe(self) -> str:
        """The schema as readable text, one column a line."""
        kind = "plain rows, without user and item" if self.is_rows else "one event a row: who, what"
        lines = [f"events ({kind})"]
        for role in ("user", "item", "time", "label", "weight"):
            column = getattr(self, role)
            lines.append(f"  {role:<9}{column}" if column is not None else f"  {role:<9}-")
        if self.label is not None:
            lines.append(f"  positive {self.label} >= {self.positive:g}")
            lines.append(f"  click    {f'{self.label} >= {self.click:g}' if self.click is not None else self.label}")
        for side, title in (("context", "context of an event"), ("users", "users"), ("items", "items")):
            fields: tuple[Field, ...] = getattr(self, side)
            lines += [title, *(f"  {_describe_field(f)}" for f in fields)] if fields else []
        if self.past:
            lines += ["context, computed from earlier events"]
            lines += [f"  {p.name}  {p.what} {'shown' if p.shown else 'positive'}, same {p.of}" for p in self.past]
        return "\n".join(lines)


@dataclass(frozen=True, slots=True)
class CategorySpec:
    """One categorical field inside `Batch.ids`: columns start..stop, `rows` of the fused table from `offset` on.

    Vocabulary row v of the field is row `0 if v == 0 else offset + v - 1` of the fused table: padding is one shared
    row 0, and the field's unknown row is `offset`.
    """

    name: str
    side: Side
    rows: int  #: vocabulary size, padding and unknown included; the field owns rows - 1 rows of the fused table
    offset: int
    start: int
    stop: int


@dataclass(frozen=True, slots=True)
class NumberSpec:
    """One numeric field inside `Batch.numbers`: columns start..stop (three for "powers", else one)."""

    name: str
    side: Side
    start: int
    stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """All that a model may know of the data: sizes and positions, no values. JSON-able.

    Column order of `Batch.ids` and `Batch.numbers`: user fields, item fields, context fields. The user id and the
    item id, where there are any, are the first fields of their sides.
    """

    categories: tuple[CategorySpec, ...] = ()
    numbers: tuple[NumberSpec, ...] = ()
    num_users: int = 0  #: user rows, padding and unknown included; 0 when there are no users
    num_items: int = 0  #: item rows, padding and unknown included; 0 when there are no items
    content_dim: int = 0  #: width of the items' content vectors; 0 when models are to know items by id alone

    @property
    def table_rows(self) -> int:
        """Rows of the fused embedding table, the shared padding row 0 included."""
        return 1 + sum(c.rows - 1 for c in self.categories)

    @property
    def num_ids(self) -> int:
        """C: integer columns of `Batch.ids`."""
        return max((c.stop for c in self.categories), default=0)

    @property
    def num_numbers(self) -> int:
        """M: float columns of `Batch.numbers`."""
        return max((n.stop for n in self.numbers), default=0)

    @property
    def num_fields(self) -> int:
        """F: categorical fields; each becomes one vector, a multi-valued one after pooling."""
        return len(self.categories)

    @property
    def item_ids(self) -> slice:
        """The columns of `ids` that describe the item; `Batch.history_ids` has the same columns."""
        item = [c for c in self.categories if c.side == "item"]
        return slice(item[0].start, item[-1].stop) if item else slice(0, 0)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON-able data; `from_dict` is the inverse."""
        data = dataclasses.asdict(self)
        return data if self.content_dim else {k: v for k, v in data.items() if k != "content_dim"}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Spec:
        """Read what `to_dict` wrote. Raises ValueError on any unknown key."""
        categories = tuple(_from_dict(CategorySpec, c) for c in data.get("categories", ()))
        numbers = tuple(_from_dict(NumberSpec, n) for n in data.get("numbers", ()))
        spec: Spec = _from_dict(cls, {**data, "categories": categories, "numbers": numbers})
        return spec
