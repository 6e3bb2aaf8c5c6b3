"""Funnel: the whole recommender in one object, and in one folder that loads without the data it was made from.

    funnel = Funnel.build(dataset, matcher=sasrec, ranker=din, reranker=ControllableDiversity())
    funnel.save("shop.funnel")
    Funnel.load("shop.funnel").recommend(user=42, k=10)

It speaks the user's own ids on both sides and holds everything that the answer needs: vocabularies, attributes of users
and items, histories, item vectors, weights. What goes wrong with a request is a RequestError of one line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor, nn

from funnelrec import zoo
from funnelrec.core.batch import Batch
from funnelrec.core.contracts import Matcher, Reranker, VectorMatcher
from funnelrec.core.shapes import FIRST_KNOWN, PADDING, UNKNOWN
from funnelrec.data.dataset import Dataset
from funnelrec.encode.item.content import ContentEncoder
from funnelrec.learn.calibration import Calibration, calibration_from_dict
from funnelrec.match.index.exact import ExactIndex
from funnelrec.match.index.faiss import FaissIndex
from funnelrec.match.popularity import Popularity
from funnelrec.match.retriever import VectorRetriever, item_vectors
from funnelrec.serve.artifact import read_artifact, write_artifact
from funnelrec.serve.pipeline import Pace, Pipeline, Ranked
from funnelrec.serve.recent import Recent
from funnelrec.serve.request import Recommendation, Recommended, Request, RequestError, SimilarUser
from funnelrec.serve.similar import Neighbours
from funnelrec.serve.store import Store

__all__ = ["Funnel", "retriever_of"]

LARGEST_EXACT = 200_000  #: items; an exact search of so many takes milliseconds, above it an index pays
INDEX_CACHE = "index"
FALLBACK_HALF_LIFE = 7.0  #: days; the fallback is what has been popular of late


class Funnel:
    """match -> rank -> rerank over one catalogue. Make one with `build` or `load`.

    `candidates` is how many items the matcher hands to the ranker, `max_len` the longest history that is read,
    `diversity_field` the categorical item field on which re-ranking measures variety, `metrics` what was measured,
    `calibration` what turns the ranker's logits into the probabilities of an answer (learn/calibration.py),
    `item_map` the places of the item rows in a plane (`workflow.item_places`), NaN for rows without one, `content` what
    makes vectors of new items' content (serve/grow.py), `digest` the SHA-256 of the artifact that it was loaded from.
    `recent` holds what users did since; a server adds to it.
    """

    def __init__(
        self,
        store: Store,
        *,
        matcher: nn.Module,
        fallback: Popularity,
        ranker: nn.Module | None = None,
        reranker: Reranker | None = None,
        candidates: int = 500,
        max_len: int = 50,
        diversity_field: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
        item_map: Float[Tensor, "N 2"] | None = None,
        content: ContentEncoder | None = None,
        index_cache: Path | None = None,
        digest: str | None = None,
    ) -> None:
        if item_map is not None and len(item_map) != store.spec.num_items:
            raise ValueError(f"a map has a place for each of the {store.spec.num_items} rows, received {len(item_map)}")
        if calibration is not None and ranker is None:
            raise ValueError("a calibration is of a ranker's logits, and this funnel has no ranker; leave it out")
        for module in (matcher, fallback, ranker):
            if module is not None:
                module.eval()
        self.store = store
        self.matcher, self.fallback, self.ranker, self.reranker = matcher, fallback, ranker, reranker
        self.diversity_field = diversity_field
        self.metrics = dict(metrics or {})
        self.calibration = calibration
        self.item_map = item_map
        self.content = content
        self.digest = digest
        self.recent = Recent()
        self._sizes = {"candidates": candidates, "max_len": max_len}
        self._index_cache = index_cache
        self.pipeline = self.pipeline_with(fallback)

    def pipeline_with(self, fallback: Popularity) -> Pipeline:
        """The stages of this funnel with another answer for people of whom nothing is known."""
        num_items = self.store.spec.num_items
        retriever, vectors = retriever_of(self.matcher, fallback, num_items, self._index_cache)
        return Pipeline(
            features=self.store.features,
            matcher=retriever,
            ranker=self.ranker,
            categories=_categories(self.store, self.diversity_field),
            vectors=vectors,
            **self._sizes,
        )

    @classmethod
    def build(
        cls,
        dataset: Dataset,
        *,
        matcher: nn.Module,
        ranker: nn.Module | None = None,
        reranker: Reranker | None = None,
        candidates: int = 500,
        max_len: int = 50,
        diversity_field: str | None = None,
        metrics: Mapping[str, Any] | None = None,
        calibration: Calibration | None = None,
        content: ContentEncoder | None = None,
    ) -> Funnel:
        """Join trained models to what they were trained on. Histories hold every positive event of the dataset.

        The fallback, for users of whom nothing is known, is recent popularity over all of these events. `content` is
        what the matcher's items were encoded by.
        """
        store = Store.of(dataset)
        if content is not None:
            store = replace(store, spec=replace(store.spec, content_dim=content.width))
        fallback = Popularity(dataset.spec, half_life=FALLBACK_HALF_LIFE)
        fallback.fit(*dataset.taken())
        return cls(
            store,
            matcher=matcher,
            fallback=fallback,
            ranker=ranker,
            reranker=reranker,
            candidates=candidates,
            max_len=max_len,
            diversity_field=diversity_field,
            metrics=metrics,
            calibration=calibration,
            content=content,
        )

    # ------------------------------------------------------------------------------------------------ questions
    def recommend(
        self,
        user: int | str | None = None,
        *,
        history: Sequence[Any] | None = None,
        k: int = 10,
        filters: Mapping[str, Any] | None = None,
        diversity: int | float | None = None,
        context: Mapping[str, Any] | None = None,
        exclude_seen: bool = True,
    ) -> Recommendation:
        """The k best items for a known user, or for anyone with a history (item ids, newest last).

        `filters` {"genres": ["Drama", "War"]} keeps items that have one of the values of every field named.
        `diversity` replaces the reranker's knob for this answer; 0 is the plain order of the scores.
        `context` gives the context fields of the events, as columns of one row. Raises RequestError.
        """
        request = Request(
            user=user,
            history=history,
            k=k,
            filters=filters,
            diversity=diversity,
            context=context,
            exclude_seen=exclude_seen,
        )
        return self.recommend_many([request])[0]

    def recommend_many(self, requests: Sequence[Request], pace: Pace | None = None) -> list[Recommendation]:
        """Answers in the order of the requests. Requests of equal options are answered together."""
        answers: list[Recommendation | None] = [None] * len(requests)
        groups: dict[Any, list[int]] = {}
        for place, request in enumerate(requests):
            groups.setdefault(request.options(), []).append(place)
        for places in groups.values():
            for place, answer in zip(places, self._answer([requests[p] for p in places], pace), strict=True):
                answers[place] = answer
        return [a for a in answers if a is not None]

    def _answer(self, requests: list[Request], pace: Pace | None) -> list[Recommendation]:
        """Requests that differ only in user, history and context."""
        ranked, fallbacks = self.ranked(requests, pace)
        return [self._recommendation(ranked, i, reason) for i, reason in enumerate(fallbacks)]

    def ranked(self, requests: Sequence[Request], pace: Pace | None = None) -> tuple[Ranked, list[str | None]]:
        """Answers as rows [B, k], for requests of equal `options()`, and why each is a fallback (None: it is not)."""
        first = requests[0]
        batch, exclude, fallbacks = self.batch(requests)
        context_ids, context_numbers = self.store.encode_contexts([r.context or {} for r in requests])
        exclude = exclude if first.exclude_seen else exclude[:, :0]
        allowed = self.store.allowed(first.filters or {})
        known = torch.tensor([i for i, reason in enumerate(fallbacks) if reason is None], dtype=torch.int64)
        strangers = torch.tensor([i for i, reason in enumerate(fallbacks) if reason is not None], dtype=torch.int64)
        parts = []
        if len(known):
            parts.append(
                self.pipeline.run(
                    batch.select(known),
                    first.k,
                    exclude=exclude[known],
                    allowed=allowed,
                    context_ids=context_ids[known],
                    context_numbers=context_numbers[known],
                    reranker=self._reranker(first.diversity),
                    pace=pace,
                )
            )
        if len(strangers):
            found, scores = self.fallback.recommend(batch.select(strangers), first.k, exclude[strangers], allowed)
            places = torch.arange(first.k).expand(len(strangers), -1)
            parts.append(Ranked(found, scores, scores, places, places))
        back = torch.cat([known, strangers]).argsort()
        return Ranked(*(torch.cat([getattr(p, f.name) for p in parts])[back] for f in fields(Ranked))), fallbacks

    def batch(self, requests: Sequence[Request]) -> tuple[Batch, Tensor, list[str | None]]:
        """The batch of some requests, what each has seen, and the reason for a fallback where there is one."""
        store, length = self.store, self.store.history_length(self.pipeline.max_len)
        persons = store.persons([r.user for r in requests])
        history, times, mask = store.histories.before(persons, torch.full((len(requests),), store.now), length)
        exclude = store.histories.seen(persons, torch.full((len(requests),), store.now))
        told = [self.recent.of(r.user) if r.history is None else r.history for r in requests]
        changed = [i for i, r in enumerate(requests) if r.history is not None or told[i]]
        if changed:
            rows = store.item_rows([told[i] for i in changed])  # list of int64 tensors, unknown items as row 1
            exclude = F.pad(exclude, (0, max(len(r) for r in rows)))
            for i, own in zip(changed, rows, strict=True):
                if requests[i].history is not None:  # it replaces what is stored; recent events go behind it
                    mask[i] = False
                    exclude[i] = 0
                kept = mask[i]
                both = torch.cat([history[i][kept], own])[-length:]
                when = torch.cat([times[i][kept], torch.full_like(own, store.now)])[-length:]
                for tensor, values in ((history, both), (times, when), (mask, both != PADDING)):
                    tensor[i] = 0
                    tensor[i, length - len(both) :] = values
                exclude[i, exclude.shape[1] - len(own) :] = own.masked_fill(own < FIRST_KNOWN, 0)
        known = ((history >= FIRST_KNOWN) & mask).any(1)
        fallbacks = [
            None if known[i] else _reason(request, bool(persons[i] == UNKNOWN)) for i, request in enumerate(requests)
        ]
        batch = Batch(
            user=store.user_rows(persons),
            time=torch.full((len(requests),), store.now),
            history=history,
            mask=mask,
            history_times=times,
        )
        return batch, exclude, fallbacks

    def _reranker(self, diversity: int | float | None) -> Reranker | None:
        if diversity is None:
            return self.reranker
        if self.reranker is None:
            raise RequestError(
                "this funnel has no reranker, so 'diversity' cannot be set; fit it with --rerank diversity"
            )
        config = dict(getattr(self.reranker, "config"))  # noqa: B009  (every model of the zoo has one)
        if "diversity" not in config:
            raise RequestError(f"the reranker {type(self.reranker).__name__} has no knob 'diversity'; leave it out")
        changed: Reranker = type(self.reranker)(**{**config, "diversity": float(diversity)})
        return changed

    def _recommendation(
        self, ranked: Ranked, i: int, fallback: str | None, *, calibrated: bool = True
    ) -> Recommendation:
        rows = ranked.rows[i]
        count = int((rows > 0).sum())
        attributes = self.store.described[rows[:count].numpy()].to_dicts()
        key = str(self.store.schema.item)
        logits = calibrated and fallback is None
        probabilities = self.probabilities(ranked.scores[i, :count]) if logits else [None] * count
        items = tuple(
            Recommended(
                item=described.pop(key),
                score=float(ranked.scores[i, place]),
                match_score=float(ranked.match_scores[i, place]),
                match_place=int(ranked.match_places[i, place]),
                attributes=described,
                probability=probabilities[place],
            )
            for place, described in enumerate(attributes)
        )
        return Recommendation(items=items, fallback=fallback)

    def probabilities(self, logits: Tensor) -> Sequence[float | None]:
        """Of the ranker's logits, where there is a calibration; the popular items of a fallback have none."""
        if self.calibration is None:
            return [None] * len(logits)
        return [float(p) for p in self.calibration.probabilities(logits.numpy().astype(np.float64))]

    def score(self, request: Request, rows: Int[Tensor, "n"]) -> tuple[Float[Tensor, "n"], str | None]:
        """The ranker's logits of some item rows for who asks, and why little is known of them (None: it is not so)."""
        if self.ranker is None:
            raise RequestError("this funnel has no ranker, so it cannot score items; fit it with --rank din")
        batch, _, fallbacks = self.batch([request])
        context_ids, context_numbers = self.store.encode_contexts([request.context or {}])
        if not len(rows):
            return torch.zeros(0), fallbacks[0]
        return self.pipeline.rank(batch, rows.unsqueeze(0), context_ids, context_numbers)[0], fallbacks[0]

    def similar(self, item: int | str, *, k: int = 10, filters: Mapping[str, Any] | None = None) -> Recommendation:
        """The k items most like `item`, itself left out. A score is the cosine of the matcher's vectors, or what a
        matcher that counts takes for similarity. Raises RequestError, also for a matcher that knows no such thing."""
        Request(history=[item], k=k, filters=filters)  # refuses what no question may hold
        row = int(self.store.item_rows([[item]])[0])
        if row < FIRST_KNOWN:
            raise RequestError(f"no item has the id {item!r}; look at the catalogue for the ids there are")
        rows, scores = self.neighbours.items(row, k, self.store.allowed(filters or {}))
        ranked = Ranked(*(t.unsqueeze(0) for t in (rows, scores, scores, torch.arange(k), torch.arange(k))))
        return self._recommendation(ranked, 0, None, calibrated=False)

    def similar_users(self, user: int | str, *, k: int = 10) -> list[SimilarUser]:
        """The k people most like `user`: for each interest of theirs the closest one of the other, and the mean of the
        cosines; user-CF answers by its own similarity. Raises RequestError."""
        Request(user=user, k=k)
        person = int(self.store.persons([user]))
        if person < FIRST_KNOWN:
            raise RequestError(f"no user has the id {user!r}, so nobody is known to be like them; ask for another")
        rows, scores = self.neighbours.people(person, k)
        count = int((rows > 0).sum())
        ids = self.store.people.decode(rows[:count].numpy()).to_list()
        return [SimilarUser(user=u, score=float(s)) for u, s in zip(ids, scores, strict=False)]

    @cached_property
    def neighbours(self) -> Neighbours:
        """What the matcher knows of likeness, as rows."""
        return Neighbours(self.matcher, self.store, self.pipeline.max_len)

    # --------------------------------------------------------------------------------------------------- on disk
    def save(self, folder: Path | str) -> Path:
        """Write or replace the artifact at `folder`: at every instant it is the old one or the new one."""
        from safetensors.torch import save

        stages = {
            "match": _described(self.matcher),
            "fallback": _described(self.fallback),
            "rank": None if self.ranker is None else _described(self.ranker),
            "rerank": None if self.reranker is None else _described(self.reranker),
        }
        facts, members = self.store.to_members()
        for stage, model in (("match", self.matcher), ("fallback", self.fallback), ("rank", self.ranker)):
            if model is not None:
                members[f"{stage}.safetensors"] = _weights(model)
        if self.content is not None:
            members |= self.content.to_members()
        if self.item_map is not None:
            members["map.safetensors"] = save({"places": self.item_map.to(torch.float32).contiguous()})
        manifest = {
            "stages": stages,
            "candidates": self.pipeline.candidates,
            "max_len": self.pipeline.max_len,
            "diversity_field": self.diversity_field,
            "metrics": self.metrics,
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            **facts,
        }
        write_artifact(Path(folder), manifest, members)
        index = getattr(self.pipeline.matcher, "index", None)
        if isinstance(index, FaissIndex):  # a cache beside the artifact: the vectors are the truth
            index.save(Path(folder) / INDEX_CACHE)
        return Path(folder)

    @classmethod
    def load(cls, folder: Path | str) -> Funnel:
        """Read and verify an artifact; needs nothing else. Raises ArtifactError that names the faulty file."""
        from safetensors.torch import load

        manifest, members = read_artifact(Path(folder))
        store = Store.from_members(manifest, members)
        stages = {name: entry for name, entry in manifest["stages"].items() if entry is not None}
        models = {name: _restored(entry, store, members.get(f"{name}.safetensors")) for name, entry in stages.items()}
        return cls(
            store,
            matcher=models["match"],
            fallback=models["fallback"],
            ranker=models.get("rank"),
            reranker=models.get("rerank"),
            candidates=manifest["candidates"],
            max_len=manifest["max_len"],
            diversity_field=manifest["diversity_field"],
            metrics=manifest["metrics"],
            calibration=_calibration(manifest),
            item_map=load(members["map.safetensors"])["places"] if "map.safetensors" in members else None,
            content=ContentEncoder.from_members(members),
            index_cache=Path(folder) / INDEX_CACHE,
            digest=manifest["sha256"],
        )

    def __repr__(self) -> str:
        parts = (self.matcher, self.ranker, self.reranker)
        stages = " -> ".join(type(p).__name__ for p in parts if p is not None)
        return f"Funnel({stages}, {self.store.spec.num_items - FIRST_KNOWN:,} items)"


