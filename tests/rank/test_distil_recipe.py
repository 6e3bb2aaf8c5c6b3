"""recipes/rank/distil.py: that it runs and what it prints; (slow) that the student keeps what it should."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from funnelrec import Dataset
from funnelrec.data.examples import Impressions
from funnelrec.data.sources.simulate import World


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "rank" / "distil.py"
    spec = importlib.util.spec_from_file_location("distil_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["distil_recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_recipe_runs(recipe: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main(["--seeds", "1", "--users", "40", "--items", "60"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].startswith("| 0 | 0.")
    assert lines[-1].startswith("| all | 0.")


def test_the_gap_by_hand(recipe: ModuleType) -> None:
    outcome = recipe.Outcome(oracle=0.9, teacher=0.85, alone=0.80, taught=0.84, size=0.1, cost=(2.0, 1.0))
    assert outcome.kept == pytest.approx(0.8)


def test_hidden_labels_are_hidden(recipe: ModuleType, tmp_path: Path) -> None:
    data = Dataset.build(World.build(users=30, items=40).tables, tmp_path / "world")
    train = Impressions(data, "train")
    shown = torch.arange(len(train)) % 3 == 0
    pupil = recipe.Rows(train, shown, only_labelled=False).gather(torch.arange(6), None)
    assert pupil.label.isnan().tolist() == [False, True, True, False, True, True]
    lonely = recipe.Rows(train, shown, only_labelled=True)
    assert len(lonely) == int(shown.sum())
    assert torch.equal(lonely.gather(torch.tensor([1]), None).label, train.gather(torch.tensor([3])).label)


def test_the_student_is_small_enough(recipe: ModuleType, tmp_path: Path) -> None:
    data = Dataset.build(World.build(users=800, items=500, events=3000).tables, tmp_path / "world")
    teacher, student = (s.build(data.spec, 0) for s in (recipe.TEACHER, recipe.STUDENT))
    assert recipe.parameters(student) <= recipe.parameters(teacher) / 8


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_band(recipe: ModuleType) -> None:
    kept = [recipe.run(seed).kept for seed in range(5)]
    assert np.mean(kept) >= 0.8
