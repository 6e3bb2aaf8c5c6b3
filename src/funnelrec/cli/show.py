"""What the command line prints."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from funnelrec.data.dataset import Dataset
    from funnelrec.data.tables import Tables
    from funnelrec.evaluate.report import Table as ReportTable
    from funnelrec.serve.request import Recommendation, SimilarUser
    from funnelrec.zoo import Summary

__all__ = ["console", "dataset", "line", "models", "recommendation", "report_table", "similar_users", "tables"]

WIDTH = 240  #: columns when nobody watches: a pipe or a file
console = Console(highlight=False, width=None if sys.stdout.isatty() else WIDTH)
SHOWN_ATTRIBUTES = 4


def line(text: str) -> None:
    """One line of progress."""
    console.print(text, markup=False, soft_wrap=True)


def _grid(title: str | None, columns: Sequence[str], rows: Iterable[Sequence[str]], right: bool = False) -> None:
    table = Table(title=title, title_justify="left", header_style="bold", title_style="bold", box=None, pad_edge=False)
    for number, column in enumerate(columns):
        figures = right and number > 0
        table.add_column(column, justify="right" if figures else "left", no_wrap=figures, overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def models(summaries: Sequence[Summary]) -> None:
    """The zoo as a table."""
    _grid(None, ("model", "idea", "paper"), [(s.name, s.idea, s.paper) for s in summaries])


def report_table(table: ReportTable) -> None:
    """A table of a report, as it stands in report.md but without the marks."""
    console.print()
    cells = [[cell.replace("**", "") for cell in row] for row in table.cells]
    _grid(table.title, table.columns, cells, right=True)


def recommendation(
    answer: Recommendation, *, as_json: bool = False, title: str | None = None, matched: bool = True
) -> None:
    """A list of items with their attributes; `matched`: with the place that retrieval had them at."""
    if as_json:
        data = {"fallback": answer.fallback, "items": [dataclasses.asdict(r) for r in answer.items]}
        console.print_json(json.dumps(data, default=str))
        return
    if not answer.items:
        line("(no item qualifies)")
        return
    names = list(dict.fromkeys(n for r in answer.items for n, v in r.attributes.items() if _is_shown(v)))
    names = names[:SHOWN_ATTRIBUTES]
    rows = [
        (
            str(place),
            str(r.item),
            *(_text(r.attributes.get(n)) for n in names),
            f"{r.score:.3f}",
            *([str(r.match_place + 1)] if matched else []),
        )
        for place, r in enumerate(answer.items, 1)
    ]
    _grid(title, ("", "item", *names, "score", *(["place by match"] if matched else [])), rows)
    if answer.fallback is not None:
        line(f"(recently popular items: {answer.fallback})")


def similar_users(found: Sequence[SimilarUser], *, as_json: bool = False) -> None:
    """A list of people."""
    if as_json:
        console.print_json(json.dumps([dataclasses.asdict(u) for u in found], default=str))
        return
    rows = [(str(place), str(u.user), f"{u.score:.3f}") for place, u in enumerate(found, 1)]
    _grid(None, ("", "user", "score"), rows)


def _is_shown(value: Any) -> bool:
    return isinstance(value, str | int | float | list)


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(str(v) for v in value)
    return f"{value:g}" if isinstance(value, float) else str(value)


def tables(loaded: Tables) -> None:
    """The row account of every file, and what the columns were taken for."""
    for account in loaded.accounting:
        line(str(account))
        for reject in account.rejects[:10]:
            line(f"  {reject}")
        if len(account.rejects) > 10:
            line(f"  … and {len(account.rejects) - 10:,} more")
    line(loaded.schema.describe())


def dataset(built: Dataset) -> None:
    """Counts of a dataset."""
    facts: Mapping[str, int] = {
        **built.counts,
        "users": max(built.spec.num_users - 2, 0),
        "items": max(built.spec.num_items - 2, 0),
    }
    line(f"{built.folder}: " + ", ".join(f"{name} {count:,}" for name, count in facts.items()))
