"""How a Dataset is made from tables: everything that is fitted is fitted on the training part alone."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.feather as feather

from funnelrec.core.schema import Category, Field, Number, Spec
from funnelrec.data.encoding import compile_spec, encode_fields, fit_fields, fuse
from funnelrec.data.facts import Layout
from funnelrec.data.histories import Histories
from funnelrec.data.numeric import NumericTransform
from funnelrec.data.past import PastEvents
from funnelrec.data.split import HISTORY, TEST, TRAIN, VALID, AnySplit, Given, GlobalTime, HeldOutUsers, LeaveLastOut
from funnelrec.data.tables import Tables
from funnelrec.data.vocabulary import HashVocabulary, Vocabulary

__all__ = ["digest", "write"]

FORMAT = 1  #: of the folder; a reader refuses a newer one
CHUNK = 1 << 20  #: events that are encoded at a time
BY_ORDINAL = (LeaveLastOut, HeldOutUsers)  #: splits whose moments are ordinals
Int64Array = npt.NDArray[np.int64]


def digest(data: dict[str, Any]) -> str:
    """SHA-256 of plain data, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@dataclass(frozen=True)
class _Timeline:
    """The events in the order of time, who acted, and which part each belongs to."""

    events: pl.DataFrame
    time: Int64Array
    moment: Int64Array
    part: npt.NDArray[np.uint8]
    person: Int64Array  # codes of `people`
    people: Vocabulary | None
    split: AnySplit


def _column(table: pl.DataFrame, name: str, kind: Literal["seconds", "float"]) -> npt.NDArray[Any]:
    """A column without gaps: whole seconds as int64 or floats as float32. Raises ValueError for anything else."""
    column = table[name]
    dtype = column.dtype
    if not (dtype.is_integer() or (kind == "float" and (dtype.is_numeric() or dtype == pl.Boolean))):
        wanted = "whole seconds" if kind == "seconds" else "numbers"
        raise ValueError(f"column '{name}' needs {wanted}, received {dtype}; read the table with read_table")
    if column.null_count():
        raise ValueError(f"column '{name}' has {column.null_count()} missing values; drop those rows or fill them")
    if dtype.is_float() and not column.is_finite().all():
        raise ValueError(f"column '{name}' has values that are NaN or infinite; drop those rows or mend them")
    return column.cast(pl.Int64 if kind == "seconds" else pl.Float32).to_numpy()


def _timeline(tables: Tables, split: AnySplit | None) -> _Timeline:
    schema = tables.schema
    if tables.events.height == 0:
        raise ValueError("the events table is empty; a dataset needs at least one event")
    if split is None:
        split = GlobalTime() if tables.part is None else Given(tables.part)
    if isinstance(split, Given) and split.part is None:
        split = Given(tables.part)
    if isinstance(split, GlobalTime) and schema.time is None:
        raise ValueError("GlobalTime needs the column 'time', which the schema lacks; use Ratio or a published part")
    events = tables.events
    n = events.height
    time = _column(events, schema.time, "seconds") if schema.time else np.arange(n, dtype=np.int64)
    if (time[1:] < time[:-1]).any():
        order = np.argsort(time, kind="stable")
        events, time = events[order], time[order]
        if isinstance(split, Given) and split.part is not None and len(split.part) == n:
            split = Given(split.part[order])
    people = Vocabulary.fit(events[schema.user]) if schema.user else None
    person = np.zeros(n, dtype=np.int64)
    if people is not None and schema.user is not None:
        person = people.encode(events[schema.user]).astype(np.int64)
        for key in (schema.user, schema.item):
            if key is not None and events[key].null_count():
                raise ValueError(f"column '{key}' has {events[key].null_count()} missing ids; drop those events")
    if isinstance(split, GlobalTime):
        split = split.fit(time)
    part = split.assign(person, time)
    if not (part == TRAIN).any():
        raise ValueError(f"no event is left for training by {type(split).__name__}; make valid and test smaller")
    moment = _ordinals(person) if isinstance(split, BY_ORDINAL) else time
    return _Timeline(events, time, moment, part, person, people, split)


def _ordinals(person: Int64Array) -> Int64Array:
    """1, 2, 3 … within each person, in the order given."""
    order = np.argsort(person, kind="stable")
    first = np.searchsorted(person[order], person[order], side="left")
    ordinals = np.empty(len(person), dtype=np.int64)
    ordinals[order] = np.arange(len(person)) - first + 1
    return ordinals


