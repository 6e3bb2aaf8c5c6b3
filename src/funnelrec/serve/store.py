"""Store: everything a funnel knows that is not a model. Ids to rows, attributes, histories, the catalogue."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.feather as feather
import torch
from jaxtyping import Bool, Int
from torch import Tensor

import funnelrec
from funnelrec.core.schema import Category, Image, Number, Schema, Spec
from funnelrec.core.shapes import FIRST_KNOWN, UNKNOWN
from funnelrec.data.dataset import Dataset
from funnelrec.data.encoding import encode_fields, unfuse
from funnelrec.data.features import Features
from funnelrec.data.histories import Histories
from funnelrec.data.numeric import NumericTransform
from funnelrec.data.vocabulary import HashVocabulary, Vocabulary, vocabulary_from_arrow
from funnelrec.serve.request import RequestError

__all__ = ["Store"]

MAX_HISTORY = 200  #: slots; the longest history any stage reads
FEW = 4_096  #: ids that are looked up one by one
KEPT_FILTERS = 64
FEATURES = ("user_ids", "user_numbers", "item_ids", "item_numbers")


@dataclass(frozen=True)
class Store:
    """The data side of a funnel. `people` are the ids behind the rows of `histories` (row 2 is the first id): the
    users of the vocabulary, then those whom training never saw. `now` is just after the last event, in seconds."""

    schema: Schema
    spec: Spec
    vocabularies: Mapping[str, Vocabulary | HashVocabulary]
    transforms: Mapping[str, NumericTransform]
    features: Features
    histories: Histories
    people: Vocabulary
    catalogue: pl.DataFrame
    now: int
    fingerprint: str

    @classmethod
    def of(cls, dataset: Dataset) -> Store:
        """What serving needs of a dataset, copied into memory."""
        if dataset.schema.is_rows:
            raise ValueError("a funnel recommends items to users; this dataset is a plain table of rows without them")
        features = Features(dataset.spec, **{n: getattr(dataset.features, n).clone() for n in FEATURES})
        # Of all parts: a dataset whose parts are random rows keeps its test events out of its own histories.
        events = dataset.events
        chosen = events.label >= dataset.schema.positive
        histories = Histories.build(
            events.person[chosen], events.item[chosen], events.moment[chosen], dataset.histories.num_users
        )
        return cls(
            schema=dataset.schema,
            spec=dataset.spec,
            vocabularies=dataset.vocabularies,
            transforms=dataset.transforms,
            features=features,
            histories=histories,
            people=dataset.people,
            catalogue=dataset.catalogue,
            now=int(histories.times.max()) + 1 if len(histories.times) else 0,
            fingerprint=dataset.fingerprint,
        )

    # ------------------------------------------------------------------------------------------------ the catalogue
    @cached_property
    def described(self) -> pl.DataFrame:
        """The catalogue, an item a row, without the columns of bytes: what may stand in an answer."""
        return self.catalogue.select(pl.exclude(pl.Binary))

    def picture(self, row: int) -> bytes | None:
        """The file (PNG, JPEG, ...) of an item's picture; None where the catalogue holds none."""
        if self.picture_field is None:
            return None
        content: bytes | None = self.catalogue[self.picture_field][row]
        return content

    @cached_property
    def picture_field(self) -> str | None:
        """The first image field of the items whose column holds the files themselves."""
        fields = [f.name for f in self.schema.items if isinstance(f, Image)]
        return next((name for name in fields if self.catalogue.schema.get(name) == pl.Binary), None)

    # ------------------------------------------------------------------------------------------------ ids to rows
    def persons(self, users: Sequence[Any]) -> Int[Tensor, "B"]:
        """Rows of the histories; row 1, whose history is empty, for None and for strangers."""
        return torch.tensor(_rows(self.people, ["" if u is None else str(u) for u in users]), dtype=torch.int64)

    def user_rows(self, persons: Int[Tensor, "B"]) -> Int[Tensor, "B"]:
        """Rows of the models' user tables; row 1 for whom training never saw."""
        return persons.masked_fill(persons >= self.spec.num_users, UNKNOWN)

    def item_rows(self, lists: Sequence[Sequence[Any]]) -> list[Int[Tensor, "n"]]:
        """The rows of the items of each list; row 1 for an item that is not in the catalogue."""
        flat = [str(i) for ids in lists for i in ids]
        rows = torch.tensor(_rows(self.vocabularies[str(self.schema.item)], flat), dtype=torch.int64)
        return list(torch.split(rows, [len(ids) for ids in lists]))

    def history_length(self, max_len: int) -> int:
        """Slots of a history that serve both the matcher and the ranker."""
        return max(max_len, min(MAX_HISTORY, self._longest_history))

    @cached_property
    def _longest_history(self) -> int:
        return int((self.histories.offsets[1:] - self.histories.offsets[:-1]).max())

    # ------------------------------------------------------------------------------------------ items and context
    def item_attribute(self, field: str) -> Int[Tensor, "N G"]:
        """Vocabulary rows of a categorical item field. Raises RequestError for another field."""
        if field not in self._attributes:
            raise RequestError(
                f"no categorical item field is named '{field}'; there are {', '.join(self._attributes) or 'none'}"
            )
        return self._attributes[field]

    @cached_property
    def _attributes(self) -> dict[str, Tensor]:
        items = [c for c in self.spec.categories if c.side == "item"]
        first = items[0].start
        ids = self.features.item_ids.numpy()
        return {
            c.name: torch.from_numpy(unfuse(ids[:, c.start - first : c.stop - first], c).astype(np.int64))
            for c in items
        }

    def allowed(self, filters: Mapping[str, Any]) -> Bool[Tensor, "N"] | None:
        """Items that have one of the values of every field; None without filters. Raises RequestError."""
        if not filters:
            return None
        key = json.dumps(filters, sort_keys=True, default=str)
        found = self._allowed.get(key)
        if found is None:
            if len(self._allowed) >= KEPT_FILTERS:
                self._allowed.clear()
            found = self._allowed[key] = self._find_allowed(filters)
        return found

    @cached_property
    def _allowed(self) -> dict[str, Tensor]:
        return {}  # of the filters asked for last: the same ones come again

    def _find_allowed(self, filters: Mapping[str, Any]) -> Bool[Tensor, "N"]:
        allowed = torch.ones(self.spec.num_items, dtype=torch.bool)
        for field, values in filters.items():
            wanted = list(values) if isinstance(values, list | tuple | set) else [values]
            if not wanted:
                raise RequestError(f"the filter '{field}' needs at least one value; leave it out to allow all")
            rows = self.item_attribute(field)
            texts = pl.Series(field, [_word(v, self.vocabularies[field]) for v in wanted], dtype=pl.String)
            codes = torch.tensor(self.vocabularies[field].encode(texts), dtype=torch.int64)
            if bool((codes < FIRST_KNOWN).any()):
                missing = wanted[int((codes < FIRST_KNOWN).nonzero()[0])]
                raise RequestError(f"no item has {field}={missing!r}; look at the catalogue for the values there are")
            allowed &= torch.isin(rows, codes).any(1)
        return allowed

    def encode_contexts(self, contexts: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        """The context fields of some requests: ids int32 [B, Cc] and numbers float32 [B, Mc].

        What is not given is padding. Raises RequestError for a name that is no context field and for what is no number.
        """
        if not any(contexts):
            ids, numbers = self._no_context
            return ids.expand(len(contexts), -1), numbers.expand(len(contexts), -1)
        return self._encode_contexts(contexts)

    @cached_property
    def _no_context(self) -> tuple[Tensor, Tensor]:
        return self._encode_contexts([{}])

    def _encode_contexts(self, contexts: Sequence[Mapping[str, Any]]) -> tuple[Tensor, Tensor]:
        names = {f.name for f in self.schema.context}
        unknown = next((name for c in contexts for name in c if name not in names), None)
        if unknown is not None:
            raise RequestError(f"no context field is named '{unknown}'; there are {', '.join(sorted(names)) or 'none'}")
        columns = {}
        for field in self.schema.context:
            values = [c.get(field.name) for c in contexts]
            if isinstance(field, Number):
                wrong = next((v for v in values if v is not None and not isinstance(v, Real)), None)
                if wrong is not None:
                    raise RequestError(f"the context field '{field.name}' is a number, received {wrong!r}")
                columns[field.name] = pl.Series(
                    field.name, [None if v is None else float(v) for v in values], dtype=pl.Float64
                )
                continue
            vocabulary = self.vocabularies[field.name]
            if isinstance(field, Category) and field.many:
                lists = [[v] if v is None or isinstance(v, str) or not isinstance(v, Iterable) else v for v in values]
                words = [[_word(x, vocabulary) for x in v] for v in lists]
                columns[field.name] = pl.Series(field.name, words, dtype=pl.List(pl.String))
            else:
                words_of_all = [_word(v, vocabulary) for v in values]
                columns[field.name] = pl.Series(field.name, words_of_all, dtype=pl.String)
        if not columns:
            return torch.zeros(len(contexts), 0, dtype=torch.int32), torch.zeros(len(contexts), 0)
        ids, numbers = encode_fields(
            pl.DataFrame(columns), self.schema.context, self.spec, self.vocabularies, self.transforms
        )
        return torch.tensor(ids), torch.tensor(numbers)

    # ---------------------------------------------------------------------------------------------------- on disk
    def to_members(self) -> tuple[dict[str, Any], dict[str, bytes]]:
        """(entries of the manifest, files). `from_members` is the inverse."""
        from safetensors.torch import save

        vocabularies = {name: f"vocabulary_{n:02d}.arrow" for n, name in enumerate(sorted(self.vocabularies))}
        members = {file: _arrow(self.vocabularies[name].to_arrow()) for name, file in vocabularies.items()}
        members["people.arrow"] = _arrow(self.people.to_arrow())
        buffer = io.BytesIO()
        self.catalogue.write_ipc(buffer)
        members["catalogue.arrow"] = buffer.getvalue()
        members["features.safetensors"] = save({n: getattr(self.features, n).contiguous() for n in FEATURES})
        own = self.histories
        members["histories.safetensors"] = save({"offsets": own.offsets, "items": own.items, "times": own.times})
        facts = {
            "versions": {"funnelrec": funnelrec.__version__, "torch": torch.__version__, "polars": pl.__version__},
            "schema": self.schema.to_dict(),
            "spec": self.spec.to_dict(),
            "vocabularies": vocabularies,
            "transforms": {name: t.to_dict() for name, t in self.transforms.items()},
            "now": self.now,
            "fingerprint": self.fingerprint,
        }
        return facts, members

    @classmethod
    def from_members(cls, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> Store:
        """Read what `to_members` wrote; the bytes were verified by `read_artifact`."""
        from safetensors.torch import load

        spec = Spec.from_dict(manifest["spec"])
        people = vocabulary_from_arrow(_table(members["people.arrow"]))
        if not isinstance(people, Vocabulary):
            raise ValueError("people.arrow holds no vocabulary of ids; fit the funnel again")
        histories = load(members["histories.safetensors"])
        return cls(
            schema=Schema.from_dict(manifest["schema"]),
            spec=spec,
            vocabularies={
                name: vocabulary_from_arrow(_table(members[file])) for name, file in manifest["vocabularies"].items()
            },
            transforms={name: NumericTransform.from_dict(t) for name, t in manifest["transforms"].items()},
            features=Features(spec, **load(members["features.safetensors"])),
            histories=Histories(*(histories[n].numpy() for n in ("offsets", "items", "times"))),
            people=people,
            catalogue=pl.read_ipc(io.BytesIO(members["catalogue.arrow"])),
            now=manifest["now"],
            fingerprint=manifest["fingerprint"],
        )


def _rows(vocabulary: Vocabulary | HashVocabulary, texts: list[str]) -> list[int]:
    """Rows of ids as texts, 1 for what is not known. Few are looked up one by one, many in one join."""
    if isinstance(vocabulary, Vocabulary) and len(texts) <= FEW:
        return vocabulary.rows_of(texts)
    rows = vocabulary.encode(pl.Series("id", texts, dtype=pl.String))
    return [int(r) for r in np.maximum(rows, UNKNOWN)]


def _word(value: Any, vocabulary: Vocabulary | HashVocabulary) -> str | None:
    """A value of a request as a vocabulary is asked for it: where it holds integers, True is 1 and 7.0 is 7."""
    if value is None:
        return None
    integers = isinstance(vocabulary, HashVocabulary) or vocabulary.dtype == "int64"
    whole = isinstance(value, bool | np.bool_) or (isinstance(value, float) and value.is_integer())
    return str(int(value)) if integers and whole else str(value)


def _arrow(table: pa.Table) -> bytes:
    buffer = io.BytesIO()
    feather.write_feather(table, buffer, compression="uncompressed")
    return buffer.getvalue()


def _table(content: bytes) -> pa.Table:
    return feather.read_table(io.BytesIO(content))
