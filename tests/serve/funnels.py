"""A small shop and an untrained funnel over it, for every test of serving."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import polars as pl
import torch

from funnelrec.core.schema import Category, Number, Schema
from funnelrec.data.dataset import Dataset
from funnelrec.data.tables import Tables
from funnelrec.match.comirec_sa import ComiRecSA
from funnelrec.rank.din import DIN
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.funnel import Funnel

__all__ = ["small_dataset", "small_funnel"]

USERS, ITEMS, EVENTS = 30, 40, 600


def small_dataset(folder: Path) -> Dataset:
    """Some events of users whose ids are texts; the last of them ("late") comes after training ends."""
    rng = np.random.default_rng(0)
    events = pl.DataFrame(
        {
            "user": [f"u{u:02d}" for u in rng.integers(0, USERS, EVENTS)],
            "item": rng.integers(100, 100 + ITEMS, EVENTS),
            "time": np.sort(rng.integers(0, 10**6, EVENTS)),
            "click": (rng.random(EVENTS) < 0.5).astype(np.int64),
            "device": np.where(rng.random(EVENTS) < 0.5, "phone", "desktop"),
        }
    )
    late = pl.DataFrame({"user": ["late"] * 3, "item": [100, 101, 102], "time": [10**6] * 3, "click": [1] * 3})
    events = pl.concat([events, late.with_columns(pl.lit("phone").alias("device"))])
    items = pl.DataFrame(
        {
            "item": np.arange(100, 100 + ITEMS),
            "title": [f"Item {i}" for i in range(ITEMS)],
            "kind": [("red", "green", "blue")[i % 3] for i in range(ITEMS)],
            "price": rng.random(ITEMS),
        }
    )
    schema = Schema(
        user="user",
        item="item",
        time="time",
        label="click",
        context=(Category("device"),),
        items=(Category("kind"), Number("price")),
    )
    return Dataset.build(Tables(events, schema, items=items), folder)


def small_funnel(dataset: Dataset) -> Funnel:
    """ComiRec-SA → DIN → controllable diversity, weights drawn with a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        matcher = ComiRecSA(dataset.spec, embedding_dim=8, num_interests=2, max_len=20)
        torch.nn.init.normal_(matcher.items.weight[2:])
        ranker = DIN(dataset.spec, embedding_dim=4, hidden=(8,), attention_hidden=(8,))
    return Funnel.build(
        dataset,
        matcher=matcher,
        ranker=ranker,
        reranker=ControllableDiversity(diversity=0.01),
        diversity_field="kind",
        candidates=25,
        max_len=20,
        metrics={"ndcg@10": 0.25},
    )
