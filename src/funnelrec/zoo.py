"""The zoo: every model there is, found by looking at the folders; nothing is registered and nothing is imported.

A model is a file of a stage folder whose docstring has a `Paper:` line (`Source:` where there is no paper). Its name
is "stage/file": `rank/deepfm` is the class named in the `__all__` of `funnelrec/rank/deepfm.py`.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

__all__ = ["STAGES", "Summary", "load", "names", "summary"]

_HERE = Path(__file__).parent
_PATTERNS = {  # where a stage keeps its models; match/index holds indexes, which are no models
    "encode": ("*.py", "*/*.py"),
    "match": ("*.py",),
    "rank": ("*.py",),
    "rerank": ("*.py",),
}
_PAPER = ("Paper:", "Source:")
STAGES: tuple[str, ...] = tuple(_PATTERNS)


@dataclass(frozen=True, slots=True)
class Summary:
    """The head of a model's docstring: its first line, and its `Paper:` (or `Source:`) and `Idea:` paragraphs, each as
    one line."""

    name: str
    title: str
    paper: str
    idea: str


@functools.cache
def _docstring(path: Path) -> str:
    return ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""


def _paragraph(docstring: str, *keys: str) -> str:
    """The text after the first line that begins with one of `keys`, joined with the indented lines that continue it;
    "" where there is none."""
    lines = docstring.splitlines()
    start = next((n for n, line in enumerate(lines) if line.startswith(keys)), None)
    if start is None:
        return ""
    parts = [lines[start].partition(":")[2].strip()]
    for line in lines[start + 1 :]:
        if not line.startswith(" "):
            break
        parts.append(line.strip())
    return " ".join(parts)


def names(stage: str | None = None) -> list[str]:
    """Sorted names of the models of one stage, or of all stages in the order of the funnel. Imports no model.

    Raises ValueError for a stage that does not exist.
    """
    if stage is not None and stage not in _PATTERNS:
        raise ValueError(f"no stage '{stage}'; the stages are {', '.join(STAGES)}")
    found = []
    for one in STAGES if stage is None else (stage,):
        files = {p for pattern in _PATTERNS[one] for p in (_HERE / one).glob(pattern) if not p.name.startswith("_")}
        found += sorted(
            p.relative_to(_HERE).with_suffix("").as_posix() for p in files if _paragraph(_docstring(p), *_PAPER)
        )
    return found


def _require(name: str) -> None:
    known = names()
    if name not in known:
        by_file = {n.rpartition("/")[2]: n for n in known}
        file = name.lower().rpartition("/")[2]  # a model of that very name in another stage is what was meant
        near = (
            [file] if file in by_file else difflib.get_close_matches(name.lower(), [*known, *by_file], n=1, cutoff=0.4)
        )
        hint = f"did you mean '{by_file.get(near[0], near[0])}'?" if near else f"there are {', '.join(known)}"
        raise ValueError(f"no model '{name}' in the zoo; {hint}")


def load(name: str) -> type[Any]:
    """The class of the model `name`, e.g. load("rank/deepfm"). Imports that one file and what it needs.

    Raises ValueError, with the nearest name there is, for an unknown name.
    """
    _require(name)
    module = importlib.import_module("funnelrec." + name.replace("/", "."))
    exported = list(getattr(module, "__all__", ()))
    if len(exported) != 1:
        raise ValueError(f"the file of '{name}' must name one class in __all__, received {exported}")
    model: type[Any] = getattr(module, exported[0])
    return model


def summary(name: str) -> Summary:
    """Title, paper and idea of a model, read from its file without importing it. Raises ValueError as `load` does."""
    _require(name)
    docstring = _docstring(_HERE / f"{name}.py")
    title = docstring.partition("\n")[0].strip()
    return Summary(name, title, _paragraph(docstring, *_PAPER), _paragraph(docstring, "Idea:"))
