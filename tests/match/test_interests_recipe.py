"""recipes/match/interests.py: that it runs, goes on where it was, and what the knob does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from funnelrec.data.dataset import Dataset


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "match" / "interests.py"
    spec = importlib.util.spec_from_file_location("interests_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_it_runs_and_goes_on(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install 'funnelrec[plots]'")
    monkeypatch.setattr(recipe, "WORLD", {"users": 80, "items": 120, "interests": 4, "seed": 0})
    monkeypatch.setattr(recipe, "EPOCHS", 1)
    monkeypatch.setattr(recipe, "KNOB", (0.0, 1000.0))
    monkeypatch.setattr(recipe, "CANDIDATES", 60)
    recipe.main([str(tmp_path), "--models", "comirec_sa", "--interests", "1", "2"])
    printed = capsys.readouterr().out
    rows = [r.split(" | ") for r in printed.splitlines() if "comirec_sa" in r]
    assert [r[:4] for r in rows] == [["| best", "comirec_sa", k, "30"] for k in "12"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["best comirec_sa 1 30 0"]["agreement"] == pytest.approx(
        0
    )  # one interest tells nothing of the true ones
    monkeypatch.setattr(recipe, "run", None)  # finished runs are not run again
    recipe.main([str(tmp_path), "--models", "comirec_sa", "--interests", "1", "2"])
    with pytest.raises(TypeError, match="NoneType"):  # but one of another horizon is another run
        recipe.main([str(tmp_path), "--models", "comirec_sa", "--interests", "1", "--horizon", "1"])


def test_what_is_possible(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of forty directions in four numbers a sum of four is none of them; in 64 numbers it is each of them."""
    monkeypatch.setattr(recipe, "WIDTHS", (4, 64))
    world = recipe.simulate.load(users=300, items=2000, interests=4, seed=0)
    recipe.possible(world, Dataset.build(world.tables, tmp_path / "data"))
    rows = capsys.readouterr().out.splitlines()[2:]
    narrow, wide = ([float(x) for x in r.strip("| ").split(" | ")] for r in rows)
    assert narrow[1] > 2 * narrow[2]
    assert wide[1] == pytest.approx(wide[2], abs=0.03)


def test_the_knob_trades_one_for_the_other(
    recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install 'funnelrec[plots]'")
    monkeypatch.setattr(recipe, "WORLD", {"users": 80, "items": 120, "interests": 4, "seed": 0})
    monkeypatch.setattr(recipe, "EPOCHS", 3)
    monkeypatch.setattr(recipe, "KNOB", (0.0, 1000.0))
    monkeypatch.setattr(recipe, "CANDIDATES", 60)
    recipe.main([str(tmp_path), "--models", "comirec_sa", "--interests", "2", "--curve"])
    table = capsys.readouterr().out.split("| knob |")[1].splitlines()[2:4]
    low, high = (float(r.split(" | ")[3].rstrip(" |")) for r in table)
    assert low < high <= 1
    assert (tmp_path / "diversity.png").exists()
