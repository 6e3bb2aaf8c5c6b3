"""Guessing a schema from the names and contents of columns. Called by `Schema.infer`; imported only then.

Names decide who, what, when and how good; contents decide the kind of the rest:

| a column of                                    | becomes                                   |
|------------------------------------------------|-------------------------------------------|
| lists of numbers, all of one length            | Vector                                    |
| lists, or text such as "Action|Comedy"         | Category(many=True)                       |
| text named title, description..., or sentences | Text                                      |
| text that ends in .jpg, .png...; bytes         | Image                                     |
| other text, booleans, integers of few values   | Category                                  |
| fractions, integers of many values             | Number (whole-number ids stay Category)   |
| one value or none; dates beside the time       | nothing: left out                         |
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import polars as pl

from funnelrec.core.schema import Category, Field, Image, Number, Schema, Text, Vector

__all__ = ["infer_schema"]

# Names are compared in lower case without anything but letters and digits: user_id, userId and USER ID are userid.
USER = (
    "user",
    "userid",
    "uid",
    "customer",
    "customerid",
    "visitorid",
    "memberid",
    "accountid",
    "reviewerid",
    "viewerid",
)
ITEM = (
    "item", "itemid", "iid", "movie", "movieid", "product", "productid", "article", "articleid", "news", "newsid",
    "video", "videoid", "track", "trackid", "song", "songid", "book", "bookid", "isbn", "asin", "parentasin", "sku",
    "ad", "adid", "app", "appid", "post", "postid", "listing", "listingid", "artist", "artistid", "contentid",
)  # fmt: skip
TIME = (
    "time", "timestamp", "ts", "datetime", "date", "eventtime", "unixtime", "unixtimestamp", "unixreviewtime",
    "createdat", "createdtime", "eventtimestamp",
)  # fmt: skip
LABEL = (
    "label", "rating", "click", "clicked", "isclick", "clicks", "stars", "score", "target", "overall", "y", "converted",
    "conversion", "liked", "purchase", "purchased", "response",
)  # fmt: skip
WEIGHT = ("weight", "watchseconds", "watchtime", "dwelltime", "dwellseconds")
PROSE = ("title", "name", "description", "summary", "text", "overview", "plot", "abstract", "headline", "body")
PICTURE = r"(?i)\.(?:jpe?g|png|webp|gif|bmp)$"
NUMERIC_SHARE = 0.9  # a text column with this share of numbers is a number column with bad rows
FEW_VALUES = 50  # integers with at most so many distinct values are codes
PROSE_WORDS = 3.0
LIST_SHARE = 0.2


def infer_schema(events: pl.DataFrame, users: pl.DataFrame | None, items: pl.DataFrame | None) -> Schema:
    """See `Schema.infer`."""
    user = _key(events, USER, users)
    item = _key(events, ITEM, items)
    if (user is None) != (item is None):
        missing, found = ("users", item) if user is None else ("items", user)
        raise ValueError(
            f"no column of {missing} was recognised beside '{found}' among {', '.join(events.columns)}; "
            "write a Schema that names user and item"
        )
    for side, table, key in (("users", users, user), ("items", items, item)):
        if table is not None and (key is None or key not in table.columns):
            raise ValueError(
                f"the {side} table shares no key column with the events ({', '.join(table.columns)} against "
                f"{', '.join(events.columns)}); rename its key or write a Schema"
            )
    time = _time(events)
    label = _first(events, LABEL, _is_number)
    weight = _first(events, WEIGHT, _is_number)
    taken = {c for c in (user, item, time, label, weight) if c is not None}
    context = _fields(events, taken)
    taken |= {f.name for f in context}
    user_fields = _fields(users, taken) if users is not None else ()
    taken |= {f.name for f in user_fields}
    return Schema(
        user=user,
        item=item,
        time=time,
        label=label,
        weight=weight,
        click=_click(events[label]) if label is not None else None,
        context=context,
        users=user_fields,
        items=_fields(items, taken) if items is not None else (),
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


def _key(events: pl.DataFrame, names: Iterable[str], table: pl.DataFrame | None) -> str | None:
    """The column with the likeliest of `names`; where the side table has none such, the one column that both share."""
    candidates = [c for n in names for c in events.columns if _plain(c) == n and not events[c].dtype.is_float()]
    if table is not None:
        shared = [c for c in events.columns if c in table.columns]
        candidates = [c for c in candidates if c in shared] or (shared if len(shared) == 1 else [])
    return candidates[0] if candidates else None


def _first(events: pl.DataFrame, names: Iterable[str], test: object) -> str | None:
    assert callable(test)
    return next((c for n in names for c in events.columns if _plain(c) == n and test(events[c])), None)


def _numbers(values: pl.Series) -> pl.Series:
    """float64, null where the value is no number."""
    text = values.dtype == pl.String
    return (values.str.strip_chars() if text else values).cast(pl.Float64, strict=False)


def _is_number(values: pl.Series) -> bool:
    if values.dtype.is_numeric() or values.dtype == pl.Boolean:
        return True
    if values.dtype != pl.String:
        return False
    known = values.drop_nulls()
    return known.len() > 0 and _numbers(known).count() >= NUMERIC_SHARE * known.len()


def _is_date_text(values: pl.Series) -> bool:
    known = values.drop_nulls()
    return known.len() > 0 and bool(known.str.contains(r"^\d{4}-\d{2}-\d{2}(?:[T ]|$)").mean() >= NUMERIC_SHARE)  # type: ignore[operator]


def _is_time(values: pl.Series) -> bool:
    return values.dtype.is_temporal() or _is_number(values) or (values.dtype == pl.String and _is_date_text(values))


def _time(events: pl.DataFrame) -> str | None:
    """By name, else the only column of dates."""
    named = _first(events, TIME, _is_time)
    if named is not None:
        return named
    dates = [c for c in events.columns if events[c].dtype.is_temporal()]
    return dates[0] if len(dates) == 1 else None


def _click(label: pl.Series) -> float | None:
    """Labels in [0, 1] are used as they stand; of a longer scale, the upper fifth counts (4 of 5 stars)."""
    numbers = _numbers(label).fill_nan(None).drop_nulls()
    numbers = numbers.filter(numbers.is_finite())
    low, high = numbers.min(), numbers.max()
    if not isinstance(low, float) or not isinstance(high, float) or (low >= 0 and high <= 1):
        return None
    return 0.8 * high if high > 1 else 0.5


def _fields(table: pl.DataFrame, taken: set[str]) -> tuple[Field, ...]:
    guesses = (_field(table[c]) for c in table.columns if c not in taken and c)
    return tuple(g for g in guesses if g is not None)


def _field(values: pl.Series) -> Field | None:
    name, dtype = values.name, values.dtype
    known = values.drop_nulls()
    if not known.len() or dtype.is_temporal():
        return None
    if isinstance(dtype, pl.List | pl.Array):
        numeric = dtype.inner is not None and dtype.inner.is_float()
        lengths = known.list.len() if isinstance(dtype, pl.List) else pl.Series([1])
        return Vector(name) if numeric and lengths.n_unique() == 1 else Category(name, many=True)
    if dtype == pl.Binary:
        return Image(name)
    if known.n_unique() <= 1 or dtype.is_nested():
        return None
    if dtype.is_float() or dtype.is_decimal():
        return Number(name)
    if dtype.is_integer():
        return Category(name) if _is_code(name, known) else Number(name)
    if dtype == pl.String:
        return _text_field(name, known)
    return Category(name)


def _is_code(name: str, known: pl.Series) -> bool:
    """Whole numbers that name something rather than measure it."""
    return _plain(name).endswith(("id", "code", "zip")) or known.n_unique() <= FEW_VALUES


def _text_field(name: str, known: pl.Series) -> Field | None:
    if bool(known.str.contains(PICTURE).mean() >= NUMERIC_SHARE):  # type: ignore[operator]
        return Image(name)
    if _is_date_text(known):
        return None
    if _is_number(known):
        zeros = known.str.contains(r"^0\d").any()  # "007" is a code
        fractions = known.str.contains(r"\.").any()
        return Category(name) if zeros or (not fractions and _is_code(name, known)) else Number(name)
    prose = _plain(name) in PROSE or known.str.count_matches(r"\S+").mean() >= PROSE_WORDS  # type: ignore[operator]
    pieces = known.str.split("|")
    joined = bool((pieces.list.len() > 1).mean() >= LIST_SHARE)  # type: ignore[operator]
    if joined and pieces.explode().n_unique() < known.len() and _plain(name) not in PROSE:
        return Category(name, many=True)
    return Text(name) if prose else Category(name)
