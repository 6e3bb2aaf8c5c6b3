"""The zoo finds models by looking at files, imports one file at a time, and helps with a misspelt name."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from funnelrec import zoo

PACKAGE = Path(zoo.__file__).parent
NO_MODELS = {"match/retriever"}  # joins a vector matcher to an index
MODEL = (
    '"""Toy — a toy.\n\nPaper: A. B.\n       2020.\nIdea:  one\n       two.\n\nEq. (1) y = x\n"""\n__all__ = ["Toy"]\n'
)


@pytest.fixture
def house(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty package in the place of the real one."""
    for stage in ("encode/text", "match/index", "rank", "rerank"):
        (tmp_path / stage).mkdir(parents=True)
    monkeypatch.setattr(zoo, "_HERE", tmp_path)
    return tmp_path


def test_every_file_of_a_stage_is_a_model() -> None:
    files = {f"{s}/{p.stem}" for s in ("match", "rank", "rerank") for p in (PACKAGE / s).glob("[!_]*.py")}
    assert {n for n in zoo.names() if not n.startswith("encode/")} == files - NO_MODELS


def test_names_of_a_stage_are_sorted() -> None:
    names = zoo.names("rank")
    assert names == sorted(names)
    assert {"rank/deepfm", "rank/din", "rank/fm", "rank/logistic_regression"} <= set(names)
    assert set(names) <= set(zoo.names())


def test_a_file_is_all_a_new_model_needs(house: Path) -> None:
    assert zoo.names() == []
    (house / "rank" / "toy.py").write_text(MODEL, encoding="utf-8")
    (house / "encode" / "text" / "toy.py").write_text(MODEL.replace("Paper:", "Source:"), encoding="utf-8")
    assert zoo.names() == ["encode/text/toy", "rank/toy"]


@pytest.mark.parametrize("path", ["rank/_parts.py", "match/index/exact.py", "rank/__init__.py"])
def test_parts_and_indexes_are_no_models(house: Path, path: str) -> None:
    (house / path).write_text(MODEL, encoding="utf-8")
    (house / "rank" / "helper.py").write_text('"""No model."""\n', encoding="utf-8")
    assert zoo.names() == []


def test_summary_joins_continued_lines(house: Path) -> None:
    (house / "rank" / "toy.py").write_text(MODEL, encoding="utf-8")
    assert zoo.summary("rank/toy") == zoo.Summary("rank/toy", "Toy — a toy.", "A. B. 2020.", "one two.")


def test_every_model_has_a_summary() -> None:
    for name in zoo.names():
        summary = zoo.summary(name)
        assert summary.title, name
        assert summary.paper, name
        assert summary.idea, name


@pytest.mark.parametrize("call", [zoo.load, zoo.summary])
@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("rank/deepfn", "rank/deepfm"),
        ("deepfm", "rank/deepfm"),
        ("DIN", "rank/din"),
        ("rank/sasrec", "match/sasrec"),
        ("rank/logistic-regression", "rank/logistic_regression"),
    ],
)
def test_an_unknown_name_is_answered_with_the_nearest(call: object, wrong: str, right: str) -> None:
    with pytest.raises(ValueError, match=f"no model '{wrong}' in the zoo; did you mean '{right}'\\?"):
        call(wrong)  # type: ignore[operator]


def test_a_name_like_no_other_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match=r"no model '####' in the zoo; there are .*rank/fm"):
        zoo.load("####")


def test_an_unknown_stage_is_answered_with_all() -> None:
    with pytest.raises(ValueError, match="no stage 'ranking'; the stages are encode, match, rank, rerank"):
        zoo.names("ranking")


def test_a_name_cannot_leave_the_zoo() -> None:
    with pytest.raises(ValueError, match="no model 'core/batch'"):
        zoo.load("core/batch")
    with pytest.raises(ValueError, match=r"no model '\.\./x'"):
        zoo.load("../x")


def test_load_returns_the_class() -> None:
    assert zoo.load("rank/fm").__name__ == "FM"


def _modules_after(code: str) -> set[str]:
    script = f"import sys; from funnelrec import zoo; {code}; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=True)
    return set(done.stdout.split())


def test_listing_and_summaries_import_no_model() -> None:
    after = _modules_after("[zoo.summary(n) for n in zoo.names()]")
    assert "torch" not in after
    assert not [m for m in after if m.startswith("funnelrec.") and m != "funnelrec.zoo"]


def test_load_imports_one_model() -> None:
    after = _modules_after("zoo.load('rank/fm')")
    assert {m for m in after if m.startswith(("funnelrec.rank.", "funnelrec.match.", "funnelrec.learn."))} == {
        "funnelrec.rank.fm"
    }
