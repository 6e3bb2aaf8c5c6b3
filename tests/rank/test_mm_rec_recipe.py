"""recipes/rank/mm_rec.py: what the lists of films hold, and that the three tasks of posters run on made-up films."""

from __future__ import annotations

import gzip
import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

from funnelrec.data.histories import Histories


@pytest.fixture(scope="module")
def recipe() -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "rank" / "mm_rec.py"
    spec = importlib.util.spec_from_file_location("mm_rec_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_a_list_is_a_liked_film_and_four_that_were_never_rated(recipe: ModuleType) -> None:
    """Two users; what is passed over is what others liked; a history ends before the moment."""
    users = torch.tensor([1, 1, 1, *[2] * 8])
    items = torch.tensor([2, 3, 4, *range(4, 12)])
    times = torch.arange(11)
    rated = torch.zeros(3, 12, dtype=torch.bool)
    rated[users, items] = True
    rated[1, 5] = True  # rated, though not liked
    histories = Histories.build(users.numpy(), items.numpy(), times.numpy(), 3)
    lists = recipe.Tastes(users, items, times, histories, rated)
    batch = lists.gather(torch.full((50,), 2), torch.Generator().manual_seed(0))
    candidates = batch.item.view(50, 5)
    assert (candidates[:, 0] == 4).all() and batch.label.view(50, 5)[:, 0].all()
    assert set(candidates[:, 1:].flatten().tolist()) == {6, 7, 8, 9, 10, 11}
    assert batch.history[batch.mask].unique().tolist() == [2, 3]
    assert lists.newest(3).items.tolist() == [9, 10, 11]


def test_posters_runs(recipe: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Sixteen films of two kinds, which words and posters tell; of twenty people half like one kind."""
    pillow = pytest.importorskip("PIL.Image", reason="Pillow is not installed; pip install 'funnelrec[images]'")
    rng = np.random.default_rng(0)
    (tmp_path / "posters").mkdir()
    for film in range(1, 17):
        colour = (200, 30, 30) if film % 2 else (30, 30, 200)
        pixels = np.clip(np.array(colour) + rng.normal(0, 20, (80, 60, 3)), 0, 255).astype(np.uint8)
        pillow.fromarray(pixels).save(tmp_path / "posters" / f"{film}.jpg")
    movies = [f"{film}::Film {film} (1999)::Drama" for film in range(1, 17)]
    (tmp_path / "movies.dat").write_text("\n".join(movies), encoding="latin-1")
    (tmp_path / "users.dat").write_text("\n".join(f"{u}::F::1::1::1" for u in range(1, 21)), encoding="latin-1")
    moments = [(u, film) for u in range(1, 21) for film in rng.permutation(np.arange(1 + u % 2, 17, 2)).tolist()[:6]]
    ratings = [f"{u}::{film}::5::{1000 + n}" for n, (u, film) in enumerate(rng.permutation(moments).tolist())]
    (tmp_path / "ratings.dat").write_text("\n".join(ratings), encoding="latin-1")
    with gzip.open(tmp_path / "omdb_metadata.jsonl.gz", "wt", encoding="utf-8") as file:
        for film in range(1, 17):
            plot = "a battle at sea" if film % 2 else "a wedding in spring"
            file.write(json.dumps({"movieId": film, "title": f"Film {film} (1999)", "Plot": plot}) + "\n")
    recipe.main(["posters", str(tmp_path / "posters"), "--films", str(tmp_path), "--epochs", "30"])
    printed = capsys.readouterr().out
    assert "16 films" in printed
    found = {row.split(" | ")[0].strip("| "): float(row.split(" | ")[1][:6]) for row in printed.splitlines()[3:6]}
    assert list(found) == ["T+V", "T", "V"] and min(found.values()) > 0.8
    assert "T+V above V: " in printed
