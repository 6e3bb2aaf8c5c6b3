"""`funnelrec compare`: every model over its seeds beside the baselines, resumed, and one line for every mistake."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest

from funnelrec.cli.app import run
from funnelrec.cli.compare import named_choices
from funnelrec.data.sources import simulate


@pytest.fixture(scope="module")
def events(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("events")
    world = simulate.load(users=60, items=80, events=3000)
    world.tables.events.write_csv(folder / "events.csv")
    return folder / "events.csv"


def test_models_beside_the_baselines_and_again_without_training(
    events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = f"compare {events} -o {tmp_path}/out --seeds 2 --epochs 2 --no-progress --match sasrec(max_len=10)"
    words = [*words.split(), "--rank", "deepfm,deepfm(embedding_dim=4, hidden=(8,))"]
    assert run(words) == 0
    report = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    tables = {t["title"]: t["rows"] for t in report["tables"]}
    rank = {row["model"]: row["runs"]["auc"] for row in tables["Rank: over the seeds"]}
    assert list(rank) == ["logistic_regression", "fm", "deepfm", "deepfm(embedding_dim=4, hidden=(8,))"]
    assert all(len(areas) == 2 for areas in rank.values())
    assert rank["deepfm"][0] != rank["deepfm"][1], "two seeds are two runs"
    match = {row["model"]: row["runs"]["ndcg@10"] for row in tables["Match: over the seeds"]}
    assert len(match["item_cf"]) == 1, "what is counted is the same for every seed"
    assert len(match["sasrec(max_len=10)"]) == 2
    tested = next(row for row in tables["Rank: scoring what was shown"] if row["model"] == "deepfm")
    assert tested["versus"] in ("logistic_regression", "fm")
    assert list((tmp_path / "out" / "report").glob("*.png"))
    capsys.readouterr()
    before = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "work" / "rank").rglob("*.safetensors")}
    assert before
    time.sleep(0.02)
    assert run(words) == 0
    again = json.loads((tmp_path / "out" / "report" / "report.json").read_text())
    assert {t["title"]: t["rows"] for t in again["tables"]}["Rank: over the seeds"] == tables["Rank: over the seeds"]
    after = {f: f.stat().st_mtime_ns for f in (tmp_path / "out" / "work" / "rank").rglob("*.safetensors")}
    assert before == after, "a finished run was trained again"


def test_a_plain_table_of_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = ["label,site,hour"] + [f"{i % 2},s{i % 2 + 2 * (i % 3)},{i % 7}" for i in range(400)]
    (tmp_path / "rows.csv").write_text("\n".join(lines) + "\n")
    schema = {"label": "label", "context": [{"kind": "category", "name": n} for n in ("site", "hour")]}
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    words = f"compare {tmp_path}/rows.csv --schema {tmp_path}/schema.json -o {tmp_path}/out --seeds 1 --epochs 1"
    words += " --split ratio --no-progress"
    assert run([*words.split(), "--rank", "dcn"]) == 0
    assert "dcn" in capsys.readouterr().out
    assert run([*words.split(), "--match", "sasrec"]) == 2
    assert "has no users to find items for; compare rankers on it with --rank" in capsys.readouterr().err


def test_mistakes_are_one_line(events: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compare", str(events), "-o", str(tmp_path / "out")]) == 2
    assert "nothing to compare; give --rank or --match" in capsys.readouterr().err
    assert named_choices("none", "rank") == {}
    assert list(named_choices("fm, deepfm(hidden=(4, 4))", "rank")) == ["fm", "deepfm(hidden=(4, 4))"]
