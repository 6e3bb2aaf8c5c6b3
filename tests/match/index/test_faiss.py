"""FaissIndex: the scores of ExactIndex, measured recall, and a cache that is never trusted."""

from __future__ import annotations

import builtins
import json
from pathlib import Path

import pytest
import torch

from funnelrec.core.contracts import Index
from funnelrec.match.index.exact import ExactIndex
from tests.match.index.clustered import QUERIES, VALID, VECTORS, limits

faiss = pytest.importorskip("faiss", reason="faiss is not installed; pip install 'funnelrec[faiss]'")
from funnelrec.match.index.faiss import FaissIndex  # noqa: E402


def test_flat_is_exact_with_exclusions_and_filters() -> None:
    index, truth = FaissIndex(VECTORS), ExactIndex(VECTORS)
    assert isinstance(index, Index)
    assert (index.kind, index.recall) == ("flat", 1.0)
    exclude, allowed = limits()
    for options in ({}, {"exclude": exclude}, {"allowed": allowed}, {"exclude": exclude, "allowed": allowed}):
        rows, scores = index.search(QUERIES, VALID, 20, **options)
        expected, values = truth.search(QUERIES, VALID, 20, **options)
        assert torch.equal(rows, expected)
        torch.testing.assert_close(scores, values)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_approximate_kinds_measure_their_recall_and_score_exactly(kind: str) -> None:
    index, truth = FaissIndex(VECTORS, kind=kind), ExactIndex(VECTORS)
    assert index.recall >= 0.95
    exclude, allowed = limits()
    for options in ({}, {"exclude": exclude, "allowed": allowed}):
        rows, scores = index.search(QUERIES, VALID, 20, **options)
        expected, _ = truth.search(QUERIES, VALID, 20, **options)
        hit = (rows[1:].unsqueeze(2) == expected[1:].unsqueeze(1)).any(2).float().mean()
        assert hit >= 0.93
        assert rows[0].tolist() == [0] * 20
        own = torch.einsum("bkd,bmd->bkm", QUERIES[1:], VECTORS[rows[1:]])
        own = own.masked_fill(~VALID[1:].unsqueeze(2), -torch.inf).amax(1)
        torch.testing.assert_close(scores[1:], own)
        assert (scores[1:].diff(dim=1) <= 0).all()
        assert all(len(set(r)) == 20 and min(r) >= 2 for r in rows[1:].tolist())
        if options:
            assert allowed[rows[1:]].all()
            assert not (rows[1:].unsqueeze(2) == exclude[1:].unsqueeze(1)).any()


def test_an_effort_too_small_shows_in_the_recall() -> None:
    """Positive control of the measurement: one list visited is not enough."""
    index = FaissIndex(VECTORS, kind="ivf")
    truth, _ = ExactIndex(VECTORS).search(QUERIES, VALID, 100)
    index.effort = 1
    rows, _ = index.search(QUERIES, VALID, 100)
    assert (rows[1:].unsqueeze(2) == truth[1:].unsqueeze(1)).any(2).float().mean() < 0.97


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_a_list_that_filters_leave_short_is_filled_exactly(kind: str) -> None:
    index = FaissIndex(VECTORS, kind=kind)
    allowed = torch.zeros(len(VECTORS), dtype=torch.bool)
    allowed[[0, 1, 50, 900, 2999]] = True
    rows, scores = index.search(QUERIES, VALID, 5, None, allowed)
    assert all(set(r) == {50, 900, 2999, 0} for r in rows[1:].tolist())
    assert (scores[:, 3:] == -torch.inf).all()


def test_more_than_the_catalogue_holds() -> None:
    rows, scores = FaissIndex(VECTORS[:10]).search(QUERIES[1:], VALID[1:], 30, torch.full((15, 3), 4))
    expected, values = ExactIndex(VECTORS[:10]).search(QUERIES[1:], VALID[1:], 30, torch.full((15, 3), 4))
    assert torch.equal(rows, expected)
    torch.testing.assert_close(scores, values)


@pytest.mark.parametrize("kind", ["flat", "ivf", "hnsw"])
def test_saved_and_loaded_answers_the_same(tmp_path: Path, kind: str) -> None:
    index = FaissIndex(VECTORS, kind=kind)
    index.save(tmp_path)
    loaded = FaissIndex.load(tmp_path, VECTORS)
    assert (loaded.kind, loaded.effort, loaded.recall) == (index.kind, index.effort, index.recall)
    for before, after in zip(index.search(QUERIES, VALID, 9), loaded.search(QUERIES, VALID, 9), strict=True):
        assert torch.equal(before, after)