def _key_vocabulary(tables: Tables, line: _Timeline, side: str) -> Vocabulary:
    """The ids of one side: those of the training part and those of the side's own table."""
    key = tables.schema.user if side == "users" else tables.schema.item
    table: pl.DataFrame | None = getattr(tables, side)
    if key is None:
        raise ValueError(f"a table of {side} needs a schema with 'user' and 'item'")
    train = line.events[key].filter(pl.Series(line.part == TRAIN))
    return Vocabulary.fit(train, also=None if table is None else table[key])


def _table_rows(table: pl.DataFrame, key: str, vocabulary: Vocabulary) -> Int64Array:
    """The row of each line of a table of users or items. Raises ValueError where an id is missing or stands twice."""
    rows = vocabulary.encode(table[key]).astype(np.int64)
    if (rows == 0).any():
        raise ValueError(f"column '{key}' of a table of users or items has missing ids; drop those rows")
    counts = np.bincount(rows, minlength=vocabulary.size)
    if (counts > 1).any():
        twice = vocabulary.decode(np.array([int(counts.argmax())]))[0]
        raise ValueError(f"id {twice!r} stands {counts.max()} times in column '{key}' of its table; keep one row an id")
    return rows


@dataclass(frozen=True)
class _Fitted:
    """What was learnt from the training part, and what it compiles to."""

    vocabularies: dict[str, Vocabulary | HashVocabulary]
    transforms: dict[str, NumericTransform]
    spec: Spec
    user_key: Vocabulary | None
    item_key: Vocabulary | None


def _fit(tables: Tables, line: _Timeline) -> _Fitted:
    schema = tables.schema
    for field in schema.context:
        if not isinstance(field, Category | Number):
            raise ValueError(
                f"context field '{field.name}' is {type(field).__name__}; a context holds Category and Number"
            )
    train = line.events.filter(pl.Series(line.part == TRAIN))
    vocabularies, transforms = fit_fields(train, schema.context)
    keys: dict[str, Vocabulary] = {}
    for side, key, fields in (("users", schema.user, schema.users), ("items", schema.item, schema.items)):
        if key is None:
            continue
        keys[side] = vocabularies[key] = _key_vocabulary(tables, line, side)
        table: pl.DataFrame | None = getattr(tables, side)
        if table is not None:
            # Attributes too are learnt from those users and items alone that training saw.
            # The order of the rows is fixed first: a sum of floats depends on it.
            rows = _table_rows(table, key, keys[side])
            order = np.argsort(rows)
            more = fit_fields(table[order[keys[side].counts[rows[order] - 2] > 0]], fields)
            vocabularies |= more[0]
            transforms |= more[1]
    if schema.past:
        transforms |= _fit_past(tables, line, vocabularies, keys)
    spec = compile_spec(schema, vocabularies, transforms)
    return _Fitted(vocabularies, transforms, spec, keys.get("users"), keys.get("items"))


def _fit_past(
    tables: Tables,
    line: _Timeline,
    vocabularies: dict[str, Vocabulary | HashVocabulary],
    keys: dict[str, Vocabulary],
) -> dict[str, NumericTransform]:
    """Transforms of what the training events' past says; nothing but training events lies before one of them."""
    schema = tables.schema
    train = np.flatnonzero(line.part == TRAIN)
    events = line.events[train]
    person = _people_rows(line, keys["users"])[0][train]
    item = keys["items"].encode(events[str(schema.item)]).astype(np.int64)
    label = _column(events, schema.label, "float") if schema.label else np.ones(len(train), np.float32)

    def groups(column: str) -> Int64Array:
        rows = np.arange(keys["items"].size, dtype=np.int64)
        if column == schema.item or tables.items is None:
            return rows
        values = np.where(rows > 0, 1, 0)
        own = _table_rows(tables.items, str(schema.item), keys["items"])
        values[own] = vocabularies[column].encode(tables.items[column])
        return values

    past = PastEvents(schema.past, person, item, line.moment[train], label >= schema.positive, groups)
    return past.fit(person, item, line.moment[train])


