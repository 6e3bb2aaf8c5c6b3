"""The README's table of models, made from their docstrings: `python -m funnelrec.cli.models_table README.md`."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from funnelrec import zoo

__all__ = ["filled", "models_table"]

SECTION = re.compile(r"(<!-- models: [^\n]*-->\n).*?(<!-- end of models -->)", flags=re.DOTALL)


def models_table() -> str:
    """One line a model: where it is, what it is, its paper."""
    lines = ["| model | what it is | paper |", "|---|---|---|"]
    for name in zoo.names():
        about = zoo.summary(name)
        title = about.title.partition(" — ")[2].rstrip(".") or about.title
        paper = re.sub(r"arXiv:(\S+?)\.?$", r"[arXiv:\1](https://arxiv.org/abs/\1)", about.paper)
        lines.append(f"| [{name}](src/funnelrec/{name}.py) | {title} | {paper} |")
    return "\n".join(lines) + "\n"


def filled(text: str) -> str:
    """`text` with the table between its two marks made anew."""
    return SECTION.sub(lambda found: found[1] + models_table() + found[2], text)


if __name__ == "__main__":
    path = Path(sys.argv[1])
    path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
