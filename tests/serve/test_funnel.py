"""The funnel: the same answers after saving, a named fallback where nothing is known, no code in any file."""

from __future__ import annotations

import dataclasses
import os
import pickletools
import random
import subprocess
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from funnelrec.core.schema import Category, Schema
from funnelrec.data.dataset import Dataset
from funnelrec.data.split import LeaveLastOut, Ratio
from funnelrec.data.tables import Tables
from funnelrec.learn.calibration import Subsampling, Temperature
from funnelrec.match.item_cf import ItemCF
from funnelrec.match.popularity import Popularity
from funnelrec.rerank.mmr import MMR
from funnelrec.serve.artifact import ArtifactError, read_artifact, write_artifact
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.request import Request, RequestError
from tests.serve.funnels import small_dataset, small_funnel


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("data") / "d")


@pytest.fixture(scope="module")
def funnel(dataset: Dataset) -> Funnel:
    return small_funnel(dataset)


@pytest.fixture
def saved(funnel: Funnel, tmp_path: Path) -> Path:
    return funnel.save(tmp_path / "shop.funnel")


QUESTIONS = [
    Request(user="u03"),
    Request(user="u11", k=5),
    Request(user="late"),
    Request(user="nobody"),
    Request(history=[105, 106, 107]),
    Request(history=["105", "106", "107"]),
    Request(history=[]),
    Request(history=[999, 998]),
    Request(history=[999, 105]),
    Request(user="u03", history=[105], context={"device": "phone"}),
    Request(user="u03", filters={"kind": ["red", "blue"]}),
    Request(user="u03", diversity=5.0),
    Request(user="u03", exclude_seen=False, k=40),
]


def test_answers_are_the_same_after_saving(funnel: Funnel, saved: Path) -> None:
    loaded = Funnel.load(saved)
    assert loaded.recommend_many(QUESTIONS) == funnel.recommend_many(QUESTIONS)
    assert loaded.metrics == {"ndcg@10": 0.25}


def test_together_or_one_by_one_the_answers_are_the_same(funnel: Funnel) -> None:
    for question, together in zip(QUESTIONS, funnel.recommend_many(QUESTIONS), strict=True):
        alone = funnel.recommend_many([question])[0]
        assert alone.ids == together.ids
        assert alone.fallback == together.fallback
        assert [r.score for r in alone.items] == pytest.approx([r.score for r in together.items], abs=1e-5)


def test_saving_twice_gives_the_same_bytes(funnel: Funnel, tmp_path: Path) -> None:
    a, b = funnel.save(tmp_path / "a"), funnel.save(tmp_path / "b")
    assert {p.name: p.read_bytes() for p in a.iterdir()} == {p.name: p.read_bytes() for p in b.iterdir()}
    before = {p.name for p in a.iterdir()}
    Funnel.load(a).save(a)
    assert {p.name for p in a.iterdir()} == before, "a loaded funnel saves what it was loaded from"


@pytest.mark.parametrize(
    ("question", "reason"),
    [
        (Request(user="u03"), None),
        (Request(user="late"), None),  # whom training never saw, but the log did
        (Request(user="nobody"), "unknown user"),
        (Request(history=[]), "empty history"),
        (Request(user="u03", history=[]), "empty history"),
        (Request(history=[999, 998]), "unknown items"),
        (Request(history=[999, 105]), None),
    ],
)
def test_the_fallback_is_named(funnel: Funnel, question: Request, reason: str | None) -> None:
    answer = funnel.recommend_many([question])[0]
    assert answer.fallback == reason
    assert len(answer.items) == 10


def test_the_fallback_is_what_was_popular_of_late(dataset: Dataset) -> None:
    funnel = Funnel.build(dataset, matcher=ItemCF(dataset.spec).fit(*dataset.positives("train")))
    by_row = funnel.fallback.scores.clone()
    best = dataset.item_vocabulary.decode(by_row.argsort(descending=True, stable=True)[:3].numpy())
    assert funnel.recommend(user="nobody", k=3).ids == best.to_list()


def test_items_seen_before_are_left_out_unless_asked_for(funnel: Funnel, dataset: Dataset) -> None:
    person = dataset.people.encode(pl.Series(["u03"]))
    seen = {int(r) for r in dataset.histories.seen(torch.tensor(person), torch.tensor([10**9]))[0] if r}
    ids = set(dataset.item_vocabulary.decode(np.array(sorted(seen))).to_list())
    assert ids
    assert not ids & set(funnel.recommend("u03", k=40).ids)
    assert ids & set(funnel.recommend("u03", k=40, exclude_seen=False).ids)
    assert not {105, 106} & set(funnel.recommend(history=[105, 106], k=40).ids)


