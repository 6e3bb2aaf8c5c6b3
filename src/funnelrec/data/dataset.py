"""Dataset: a folder of memory-mapped columns. Events are facts; users and items are tables that facts point into.

    dataset.json            format, schema, spec, split, counts, boundaries, fingerprint, SHA-256 of every file
    facts.npy part.npy      the packed events in the order of time (data/facts.py), the part of each
    time.npy                LeaveLastOut, HeldOutUsers: the times, where the moments are ordinals
    history_*.npy           who did what before when (data/histories.py)
    user_*.npy item_*.npy   attributes by user row and item row (data/features.py)
    vocabulary_*.arrow      values to rows; catalogue.arrow: the raw items table by item row; people.arrow: ids by
                            row of the histories

Everything that is fitted (vocabularies, numeric transforms) is fitted on the training part alone.
"""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import polars as pl
import pyarrow.feather as feather
import torch
from torch import Tensor

from funnelrec.core.schema import Schema, Spec
from funnelrec.data import _build
from funnelrec.data.encoding import encode_fields, unfuse
from funnelrec.data.facts import Facts, Layout
from funnelrec.data.features import Features
from funnelrec.data.histories import Histories
from funnelrec.data.numeric import NumericTransform
from funnelrec.data.past import PastEvents
from funnelrec.data.split import PARTS, AnySplit, Part, split_from_dict
from funnelrec.data.tables import Tables
from funnelrec.data.vocabulary import HashVocabulary, Vocabulary, vocabulary_from_arrow

__all__ = ["Dataset"]

VERIFY_BELOW = 1 << 30  #: bytes; smaller datasets are read through and compared with their digests when opened


