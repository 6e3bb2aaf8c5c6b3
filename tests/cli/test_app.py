"""The command line: what it prints, and one line with exit code 2 for every mistake."""

from __future__ import annotations

import json
from pathlib import Path

import polars as pl
import pytest

from funnelrec.cli import show
from funnelrec.cli.app import run
from funnelrec.cli.fit import _choices, trained
from funnelrec.data.sources import simulate
from funnelrec.learn.fit import FitResult
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import Recommendation, Recommended


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with events.csv, items.csv and a funnel fitted on them by the command line."""
    folder = tmp_path_factory.mktemp("shop")
    world = simulate.load(users=60, items=80, events=4000)
    world.tables.events.write_csv(folder / "events.csv")
    world.tables.items.write_csv(folder / "items.csv")
    words = f"fit {folder}/events.csv --items {folder}/items.csv -o {folder}/shop.funnel"
    words += " --match sasrec(max_len=20),item_cf --rank deepfm --epochs 2 --no-progress --diversity-field style --map"
    assert run(words.split()) == 0
    return folder


def test_fit_writes_a_funnel_and_a_report(shop: Path) -> None:
    report = (shop / "shop.funnel" / "report" / "report.md").read_text()
    for name in (
        "sasrec",
        "item_cf",
        "popularity",
        "recent popularity",
        "deepfm",
        "logistic_regression",
        "match → rank",
    ):
        assert name in report
    assert "±" in report
    funnel = Funnel.load(shop / "shop.funnel")
    measured = funnel.metrics["match → rank → rerank"]
    low, high = measured["intervals"]["ndcg@10"]
    assert 0 <= low <= measured["ndcg@10"] <= high
    assert measured["users"] > 0
    assert (funnel.item_map is None) == (funnel.pipeline.vectors.shape[1] == 0)  # whichever matcher was the better one


def test_recommend_for_a_user_and_for_a_stranger(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(shop / "shop.funnel")
    assert run(["recommend", folder, "--user", "7", "--json", "-k", "4"]) == 0
    by_user = json.loads(capsys.readouterr().out)
    assert len(by_user["items"]) == 4
    assert by_user["items"] == json.loads(json.dumps(asdict_items(Funnel.load(folder).recommend("7", k=4))))
    assert run(["recommend", folder, "--history", "12,5,31", "--where", "category=sea,sky"]) == 0
    assert "place by match" in capsys.readouterr().out
    assert run(["recommend", folder, "--user", "nobody"]) == 0
    assert "(recently popular items: unknown user)" in capsys.readouterr().out


def asdict_items(answer: object) -> list[dict[str, object]]:
    import dataclasses

    return [dataclasses.asdict(r) for r in answer.items]  # type: ignore[attr-defined]


def test_evaluate_gives_the_figures_that_fit_stored(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["evaluate", str(shop / "shop.funnel")]) == 0
    stored = Funnel.load(shop / "shop.funnel").metrics["match"]["recall@50"]
    printed = capsys.readouterr().out
    assert f"{stored:.4f}" in printed
    for table in (printed, (shop / "shop.funnel" / "report" / "report.md").read_text()):
        parts = table.split("The funnel: who is served how well")[1]
        assert "overall" in parts and "items seen in training" in parts


def test_models_lists_every_stage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["models"]) == 0
    everything = capsys.readouterr().out
    assert all(name in everything for name in ("match/sasrec", "rank/din", "rerank/mmr"))
    assert run(["models", "--stage", "rank"]) == 0
    assert "match/sasrec" not in capsys.readouterr().out


def test_prepare_accounts_for_every_row(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = (shop / "events.csv").read_text().splitlines()
    lines[5] = lines[5].replace(lines[5].split(",")[2], "yesterday", 1)
    (tmp_path / "bad.csv").write_text("\n".join(lines) + "\n")
    out = str(tmp_path / "d")
    assert run(["data", "prepare", str(tmp_path / "bad.csv"), "-o", out]) == 2
    error = capsys.readouterr().err
    assert "bad.csv:6" in error
    assert "time" in error
    assert "max_bad_rows" in error
    assert run(["data", "prepare", str(tmp_path / "bad.csv"), "-o", out, "--max-bad-rows", "1"]) == 0
    assert f"{len(lines) - 1:,} rows read, {len(lines) - 2:,} kept, 1 rejected" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("fit nowhere.csv -o x", "nowhere.csv"),
        ("fit simulate -o x --match sasrex", "did you mean 'match/sasrec'"),
        ("fit simulate -o x --match sasrec(widht=3)", "sasrec has no argument 'widht'"),
        ("fit simulate -o x --match sasrec(dropout=open)", "a model is written sasrec or sasrec(dropout=0.2)"),
        ("fit simulate -o x --match none", "a funnel needs a matcher"),
        ("fit simulate -o x --rerank diversity,mmr", "a funnel has one reranker"),
        ("fit simulate -o x --match sasrec,sasrec(dropout=0.5)", "sasrec stands twice in 'sasrec,sasrec(dropout=0.5)'"),
        ("fit . -o x", ". is a folder; give the path of one table"),
        ("fit simulate -o x --items items.csv", "brings its own tables and schema; leave out --items"),
        ("recommend nowhere --user 3", "nowhere is not a funnel"),
        ("recommend nowhere", "say for whom"),
        ("models --stage ranking", "no stage 'ranking'"),
        ("frobnicate", "No such command"),
        ("evaluate nowhere", "nowhere is not a funnel"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    words: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(words.split()) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    if error.startswith("funnelrec: "):
        assert error.count("\n") == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="is not a funnel"):
        run(["recommend", str(tmp_path), "--user", "3", "--debug"])


def test_commas_inside_brackets_do_not_part_models() -> None:
    text = "deepfm(dropout=0.1, hidden=(100, 50)), din(hidden=[8,4],softmax=True),fm"
    assert [(c.label, dict(c.config)) for c in _choices(text, "rank")] == [
        ("deepfm", {"dropout": 0.1, "hidden": (100, 50)}),
        ("din", {"hidden": [8, 4], "softmax": True}),
        ("fm", {}),
    ]


def test_times_that_are_not_there_are_asked_for_in_words_of_the_command(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "e.csv").write_text("user,item\n" + "".join(f"{i % 5},{i % 7}\n" for i in range(60)))
    words = ["data", "prepare", str(tmp_path / "e.csv"), "-o", str(tmp_path / "d")]
    assert run(words) == 2
    assert "--split ratio" in capsys.readouterr().err
    assert run([*words, "--split", "ratio"]) == 0


def test_sources_hear_how_many_bad_rows_are_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    good = "1\t" + "\t".join(["3"] * 13 + ["ab"] * 26)
    (tmp_path / "train.txt").write_text("\n".join([good] * 30 + [good.replace("3", "three", 1)]) + "\n")
    words = ["data", "prepare", f"criteo:{tmp_path}", "-o", str(tmp_path / "d"), "--split", "ratio"]
    assert run(words) == 2
    assert "train.txt:31" in capsys.readouterr().err
    assert run([*words, "--max-bad-rows", "1"]) == 0


def test_a_metric_that_cannot_be_measured_is_said_and_no_traceback() -> None:
    result = FitResult([{"epoch": 0}], best_epoch=None, best_metric=None, seconds=1.0, stopped_by="epochs")
    assert "validation auc not measurable" in trained("din", result, "auc")


def test_the_matcher_that_is_best_on_validation_is_served_also_when_it_only_counts(shop: Path, tmp_path: Path) -> None:
    words = f"fit {shop}/events.csv -o {tmp_path}/f --match sasrec(embedding_dim=2),item_cf --rank none --rerank none"
    assert run([*words.split(), "--epochs", "1", "--lr", "1e-9", "--no-progress"]) == 0  # sasrec learns nothing
    assert type(Funnel.load(tmp_path / "f").matcher).__name__ == "ItemCF"


def test_a_filter_given_twice_is_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", str(shop / "shop.funnel"), "--user", "7", "--where", "category=sea", "--where"]
    assert run([*words, "category=sky"]) == 2
    assert "the filter 'category' stands twice; write category=VALUE,VALUE" in capsys.readouterr().err


def test_other_settings_begin_anew_when_told_to(shop: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = f"fit {shop}/events.csv -o {tmp_path}/f --match sasrec(max_len=5) --rank none --epochs 1 --no-progress"
    assert run(words.split()) == 0
    assert run([*words.split(), "--lr", "0.01"]) == 2
    assert "is another one (fit.lr" in capsys.readouterr().err
    assert run([*words.split(), "--lr", "0.01", "--no-resume"]) == 0


def test_no_item_is_an_answer(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    item = Funnel.load(shop / "shop.funnel").recommend("7", k=1).items[0]
    other = next(c for c in ("sea", "sky", "kitchen") if c != item.attributes["category"])
    words = ["recommend", str(shop / "shop.funnel"), "--user", "7", "--where", f"item={item.item}"]
    assert run([*words, "--where", f"category={other}"]) == 0
    assert "(no item qualifies)" in capsys.readouterr().out


def test_a_missing_attribute_is_blank_and_hides_no_column(capsys: pytest.CaptureFixture[str]) -> None:
    items = [Recommended(i, 1.0, 1.0, i, {"title": title}) for i, title in enumerate((None, "Heat"))]
    show.recommendation(Recommendation(items=tuple(items)))
    shown = capsys.readouterr().out
    assert "Heat" in shown
    assert "None" not in shown


def test_a_filter_without_a_value_is_refused(shop: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["recommend", str(shop / "shop.funnel"), "--user", "7", "--where", "category"]) == 2
    assert "a filter is written FIELD=VALUE" in capsys.readouterr().err


def test_help_is_quick_because_torch_stays_away() -> None:
    import subprocess
    import sys

    code = (
        "import sys; from funnelrec.cli.app import run; run(['fit', '--help'])\n"
        "assert 'torch' not in sys.modules and 'polars' not in sys.modules, 'heavy'"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "--match" in done.stdout


def test_a_funnel_of_another_dataset_is_not_evaluated(shop: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(shop / "shop.funnel", tmp_path / "f")
    events = pl.read_csv(shop / "events.csv").head(3000)
    events.write_csv(tmp_path / "less.csv")
    shutil.rmtree(tmp_path / "f" / "work" / "dataset")
    assert run(["data", "prepare", str(tmp_path / "less.csv"), "-o", str(tmp_path / "f" / "work" / "dataset")]) == 0
    assert run(["evaluate", str(tmp_path / "f")]) == 2