def _reason(request: Request, unknown_user: bool) -> str:
    if request.history is not None:
        return "unknown items" if len(request.history) else "empty history"
    return "unknown user" if unknown_user else "empty history"


def retriever_of(
    model: Any, fallback: Matcher | None, num_items: int, index_cache: Path | None = None
) -> tuple[Matcher, Tensor]:
    """A model as a matcher that recommends, and the item vectors [N, D] (D = 0 where it has none).

    Vectors are searched exactly up to `LARGEST_EXACT` items and by faiss above, from `index_cache` where that fits.
    """
    if isinstance(model, VectorMatcher):
        vectors = item_vectors(model, num_items)
        return VectorRetriever(model, _index(vectors, index_cache), fallback), vectors
    if isinstance(model, Matcher):
        return model, torch.zeros(num_items, 0)
    raise ValueError(f"{type(model).__name__} is no matcher; it needs encode_users and encode_items, or recommend")


def _index(vectors: Tensor, cache: Path | None) -> ExactIndex | FaissIndex:
    if len(vectors) <= LARGEST_EXACT:
        return ExactIndex(vectors)
    return FaissIndex.load(cache, vectors) if cache is not None and cache.is_dir() else FaissIndex(vectors)


def _categories(store: Store, field: str | None) -> Tensor:
    """The rows that variety is measured on; one empty column where no field was named."""
    if field is None:
        return torch.zeros(store.spec.num_items, 1, dtype=torch.int64)
    return store.item_attribute(field)


def _described(model: Any) -> dict[str, Any]:
    name = type(model).__module__.removeprefix("funnelrec.").replace(".", "/")
    if name not in zoo.names():
        raise ValueError(f"{type(model).__name__} is not a model of the zoo, so a saved funnel could not load it again")
    return {"name": name, "config": model.config, "takes_spec": hasattr(model, "spec")}


def _calibration(manifest: Mapping[str, Any]) -> Calibration | None:
    found = manifest.get("calibration")  # artifacts of earlier versions have none
    return None if found is None else calibration_from_dict(found)


def _weights(model: nn.Module) -> bytes:
    from safetensors.torch import save

    return save({name: tensor.contiguous() for name, tensor in model.state_dict().items()})


def _restored(entry: Mapping[str, Any], store: Store, weights: bytes | None) -> Any:
    from safetensors.torch import load

    cls = zoo.load(entry["name"])
    model = cls(store.spec, **entry["config"]) if entry["takes_spec"] else cls(**entry["config"])
    if weights is not None:
        model.load_state_dict(load(weights))
    return model