def test_numbers_of_numpy_are_ids_too(funnel: Funnel) -> None:
    plain = funnel.recommend(history=[105, 106], k=5)
    assert funnel.recommend(history=list(np.array([105, 106])), k=5) == plain
    assert funnel.recommend_many([unchecked(history=[105, 106], k=np.int64(5))]) == [plain]
    assert unchecked(user=np.int64(7)).user == 7


@pytest.fixture(scope="module")
def flagged(tmp_path_factory: pytest.TempPathFactory) -> Tables:
    """Events and items with columns of True and False, whole floats, and lists."""
    rng = np.random.default_rng(5)
    n = 400
    events = pl.DataFrame(
        {
            "user": rng.integers(0, 20, n),
            "item": rng.integers(0, 30, n),
            "time": np.arange(n) * 3600,
            "member": rng.random(n) < 0.5,
            "floor": rng.integers(0, 3, n).astype(np.float64),
            "tags": [["new", "cheap"][: i % 3] for i in range(n)],
        }
    )
    schema = Schema(
        user="user",
        item="item",
        time="time",
        context=(Category("member"), Category("floor"), Category("tags", many=True)),
        items=(Category("adult"),),
    )
    return Tables(events, schema, items=pl.DataFrame({"item": np.arange(30), "adult": [i % 2 == 0 for i in range(30)]}))


def test_values_of_a_request_mean_what_they_mean_in_a_table(flagged: Tables, tmp_path: Path) -> None:
    dataset = Dataset.build(flagged, tmp_path / "d")
    funnel = Funnel.build(dataset, matcher=Popularity(dataset.spec).fit(*dataset.taken("train")))
    for row in flagged.events.head(12).iter_rows(named=True):
        context = {name: row[name] for name in ("member", "floor", "tags")}
        table = flagged.events.filter(pl.col("time") == row["time"])
        assert funnel.store.encode_contexts([context])[0].tolist() == dataset.encode_context(table)[0].tolist()
    one, same = ({"tags": "new"}, {"tags": ["new"]})
    assert funnel.store.encode_contexts([one])[0].tolist() == funnel.store.encode_contexts([same])[0].tolist()
    assert {i % 2 for i in funnel.recommend(3, k=30, filters={"adult": True}).ids} == {0}


def test_serving_knows_all_events_whatever_the_split(flagged: Tables, tmp_path: Path) -> None:
    """Random rows keep test events out of the dataset's histories, but the items were taken all the same."""
    for name, split in (("ratio", Ratio()), ("time", None), ("legacy", LeaveLastOut())):
        dataset = Dataset.build(flagged, tmp_path / name, split=split)
        funnel = Funnel.build(dataset, matcher=Popularity(dataset.spec).fit(*dataset.taken("train")))
        for user in range(20):
            taken = set(flagged.events.filter(pl.col("user") == user)["item"])
            assert set(funnel.recommend(user, k=30).ids) == set(range(30)) - taken


def test_the_fallback_counts_days_also_where_moments_are_ordinals(tmp_path: Path) -> None:
    old, new = [(u, 1, 0) for u in range(6)], [(u, 2, 365 * 86_400) for u in range(6, 10)]
    events = pl.DataFrame([*old, *new], schema=["user", "item", "time"], orient="row")
    dataset = Dataset.build(
        Tables(events, Schema(user="user", item="item", time="time")), tmp_path / "d", split=LeaveLastOut()
    )
    funnel = Funnel.build(dataset, matcher=Popularity(dataset.spec).fit(*dataset.taken("train")))
    assert funnel.recommend("nobody", k=2).ids == [2, 1]
    by_ordinal = Popularity(dataset.spec, half_life=7.0).fit(*dataset.positives("train"))  # the fault
    assert dataset.item_vocabulary.decode(by_ordinal.scores.argmax()[None].numpy()).to_list() == [1]


def test_filters_are_honoured(funnel: Funnel) -> None:
    answer = funnel.recommend("u03", k=40, filters={"kind": "red"})
    assert answer.items
    assert {r.attributes["kind"] for r in answer.items} == {"red"}
    assert answer.items[0].attributes["title"].startswith("Item")


def test_more_diversity_gives_more_kinds_at_the_top(funnel: Funnel) -> None:
    plain, varied = (funnel.recommend("u03", k=6, diversity=d) for d in (0, 100.0))
    assert [r.attributes["kind"] for r in varied.items[:3]] != [r.attributes["kind"] for r in plain.items[:3]]
    assert len({r.attributes["kind"] for r in varied.items[:3]}) == 3
    assert [r.score for r in plain.items] == sorted((r.score for r in plain.items), reverse=True)