class Dataset:
    """Open one with `Dataset.open(folder)`, make one with `Dataset.build(tables, folder)`."""

    def __init__(self, folder: Path, data: dict[str, Any], *, in_memory: bool = False) -> None:
        self.folder = folder
        self._data = data
        self._in_memory = in_memory
        self.schema: Schema = Schema.from_dict(data["schema"])
        self.spec: Spec = Spec.from_dict(data["spec"])
        self.split: AnySplit = split_from_dict(data["split"])
        self.fingerprint: str = data["fingerprint"]
        self.counts: dict[str, int] = data["counts"]
        self.boundaries: tuple[int, int] | None = tuple(data["boundaries"]) if data["boundaries"] else None
        self.transforms = {name: NumericTransform.from_dict(t) for name, t in data["transforms"].items()}
        time = self._array("time") if "time.npy" in data["files"] else None
        self.events = Facts(
            torch.from_numpy(self._array("facts")),
            self._array("part"),
            Layout.from_dict(data["layout"]),
            num_users=self.spec.num_users,
            time=time,
        )

    @classmethod
    def build(cls, tables: Tables, folder: Path | str, *, split: AnySplit | None = None) -> Dataset:
        """Encode `tables` into `folder` and open it. A dataset that is there already is replaced.

        split: the published part of the tables where there is one, else `GlobalTime()`. The folder appears whole, by
        one rename, or not at all. Raises ValueError where the tables and the schema do not fit.
        """
        _build.write(tables, Path(folder), split)
        return cls.open(folder, verify=False)

    @classmethod
    def open(cls, folder: Path | str, *, in_memory: bool = False, verify: bool | None = None) -> Dataset:
        """Memory-map a dataset; `in_memory` reads it whole.

        verify: compare every file with its digest; None does so when the dataset is smaller than 1 GiB. Sizes are
        always compared. Raises ValueError, which names the file, when one is missing, broken or of a newer format.
        """
        folder = Path(folder)
        data = _read_json(folder)
        total = sum(entry["bytes"] for entry in data["files"].values())
        for name, entry in data["files"].items():
            path = folder / name
            if not path.is_file():
                raise ValueError(f"{path} is missing; build the dataset again")
            if path.stat().st_size != entry["bytes"]:
                raise ValueError(
                    f"{path} has {path.stat().st_size} bytes, not {entry['bytes']}; build the dataset again"
                )
            if (verify or (verify is None and total < VERIFY_BELOW)) and _build.file_digest(path) != entry["sha256"]:
                raise ValueError(f"{path} is corrupted: its SHA-256 does not match; build the dataset again")
        return cls(folder, data, in_memory=in_memory)

    def __repr__(self) -> str:
        counts = ", ".join(f"{name} {count:,}" for name, count in self.counts.items())
        return f"Dataset({str(self.folder)!r}: {counts})"

    def __len__(self) -> int:
        """Events."""
        return len(self.events)

    @property
    def facts(self) -> Tensor:
        """The packed events, int32 [n, W] (data/facts.py)."""
        return self.events.packed

    def rows(self, part: Part) -> npt.NDArray[np.int64]:
        """The fact rows of one part, ascending."""
        if part not in PARTS:
            raise ValueError(f"part must be one of {', '.join(PARTS)}, received {part!r}")
        return np.flatnonzero(self.events.part == PARTS.index(part))

    @cached_property
    def features(self) -> Features:
        """The attributes of users and items, and the one gather of training and serving."""
        kinds = {"user_ids": np.int32, "user_numbers": np.float32, "item_ids": np.int32, "item_numbers": np.float32}
        tables = {}
        for name, kind in kinds.items():
            array = np.zeros((2, 0), kind) if self.schema.is_rows else self._array(name)
            tables[name] = torch.from_numpy(array)
        return Features(self.spec, **tables)

    @cached_property
    def histories(self) -> Histories:
        """Positive events before a moment; rows as `events.person`, moments as `events.moment`.

        Holds the events of all parts when every user's parts follow one another in time, else the training part only.
        """
        if self.schema.is_rows:
            raise ValueError("a plain rows table has no histories: its schema names no user and no item")
        return Histories(*(self._array(f"history_{name}") for name in ("offsets", "items", "times")))

    @cached_property
    def past(self) -> PastEvents:
        """What `Schema.past` asks for, of all parts or the training part alone, as `histories`."""
        rows = np.arange(len(self)) if self._data["history"] == "all" else self.rows("train")
        positive = self.events.label[rows] >= self.schema.positive

        def groups(column: str) -> npt.NDArray[np.int64]:
            own = column == self.schema.item
            return np.arange(self.spec.num_items) if own else self.item_attribute(column)[:, 0]

        events = self.events
        return PastEvents(
            self.schema.past, events.person[rows], events.item[rows], events.moment[rows], positive, groups
        )

    @cached_property
    def train_histories(self) -> Histories:
        """Positive events of the training part alone."""
        return Histories.build(*self.positives("train"), num_users=self.histories.num_users)

    def positives(self, part: Part) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """The positive events of a part, in the order of time: (person, item, moment), int64 each.

        In the training part a person is a user row.
        """
        rows = self.rows(part)
        rows = rows[self.events.label[rows] >= self.schema.positive]
        return self.events.person[rows], self.events.item[rows], self.events.moment[rows]

    def taken(
        self, part: Part | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """As `positives`, of all parts when none is named, with times in seconds also where moments are ordinals."""
        rows = np.arange(len(self)) if part is None else self.rows(part)
        rows = rows[self.events.label[rows] >= self.schema.positive]
        return self.events.person[rows], self.events.item[rows], self.events.time[rows]

    @cached_property
    def train_item_counts(self) -> npt.NDArray[np.int64]:
        """Positive training events of each item row, int64 [N]."""
        return np.bincount(self.positives("train")[1], minlength=self.spec.num_items)

    @cached_property
    def vocabularies(self) -> dict[str, Vocabulary | HashVocabulary]:
        """The vocabulary of every categorical field, by the name of its column."""
        return {
            name: vocabulary_from_arrow(feather.read_table(self.folder / file, memory_map=False))
            for name, file in self._data["vocabularies"].items()
        }

    @property
    def user_vocabulary(self) -> Vocabulary:
        """User ids to user rows."""
        return self._key_vocabulary(self.schema.user)

    @property
    def item_vocabulary(self) -> Vocabulary:
        """Item ids to item rows."""
        return self._key_vocabulary(self.schema.item)

    @cached_property
    def people(self) -> Vocabulary:
        """The ids behind the rows of the histories: the users, then the people whom training never saw."""
        if self.schema.is_rows:
            raise ValueError("a plain rows table has no people: its schema names no user")
        people = vocabulary_from_arrow(feather.read_table(self.folder / "people.arrow", memory_map=False))
        if not isinstance(people, Vocabulary):
            raise ValueError(f"{self.folder / 'people.arrow'} holds no ids; build the dataset again")
        return people

    @cached_property
    def catalogue(self) -> pl.DataFrame:
        """The raw items table: row r describes item row r, rows 0 and 1 are null. At least the column of item ids."""
        if self.schema.is_rows:
            raise ValueError("a plain rows table has no catalogue: its schema names no item")
        return pl.read_ipc(self.folder / "catalogue.arrow")

    def item_attribute(self, field: str) -> npt.NDArray[np.int64]:
        """Vocabulary rows of a categorical item field, int64 [N, G]; 0 = padding."""
        items = [c for c in self.spec.categories if c.side == "item"]
        column = next((c for c in items if c.name == field), None)
        if column is None:
            known = ", ".join(c.name for c in items) or "none"
            raise ValueError(f"no categorical item field is named '{field}'; there are: {known}")
        first = items[0].start
        ids = self.features.item_ids[:, column.start - first : column.stop - first].numpy()
        return unfuse(ids, column).astype(np.int64)

    def encode_context(self, table: pl.DataFrame) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
        """The context fields of a table as training saw them: ids int32 [n, Cc] and numbers float32 [n, Mc]."""
        return encode_fields(table, self.schema.context, self.spec, self.vocabularies, self.transforms)

    def _key_vocabulary(self, key: str | None) -> Vocabulary:
        vocabulary = self.vocabularies[key] if key is not None else None
        if not isinstance(vocabulary, Vocabulary):
            raise ValueError("a plain rows table has no users and no items")
        return vocabulary

    def _array(self, name: str) -> npt.NDArray[Any]:
        # Copy-on-write: torch refuses to share read-only memory, and nothing written here could reach the file.
        array = np.load(self.folder / f"{name}.npy", mmap_mode=None if self._in_memory else "c", allow_pickle=False)
        return np.asarray(array)


def _read_json(folder: Path) -> dict[str, Any]:
    path = folder / "dataset.json"
    if not path.is_file():
        raise ValueError(f"{path} is missing: {folder} is no dataset; make one with Dataset.build")
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        newer = int(data["format"])
    except (ValueError, KeyError, TypeError):
        raise ValueError(f"{path} is corrupted: it is not what Dataset.build writes; build the dataset again") from None
    if newer > _build.FORMAT:
        raise ValueError(f"{path} has format {newer}, this version reads up to {_build.FORMAT}; upgrade funnelrec")
    if _build.digest({k: v for k, v in data.items() if k != "digest"}) != data.get("digest"):
        raise ValueError(f"{path} is corrupted: its digest does not match; build the dataset again")
    return dict(data)
