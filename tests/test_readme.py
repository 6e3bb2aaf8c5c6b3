"""The README does what it says: every fenced block runs, every link leads somewhere, the table of models is current."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from funnelrec.cli.models_table import filled
from funnelrec.data.sources import simulate

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.MULTILINE | re.DOTALL)


def blocks(page: Path, language: str) -> list[str]:
    return [body for found, body in BLOCK.findall(page.read_text(encoding="utf-8")) if found == language]


def run(command: list[str], folder: Path) -> str:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}  # beside other tests, waking threads costs more than it gains
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, f"{shlex.join(command)}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the events.csv, items.csv and new.csv that the README speaks of."""
    folder = tmp_path_factory.mktemp("shop")
    world = simulate.load(users=60, items=80, events=4000)
    world.tables.events.write_csv(folder / "events.csv")
    items = world.tables.items.drop("picture", strict=False)
    items.write_csv(folder / "items.csv")
    items[:2].with_columns(pl.col("item") + 1000).write_csv(folder / "new.csv")
    return folder


@pytest.mark.parametrize("body", blocks(ROOT / "README.md", "python"))
def test_python_blocks(body: str, tmp_path: Path) -> None:
    out = run([sys.executable, "-W", "error", "-c", body], tmp_path)
    assert "match → rank → rerank" in out


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_shell_blocks(page: Path, shop: Path) -> None:
    """`funnelrec` lines run as they stand, in a folder that holds what they name; of `make` lines, what make would do
    is asked (`make demo` itself is tests/cli/test_demo.py, `make test` is this)."""
    for body in blocks(page, "bash"):
        for line in body.splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["make"]:
                assert run(["make", "--dry-run", "--always-make", *words[1:]], ROOT)
            elif words[:1] == ["funnelrec"]:
                run([sys.executable, "-m", *words], shop)
            elif words:
                raise AssertionError(f"{page.name} has a shell line that no test knows how to run: {line}")


def test_the_table_of_models_is_current() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert filled(text) == text, "run: python -m funnelrec.cli.models_table README.md"
    assert filled(text.replace("match/sasrec]", "match/other]")) == text  # a table that is not current is seen


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#\s]+)", page.read_text(encoding="utf-8")):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_tree_names_what_is_there() -> None:
    tree = next(body for body in blocks(ROOT / "README.md", "") if "src/funnelrec/" in body)
    named = re.findall(r"[├└]── (\w+(?:\.py|/))", tree)
    there = {p.name + "/" for p in (ROOT / "src" / "funnelrec").iterdir() if p.is_dir() and p.name != "__pycache__"}
    assert there <= set(named), f"not in the tree: {sorted(there - set(named))}"
    for name in named:
        assert (ROOT / "src" / "funnelrec" / name).exists()
