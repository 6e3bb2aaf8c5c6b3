"""recipes/match/cold.py and cold_world.py: new items, found by what is known of them, beside chance and the truth."""

from __future__ import annotations

import gzip
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import torch


def load(name: str) -> ModuleType:
    path = Path(__file__).parents[2] / "recipes" / "match" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def world() -> ModuleType:
    return load("cold_world")


def test_new_items_are_found_by_title_and_by_picture(world: ModuleType) -> None:
    """Far above chance, below the truth; each picks up what its content says."""
    found = {name: float(values.mean()) for name, values in world.measure(400, 400, 0, 8, 8).items()}
    assert list(found) == ["chance", "titles", "pictures", "both", "oracle"]
    for kind in ("titles", "pictures", "both"):
        assert found["chance"] + 0.15 < found[kind] < found["oracle"] + 0.02
    assert found["oracle"] < 1


def test_content_that_says_nothing_is_seen(world: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control: shuffled pictures are near chance."""
    honest = world.pictures

    def shuffled(*arguments: object) -> torch.Tensor:
        vectors: torch.Tensor = honest(*arguments)
        return vectors[torch.randperm(len(vectors), generator=torch.Generator().manual_seed(0))]

    monkeypatch.setattr(world, "pictures", shuffled)
    found = {name: float(values.mean()) for name, values in world.measure(400, 400, 0, 8, 8).items()}
    assert found["pictures"] < found["titles"] - 0.15


def test_recall_by_hand(world: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two places; the first user wants items 0 and 3 and was shown 0 before, the second wants 1, 2 and 3."""
    monkeypatch.setattr(world, "K", 2)
    scores = np.array([[9.0, 8.0, 7.0, 6.0], [1.0, 9.0, 2.0, 8.0]])
    truth = np.array([[True, False, False, True], [False, True, True, True]])
    free = np.array([[False, True, True, True], [True, True, True, True]])
    assert world.recall(scores, truth, free).tolist() == [0.0, 1.0]


def test_kinds_of_vectors_are_compared_on_the_same_users(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A made-up shop of two genres: the tables, and the paired difference; vectors against themselves differ by 0."""
    rng = np.random.default_rng(0)
    frame = pl.DataFrame({"iid": range(40), "title": [f"Film {i} (1999)" for i in range(40)]})
    frame = frame.with_columns(pl.Series("genres", [("Comedy|War", "Drama")[i % 2] for i in range(40)]))
    tables = {"item": frame}
    pairs = {"train": (0, 30), "cold_vali": (30, 35), "cold_test": (35, 40)}
    for name, (first, last) in pairs.items():
        rows = [(u, i) for u in range(60) for i in range(first, last) if i % 2 == u % 2 and rng.random() < 0.7]
        tables[name] = pl.DataFrame(rows, schema=["uid", "iid"], orient="row")
    for name, own in tables.items():
        with gzip.open(tmp_path / f"{name}_df.csv.gz", "wb") as file:
            file.write(own.write_csv().encode())
    lines = [f"{i}::Film {i} (1999)::x" for i in range(40)]
    (tmp_path / "movies.dat").write_text("\n".join(lines), encoding="latin-1")
    with gzip.open(tmp_path / "movies_extrainfos.dat.gz", "wt", encoding="latin-1") as text:
        for i in range(40):
            word = ("laugh battle", "tears")[i % 2]
            text.write("::".join([str(i), "t", "y", "PG", "r", "g", "D", "w", "A, B", word]) + "\n")
    recipe = load("cold")
    recipe.main([str(tmp_path), str(tmp_path / "movies.dat"), "--vectors", "both", "words", "both", "--epochs", "4"])
    printed = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("| words | 0 | test |") for line in printed) == len(recipe.SCALES)
    assert "Recall@20 of words above both:" in printed[-2]
    assert "Recall@20 of both above both: +0.0000 [+0.0000, +0.0000], p = 1.0000" in printed[-1]


def test_what_is_measured_chooses_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Two scales, four people. Known films of 0 and 2 allow the long one, those of 1 and 3 the short one alone, so
    each half gets what the other half allows, and its own test figures; of two kinds the one that validates better."""
    recipe = load("cold")
    nan = np.nan

    def figures(warm: list[float], cold: list[float]) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        named = {"cold among cold": cold, "cold among all": cold, "warm among all": warm}
        return {name: (np.array(v, dtype=float),) * 2 for name, v in named.items()}

    test = {
        ("a", 0.9): figures([1, 1, nan, 0], [0.4, 9, 0.6, 9]),
        ("a", 1.0): figures([0.3, 0.2, nan, 0.2], [9, 0.2, 9, nan]),
        ("b", 0.9): figures([1, 1, 1, 1], [9, 9, 9, 9]),
    }
    valid = {key: figures([1] * 4, [{"a": 0.5, "b": 0.1}[key[0]]] * 4) for key in test}
    valid["b", 1.0] = figures([0] * 4, [0.9] * 4)  # more new films, but no known ones
    even = np.array([True, False, True, False])
    assert recipe.choice(valid, test, even) == ("a", 1.0)
    assert recipe.choice(valid, test, ~even) == ("a", 0.9)
    recipe.chosen(valid, test)
    line = capsys.readouterr().out
    assert "a at 1 and a at 0.9" in line
    assert "| 0.4000 ±" in line  # cold: .4 and .6 of people 0 and 2 at .9, .2 of person 1 at 1
    assert "| 0.4667 ±" in line  # warm: 1 of person 0 at .9, .2 and .2 of persons 1 and 3 at 1
    with pytest.raises(ValueError, match=r"no vectors at any scale leave 0\.25 of the known films"):
        recipe.choice(valid, {("a", 1.0): figures([0.1] * 4, [1] * 4)}, even)
