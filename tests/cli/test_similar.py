"""`funnelrec similar`: what it prints, and one line for a mistake."""

from __future__ import annotations

import json

import pytest

from funnelrec.cli.app import run
from funnelrec.serve.funnel import Funnel
from tests.serve.funnels import small_dataset, small_funnel


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("shop")
    return str(small_funnel(small_dataset(path / "data")).save(path / "shop.funnel"))


def test_items_like_an_item(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["similar", folder, "--item", "105", "-k", "3", "--where", "kind=red,blue", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["items"]
    expected = Funnel.load(folder).similar(105, k=3, filters={"kind": ["red", "blue"]})
    assert [i["item"] for i in found] == expected.ids
    assert run(["similar", folder, "--item", "105"]) == 0
    text = capsys.readouterr().out
    assert "score" in text
    assert "place by match" not in text


def test_people_like_a_user(folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["similar", folder, "--user", "u03", "-k", "3", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [u["user"] for u in found] == [u.user for u in Funnel.load(folder).similar_users("u03", k=3)]
    assert run(["similar", folder, "--user", "u03", "-k", "3"]) == 0
    assert all(u["user"] in capsys.readouterr().out for u in found[:1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "say like what: --item ID or --user ID"),
        ("--item 105 --user u03", "one of them"),
        ("--user u03 --where kind=red", "--where filters items"),
        ("--item 999", "no item has the id '999'"),
        ("--user nobody", "no user has the id 'nobody'"),
        ("--item 105 --where kind=pink", "no item has kind='pink'"),
    ],
)
def test_a_mistake_is_one_line(folder: str, words: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["similar", folder, *words.split()]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
