"""recipes/match/item2vec.py: its measure by hand, and (slow) that the nearest films share genres."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import torch


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "match" / "item2vec.py"
    spec = importlib.util.spec_from_file_location("item2vec_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_overlap_by_hand(recipe: ModuleType) -> None:
    # items 2 to 4 have genres {2, 3}, {3}, {4}; item 2 with 3: 1/2, with 4: 0; item 3 with 2: 1/2, and a missing place
    genres = torch.tensor([[0, 0], [0, 0], [2, 3], [3, 0], [4, 0]])
    nearest = torch.tensor([[3, 4], [2, 0]])
    assert float(recipe.genre_overlap(genres, nearest, torch.tensor([2, 3]))) == pytest.approx(1 / 3)


def test_nearest_leaves_out_the_item_and_who_is_not_asked_for(
    recipe: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recipe, "NEAREST", 2)
    vectors = torch.tensor([[9.0, 0], [9, 0], [1, 0], [0.9, 0.1], [0.5, 0.5], [0, 1]])
    found = recipe.nearest_by_cosine(vectors, torch.tensor([2, 4, 5]))
    assert found.tolist() == [[4, 5], [2, 5], [4, 2]]


@pytest.mark.slow
def test_near_films_share_genres(recipe: ModuleType, real_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe.main([str(real_data / "ml-1m"), "--epochs", "1"])
    out = capsys.readouterr().out
    any_films, near = (float(re.search(rf"{name} (\d\.\d+)", out)[1]) for name in ("any films", "item2vec"))
    assert any_films < 0.2
    assert near > 0.4
