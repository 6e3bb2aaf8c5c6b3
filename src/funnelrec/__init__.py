"""funnelrec turns an events table and a catalogue into a recommender that one can trust and serve.

The folders are the funnel, in the order in which data flows and imports may point:

    core      the nouns (Schema, Spec, Batch, contracts) and the network parts that every stage shares
    data      tables -> memory-mapped Dataset -> splits -> batches; histories that cannot see the future
    encode    content -> vectors
    evaluate  metrics, full-catalogue protocol, intervals and paired tests, reports
    learn     the fit loop, losses, samplers, lazy optimisers, checkpoints
    match     retrieval: one model a file, one or K vectors a user; index/ searches them
    rank      one model a file, one logit a candidate
    rerank    the list as a whole
    serve     the funnel in one artifact

`import funnelrec` loads none of them; the names below load their module when first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from funnelrec.core.batch import Batch as Batch
    from funnelrec.core.schema import Category as Category
    from funnelrec.core.schema import Image as Image
    from funnelrec.core.schema import Number as Number
    from funnelrec.core.schema import Schema as Schema
    from funnelrec.core.schema import Spec as Spec
    from funnelrec.core.schema import Text as Text
    from funnelrec.core.schema import Vector as Vector
    from funnelrec.data.dataset import Dataset as Dataset
    from funnelrec.serve.funnel import Funnel as Funnel

__version__ = "0.1.0"

_HOMES = {
    "Batch": "core.batch",
    "Category": "core.schema",
    "Image": "core.schema",
    "Number": "core.schema",
    "Schema": "core.schema",
    "Spec": "core.schema",
    "Text": "core.schema",
    "Vector": "core.schema",
    "Dataset": "data.dataset",
    "Funnel": "serve.funnel",
}

__all__ = ["Batch", "Category", "Dataset", "Funnel", "Image", "Number", "Schema", "Spec", "Text", "Vector"]


def __getattr__(name: str) -> Any:
    """Load the module that holds `name` at its first use, so that the import itself stays under 50 ms."""
    if name not in _HOMES:
        raise AttributeError(f"funnelrec has no '{name}'; it has {', '.join(__all__)}")
    return getattr(importlib.import_module(f"funnelrec.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
