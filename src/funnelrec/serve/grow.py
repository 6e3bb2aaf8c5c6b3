"""New items in a trained funnel: their content places them, nothing is learnt again, no other item's score moves.

A new item gets the next item row. Its vector is what the matcher's adapter makes of its content
(core/nn/content.py); the ranker sees its attributes, and its id as one that training did not know.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import polars as pl
import torch
from torch import Tensor, nn

from funnelrec.core.nn.content import content_tables
from funnelrec.core.schema import Spec
from funnelrec.core.shapes import UNKNOWN
from funnelrec.data.encoding import encode_fields
from funnelrec.data.features import Features
from funnelrec.data.vocabulary import Vocabulary, canonical_ids
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.store import FEATURES, Store

__all__ = ["add_items"]


def add_items(funnel: Funnel, items: pl.DataFrame) -> Funnel:
    """The funnel with the rows of `items` in its catalogue; save it to replace the artifact.

    `items` has the item column and columns of the catalogue; one that is left out is missing for all. Raises ValueError
    for an item that is there already, and for a matcher that knows items by id alone.
    """
    if funnel.content is None or not content_tables(funnel.matcher):
        raise ValueError(
            f"{type(funnel.matcher).__name__} of this funnel knows items by id alone, so it cannot place a new one; "
            "fit it again with --content"
        )
    new = _checked(funnel.store, items)
    if new.is_empty():
        return funnel
    store = _larger(funnel.store, new)
    matcher = _grown(funnel.matcher, store.spec)
    for table in content_tables(matcher):
        table.content[-len(new) :] = funnel.content.encode(new)
    places = funnel.item_map
    return Funnel(
        store,
        matcher=matcher,
        fallback=_grown(funnel.fallback, store.spec),
        ranker=None if funnel.ranker is None else _grown(funnel.ranker, store.spec),
        reranker=funnel.reranker,
        candidates=funnel.pipeline.candidates,
        max_len=funnel.pipeline.max_len,
        diversity_field=funnel.diversity_field,
        metrics=funnel.metrics,
        calibration=funnel.calibration,
        item_map=None if places is None else torch.cat([places, places.new_full((len(new), 2), torch.nan)]),
        content=funnel.content,
    )


def _checked(store: Store, items: pl.DataFrame) -> pl.DataFrame:
    """The rows in the columns and types of the catalogue."""
    key, catalogue = str(store.schema.item), store.catalogue
    unknown = next((c for c in items.columns if c not in catalogue.columns), None)
    if key not in items.columns or unknown is not None:
        wrong = (
            f"there is no column '{key}'" if key not in items.columns else f"the catalogue has no column '{unknown}'"
        )
        raise ValueError(f"{wrong}; new items have the columns {', '.join(catalogue.columns)}")
    if items[key].null_count():
        raise ValueError(f"{items[key].null_count()} of the new items have no id in column '{key}'; leave them out")
    ids = canonical_ids(items[key])
    if ids.n_unique() != len(ids):
        twice = ids.filter(ids.is_duplicated())[0]
        raise ValueError(f"the item {twice!r} stands twice among the new ones; keep one row of it")
    known = store.vocabularies[key].encode(ids) > UNKNOWN
    if known.any():
        raise ValueError(f"the item {ids.filter(pl.Series(known))[0]!r} is in the catalogue already; leave it out")
    columns = []
    for name, kind in catalogue.schema.items():
        given = items[name] if name in items.columns else pl.Series(name, [None] * len(items), dtype=kind)
        try:
            columns.append(given.cast(kind))
        except pl.exceptions.PolarsError:
            raise ValueError(
                f"column '{name}' of the new items is {given.dtype} and that of the catalogue {kind}; convert it"
            ) from None
    return pl.DataFrame(columns)


def _larger(store: Store, new: pl.DataFrame) -> Store:
    """The store with rows for the new items after the old ones."""
    key = str(store.schema.item)
    vocabulary = store.vocabularies[key]
    assert isinstance(vocabulary, Vocabulary)  # a catalogue is listed, never hashed
    values = pl.concat([vocabulary.values, canonical_ids(new[key]).cast(vocabulary.values.dtype)])
    larger = Vocabulary(values, np.concatenate([vocabulary.counts, np.zeros(len(new), dtype=np.int64)]))
    # the fused table is not widened: to a ranker a new id is the unknown one
    spec = replace(store.spec, num_items=store.spec.num_items + len(new))
    ids, numbers = encode_fields(new, store.schema.items, spec, store.vocabularies, store.transforms)
    own = np.full((len(new), 1), next(c.offset for c in spec.categories if c.side == "item"), dtype=np.int32)
    tables: dict[str, Tensor] = {name: getattr(store.features, name) for name in FEATURES}
    tables["item_ids"] = torch.cat([tables["item_ids"], torch.from_numpy(np.concatenate([own, ids], axis=1))])
    tables["item_numbers"] = torch.cat([tables["item_numbers"], torch.from_numpy(numbers)])
    vocabularies: Mapping[str, Any] = {**store.vocabularies, key: larger}
    return replace(
        store,
        spec=spec,
        vocabularies=vocabularies,
        features=Features(spec, **tables),
        catalogue=pl.concat([store.catalogue, new]),
    )


def _grown(model: Any, spec: Spec) -> Any:
    """A copy of a model whose tables have a row of zeros for each new item."""
    larger: nn.Module = type(model)(spec, **model.config)
    state = dict(model.state_dict())
    for name, target in larger.state_dict().items():
        if state[name].shape != target.shape:
            rows = target.new_zeros(len(target) - len(state[name]), *target.shape[1:])
            state[name] = torch.cat([state[name], rows])
    larger.load_state_dict(state)
    return larger.eval()
