"""Live: the funnel that is serving, everything the HTTP interface says about it, and how another takes its place.

Answers are plain dictionaries of the shapes in docs/http.md. They name the version that gave them: `Loaded` is one
version, and a question is answered by one `Loaded` from beginning to end.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor

import funnelrec
from funnelrec.core.contracts import VectorMatcher
from funnelrec.core.schema import Text
from funnelrec.core.shapes import FIRST_KNOWN
from funnelrec.serve.admission import Watch
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.pipeline import Ranked
from funnelrec.serve.request import Request, RequestError

__all__ = ["Live", "Loaded"]

DESCRIBED = 20_000  #: descriptions of items that are kept
SHOWN_VALUES = 50  #: values of a field on the model card
SHOWN_HISTORY = 50
SHOWN_OF_INTEREST = 10
WARM_USERS = 16


class Loaded:
    """One version of a funnel and the answers it gives."""

    def __init__(self, funnel: Funnel, name: str = "default") -> None:
        self.funnel = funnel
        self.store = funnel.store
        self.name = name
        self.digest = funnel.digest or ""
        self.version = self.digest[:12] or "unsaved"
        self.loaded_at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        self.item_field = str(self.store.schema.item)
        self.title_field = _title_field(self.store.schema.items, self.store.described.schema)
        self._items: dict[int, dict[str, Any]] = {}

    # ---------------------------------------------------------------------------------------------------- describing
    def item(self, row: int) -> dict[str, Any]:
        """An item as it stands in answers; not to be changed by the caller."""
        found = self._items.get(row)
        if found is None:
            if len(self._items) >= DESCRIBED:
                self._items = {}
            found = self._items[row] = self._describe(row)
        return found

    def _describe(self, row: int) -> dict[str, Any]:
        attributes = self.store.described.row(row, named=True)
        item_id = str(attributes.pop(self.item_field))
        title = attributes.pop(self.title_field) if self.title_field else None
        picture = self.store.picture_field is not None and self.store.picture(row) is not None
        return {"item_id": item_id, "title": title, "attributes": attributes, "picture": picture}

    def items(self, rows: Iterable[int]) -> list[dict[str, Any]]:
        """Items of the catalogue, by rows."""
        return [self.item(row) for row in rows]

    def stamp(self) -> dict[str, str]:
        """Which model answered."""
        return {"model": self.name, "model_version": self.version}

    # ----------------------------------------------------------------------------------------------------- answering
    def recommend(self, request: Request, watch: Watch, *, explain: bool = False) -> dict[str, Any]:
        """The answer to POST /v1/recommend."""
        ranked, fallbacks = self._ranked([request], watch)
        answer = self._answer(ranked, 0, fallbacks[0])
        if explain:
            answer |= self._explain(request, ranked, answer["items"], fallbacks[0], ranked_by_model=not watch.degraded)
        return self.stamp() | answer | {"degraded": watch.degraded, "timing_ms": watch.timing()}

    def recommend_many(self, requests: Sequence[Request], watch: Watch) -> list[dict[str, Any] | RequestError]:
        """An answer or an error for each; requests of equal options are answered together."""
        answers: list[dict[str, Any] | RequestError] = [RequestError("not answered")] * len(requests)
        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault((request.options(), repr(request.context)), []).append(place)
        for places in groups.values():
            try:
                ranked, fallbacks = self._ranked([requests[p] for p in places], watch)
            except RequestError as error:
                for place in places:
                    answers[place] = error
                continue
            for i, place in enumerate(places):
                answers[place] = self._answer(ranked, i, fallbacks[i])
        return answers

    def _ranked(self, requests: Sequence[Request], watch: Watch) -> tuple[Ranked, list[str | None]]:
        """Answers that hold finite numbers, come what may: without the ranker, then without the matcher."""
        ranked, fallbacks = self.funnel.ranked(requests, watch)
        if not _finite(ranked, ranked.scores):
            watch.refuse_ranker()
            ranked, fallbacks = self.funnel.ranked(requests, watch)
        if not _finite(ranked, ranked.match_scores):
            strangers = [Request(history=[], k=r.k, filters=r.filters, exclude_seen=False) for r in requests]
            ranked, _ = self.funnel.ranked(strangers, watch)
            fallbacks = ["no finite scores"] * len(requests)
        return ranked, fallbacks

    def _answer(self, ranked: Ranked, i: int, fallback: str | None) -> dict[str, Any]:
        rows = ranked.rows[i]
        rows = rows[rows > 0]
        scores = ranked.scores[i, : len(rows)]
        known: Sequence[float | None] = [None] * len(rows)
        if fallback is None:
            known = self.funnel.probabilities(scores)
        items = [
            {**item, "score": score, "probability": probability}
            for item, score, probability in zip(self.items(rows.tolist()), scores.tolist(), known, strict=True)
        ]
        return {"items": items, "fallback": fallback}

    def _explain(
        self, request: Request, ranked: Ranked, items: list[dict[str, Any]], fallback: str | None, ranked_by_model: bool
    ) -> dict[str, Any]:
        """Adds to each item where the stages had it, and says what the interests are."""
        rows = ranked.rows[0][: len(items)]
        owners, interests = self._interests(request, rows) if fallback is None else ([None] * len(items), [])
        by_model = ranked_by_model and fallback is None and self.funnel.ranker is not None
        for place, (item, owner) in enumerate(zip(items, owners, strict=True)):
            item["interest"] = owner
            item["places"] = {
                "match": int(ranked.match_places[0, place]) + 1,
                "rank": int(ranked.rank_places[0, place]) + 1,
                "final": place + 1,
            }
            item["scores"] = {
                "match": float(ranked.match_scores[0, place]),
                "rank": item["score"] if by_model else None,
            }
        return {"interests": interests}

    @torch.inference_mode()
    def _interests(self, request: Request, shown: Tensor) -> tuple[list[Any], list[dict[str, Any]]]:
        """The interest with the largest product of each shown item, and of each interest the candidates it brought."""
        matcher, pipeline = self.funnel.matcher, self.funnel.pipeline
        if not isinstance(matcher, VectorMatcher):
            return [None] * len(shown), []
        batch, exclude, _ = self.funnel.batch([request])
        queries, valid = matcher.encode_users(batch)  # (1, K, D), (1, K)
        products = pipeline.vectors @ queries[0].T  # (N, K)
        products = products.masked_fill(~valid[0], -torch.inf)
        excluded = exclude if request.exclude_seen else exclude[:, :0]
        allowed = self.store.allowed(request.filters or {})
        rows, scores = pipeline.matcher.recommend(batch, max(request.k, pipeline.candidates), excluded, allowed)
        rows, scores = rows[0][rows[0] > 0], scores[0][rows[0] > 0]
        owner = products[rows].argmax(1)  # of each candidate, best first
        interests = []
        for k in valid[0].nonzero().flatten().tolist():
            brought = (owner == k).nonzero().flatten()
            first = brought[:SHOWN_OF_INTEREST]
            own = [{**self.item(int(rows[place])), "score": float(scores[place])} for place in first]
            interests.append(
                {
                    "interest": k,
                    "candidates": len(brought),
                    "items": own,
                    "map": self._middle(rows[first], scores[first]),
                }
            )
        return products[shown].argmax(1).tolist(), interests

    def _middle(self, rows: Tensor, scores: Tensor) -> list[float] | None:
        """The place on the map between some items, the better ones counting more."""
        if self.funnel.item_map is None or not len(rows):
            return None
        places = self.funnel.item_map[rows]
        there = places.isfinite().all(1)
        if not bool(there.any()):
            return None
        weights = torch.softmax(scores[there].float(), 0)
        return [float(v) for v in weights @ places[there]]

    def rank(self, request: Request, ids: Sequence[int | str], watch: Watch) -> dict[str, Any]:
        """The answer to POST /v1/rank."""
        rows = self.store.item_rows([ids])[0]
        known = (rows >= FIRST_KNOWN).nonzero().flatten()
        watch.done("match")
        scores, fallback = self.funnel.score(request, rows[known])
        watch.done("rank")
        probabilities = self.funnel.probabilities(scores)
        order = scores.argsort(descending=True, stable=True).tolist()
        items = [
            {**self.item(int(rows[known[i]])), "score": float(scores[i]), "probability": probabilities[i]}
            for i in order
        ]
        for place in (rows < FIRST_KNOWN).nonzero().flatten().tolist():
            nothing: dict[str, Any] = {
                "title": None,
                "attributes": {},
                "picture": False,
                "score": None,
                "probability": None,
            }
            items.append({"item_id": str(ids[place]), **nothing})
        return self.stamp() | {"items": items, "fallback": fallback, "timing_ms": watch.timing()}

    def similar(self, item: int | str, k: int, filters: Mapping[str, Any] | None) -> dict[str, Any] | None:
        """The answer to POST /v1/similar; None for an item that is not in the catalogue."""
        if self.row_of(item) is None:
            return None
        found = self.funnel.similar(item, k=k, filters=filters)
        rows = self.store.item_rows([found.ids])[0].tolist() if found.items else []
        items = [{**self.item(row), "score": r.score} for row, r in zip(rows, found.items, strict=True)]
        return self.stamp() | {"items": items}

    # ----------------------------------------------------------------------------------------------------- searching
    def row_of(self, item: int | str) -> int | None:
        """The row of an item of the catalogue."""
        row = int(self.store.item_rows([[item]])[0])
        return row if row >= FIRST_KNOWN else None

    def find_items(self, query: str, limit: int) -> list[dict[str, Any]]:
        """The item with this id, then titles that begin with the query, then any text that holds it; popular first."""
        exact = self.row_of(query) if query else None
        asked = query.lower()
        begins = self._titles.str.starts_with(asked)
        inside = self._texts.str.contains(asked, literal=True)
        rows = [] if exact is None else [exact]
        for mask in (begins, inside):
            rows += [r for r in mask.arg_true().head(limit + len(rows)).to_list() if r >= FIRST_KNOWN and r not in rows]
        return self.items(rows[:limit])

    @cached_property
    def _titles(self) -> pl.Series:
        frame = self.store.described
        title = frame[self.title_field] if self.title_field else frame[self.item_field].cast(pl.String)
        return title.cast(pl.String).str.to_lowercase().fill_null("")

    @cached_property
    def _texts(self) -> pl.Series:
        """All texts of an item in one line."""
        frame = self.store.described
        texts = [n for n, kind in frame.schema.items() if kind == pl.String]
        columns = [pl.col(n).fill_null("") for n in dict.fromkeys([*texts, self.item_field])]
        line = pl.concat_str([c.cast(pl.String) for c in columns], separator="\n", ignore_nulls=True)
        return frame.select(line.str.to_lowercase().alias("text"))["text"].fill_null("")

    def find_users(self, query: str, limit: int) -> list[dict[str, Any]]:
        """Users whose id is the query, then begins with it, then holds it."""
        asked = query.lower()
        rows: list[int] = []
        for mask in (
            self._users == asked,
            self._users.str.starts_with(asked),
            self._users.str.contains(asked, literal=True),
        ):
            rows += [r for r in mask.arg_true().head(limit + len(rows)).to_list() if r not in rows]
        return [self._user(row + FIRST_KNOWN) for row in rows[:limit]]

    @cached_property
    def _users(self) -> pl.Series:
        return self.store.people.values.cast(pl.String).str.to_lowercase()

    def _user(self, person: int) -> dict[str, Any]:
        user_id = str(self.store.people.values[person - FIRST_KNOWN])
        offsets = self.store.histories.offsets
        length = int(offsets[person + 1] - offsets[person]) + len(self.funnel.recent.of(user_id))
        return {"user_id": user_id, "history_length": length}

    def user(self, user_id: str) -> dict[str, Any] | None:
        """A user and the newest items of the history; None for a stranger."""
        person = int(self.store.persons([user_id])[0])
        recent = self.funnel.recent.of(user_id)
        if person < FIRST_KNOWN and not recent:
            return None
        history, _, mask = self.store.histories.before(
            torch.tensor([person]), torch.tensor([self.store.now]), SHOWN_HISTORY
        )
        rows = [*history[0][mask[0]].tolist(), *self.store.item_rows([recent])[0].tolist()]
        own = self._user(person) if person >= FIRST_KNOWN else {"user_id": user_id, "history_length": len(recent)}
        shown = [row for row in rows if row >= FIRST_KNOWN][-SHOWN_HISTORY:]
        return own | {"history": self.items(shown)}

    # ---------------------------------------------------------------------------------------------------- what it is
    def map(self) -> dict[str, Any] | None:
        """The answer to GET /v1/map; None without a map."""
        places = self.funnel.item_map
        if places is None:
            return None
        rows = [row for row in places.isfinite().all(1).nonzero().flatten().tolist() if row >= FIRST_KNOWN]
        frame = self.store.described[rows]
        field = self.funnel.diversity_field or next(
            (c.name for c in self.store.spec.categories if c.side == "item"), None
        )
        field = field if field in frame.schema else None
        return {
            "model_version": self.version,
            "item_id": frame[self.item_field].cast(pl.String).to_list(),
            "title": frame[self.title_field].cast(pl.String).to_list() if self.title_field else [None] * len(rows),
            "x": [round(v, 4) for v in places[rows, 0].tolist()],
            "y": [round(v, 4) for v in places[rows, 1].tolist()],
            "group_field": field,
            "group": None if field is None else _first_texts(frame[field]),
        }

    def card(self) -> dict[str, Any]:
        """The answer to GET /v1/funnel."""
        funnel, store = self.funnel, self.store
        models = {"match": funnel.matcher, "rank": funnel.ranker, "rerank": funnel.reranker}
        diversity = getattr(funnel.reranker, "config", {}).get("diversity")
        return self.stamp() | {
            "digest": self.digest,
            "loaded_at": self.loaded_at,
            "versions": {"funnelrec": funnelrec.__version__, "torch": torch.__version__},
            "fingerprint": store.fingerprint,
            "stages": [_stage(stage, model) for stage, model in models.items() if model is not None],
            "metrics": funnel.metrics,
            "counts": {
                "items": store.spec.num_items - FIRST_KNOWN,
                "users": store.people.size - FIRST_KNOWN,
                "events": len(store.histories.items),
            },
            "candidates": funnel.pipeline.candidates,
            "max_len": funnel.pipeline.max_len,
            "fields": self._fields,
            "diversity": None if diversity is None else {"field": funnel.diversity_field, "default": diversity},
            "calibrated": funnel.calibration is not None,
            "map": funnel.item_map is not None,
            "pictures": store.picture_field is not None,
        }

    @cached_property
    def _fields(self) -> list[dict[str, Any]]:
        schema, found = self.store.schema, []
        for side, fields in (("user", schema.users), ("item", schema.items), ("context", schema.context)):
            for field in fields:
                vocabulary = self.store.vocabularies.get(field.name)
                values = getattr(vocabulary, "values", None)
                shown = None if values is None else [str(v) for v in values.head(SHOWN_VALUES).to_list()]
                found.append({"name": field.name, "kind": type(field).__name__.lower(), "side": side, "values": shown})
        return found

    def warm_up(self) -> None:
        """Ask what will be asked, so that the first user waits no longer than the others. Raises what goes wrong."""
        people = self.store.people.values
        picked = people.gather(np.linspace(0, len(people) - 1, min(WARM_USERS, len(people))).astype(int)).to_list()
        for request in (*(Request(user=u) for u in picked), Request(history=[])):
            watch = Watch(0.0, None, [0.0])
            answer = self.recommend(request, watch, explain=True)
            if any(not math.isfinite(item["score"]) for item in answer["items"]):
                raise ValueError("the funnel answers with numbers that are not finite; fit it again")
        self.find_items("a", 1)
        self.find_users("1", 1)


class Live:
    """The folder that is served and its current version; `load` may run beside the answers."""

    def __init__(self, folder: Path, name: str = "default") -> None:
        self.folder = folder
        self.name = name
        self.current: Loaded | None = None

    def load(self) -> Loaded:
        """Read, verify and warm up what the folder holds now. Raises ArtifactError, ValueError or OSError."""
        loaded = Loaded(Funnel.load(self.folder), self.name)
        loaded.warm_up()
        return loaded

    def swap(self, loaded: Loaded) -> None:
        """From here on `loaded` answers; questions that are being answered keep the version they began with."""
        if self.current is not None:
            loaded.funnel.recent = self.current.funnel.recent.since(loaded.store.now)
        self.current = loaded


def _finite(ranked: Ranked, scores: Tensor) -> bool:
    return bool(scores[ranked.rows > 0].isfinite().all())


def _stage(stage: str, model: Any) -> dict[str, Any]:
    name = type(model).__module__.removeprefix("funnelrec.").replace(".", "/")
    return {"stage": stage, "name": name, "config": getattr(model, "config", {})}


def _title_field(fields: Sequence[Any], columns: Mapping[str, Any]) -> str | None:
    """The column that names an item to a person."""
    texts = [f.name for f in fields if isinstance(f, Text)]
    return next((name for name in ("title", "name", *texts) if columns.get(name) == pl.String), None)


def _first_texts(values: pl.Series) -> list[str | None]:
    """One text for each value, the first of a list."""
    flat = values.list.first() if isinstance(values.dtype, pl.List) else values
    return flat.cast(pl.String).to_list()
