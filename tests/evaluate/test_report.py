"""Reports: every figure in JSON, every table with its baselines, refusals, and files that can be read back."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from funnelrec.evaluate import plots
from funnelrec.evaluate.plots import CurvePoint
from funnelrec.evaluate.protocol import MatchResult, RankResult, compare, evaluate_matcher, evaluate_ranker
from funnelrec.evaluate.report import Report

sys.path.insert(0, str(Path(__file__).parent))
from evaluation_world import FakeQueries, FirstNumber, TableMatcher, rows_world

USERS, ITEMS = 300, 60


def match_results() -> dict[str, MatchResult]:
    """Matchers of rising quality over the same questions; "oracle" knows the answers."""
    rng = np.random.default_rng(0)
    wanted = [rng.choice(np.arange(2, ITEMS), rng.integers(1, 4), replace=False).tolist() for _ in range(USERS)]
    seen = [[2 + (user + j) % (ITEMS - 2) for j in range(user % 15)] for user in range(USERS)]
    wanted = [[i for i in row if i not in past] for row, past in zip(wanted, seen, strict=True)]
    queries = FakeQueries(wanted, seen=seen)
    offsets, items = queries.relevant
    noise, owner = rng.random((USERS, ITEMS)), np.repeat(np.arange(USERS), np.diff(offsets))
    counts = np.where(np.arange(ITEMS) % 7 == 0, 0, 5)
    results = {}
    for name, lift in {"popularity": 0.0, "item-CF": 0.15, "SASRec": 0.35, "oracle": 9.0}.items():
        scores = noise.copy() if name != "popularity" else rng.random((USERS, ITEMS))
        scores[owner, items] += lift
        matcher = TableMatcher(scores)
        results[name] = evaluate_matcher(
            matcher, queries, ks=(5, 20), item_counts=counts, item_attribute=np.arange(ITEMS)[:, None] % 4 + 1
        )
    return results


def rank_results() -> dict[str, RankResult]:
    batches, _ = rows_world()
    generator = torch.Generator().manual_seed(0)
    results = {}
    for name, noise in {"LR": 1.5, "DIN": 0.3, "oracle": 0.0}.items():
        noisy = [
            b.replace(numbers=b.numbers + noise * torch.randn(b.numbers.shape, generator=generator)) for b in batches
        ]
        results[name] = evaluate_ranker(FirstNumber(), noisy)
    return results


def test_rankers_on_known_and_on_new_items() -> None:
    """Six rows, those of the new item in the wrong order: an area of 1 and of 0; one label alone has no area."""
    labels, item = np.array([0.0, 1, 0, 1, 0, 1]), np.array([2, 2, 2, 3, 3, 4])
    logits = np.array([-1.0, 2, -3, 0, 1, 5])
    parts = {"known": item == 2, "new": item == 3, "one label": item == 4}
    result = RankResult.of(logits.astype(np.float32), labels, np.arange(6), parts=parts)
    found = Report("parts").rank_slice_table({"LR": result})
    assert found is not None
    assert [row["part"] for row in found.rows] == ["overall", "known", "new"]
    assert [row["rows"] for row in found.rows] == [6, 3, 2]
    assert [row["metrics"]["LR"]["mean"] for row in found.rows] == pytest.approx([8 / 9, 1.0, 0.0])
    alone = RankResult.of(logits.astype(np.float32), labels, np.arange(6))
    assert Report("nothing to part").rank_slice_table({"LR": alone}) is None


def full_report() -> Report:
    matchers, rankers = match_results(), rank_results()
    report = Report("A small world", {"events": 12345, "split": "GlobalTime(0.1, 0.1)"})
    report.match_table(matchers, baselines=["popularity", "item-CF"], oracle="oracle")
    report.rank_table(rankers, baselines=["LR"], oracle="oracle")
    report.stage_table(
        {"match": matchers["item-CF"], "match → rank": matchers["SASRec"]}, oracle=matchers["oracle"], ks=(5,)
    )
    report.slice_table({name: matchers[name] for name in ("popularity", "SASRec")})
    report.curve([CurvePoint(f"λ = {x}", x, 1 - x**2) for x in (0.0, 0.5, 1.0)], accuracy="ndcg@5", diversity="d@5")
    return report


@pytest.fixture(scope="module")
def report() -> Report:
    return full_report()


def cells(markdown: str, first: str) -> list[str]:
    line = next(row for row in markdown.splitlines() if row.startswith(f"| {first} "))
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_markdown_shows_what_was_measured(report: Report) -> None:
    text = report.to_markdown()
    result = match_results()
    assert text.startswith("# A small world\n\n- events: 12,345\n")
    sasrec = cells(text, "SASRec")
    assert sasrec[1].startswith(f"**{result['SASRec'].means['recall@5']:.4f}** ± ")
    assert re.fullmatch(r"\+0\.\d{4} \[\+0\.\d{4}, \+0\.\d{4}\], p < 0\.001, d = \d\.\d\d", sasrec[-1])
    assert cells(text, "item-CF (baseline)")[-1] == "best baseline"
    assert cells(text, "popularity (baseline)")[-1].startswith("−0.")  # tested against the best, and worse
    assert cells(text, "oracle")[-1] == "–"
    assert "**1.0000**" not in text  # the oracle is no rival
    for heading in ("## Match", "## Rank", "## The funnel", "## Who is served how well", "## Accuracy"):
        assert heading in text
    assert "items new since training" in text
    assert cells(text, "overall")[2].startswith(f"{result['popularity'].means['ndcg@5']:.4f} ± ")
    for line in text.splitlines():
        if line.startswith("|"):
            assert line.endswith("|")


def test_every_table_is_rectangular(report: Report) -> None:
    assert len(report.tables) == 5
    for table in report.tables:
        assert {len(row) for row in table.cells} == {len(table.columns)}
        assert len(table.rows) == len(table.cells)


def test_json_holds_all_figures_and_no_nan(report: Report) -> None:
    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    data = json.loads(report.to_json(), parse_constant=refuse)
    assert (data["format"], data["title"], data["facts"]["events"]) == (1, "A small world", 12345)
    rows = {row["model"]: row for row in data["tables"][0]["rows"]}
    expected = compare(match_results()["SASRec"], match_results()["item-CF"], "ndcg@5")
    test = rows["SASRec"]["test"]
    assert test["difference"] == pytest.approx(expected.difference)
    assert test["effect_size"] == pytest.approx(expected.effect_size)
    assert test["p_randomisation"] <= test["p_adjusted"] < 0.001
    assert rows["SASRec"]["versus"] == "item-CF"
    assert rows["item-CF"]["test"] is None
    interval = rows["SASRec"]["metrics"]["recall@5"]
    assert interval["low"] < interval["mean"] < interval["high"]
    assert {"coverage@5", "novelty@20", "diversity@20", "average_precision@5"} <= set(rows["SASRec"]["means"])
    ranks = {row["model"]: row for row in data["tables"][1]["rows"]}
    assert ranks["DIN"]["test"]["interval"]["low"] > 0
    assert set(ranks["DIN"]["means"]) == {"auc", "gauc", "log_loss", "normalised_entropy", "ece"}
    stages = data["tables"][2]["rows"]
    assert stages[0]["test_against_stage_before"] is None
    assert stages[1]["test_against_stage_before"]["difference"] > 0
    assert 0 < stages[0]["share_of_oracle"] < stages[1]["share_of_oracle"] < 1


def test_what_is_not_finite_is_null_and_a_dash() -> None:
    ranks = rank_results()
    one_label = {n: dataclasses.replace(r, labels=np.zeros_like(r.labels), queries="q") for n, r in ranks.items()}
    for name, result in one_label.items():
        means = dict(result.means) | {"auc": math.nan, "gauc": math.nan}
        one_label[name] = dataclasses.replace(result, means=means)
    report = Report("One label", {"share": math.inf})
    report.rank_table({"LR": one_label["LR"]}, baselines=["LR"])
    data = json.loads(report.to_json())
    assert data["facts"]["share"] is None
    assert data["tables"][0]["rows"][0]["metrics"]["auc"]["mean"] is None
    assert cells(report.to_markdown(), "LR (baseline)")[1:3] == ["–", "–"]


def test_baselines_are_required_and_must_exist() -> None:
    report, results = Report("x"), match_results()
    with pytest.raises(ValueError, match=r"needs baselines .* received none; popularity"):
        report.match_table(results, baselines=[])
    with pytest.raises(ValueError, match="received most popular"):
        report.match_table(results, baselines=["most popular"])
    with pytest.raises(ValueError, match="received truth"):
        report.rank_table(rank_results(), baselines=["LR"], oracle="truth")
    with pytest.raises(ValueError, match="no metric 'recall@7'; these were measured"):
        report.match_table(results, baselines=["popularity"], ks=(7,))
    assert report.tables == ()


def test_other_splits_are_refused_in_every_table() -> None:
    matchers, rankers = match_results(), rank_results()
    matchers["SASRec"] = dataclasses.replace(matchers["SASRec"], split="another")
    rankers["DIN"] = dataclasses.replace(rankers["DIN"], split="another")
    report = Report("x")
    with pytest.raises(ValueError, match="'popularity' and 'SASRec' cannot be compared, their split fingerprint"):
        report.match_table(matchers, baselines=["popularity"])
    with pytest.raises(ValueError, match="cannot be compared"):
        report.rank_table(rankers, baselines=["LR"])
    with pytest.raises(ValueError, match="cannot be compared"):
        report.stage_table({"a": matchers["popularity"], "b": matchers["SASRec"]})
    with pytest.raises(ValueError, match="cannot be compared"):
        report.slice_table(matchers)


def test_write_gives_files_that_link_to_each_other(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots'")
    path = report.write(tmp_path / "new" / "folder")
    names = ("match", "rank", "reliability", "stages", "curve")
    expected = {f"{name}.{kind}" for name in names for kind in ("png", "svg")} | {"report.md", "report.json"}
    assert {p.name for p in path.parent.iterdir()} == expected
    text = path.read_text(encoding="utf-8")
    links = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert links == [f"{name}.svg" for name in names]
    for name in names:
        assert (path.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (path.parent / f"{name}.svg").read_text(encoding="utf-8")


def test_writing_twice_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots'")
    for folder in ("a", "b"):
        report.write(tmp_path / folder)
    for path in (tmp_path / "a").iterdir():
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name


def test_two_tables_of_a_kind_have_pictures_of_their_own() -> None:
    report, results = Report("x"), match_results()
    for _ in range(2):
        report.match_table(results, baselines=["popularity"], ks=(5,))
    assert re.findall(r"\((match[^)]*)\)", report.to_markdown(pictures=True)) == ["match.svg", "match-2.svg"]


def test_without_matplotlib(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    path = report.write(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {"report.md", "report.json"}
    text = path.read_text(encoding="utf-8")
    assert "pip install 'funnelrec[plots]'" in text
    assert "![" not in text
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'funnelrec\[plots\]'"):
        report.write(tmp_path, pictures=True)


def test_a_bar_may_stand_for_a_number_below_its_start(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib", reason="pictures need the extra 'plots'")
    from funnelrec.evaluate.significance import Interval

    values = [Interval(0.4, 0.35, 0.45), Interval(0.7, 0.65, 0.75), Interval(math.nan, math.nan, math.nan)]
    bars = [plots.Bar(str(n), value) for n, value in enumerate(values)]
    figure = plots.bars("t", "s", {"auc": plots.Panel("meaning", bars, 0.5)})
    axis = figure.axes[0]
    assert axis.get_xlim()[0] == 0.35  # the bar that goes left is inside
    assert "not defined" in [text.get_text() for text in axis.texts]
    assert all(p.exists() for p in plots.save(figure, tmp_path, "bars"))


def test_a_pipe_in_a_name_cannot_break_a_table() -> None:
    results = match_results()
    report = Report("x")
    report.match_table({"a|b": results["popularity"]}, baselines=["a|b"], ks=(5,))
    assert "| a\\|b (baseline) |" in report.to_markdown()
