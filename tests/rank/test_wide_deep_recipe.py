"""recipes/rank/wide_deep.py: that it runs on both sources, what it counts, and (slow) that L1 costs no AUC."""

from __future__ import annotations

import importlib.util
import random
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.rank.wide_deep import WideDeep
from tests.contracts import make_spec


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "rank" / "wide_deep.py"
    spec = importlib.util.spec_from_file_location("wide_deep_recipe", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["wide_deep_recipe"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def _write_adult(file: Path) -> None:
    draw = random.Random(0)
    names = (
        "age,workclass,fnlwgt,education,educational-num,marital-status,occupation,relationship,race,gender,"
        "capital-gain,capital-loss,hours-per-week,native-country,income"
    )
    lines = [names]
    for _ in range(400):
        rich = draw.random() < 0.3
        job = draw.choice(("?", "Sales", "Craft-repair"))
        lines.append(
            f"{draw.randrange(17, 90)},Private,1,{'Masters' if rich else '11th'},{9 + 5 * rich},Divorced,{job},"
            f"Wife,White,Female,{draw.choice((0, 4000))},0,{draw.randrange(10, 60)},Cuba,{'>50K' if rich else '<=50K'}"
        )
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_adult(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _write_adult(tmp_path / "adult.csv")
    recipe.main(["adult", str(tmp_path), "--l1", "0", "100000", "--seeds", "0", "1"])
    rows = [line.split(" | ") for line in capsys.readouterr().out.splitlines()[2:]]
    assert [row[0] for row in rows] == ["| 0", "| 0", "| 1", "| 1", "| all", "| all"]
    assert rows[0][2].startswith("0.0% of ")
    assert rows[1][2].startswith("100.0% of ")
    assert rows[0][4] == "1.0000"  # the schooling tells the label
    assert float(rows[1][5].split()[0]) == pytest.approx(float(rows[1][4]) - 1.0, abs=1e-4)
    assert float(rows[4][5].split()[0]) == 0.0
    data = recipe.adult(tmp_path, 0, tmp_path / "data")
    assert [c.name for c in data.spec.categories][-4:] == [f"{name} band" for name in recipe.BANDS]
    with pytest.raises(ValueError, match=r"there is no adult\.csv in .*; pass the folder that holds it"):
        recipe.adult(tmp_path / "data", 0, tmp_path / "more")


def test_only_weights_that_occur_are_counted(recipe: ModuleType) -> None:
    """Values 2 and 3 of a with 2 of b: three values and two combinations, of which one and one are zero."""

    class Rows:
        def __len__(self) -> int:
            return 2

        def gather(self, index: torch.Tensor, generator: torch.Generator | None = None) -> Batch:
            return Batch(
                ids=torch.tensor([[2, 5], [3, 5]], dtype=torch.int32)[index], numbers=torch.zeros(len(index), 0)
            )

    model = WideDeep(make_spec([("a", "context", 4, 1), ("b", "context", 9, 1)]), crosses=[["a", "b"]], hidden=(2,))
    with torch.no_grad():
        model.wide.values.table.weight[torch.tensor([2, 5])] = 1.0
        model.wide.combinations.weight[model.wide.cross_rows(torch.tensor([[3, 5]]))[0, 0]] = -1.0
    assert recipe.zeros(model, Batches(Rows(), 1)) == (2, 5)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_l1_makes_zeros_and_costs_no_auc(recipe: ModuleType, real_data: Path, tmp_path: Path) -> None:
    source = recipe.SOURCES["adult"]
    data = source.load(real_data / "adult-census", 0, tmp_path / "data")
    runs = [recipe.run(source, data, l1) for l1 in (0.0, 1.0, 10.0, 30.0)]
    shares = [run.share for run in runs]
    assert shares == sorted(shares)
    assert shares[-1] >= 0.8
    assert runs[0].test.means["auc"] > 0.91
    assert abs(runs[-1].test.means["auc"] - runs[0].test.means["auc"]) <= 0.002
