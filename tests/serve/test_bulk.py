"""Recommendations for everybody: the same as one by one, whole or not at all."""

from __future__ import annotations

from pathlib import Path

import polars as pl
import pytest

from funnelrec.serve import bulk
from funnelrec.serve.bulk import recommend_all, write_all
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import Request, RequestError
from tests.serve.funnels import small_dataset, small_funnel


@pytest.fixture(scope="module")
def funnel(tmp_path_factory: pytest.TempPathFactory) -> Funnel:
    return small_funnel(small_dataset(tmp_path_factory.mktemp("data") / "d"))


@pytest.mark.parametrize("options", [{"k": 7}, {"filters": {"kind": ["red"]}}, {"diversity": 5.0, "k": 3}])
def test_the_file_holds_what_each_user_is_answered(
    funnel: Funnel, options: dict[str, object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bulk, "USERS_AT_ONCE", 7)  # several parts, the last of them short
    heard: list[int] = []
    rows = write_all(funnel, tmp_path / "recs.parquet", progress=heard.append, **options)
    table = pl.read_parquet(tmp_path / "recs.parquet")
    assert len(table) == rows
    assert [p.name for p in tmp_path.iterdir()] == ["recs.parquet"]
    users = table["user"].unique(maintain_order=True).to_list()
    assert len(users) == funnel.store.people.size - 2
    assert sum(heard) >= len(users)
    for user, answer in zip(users, funnel.recommend_many([Request(user=u, **options) for u in users]), strict=True):
        own = table.filter(user=user)
        assert own["item"].to_list() == answer.ids
        assert own["place"].to_list() == list(range(1, len(answer.ids) + 1))
        assert own["score"].to_list() == pytest.approx([r.score for r in answer.items], abs=1e-5)
        assert set(own["fallback"].to_list()) == {answer.fallback}


def test_strangers_get_the_fallback(funnel: Funnel) -> None:
    (table,) = recommend_all(funnel, ["nobody", "u03"], k=4)
    assert table["fallback"].to_pylist() == ["unknown user"] * 4 + [None] * 4


def test_a_file_is_whole_or_absent(funnel: Funnel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "recs.parquet"
    write_all(funnel, file, k=3)
    before = file.read_bytes()
    with pytest.raises(RequestError, match="k must be a whole number"):
        write_all(funnel, file, k=0)
    with pytest.raises(ValueError, match="nobody to recommend to"):
        write_all(funnel, file, [])
    monkeypatch.setattr(bulk, "USERS_AT_ONCE", 7)

    def fails_later(users: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_all(funnel, file, k=5, progress=fails_later)
    assert file.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["recs.parquet"]
