"""recipes/rank/frappe.py: its loss by hand, that it runs, and (slow) that each model lands in its band."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
import torch.nn.functional as F

from funnelrec.core.batch import Batch
from funnelrec.rank.logistic_regression import LogisticRegression
from tests.contracts import make_spec


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "rank" / "frappe.py"
    spec = importlib.util.spec_from_file_location("frappe_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["frappe_recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(("by_use", "held"), [(False, (1.0, 1.0)), (True, (2 / 3, 1 / 3))])
def test_the_penalty_by_hand(recipe: ModuleType, by_use: bool, held: tuple[float, float]) -> None:
    """Rows 1, 1, 2 of weights 3 and 4: BCE + .1 / 2 · (n₁ 9 + n₂ 16); row 3 is not in the batch and is left alone."""
    model = LogisticRegression(make_spec([("site", "context", 4, 1)]))
    with torch.no_grad():
        model.weight.table.weight.copy_(torch.tensor([[0.0], [3.0], [4.0], [5.0]]))
    batch = Batch(ids=torch.tensor([[1], [1], [2]], dtype=torch.int32), numbers=torch.zeros(3, 0), label=torch.ones(3))
    loss = recipe.TableL2(0.1, by_use=by_use)(model, batch)
    logits = torch.tensor([3.0, 3.0, 4.0])
    plain = F.binary_cross_entropy_with_logits(logits, torch.ones(3))
    torch.testing.assert_close(loss, plain + 0.05 * (held[0] * 9 + held[1] * 16))
    loss.backward()
    error = (torch.sigmoid(logits) - 1) / 3
    expected = torch.stack([error[0] * 0, error[0] + error[1] + 0.3 * held[0], error[2] + 0.4 * held[1], error[0] * 0])
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


def test_the_recipe_runs(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_libfm(tmp_path)
    recipe.main([str(tmp_path), "--models", "lr"])
    row = capsys.readouterr().out.splitlines()[-1]
    assert row.startswith("| lr     | 1.0000")  # the first field tells the label
    assert row.endswith("OUTSIDE |")  # which is no result of Frappe


@pytest.mark.slow
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("name", ["lr", "fm", "deepfm"])
def test_band(recipe: ModuleType, real_data: Path, tmp_path: Path, name: str) -> None:
    setting = recipe.SETTINGS[name]
    outcome = recipe.run(setting, recipe.dataset(real_data / "frappe", tmp_path / "frappe"), progress=False)
    low, high = setting.band
    assert low <= outcome.test.means["auc"] <= high
