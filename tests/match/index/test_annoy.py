"""AnnoyIndex: the scores of ExactIndex, filters that annoy itself does not know, and a cache that is never trusted."""

from __future__ import annotations

import builtins
from pathlib import Path

import pytest
import torch

from funnelrec.core.contracts import Index
from funnelrec.match.index.exact import ExactIndex
from tests.match.index.clustered import QUERIES, VALID, VECTORS, limits

pytest.importorskip("annoy", reason="annoy is not installed; pip install 'funnelrec[annoy]'")
from funnelrec.match.index.annoy import AnnoyIndex


@pytest.fixture(scope="module")
def index() -> AnnoyIndex:
    return AnnoyIndex(VECTORS)


def test_scores_exactly_and_honours_exclusions_and_filters(index: AnnoyIndex) -> None:
    assert isinstance(index, Index)
    assert (index.kind, index.recall >= 0.95) == ("trees", True)
    truth = ExactIndex(VECTORS)
    exclude, allowed = limits()
    for options in ({}, {"exclude": exclude}, {"allowed": allowed}, {"exclude": exclude, "allowed": allowed}):
        rows, scores = index.search(QUERIES, VALID, 20, **options)
        expected, _ = truth.search(QUERIES, VALID, 20, **options)
        assert (rows[1:].unsqueeze(2) == expected[1:].unsqueeze(1)).any(2).float().mean() >= 0.93
        assert rows[0].tolist() == [0] * 20
        own = torch.einsum("bkd,bmd->bkm", QUERIES[1:], VECTORS[rows[1:]])
        torch.testing.assert_close(scores[1:], own.masked_fill(~VALID[1:].unsqueeze(2), -torch.inf).amax(1))
        assert (scores[1:].diff(dim=1) <= 0).all()
        assert all(len(set(r)) == 20 and min(r) >= 2 for r in rows[1:].tolist())
        if "allowed" in options:
            assert allowed[rows[1:]].all()
        if "exclude" in options:
            assert not (rows[1:].unsqueeze(2) == exclude[1:].unsqueeze(1)).any()


def test_an_effort_too_small_shows_in_the_recall(index: AnnoyIndex) -> None:
    """Positive control of the measurement: a few nodes are not enough."""
    truth, _ = ExactIndex(VECTORS).search(QUERIES, VALID, 100)
    effort, index.effort = index.effort, 100
    rows, _ = index.search(QUERIES, VALID, 100)
    index.effort = effort
    assert (rows[1:].unsqueeze(2) == truth[1:].unsqueeze(1)).any(2).float().mean() < 0.93


@pytest.mark.parametrize("left", [[], [50, 900, 2999]])
def test_a_list_that_filters_leave_short_is_filled_exactly(index: AnnoyIndex, left: list[int]) -> None:
    allowed = torch.zeros(len(VECTORS), dtype=torch.bool)
    allowed[[0, 1, *left]] = True
    rows, scores = index.search(QUERIES, VALID, 5, None, allowed)
    assert all(set(r) == {*left, 0} for r in rows[1:].tolist())
    assert (scores[:, len(left) :] == -torch.inf).all()


def test_saved_and_loaded_answers_the_same(index: AnnoyIndex, tmp_path: Path) -> None:
    before = index.search(QUERIES, VALID, 9)
    index.save(tmp_path)
    loaded = AnnoyIndex.load(tmp_path, VECTORS)
    assert (loaded.effort, loaded.recall) == (index.effort, index.recall)
    for made in (index, loaded, AnnoyIndex(VECTORS)):  # also what was saved goes on, and the forest is always the same
        assert all(torch.equal(a, b) for a, b in zip(before, made.search(QUERIES, VALID, 9), strict=True))


def test_a_tampered_cache_never_reaches_annoy(
    index: AnnoyIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    index.save(tmp_path)
    read: list[bytes] = []
    monkeypatch.setattr(AnnoyIndex, "_restore", lambda self, content: read.append(content))
    AnnoyIndex.load(tmp_path, VECTORS)
    assert len(read) == 1  # positive control: an untouched one does
    file = tmp_path / "index.annoy"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.warns(UserWarning, match="does not match its digest; it is built anew"):
        loaded = AnnoyIndex.load(tmp_path, VECTORS)
    assert len(read) == 1
    assert torch.equal(loaded.search(QUERIES, VALID, 9)[0], index.search(QUERIES, VALID, 9)[0])


def test_messages_name_what_was_received(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="kind must be one of trees or None, received 'ivf'"):
        AnnoyIndex(VECTORS[:10], kind="ivf")
    ordinary = builtins.__import__

    def without_annoy(name: str, *args: object, **options: object) -> object:
        if name == "annoy":
            raise ImportError(name)
        return ordinary(name, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", without_annoy)
    with pytest.raises(ImportError, match=r"AnnoyIndex needs annoy, .* pip install 'funnelrec\[annoy\]'"):
        AnnoyIndex(VECTORS)