def test_the_ranker_decides_the_order(dataset: Dataset, funnel: Funnel) -> None:
    alone = Funnel.build(dataset, matcher=funnel.matcher, max_len=20)
    by_match = alone.recommend("u03", k=10)
    assert [r.match_place for r in by_match.items] == list(range(10))
    assert [r.score for r in by_match.items] == [r.match_score for r in by_match.items]
    assert [r.match_place for r in funnel.recommend("u03", k=10).items] != list(range(10))


def test_a_calibrated_funnel_says_how_likely_a_click_is(dataset: Dataset, funnel: Funnel, tmp_path: Path) -> None:
    """The probability is of the score that is shown, survives the artifact, and changes nothing else."""
    calibration = Subsampling(0.5, Temperature(2.0))
    models = {"matcher": funnel.matcher, "ranker": funnel.ranker}
    calibrated = Funnel.build(dataset, **models, candidates=25, max_len=20, calibration=calibration)
    answer = calibrated.recommend("u03")
    plain = funnel.recommend("u03", diversity=0)
    assert [r.score for r in answer.items] == pytest.approx([r.score for r in plain.items])
    assert {r.probability for r in plain.items} == {None}
    half = [0.5 / (0.5 + np.exp(-r.score / 2)) for r in answer.items]  # p / (p + (1 - p) / .5) with p = σ(score / 2)
    assert [r.probability for r in answer.items] == pytest.approx(half)
    again = Funnel.load(calibrated.save(tmp_path / "calibrated.funnel"))
    assert again.calibration == calibration
    assert again.recommend("u03") == answer
    assert {r.probability for r in again.recommend("nobody").items} == {None}  # merely popular: nobody ranked them


def test_a_calibration_needs_a_ranker(dataset: Dataset, funnel: Funnel) -> None:
    with pytest.raises(ValueError, match="this funnel has no ranker"):
        Funnel.build(dataset, matcher=funnel.matcher, calibration=Temperature(1.0))


def test_an_artifact_from_before_calibrations_is_read(funnel: Funnel, saved: Path) -> None:
    manifest, members = read_artifact(saved)
    older = {k: v for k, v in manifest.items() if k not in ("calibration", "sha256", "format", "files")}
    write_artifact(saved, older, members)
    again = Funnel.load(saved)
    assert again.calibration is None
    assert again.recommend("u03") == funnel.recommend("u03")


