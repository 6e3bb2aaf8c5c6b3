"""recipes/rank/frappe.py: its loss by hand, that it runs and goes on, its table, and (slow) that each model arrives."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.rank.logistic_regression import LogisticRegression
from tests.contracts import make_spec

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    spec = importlib.util.spec_from_file_location("frappe_recipe", ROOT / "recipes" / "rank" / "frappe.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["frappe_recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_penalty_by_hand(recipe: ModuleType) -> None:
    """Rows 1, 1, 2 of weights 3 and 4: BCE + .1 / 2 · (2/3 · 9 + 1/3 · 16); row 3 is not in the batch."""
    model = LogisticRegression(make_spec([("site", "context", 4, 1)]))
    with torch.no_grad():
        model.weight.table.weight.copy_(torch.tensor([[0.0], [3.0], [4.0], [5.0]]))
    batch = Batch(ids=torch.tensor([[1], [1], [2]], dtype=torch.int32), numbers=torch.zeros(3, 0), label=torch.ones(3))
    loss = recipe.L2OnUse(0.1)(model, batch)
    logits = torch.tensor([3.0, 3.0, 4.0])
    plain = F.binary_cross_entropy_with_logits(logits, torch.ones(3))
    torch.testing.assert_close(loss, plain + 0.05 * (2 / 3 * 9 + 1 / 3 * 16))
    loss.backward()
    error = (torch.sigmoid(logits) - 1) / 3
    expected = torch.stack([error[0] * 0, error[0] + error[1] + 0.3 * 2 / 3, error[2] + 0.4 / 3, error[0] * 0])
    torch.testing.assert_close(model.weight.table.weight.grad.to_dense().squeeze(1), expected)


def _write_libfm(folder: Path) -> None:
    draw = random.Random(0)
    for name, rows in (("train.REBUILT", 400), ("validation", 100), ("test", 100)):
        lines = []
        for _ in range(rows):
            features = [10 * field + draw.randrange(5) for field in range(10)]
            label = 1 if features[0] % 2 else -1
            lines.append(f"{label} " + " ".join(f"{f}:1" for f in features))
        (folder / f"frappe.{name}.libfm").write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_recipe_runs_and_goes_on(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_libfm(tmp_path)
    out = tmp_path / "out"
    recipe.main([str(tmp_path), "--models", "lr", "--out", str(out)])
    assert "| LR | 1.0000 | 1 |" in capsys.readouterr().out  # the first field tells the label
    kept = json.loads((out / "results.json").read_text())["rows"]
    assert [(r["model"], r["seed"]) for r in kept] == [("lr", 0)]
    marked = [{**kept[0], "test_auc": 0.5}]
    (out / "results.json").write_text(json.dumps({"rows": marked}))
    recipe.main([str(tmp_path), "--models", "lr", "fm", "--out", str(out)])
    printed = capsys.readouterr().out
    assert "| LR | 0.5000 |" in printed, "a finished run was repeated"
    assert "0.930 (missed)" in printed
    assert "fm − lr:" in printed


def test_the_ladder_tells_better_from_no_better(recipe: ModuleType) -> None:
    draw = np.random.default_rng(0)
    labels = (draw.random(4000) < 0.5).astype(np.float32)
    noise = draw.standard_normal((3, 4000)).astype(np.float32)
    logits = {"lr": labels + 2 * noise[0], "fm": labels + noise[1], "ffm": labels + noise[2]}
    better, same = recipe.ladder([], logits, labels)
    assert better.startswith("fm − lr: +")
    assert better.endswith("p < 0.001")
    assert not same.endswith("p < 0.001")


def test_the_page_shows_what_was_measured(recipe: ModuleType) -> None:
    rows = json.loads((ROOT / "benchmarks" / "results" / "frappe.json").read_text(encoding="utf-8"))["rows"]
    assert recipe.table(rows) in (ROOT / "docs" / "ranking.md").read_text(encoding="utf-8")


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["lr", "fm", "ffm", "afm", "nfm", "deepfm", "fibinet"])
def test_band(recipe: ModuleType, real_data: Path, tmp_path: Path, name: str) -> None:
    outcome = recipe.run(name, recipe.dataset(real_data / "frappe", tmp_path / "frappe"), progress=False)
    assert outcome.row["test_auc"] >= recipe.SETTINGS[name].at_least