def _attributes(
    table: pl.DataFrame | None, key: str, fields: Sequence[Field], fitted: _Fitted
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """The table of one side by row: row 0 all zeros; fields of a row that the side's table lacks are unknown."""
    vocabulary = fitted.vocabularies[key]
    own = next(c for c in fitted.spec.categories if c.name == key)
    columns = [c for c in fitted.spec.categories if c.side == own.side]
    width = sum(n.stop - n.start for n in fitted.spec.numbers if n.side == own.side)
    ids = np.zeros((vocabulary.size, columns[-1].stop - own.start), dtype=np.int32)
    numbers = np.zeros((vocabulary.size, width), dtype=np.float32)
    ids[:, 0] = fuse(np.arange(vocabulary.size, dtype=np.int32), own)
    for column in columns[1:]:
        ids[1:, column.start - own.start] = column.offset
    if table is not None and isinstance(vocabulary, Vocabulary):
        rows = _table_rows(table, key, vocabulary)
        ids[rows, 1:], numbers[rows] = encode_fields(table, fields, fitted.spec, fitted.vocabularies, fitted.transforms)
    return ids, numbers


def _catalogue(table: pl.DataFrame | None, key: str, vocabulary: Vocabulary) -> pl.DataFrame:
    """The raw items table in the order of item rows; null where it says nothing."""
    ids = vocabulary.decode(np.arange(vocabulary.size)).alias(key)
    if table is None or table.height == 0:
        return ids.to_frame()
    line = np.full(vocabulary.size, -1, dtype=np.int64)
    line[_table_rows(table, key, vocabulary)] = np.arange(table.height)
    index = pl.Series(line)
    return table.select(pl.all().gather(index.set(index < 0, None))).with_columns(ids).rechunk()


def _pack(tables: Tables, line: _Timeline, fitted: _Fitted, person: Int64Array, path: Path) -> Layout:
    """Write the facts, some at a time."""
    schema, layout, n = tables.schema, Layout.of(tables.schema, fitted.spec), line.events.height
    facts = np.lib.format.open_memmap(path, mode="w+", dtype=np.int32, shape=(n, layout.width))
    label = _column(line.events, schema.label, "float") if schema.label else np.ones(n, np.float32)
    for start in range(0, n, CHUNK):
        part = slice(start, min(start + CHUNK, n))
        events = line.events[part]
        packed = np.zeros((events.height, layout.width), dtype=np.int32)
        packed[:, layout.label] = label[part].view(np.int32)
        if layout.moment is not None:
            moment = np.ascontiguousarray(line.moment[part])
            packed[:, layout.moment : layout.moment + 2] = moment.view(np.int32).reshape(-1, 2)
        if layout.user is not None and layout.item is not None and fitted.item_key and schema.item:
            packed[:, layout.user] = person[part]
            packed[:, layout.item] = fitted.item_key.encode(events[schema.item])
        if layout.weight is not None and schema.weight:
            packed[:, layout.weight] = _column(events, schema.weight, "float").view(np.int32)
        ids, numbers = encode_fields(events, schema.context, fitted.spec, fitted.vocabularies, fitted.transforms)
        packed[:, slice(*layout.ids)] = ids
        packed[:, slice(*layout.numbers)] = numbers.view(np.int32)
        facts[part] = packed
    facts.flush()
    return layout


def _people_rows(line: _Timeline, users: Vocabulary | None) -> tuple[Int64Array, Vocabulary | None]:
    """Each event's row in the histories, and the ids of those rows.

    People whom training never saw are one row to a model, but not one person: they get rows after the users'.
    """
    if line.people is None or users is None:
        return line.person, None
    rows = np.zeros(line.people.size, dtype=np.int64)
    rows[2:] = users.encode(line.people.values)
    strangers = np.flatnonzero(rows == 1)
    rows[strangers] = users.size + np.arange(len(strangers))
    ids = line.people.decode(strangers).cast(users.values.dtype)
    counts = np.concatenate([users.counts, np.zeros(len(ids), dtype=np.int64)])
    return rows[line.person], Vocabulary(pl.concat([users.values, ids]), counts)


def _history(
    line: _Timeline, person: Int64Array, people: int, items: Int64Array, positive: npt.NDArray[np.bool_]
) -> tuple[Histories, str]:
    """Histories of the positive events.

    Where a user's parts follow one another in time, all positive events are history of what comes later. Where they
    do not (random rows), a test event must not enter the history of a training event: only training events count.
    """
    part = np.where(line.part == HISTORY, TRAIN, line.part)  # it too is before what validates and tests
    order = np.lexsort((part, line.moment, person))
    same = person[order][1:] == person[order][:-1]
    chronological = bool((part[order][1:] >= part[order][:-1])[same].all())
    chosen = positive if chronological else positive & (line.part == TRAIN)
    built = Histories.build(person[chosen], items[chosen], line.moment[chosen], people)
    return built, "all" if chronological else "train"


def write(tables: Tables, folder: Path, split: AnySplit | None) -> None:
    """Build the dataset of `tables` at `folder`: complete, or not there at all."""
    if folder.exists() and not (folder / "dataset.json").is_file() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(f"{folder} exists and is no dataset; choose another folder or remove it")
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".partial", dir=folder.parent))
    try:
        draft.chmod(0o755)
        _write_files(tables, draft, split)
        for path in (*draft.iterdir(), draft):
            _fsync(path)
        _publish(draft, folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def _publish(draft: Path, folder: Path) -> None:
    """Rename the finished draft; a dataset that stood there before is set aside first and removed after."""
    if not folder.exists() or not any(folder.iterdir()):
        os.replace(draft, folder)
    else:
        old = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", suffix=".old", dir=folder.parent))
        os.replace(folder, old)
        os.replace(draft, folder)
        shutil.rmtree(old)
    _fsync(folder.parent)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_files(tables: Tables, draft: Path, split: AnySplit | None) -> None:
    schema = tables.schema
    line = _timeline(tables, split)
    fitted = _fit(tables, line)
    person, people = _people_rows(line, fitted.user_key)
    layout = _pack(tables, line, fitted, person, draft / "facts.npy")
    np.save(draft / "part.npy", line.part)
    if isinstance(line.split, BY_ORDINAL):
        np.save(draft / "time.npy", line.time)
    counts = {"events": len(line.part)}
    if people is not None:
        counts["people"] = people.size
        feather.write_feather(people.to_arrow(), draft / "people.arrow", compression="uncompressed")
    counts |= {
        name: int((line.part == part).sum()) for name, part in (("train", TRAIN), ("valid", VALID), ("test", TEST))
    }
    history = None
    if people is not None and schema.user is not None and schema.item is not None and fitted.item_key is not None:
        label = _column(line.events, schema.label, "float") if schema.label else np.ones(len(line.part), np.float32)
        items = fitted.item_key.encode(line.events[schema.item]).astype(np.int64)
        histories, history = _history(line, person, people.size, items, label >= schema.positive)
        for name in ("offsets", "items", "times"):
            np.save(draft / f"history_{name}.npy", getattr(histories, name).numpy())
        counts["positives"] = int((label >= schema.positive).sum())
        for side, table, key, fields in (
            ("user", tables.users, schema.user, schema.users),
            ("item", tables.items, schema.item, schema.items),
        ):
            ids, numbers = _attributes(table, key, fields, fitted)
            np.save(draft / f"{side}_ids.npy", ids)
            np.save(draft / f"{side}_numbers.npy", numbers)
        _catalogue(tables.items, schema.item, fitted.item_key).write_ipc(draft / "catalogue.arrow")
    vocabularies = {}
    for number, (name, vocabulary) in enumerate(fitted.vocabularies.items()):
        vocabularies[name] = f"vocabulary_{number:02d}.arrow"
        feather.write_feather(vocabulary.to_arrow(), draft / vocabularies[name], compression="uncompressed")
    _write_json(tables, draft, line, fitted, layout, counts, history, vocabularies)


def _write_json(
    tables: Tables,
    draft: Path,
    line: _Timeline,
    fitted: _Fitted,
    layout: Layout,
    counts: dict[str, int],
    history: str | None,
    vocabularies: dict[str, str],
) -> None:
    data: dict[str, Any] = {
        "format": FORMAT,
        "schema": tables.schema.to_dict(),
        "spec": fitted.spec.to_dict(),
        "split": line.split.to_dict(),
        "boundaries": list(line.split.boundaries or ()) or None if isinstance(line.split, GlobalTime) else None,
        "layout": layout.to_dict(),
        "counts": counts,
        "history": history,
        "vocabularies": vocabularies,
        "transforms": {name: t.to_dict() for name, t in fitted.transforms.items()},
        "files": {
            path.name: {"bytes": path.stat().st_size, "sha256": file_digest(path)} for path in sorted(draft.iterdir())
        },
    }
    data["fingerprint"] = digest(data)
    data["source"] = {"name": tables.name, "read": [[a.file, a.read, a.kept] for a in tables.accounting]}
    data["digest"] = digest(data)
    (draft / "dataset.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
