"""recipes/match/comirec.py and ml1m.py: they run on made-up files, go on where they were, and show what is asked."""

from __future__ import annotations

import importlib.util
import json
import random
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import polars as pl
import pytest
import torch

from funnelrec import Dataset, Schema
from funnelrec.core.batch import Batch
from funnelrec.core.schema import Spec
from funnelrec.data.batches import counter_generator
from funnelrec.data.split import GlobalTime
from funnelrec.data.tables import Tables
from funnelrec.match.gru4rec import GRU4Rec
from funnelrec.match.sasrec import SASRec

ROOT = Path(__file__).parents[2]


def _recipe(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"{name}_recipe", ROOT / "recipes" / "match" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def comirec() -> ModuleType:
    return _recipe("comirec")


@pytest.fixture(scope="module")
def ml1m() -> ModuleType:
    return _recipe("ml1m")


def test_the_protocol_runs_and_goes_on(comirec: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = random.Random(0)
    rows = [(u, item, day // 2) for u in range(40) for day, item in enumerate(draw.sample(range(30), 10))]
    frame = pl.DataFrame(rows, schema=["user", "item", "timestamp"], orient="row")
    frame.write_csv(tmp_path / "interactions.tsv", separator="\t")
    out = tmp_path / "out"
    call = [str(tmp_path), "--seeds", "0", "1", "--passes", "3", "--out", str(out)]
    comirec.main([*call, "--models", "popularity", "youtube_dnn", "comirec_sa:2"])
    printed = capsys.readouterr().out
    assert "recall@50: comirec_sa:2 − youtube_dnn:" in printed
    rows = json.loads((out / "books" / "results.json").read_text())["rows"]
    assert {(r["model"], r["seed"]) for r in rows} == {
        ("popularity", 0), ("youtube_dnn", 0), ("youtube_dnn", 1), ("comirec_sa:2", 0), ("comirec_sa:2", 1)
    }  # fmt: skip
    assert all(0 < r["recall@50"] <= 1 for r in rows)  # 4 people, 2 of the 30 items each
    changed = json.loads((out / "books" / "popularity.0.json").read_text()) | {"recall@50": 0.25}
    (out / "books" / "popularity.0.json").write_text(json.dumps(changed))
    comirec.main([*call, "--models", "popularity"])
    assert "| 25.00 |" in capsys.readouterr().out, "a finished run was repeated"


def test_rows_of_one_day_are_shuffled_by_a_fixed_seed(comirec: ModuleType, tmp_path: Path) -> None:
    frame = pl.DataFrame({"user": [0] * 50, "item": list(range(50)), "timestamp": [86_400] * 50})
    frame.write_csv(tmp_path / "interactions.tsv", separator="\t")
    order = [comirec.tables(tmp_path)[1].events["item"].to_list() for _ in range(2)]
    assert order[0] == order[1] and sorted(order[0]) == list(range(50))
    steps = np.diff(order[0])
    assert (steps > 0).mean() < 0.7  # the file's order is that of the item ids


def test_windows_reach_what_lies_before_the_newest_items(ml1m: ModuleType, tmp_path: Path) -> None:
    events = pl.DataFrame({"u": [7] * 30 + [8] * 4, "i": [*range(30), *range(4)], "t": [*range(30), *range(4)]})
    tables = Tables(events, Schema(user="u", item="i", time="t"))
    data = Dataset.build(tables, tmp_path / "d", split=GlobalTime(0.0, 0.0))
    windows = ml1m.Windows(data, max_len=5, rounds=200)
    assert len(windows) == 400
    batch = windows.gather(torch.arange(400), counter_generator(0))
    items = data.item_vocabulary.decode(batch.target.flatten().numpy()).to_numpy().reshape(400, 5)
    long = batch.mask.all(1).numpy()
    first = items[long][:, 0]
    assert (np.diff(items[long], axis=1) == 1).all() and set(first) <= set(range(1, 26))
    assert 0.4 < (first == 25).mean() < 0.65 and len(set(first)) > 20  # half of them newest, the rest anywhere
    short = batch.mask.sum(1) == 3
    assert int(short.sum()) == 200 and (batch.target[short] == batch.target[short][0]).all()
    with pytest.raises(ValueError, match=r"give gather a torch.Generator"):
        windows.gather(torch.arange(2))


def test_matchers_side_by_side_add_their_scores(ml1m: ModuleType) -> None:
    spec = Spec(num_items=12)
    first, second = SASRec(spec, embedding_dim=4).eval(), GRU4Rec(spec, embedding_dim=6).eval()
    batch = Batch(history=torch.tensor([[0, 3, 4], [5, 6, 7]]), mask=torch.tensor([[False, True, True], [True] * 3]))
    rows = torch.arange(12)
    with torch.no_grad():
        scores = [m.encode_users(batch)[0][:, 0] @ m.encode_items(rows).T for m in (first, second)]
        both = ml1m.SideBySide([first, second], (1.0, 0.5))
        users, valid = both.encode_users(batch)
        torch.testing.assert_close(users[:, 0] @ both.encode_items(rows).T, scores[0] + 0.5 * scores[1])
        teaches = both.encode_positions(batch)  # as a teacher: after each item, the newest one too
        torch.testing.assert_close(teaches[:, -1], users[:, 0])
    assert valid.all() and users.shape == (2, 1, 10)


def test_pages_show_what_was_measured(comirec: ModuleType) -> None:
    page = (ROOT / "docs" / "matching.md").read_text(encoding="utf-8")
    measured = json.loads((ROOT / "benchmarks" / "results" / "comirec.json").read_text(encoding="utf-8"))
    for part in ("films", "books"):
        assert comirec.table(measured[part]["rows"]) in page
