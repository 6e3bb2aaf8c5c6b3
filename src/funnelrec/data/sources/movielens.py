"""MovieLens: who rated which film, when, how.

Origin: GroupLens, University of Minnesota. Harper, Konstan. "The MovieLens Datasets", ACM TiiS 2015.
Terms:  research use with citation; no redistribution and no commercial use without permission.
Files:  "1m" ratings.dat movies.dat users.dat, joined by "::", Latin-1; "100k" u.data u.item u.user, Latin-1.

| table  | columns                                                                            |
|--------|------------------------------------------------------------------------------------|
| events | user, item, rating 1..5, time (seconds)                                            |
| users  | user, gender, age (1m: a code for a range of years, 100k: years), occupation, zip |
| items  | item, title (without its year), year, genres (list)                                |

The archives published by GroupLens have known SHA-256 (below) and are checked; a local copy is read as it is.
"""

from __future__ import annotations

from pathlib import Path

import polars as pl

from funnelrec.core.schema import Category, Number, Schema, Text
from funnelrec.data.download import cache_folder, fetch
from funnelrec.data.ingest import read_delimited
from funnelrec.data.sources._files import read_first
from funnelrec.data.tables import Accounting, Tables

__all__ = ["load"]

ARCHIVES: dict[str, tuple[str, str, int]] = {
    "1m": (
        "https://files.grouplens.org/datasets/movielens/ml-1m.zip",
        "a6898adb50b9ca05aa231689da44c217cb524e7ebd39d264c56e2832f2c54e20",
        5_917_549,
    ),
    "100k": (
        "https://files.grouplens.org/datasets/movielens/ml-100k.zip",
        "50d2a982c66986937beb9ffb3aa76efe955bf3d5c6b761f4e3a7cd717c6a3229",
        4_924_029,
    ),
}
# fmt: off
GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)
# fmt: on
EVENT_COLUMNS = ["user", "item", "rating", "time"]


def load(
    path: Path | str | None = None,
    *,
    variant: str = "1m",
    positive: int | float = 0.5,
    click: int | float | None = 4,
    max_bad_rows: int = 0,
) -> Tables:
    """Read a folder or the published zip archive; without `path`, download the archive (6 MB) once and keep it.

    `variant`: "1m" or "100k". `positive` and `click` as in Schema: by default every rating is an interaction for
    retrieval, and ratings from 4 up are what the rankers learn to predict. Raises ValueError for an unknown variant,
    a file that is not there and rows that are bad.
    """
    if variant not in ARCHIVES:
        raise ValueError(f"variant must be one of {', '.join(ARCHIVES)}, received {variant!r}")
    if path is None:
        url, sha256, size = ARCHIVES[variant]
        path = fetch(url, cache_folder(), sha256, size)
    home = Path(path)
    events, users, items, accounting = (_read_1m if variant == "1m" else _read_100k)(home, max_bad_rows)
    age = Category("age") if variant == "1m" else Number("age")
    schema = Schema(
        user="user",
        item="item",
        time="time",
        label="rating",
        positive=positive,
        click=click,
        users=(Category("gender"), age, Category("occupation"), Category("zip")),
        items=(Text("title"), Number("year"), Category("genres", many=True)),
    )
    return Tables(
        events=events, schema=schema, users=users, items=items, accounting=accounting, name=f"movielens-{variant}"
    )


_Parts = tuple[pl.DataFrame, pl.DataFrame, pl.DataFrame, tuple[Accounting, ...]]


def _read_1m(home: Path, max_bad_rows: int) -> _Parts:
    events, events_read = _events(home, ["ratings.dat", "ratings_5core.dat"], "::", max_bad_rows)
    users, users_read = _read(
        home, "users.dat", "::", ["user", "gender", "age", "occupation", "zip"], {"age": "category"}, max_bad_rows
    )
    films, films_read = _read(home, "movies.dat", "::", ["item", "title", "genres"], {}, max_bad_rows)
    genres = films["genres"].str.split("|")
    items = _items(films["item"], films["title"], genres)
    return events, users, items, (events_read, users_read, films_read)


def _read_100k(home: Path, max_bad_rows: int) -> _Parts:
    events, events_read = _events(home, ["u.data"], "\t", max_bad_rows)
    users, users_read = _read(
        home, "u.user", "|", ["user", "age", "gender", "occupation", "zip"], {"age": "number"}, max_bad_rows
    )
    names = ["item", "title", "release", "video", "address", *GENRES_100K]
    films, films_read = _read(home, "u.item", "|", names, {}, max_bad_rows)
    marked = [pl.when(pl.col(g) == "1").then(pl.lit(g)) for g in GENRES_100K]
    genres = films.select(pl.concat_list(marked).list.drop_nulls().alias("genres"))["genres"]
    items = _items(films["item"], films["title"], genres)
    return events, users, items, (events_read, users_read, films_read)


def _events(home: Path, names: list[str], separator: str, max_bad_rows: int) -> tuple[pl.DataFrame, Accounting]:
    name, data = read_first(home, names)
    return read_delimited(
        data.replace(b"::", b"\t") if separator == "::" else data,
        file=name,
        separator="\t",
        names=EVENT_COLUMNS,
        quoted=False,
        columns={"user": "id", "item": "id", "rating": "label", "time": "time"},
        max_bad_rows=max_bad_rows,
    )


def _read(
    home: Path, name: str, separator: str, names: list[str], kinds: dict[str, str], max_bad_rows: int
) -> tuple[pl.DataFrame, Accounting]:
    """A small table whose first column is its key and whose text is Latin-1; undeclared columns stay text."""
    found, data = read_first(home, [name])
    columns = {n: kinds.get(n, "text") for n in names} | {names[0]: "key"}
    return read_delimited(
        data.decode("latin-1").replace(separator, "\t").encode(),
        file=found,
        separator="\t",
        names=names,
        quoted=False,
        columns=columns,
        max_bad_rows=max_bad_rows,
    )


def _items(item: pl.Series, title: pl.Series, genres: pl.Series) -> pl.DataFrame:
    """The year stands in brackets at the end of the title: "Heat (1995)"."""
    year = title.str.extract(r"\((\d{4})\)\s*$").cast(pl.Float64)
    plain = title.str.replace(r"\s*\(\d{4}\)\s*$", "")
    return pl.DataFrame(
        {"item": item, "title": plain, "year": year, "genres": genres},
    )
