"""`funnelrec map`: a picture of the items of a funnel, and where a user's interests lie among them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import polars as pl

from funnelrec.cli import show
from funnelrec.evaluate import plots
from funnelrec.evaluate.maps import Method, item_map, place
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import RequestError

__all__ = ["draw_map"]

NAMES = {"tsne": "t-SNE", "umap": "UMAP"}


def draw_map(folder: Path, out: Path, *, colour: str | None, user: str | None, method: Method, seed: int) -> None:
    """Write the picture: PNG or SVG, by the ending of `out`."""
    if out.suffix not in (".png", ".svg"):
        raise ValueError(f"a map is a picture; name it with -o map.png or map.svg, received {out}")
    funnel = Funnel.load(folder)
    vectors, known = funnel.neighbours.vectors()
    rows = known.nonzero().squeeze(1)
    field = colour or funnel.diversity_field or _first_category(funnel)
    groups = _groups(funnel.store.catalogue, field, rows.tolist())
    units = vectors[rows].numpy()
    coordinates = item_map(units, method=method, seed=seed)
    ringed = stars = None
    if user is not None:
        person = int(funnel.store.persons([user]))
        interests, history = funnel.neighbours.interests(person)
        if not len(interests):
            raise RequestError(f"nothing is known of the user {user!r}; leave out --user or name another")
        stars = place(coordinates, units, interests.float().numpy())
        ringed = coordinates[(rows.unsqueeze(1) == history).any(1).numpy()]
    figure = plots.points(
        f"{len(rows):,} items, {NAMES[method]} of the vectors of {type(funnel.matcher).__name__}",
        f"Colour: {field}"
        + (f". Stars: the interests of user {user}, rings: what they took" if stars is not None else ""),
        coordinates,
        groups,
        ringed=ringed,
        stars=stars,
    )
    plots.save(figure, out.parent, out.stem, [out.suffix[1:]])
    show.line(f"{out}: {len(rows):,} items by {field}")


def _first_category(funnel: Funnel) -> str | None:
    names = [c.name for c in funnel.store.spec.categories if c.side == "item" and c.name != funnel.store.schema.item]
    return names[0] if names else None


def _groups(catalogue: pl.DataFrame, field: str | None, rows: list[int]) -> list[str | None]:
    """One value of the field for each row. An item with several has the rarest of the most common ones: that tells it
    from the others."""
    if field is None:
        return [None] * len(rows)
    if field not in catalogue.columns:
        raise RequestError(f"no item field is named '{field}'; there are {', '.join(catalogue.columns)}")
    values: list[Any] = catalogue[field].gather(rows).to_list()
    lists = [v if isinstance(v, list) else [v] for v in values]
    counts = Counter(str(x) for v in lists for x in v if x is not None)
    common = dict(counts.most_common(len(plots.GROUPS)))
    own = [[str(x) for x in v if str(x) in common] for v in lists]
    return [min(v, key=lambda x: (common[x], x)) if v else None for v in own]
