"""recipes/match/interests.py: that it runs, goes on where it was, and what the knob does."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest


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
    rows = [r for r in capsys.readouterr().out.splitlines() if r.startswith("| comirec_sa")]
    assert [r.split(" | ")[1] for r in rows] == ["1", "2"]
    stored = json.loads((tmp_path / "results.json").read_text())
    assert stored["comirec_sa 1 0"]["agreement"] == pytest.approx(0)  # one interest tells nothing of the true ones
    monkeypatch.setattr(recipe, "run", None)  # finished runs are not run again
    recipe.main([str(tmp_path), "--models", "comirec_sa", "--interests", "1", "2"])


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
    low, high = (float(r.split(" | ")[2].rstrip(" |")) for r in table)
    assert low < high <= 1
    assert (tmp_path / "diversity.png").exists()
