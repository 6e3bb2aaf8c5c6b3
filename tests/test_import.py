"""Importing is the first experience: it must be quick, light and silent."""

from __future__ import annotations

import importlib
import subprocess
import sys

import pytest

import funnelrec

HEAVY = ("torch", "polars", "pyarrow", "numpy", "pandas", "faiss", "lightgbm", "duckdb", "matplotlib", "typer", "rich")


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def heavy_modules_after(statement: str) -> list[str]:
    code = f"import sys\n{statement}\nprint(*[m for m in {HEAVY!r} if m in sys.modules])"
    return run(code).split()


def test_import_loads_nothing_heavy() -> None:
    assert heavy_modules_after("import funnelrec") == []


def test_the_check_above_sees_a_heavy_import() -> None:
    assert "torch" in heavy_modules_after("import funnelrec; funnelrec.Batch")


def test_import_is_under_50_ms() -> None:
    code = "import time; t = time.perf_counter(); import funnelrec; print(time.perf_counter() - t)"
    assert min(float(run(code)) for _ in range(5)) < 0.050


def test_import_opens_no_connection() -> None:
    code = (
        "import sys\n"
        "def watch(event, args):\n"
        "    if event.startswith('socket.'): raise RuntimeError(event)\n"
        "sys.addaudithook(watch)\n"
        "import funnelrec\n"
        "for name in funnelrec.__all__: getattr(funnelrec, name)"
    )
    run(code)


def first_party_modules(name: str) -> list[str]:
    code = (
        f"import sys; from funnelrec import zoo; zoo.load({name!r})\n"
        "print(*[m for m in sys.modules if m.startswith('funnelrec')])"
    )
    return run(code).split()


@pytest.mark.parametrize("name", ["rank/deepfm", "rank/din", "match/sasrec", "match/comirec_sa"])
def test_one_model_pulls_at_most_20_first_party_modules(name: str) -> None:
    assert len(first_party_modules(name)) <= 20


@pytest.mark.parametrize("name", funnelrec.__all__)
def test_every_public_name_loads(name: str) -> None:
    value = getattr(funnelrec, name)
    assert value.__name__ == name
    home = importlib.import_module(value.__module__)
    assert getattr(home, name) is value


def test_a_wrong_name_lists_the_right_ones() -> None:
    with pytest.raises(AttributeError, match=r"funnelrec has no 'Shema'; it has .*Schema"):
        funnelrec.Shema  # noqa: B018
