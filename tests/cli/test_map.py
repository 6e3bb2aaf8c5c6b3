"""`funnelrec map`: the picture is written, coloured by a field, with a user among the items."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from funnelrec.cli.app import run
from funnelrec.cli.map import _groups
from tests.serve.funnels import small_dataset, small_funnel

pytest.importorskip("matplotlib", reason="matplotlib is not installed; pip install 'funnelrec[plots]'")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shop")
    return str(small_funnel(small_dataset(path / "data")).save(path / "shop.funnel"))


def test_a_map_with_a_user(folder: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["map", folder, "-o", str(tmp_path / "m.svg"), "--colour", "kind", "--user", "u03"]) == 0
    assert "40 items by kind" in capsys.readouterr().out
    text = (tmp_path / "m.svg").read_text()
    for word in ("red", "green", "blue", "taken by the user", "interests of user u03"):
        assert word in text
    assert sorted(p.name for p in tmp_path.iterdir()) == ["m.svg"]


def test_a_plain_map(folder: str, tmp_path: Path) -> None:
    assert run(["map", folder, "-o", str(tmp_path / "m.png")]) == 0
    assert (tmp_path / "m.png").read_bytes()[1:4] == b"PNG"


def test_an_item_has_the_rarest_of_its_common_values() -> None:
    values = [["Drama", "War"], ["Drama"], ["Drama", "War"], ["Drama", "Comedy"], [], None, ["Comedy", "War"]]
    catalogue = pl.DataFrame({"item": range(7), "genres": pl.Series(values, dtype=pl.List(pl.String))})
    found = _groups(catalogue, "genres", [1, 0, 3, 4, 5, 6])
    assert found == ["Drama", "War", "Comedy", None, None, "Comedy"]  # Comedy twice, War twice here: by name
    assert _groups(catalogue, None, [0, 1]) == [None, None]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("-o m.jpg", "a map is a picture; name it with -o map.png or map.svg, received m.jpg"),
        ("--colour flavour", "no item field is named 'flavour'; there are item, title, kind, price"),
        ("--user nobody", "nothing is known of the user 'nobody'"),
    ],
)
def test_a_mistake_is_one_line(
    folder: str,
    words: str,
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(["map", folder, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