def tampered(folder: Path, how: str) -> None:
    file, about = folder / "index.faiss", folder / "index.json"
    content = bytearray(file.read_bytes())
    if how == "a flipped bit":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut short":
        file.write_bytes(content[:-1])
    elif how == "no index":
        file.unlink()
    elif how == "no digest":
        about.unlink()
    elif how == "digest of something else":
        about.write_text(json.dumps({**json.loads(about.read_text()), "index": "0" * 64}))
    elif how == "no JSON":
        about.write_text("{")
    elif how == "a list":
        about.write_text("[]")
    elif how == "another format":
        about.write_text(json.dumps({**json.loads(about.read_text()), "format": 99}))
    elif how == "a wrong effort":
        about.write_text(json.dumps({**json.loads(about.read_text()), "effort": "8"}))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("a flipped bit", "does not match its digest"),
        ("cut short", "does not match its digest"),
        ("no index", "cannot be read"),
        ("no digest", "cannot be read"),
        ("digest of something else", "does not match its digest"),
        ("no JSON", "cannot be read"),
        ("a list", "unknown format"),
        ("another format", "unknown format"),
        ("a wrong effort", "unknown format"),
    ],
)
def test_a_tampered_cache_never_reaches_faiss(
    tmp_path: Path, how: str, reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    index = FaissIndex(VECTORS, kind="ivf")
    index.save(tmp_path)
    tampered(tmp_path, how)

    def read(content: object) -> None:
        raise AssertionError("faiss read a file that was not checked")

    monkeypatch.setattr(faiss, "deserialize_index", read)
    with pytest.warns(UserWarning, match=reason):
        loaded = FaissIndex.load(tmp_path, VECTORS, kind="ivf")
    assert torch.equal(loaded.search(QUERIES, VALID, 9)[0], index.search(QUERIES, VALID, 9)[0])


def test_an_untouched_cache_does_reach_faiss(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive control of the test above."""
    FaissIndex(VECTORS, kind="ivf").save(tmp_path)

    def read(content: object) -> None:
        raise AssertionError("read")

    monkeypatch.setattr(faiss, "deserialize_index", read)
    with pytest.raises(AssertionError, match="read"):
        FaissIndex.load(tmp_path, VECTORS, kind="ivf")


def test_a_cache_of_other_vectors_or_another_kind_is_built_anew(tmp_path: Path) -> None:
    FaissIndex(VECTORS).save(tmp_path)
    other = VECTORS.clone()
    other[9, 0] += 1e-3
    with pytest.warns(UserWarning, match="belongs to other vectors"):
        assert torch.equal(FaissIndex.load(tmp_path, other).vectors, other)
    with pytest.warns(UserWarning, match="is of kind 'flat', not 'ivf'"):
        assert FaissIndex.load(tmp_path, VECTORS, kind="ivf").kind == "ivf"


def test_messages_name_what_was_received(monkeypatch: pytest.MonkeyPatch) -> None:
    index = FaissIndex(VECTORS[:10])
    with pytest.raises(ValueError, match="queries are 4 wide but item vectors 16"):
        index.search(QUERIES[:, :, :4], VALID, 3)
    with pytest.raises(ValueError, match="k must be at least 1, received 0"):
        index.search(QUERIES, VALID, 0)
    ordinary = builtins.__import__

    def without_faiss(name: str, *args: object, **options: object) -> object:
        if name == "faiss":
            raise ImportError(name)
        return ordinary(name, *args, **options)

    monkeypatch.setattr(builtins, "__import__", without_faiss)
    with pytest.raises(ImportError, match=r"pip install 'funnelrec\[faiss\]'"):
        FaissIndex(VECTORS)


@pytest.mark.parametrize("kind", ["ivf", "hnsw"])
def test_real_users_get_the_recall_that_was_asked_for_and_no_more(kind: str) -> None:
    """Tuned on users: little above the target, and less effort than from queries drawn around the items."""
    users = VECTORS[2:].view(-1, 2, 16).mean(1, keepdim=True)  # between two items: not where drawn queries are
    asked = FaissIndex(VECTORS, kind=kind, queries=users, target=0.8)
    more = FaissIndex(VECTORS, kind=kind, queries=users, target=0.99)
    assert asked.recall >= 0.8
    assert more.recall >= 0.99
    assert asked.effort <= more.effort
    valid = torch.ones(len(users), 1, dtype=torch.bool)
    truth = ExactIndex(VECTORS).search(users, valid, 100)[0]
    for index in (asked, more):
        found = index.search(users, valid, 100)[0]
        own = (truth.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean()
        assert own == pytest.approx(index.recall, abs=0.03)  # of all users, where it had seen 256


def test_what_cannot_be_tuned_on_is_refused() -> None:
    with pytest.raises(ValueError, match=r"queries must be \[users, interests, 16\].*received \[3, 2, 4\]"):
        FaissIndex(VECTORS, queries=torch.zeros(3, 2, 4))
    with pytest.raises(ValueError, match=r"one user at least, received \[0, 2, 16\]"):
        FaissIndex(VECTORS, queries=torch.zeros(0, 2, 16))
    with pytest.raises(ValueError, match="a recall above 0 and at most 1, received 1"):
        FaissIndex(VECTORS, target=1.5)
    with pytest.raises(ValueError, match="needs at least 16 items, received 10; use kind='flat'"):
        FaissIndex(VECTORS[:12], kind="ivf")


def test_a_graph_over_lengths_that_differ_finds_the_largest_products() -> None:
    """A graph of products leaves most items without a path to them and cannot reach this recall at any effort."""
    generator = torch.Generator().manual_seed(0)
    vectors = VECTORS * torch.exp(0.7 * torch.randn(len(VECTORS), 1, generator=generator))
    index = FaissIndex(vectors, kind="hnsw", target=0.97)
    assert index.recall >= 0.97
    assert index.effort < len(vectors) // 2
    plain = faiss.IndexHNSWFlat(16, 32, faiss.METRIC_INNER_PRODUCT)  # positive control
    plain.hnsw.efConstruction = 100
    plain.add(vectors[2:].numpy())
    queries = QUERIES[1:, :1]
    truth = ExactIndex(vectors).search(queries, torch.ones(len(queries), 1, dtype=torch.bool), 100)[0] - 2
    options = faiss.SearchParametersHNSW(efSearch=index.effort)
    found = torch.from_numpy(plain.search(queries[:, 0].numpy(), 100, params=options)[1])
    assert (truth.unsqueeze(2) == found.unsqueeze(1)).any(2).float().mean() < 0.97