def test_context_reaches_the_ranker(funnel: Funnel) -> None:
    phone, desktop = (funnel.recommend("u03", context={"device": d}, diversity=0) for d in ("phone", "desktop"))
    assert [r.score for r in phone.items] != [r.score for r in desktop.items]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "needs a user or a history"),
        ({"user": "u03", "k": 0}, "k must be a whole number from 1 to 1000, received 0"),
        ({"user": "u03", "k": 10**6}, "k must be"),
        ({"user": "u03", "filters": {"colour": "red"}}, "no categorical item field is named 'colour'; there are"),
        ({"user": "u03", "filters": {"kind": "pink"}}, "no item has kind='pink'"),
        ({"user": "u03", "filters": {"kind": []}}, "needs at least one value"),
        ({"user": "u03", "context": {"weather": "dry"}}, "no context field is named 'weather'; there are device"),
        ({"user": "u03", "diversity": -1.0}, "diversity must be 0 or a positive number"),
        ({"user": "u03", "diversity": float("nan")}, "diversity must be 0 or a positive number"),
        ({"history": "105,106"}, "a list of item ids, newest last, received '105,106'"),
        ({"history": [105, None]}, "an item of a history is a whole number or a text, received None"),
        ({"history": [105, 2.5]}, "an item of a history is a whole number or a text, received 2.5"),
        ({"history": [1] * 10_001}, "at most 10000 items"),
    ],
)
def test_a_wrong_request_says_what_is_wrong(funnel: Funnel, options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        funnel.recommend(**options)  # type: ignore[arg-type]


def unchecked(**options: object) -> Request:
    """A request as it comes to be where nothing checks annotations, as in a user's program."""
    request = object.__new__(Request)
    for f in dataclasses.fields(Request):
        object.__setattr__(request, f.name, options.get(f.name, f.default))
    request.__post_init__()
    return request


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"user": 7.0}, "a user is a whole number or a text, received 7.0"),
        ({"user": True}, "a user is a whole number or a text, received True"),
        ({"user": "u03", "diversity": "high"}, "diversity must be 0 or a positive number, received 'high'"),
        ({"user": "u03", "filters": "red"}, "filters are written {name: value}, received 'red'"),
        ({"user": "u03", "context": "phone"}, "context are written {name: value}, received 'phone'"),
        ({"user": "u03", "k": 2.0}, "k must be a whole number from 1 to 1000, received 2.0"),
    ],
)
def test_values_of_a_wrong_type_say_what_is_wrong(options: dict[str, object], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        unchecked(**options)


def test_a_reranker_without_the_knob_says_so(dataset: Dataset, funnel: Funnel) -> None:
    with pytest.raises(RequestError, match="has no reranker"):
        Funnel.build(dataset, matcher=funnel.matcher).recommend("u03", diversity=1.0)
    with pytest.raises(RequestError, match="MMR has no knob 'diversity'"):
        Funnel.build(dataset, matcher=funnel.matcher, reranker=MMR()).recommend("u03", diversity=1.0)


def test_models_that_are_not_of_the_zoo_are_refused_when_saving(dataset: Dataset, tmp_path: Path) -> None:
    class Own(ItemCF):
        """A model of the user's own."""

    own = Own(dataset.spec).fit(*dataset.positives("train"))
    with pytest.raises(ValueError, match="Own is not a model of the zoo"):
        Funnel.build(dataset, matcher=own).save(tmp_path / "x")
    with pytest.raises(ValueError, match="Linear is no matcher"):
        Funnel.build(dataset, matcher=torch.nn.Linear(2, 2))


def holds_pickle(content: bytes) -> bool:
    """True for a stream that a pickle reader would follow to its end and that builds anything by name."""
    try:
        names = {opcode.name for opcode, _, _ in pickletools.genops(content)}
    except (ValueError, IndexError, UnicodeDecodeError):
        return False
    return bool(names)


def test_no_file_holds_pickle(saved: Path) -> None:
    import pickle

    assert holds_pickle(pickle.dumps({"a": [1, 2]})), "the check sees a pickle"
    for path in saved.iterdir():
        content = path.read_bytes()
        assert not holds_pickle(content)
        assert b"\x80\x04\x95" not in content, f"{path.name} holds the start of a pickle"


LOAD_WATCHED = """
import sys
from funnelrec.serve.funnel import Funnel
Funnel.load(sys.argv[1]).recommend(user="u03")          # everything is imported now
def watch(event, args):
    if event in ("pickle.find_class", "marshal.loads", "exec", "compile", "subprocess.Popen", "os.system"):
        raise RuntimeError("forbidden: " + event)
    if event.startswith("socket."):
        raise RuntimeError("forbidden: " + event)
sys.addaudithook(watch)
if sys.argv[2] == "fault":
    eval("1 + 1")
print(len(Funnel.load(sys.argv[1]).recommend(user="u03").items))
"""


def test_loading_and_answering_execute_nothing_from_the_artifact(saved: Path) -> None:
    def attempt(mode: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-c", LOAD_WATCHED, str(saved), mode]
        return subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)

    good, caught = attempt("plain"), attempt("fault")
    assert (good.returncode, good.stdout.strip()) == (0, "10"), good.stderr
    assert "forbidden: " in caught.stderr


def refused(saved: Path, file: int, name: str, content: bytes, place: int, bit: int) -> bool:
    """One bit of the file flipped on disk and back; True when reading named the file."""
    os.pwrite(file, bytes([content[place] ^ (1 << bit)]), place)
    try:
        read_artifact(saved)
    except ArtifactError as error:
        return name in str(error)
    finally:
        os.pwrite(file, content[place : place + 1], place)
    return False


def unnoticed_flips(saved: Path, places: Callable[[int], Iterable[tuple[int, int]]]) -> tuple[int, list[str]]:
    """How many flips were tried, and those that reading did not refuse by name. `places`: size -> (byte, bit)s."""
    tried, missed = 0, []
    for path in sorted(p for p in saved.iterdir() if p.is_file()):
        content, file = path.read_bytes(), os.open(path, os.O_RDWR)
        for place, bit in places(len(content)):
            tried += 1
            if not refused(saved, file, path.name, content, place, bit):
                missed.append(f"{path.name}, byte {place}, bit {bit}")
        os.close(file)
    Funnel.load(saved)  # put back, it is whole
    return tried, missed


def test_flipped_bits_of_a_real_artifact_are_refused(saved: Path) -> None:
    rng = random.Random(0)
    tried, missed = unnoticed_flips(
        saved, lambda size: [(p, rng.randrange(8)) for p in (0, size - 1, *rng.sample(range(size), 60))]
    )
    assert missed == []
    assert tried > 500


@pytest.mark.slow
def test_every_flipped_bit_of_a_real_artifact_is_refused(saved: Path) -> None:
    tried, missed = unnoticed_flips(saved, lambda size: ((p, bit) for p in range(size) for bit in range(8)))
    assert missed == []
    assert tried == 8 * sum(p.stat().st_size for p in saved.iterdir() if p.is_file())
