"""The Dataset: what is fitted sees training only, attributes stand where the spec says, files are whole or refused."""

from __future__ import annotations

import inspect
import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest
import torch

from funnelrec.core.schema import Schema
from funnelrec.data import _build
from funnelrec.data.dataset import Dataset
from funnelrec.data.examples import Impressions
from funnelrec.data.split import Given, GlobalTime, LeaveLastOut, Ratio
from funnelrec.data.tables import Tables
from tests.data import worlds


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return Dataset.build(worlds.tables(), tmp_path_factory.mktemp("built") / "data")


def test_facts_are_the_events_in_the_order_of_time(built: Dataset) -> None:
    table = worlds.tables().events
    facts = built.events
    assert facts.time.tolist() == table["when"].to_list() and facts.moment.tolist() == facts.time.tolist()
    assert facts.label.tolist() == table["stars"].to_list()
    assert facts.weight.tolist() == table["seconds"].cast(pl.Float32).to_list()
    known = pl.Series(facts.item >= 2)
    items = built.item_vocabulary.decode(facts.item)
    assert items.filter(known).to_list() == table["what"].filter(known).to_list()
    assert built.counts["events"] == len(built) == 300
    assert [len(built.rows(p)) for p in ("train", "valid", "test")] == np.bincount(facts.part).tolist()
    assert built.boundaries == GlobalTime().fit(table["when"].to_numpy()).boundaries
    assert facts.time[built.rows("train")].max() < built.boundaries[0] <= facts.time[built.rows("valid")].min()


def test_attributes_stand_by_row(built: Dataset) -> None:
    spec, features = built.spec, built.features
    assert [c.name for c in spec.categories] == ["who", "city", "what", "tags", "device"]
    assert spec.num_items == built.item_vocabulary.size == len(features.item_ids)
    assert not features.item_ids[0].any() and not features.user_ids[0].any()
    columns = {c.name: c for c in spec.categories}
    assert features.item_ids[1].tolist() == [columns["what"].offset, columns["tags"].offset, 0, 0]
    assert features.user_ids[1].tolist() == [columns["who"].offset, columns["city"].offset]
    bare = int(built.user_vocabulary.encode(pl.Series(["u1"]))[0])  # acted, but has no line in the users table
    assert features.user_ids[bare].tolist() == [columns["who"].offset + bare - 1, columns["city"].offset]
    tags, vocabulary = built.item_attribute("tags"), built.vocabularies["tags"]
    for row in range(2, spec.num_items):
        raw = built.catalogue["tags"][row]
        wanted = vocabulary.encode(pl.Series(raw)).tolist() if raw is not None else [1]
        assert tags[row].tolist() == wanted + [0] * (3 - len(wanted))
    assert built.item_attribute("what")[:, 0].tolist() == list(range(spec.num_items))
    price = built.transforms["price"].apply(built.catalogue["price"].fill_null(float("nan")).to_numpy())
    assert np.array_equal(features.item_numbers.numpy(), price)


def test_the_catalogue_follows_the_item_rows(built: Dataset) -> None:
    ids = built.catalogue["what"].to_list()
    assert ids[:2] == [None, None] and built.item_vocabulary.encode(pl.Series(ids[2:])).tolist() == list(
        range(2, built.spec.num_items)
    )
    assert 999 in ids  # nobody took it, the catalogue has it
    titles = dict(zip(ids, built.catalogue["title"].to_list(), strict=True))
    assert titles[105] == "Item 105" and titles[101] is None


def _change_after(table: pl.DataFrame, t: int) -> pl.DataFrame:
    """The same events with every value at or after t replaced by something never seen."""
    late = pl.col("when") >= t
    return table.with_columns(
        pl.when(late).then(pl.lit("stranger")).otherwise("who").alias("who"),
        pl.when(late).then(777).otherwise("what").alias("what"),
        pl.when(late).then(pl.lit("watch")).otherwise("device").alias("device"),
        pl.when(late).then(1e9).otherwise("hour").alias("hour"),
    )


def test_what_is_fitted_sees_the_training_part_only(tmp_path: Path) -> None:
    before = worlds.tables()
    bounds = GlobalTime().fit(before.events["when"].to_numpy()).boundaries
    assert bounds is not None
    split = GlobalTime(boundaries=bounds)
    one = Dataset.build(before, tmp_path / "one", split=split)
    other = Dataset.build(
        replace(before, events=_change_after(before.events, bounds[0])), tmp_path / "other", split=split
    )
    assert one.spec == other.spec and one.transforms == other.transforms
    for name, vocabulary in one.vocabularies.items():
        assert vocabulary.to_arrow().equals(other.vocabularies[name].to_arrow())
    assert torch.equal(one.features.item_ids, other.features.item_ids)
    train = one.rows("train")
    assert torch.equal(one.facts[train], other.facts[train])
    test = other.events
    assert set(test.user[other.rows("test")]) == set(test.item[other.rows("test")]) == {1}
    # the check sees a difference where training itself differs
    planted = Dataset.build(
        replace(before, events=_change_after(before.events, bounds[0] - 20)), tmp_path / "planted", split=split
    )
    assert planted.transforms != one.transforms and planted.spec != one.spec


def test_people_whom_training_never_saw_keep_their_own_histories(tmp_path: Path) -> None:
    events = pl.DataFrame({"u": [1, 1, 8, 9, 8], "i": [5, 6, 5, 6, 6], "t": [0, 1, 10, 11, 12]})
    data = Dataset.build(
        Tables(events, Schema(user="u", item="i", time="t")), tmp_path / "d", split=GlobalTime(boundaries=(5, 5))
    )
    assert data.events.user.tolist() == [2, 2, 1, 1, 1]
    people = torch.from_numpy(data.events.person)
    items, _, mask = data.histories.before(people[4:], torch.tensor([12]), 3)
    assert data.item_vocabulary.decode(items[mask].numpy()).to_list() == [5]
    assert not data.histories.before(torch.tensor([1]), torch.tensor([99]), 3)[2].any()  # "unknown" is nobody


@pytest.mark.parametrize("split", [GlobalTime(), LeaveLastOut(), Ratio(seed=1)])
def test_the_order_of_the_rows_does_not_matter(tmp_path: Path, split: GlobalTime | LeaveLastOut | Ratio) -> None:
    tidy = worlds.tables(200, ties=False)
    assert tidy.users is not None and tidy.items is not None
    mixed = replace(
        tidy,
        events=tidy.events.sample(fraction=1.0, shuffle=True, seed=1),
        users=tidy.users.sample(fraction=1.0, shuffle=True, seed=2),
        items=tidy.items.sample(fraction=1.0, shuffle=True, seed=3),
    )
    one = Dataset.build(tidy, tmp_path / "one", split=split)
    other = Dataset.build(mixed, tmp_path / "other", split=split)
    assert one.fingerprint == other.fingerprint
    changed = replace(tidy, events=tidy.events.with_columns(pl.col("hour") + (pl.col("when") == 1_000_050)))
    assert Dataset.build(changed, tmp_path / "changed", split=split).fingerprint != one.fingerprint


def test_a_published_part_follows_its_rows(tmp_path: Path) -> None:
    tidy = worlds.tables(60, ties=False)
    part = (np.arange(60) % 3).astype(np.uint8)
    order = np.random.default_rng(0).permutation(60)
    one = Dataset.build(replace(tidy, part=part), tmp_path / "one")
    other = Dataset.build(replace(tidy, events=tidy.events[order], part=part[order]), tmp_path / "other")
    assert one.fingerprint == other.fingerprint and one.events.part.tolist() == part.tolist()
    assert one.split == Given()


def test_leave_last_out_counts_moments_by_user(tmp_path: Path) -> None:
    data = Dataset.build(worlds.tables(), tmp_path / "d", split=LeaveLastOut())
    assert data.events.time.tolist() == worlds.tables().events["when"].to_list()
    for person in set(data.events.person.tolist()):
        mine = data.events.person == person
        assert data.events.moment[mine].tolist() == list(range(1, int(mine.sum()) + 1))
        assert data.events.part[mine].tolist()[-3:] == [0, 1, 2]


def test_random_rows_keep_test_events_out_of_the_histories(tmp_path: Path) -> None:
    data = Dataset.build(worlds.tables(), tmp_path / "d", split=Ratio(0.1, 0.3))
    assert len(data.histories.items) == len(data.positives("train")[0]) == len(data.train_histories.items)
    ordered = Dataset.build(worlds.tables(), tmp_path / "e")
    assert len(ordered.histories.items) == ordered.counts["positives"] > len(ordered.train_histories.items)


def test_a_plain_rows_table(tmp_path: Path) -> None:
    tables = worlds.rows_tables()
    data = Dataset.build(tables, tmp_path / "rows")
    assert (data.spec.num_users, data.spec.num_items, data.spec.num_ids, data.spec.num_numbers) == (0, 0, 2, 3)
    assert data.split == Given() and len(data.rows("test")) == 10
    ids, numbers = data.encode_context(tables.events)
    batch = Impressions(data, "valid").gather(torch.arange(10))
    assert set(batch) == {"ids", "numbers", "label", "weight"}
    assert np.array_equal(batch.ids.numpy(), ids[30:40]) and np.array_equal(batch.numbers.numpy(), numbers[30:40])
    assert batch.label.tolist() == tables.events["click"][30:40].to_list()
    for wanted in ("histories", "catalogue", "user_vocabulary"):
        with pytest.raises(ValueError, match="a plain rows table has no"):
            getattr(data, wanted)
    with pytest.raises(ValueError, match=r"max_len and negatives must be 0"):
        Impressions(data, "train", max_len=3)
    with pytest.raises(ValueError, match=r"GlobalTime needs the column 'time'.*use Ratio"):
        Dataset.build(tables, tmp_path / "other", split=GlobalTime())
    assert len(Dataset.build(tables, tmp_path / "other", split=Ratio(0.1, 0.1)).rows("valid")) == 5


def test_in_memory_equals_memory_mapped(built: Dataset) -> None:
    loaded = Dataset.open(built.folder, in_memory=True)
    index = torch.arange(50)
    for part in ("train", "test"):
        left, right = (Impressions(d, part, max_len=5).gather(index[:20]) for d in (built, loaded))
        assert all(torch.equal(left[k], right[k]) for k in left)


def test_writing_to_a_tensor_never_reaches_the_file(tmp_path: Path) -> None:
    data = Dataset.build(worlds.tables(50), tmp_path / "d")
    data.facts.zero_()
    Dataset.open(data.folder, verify=True)


def test_encoding_a_large_table_in_pieces_changes_nothing(
    built: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(_build, "CHUNK", 7)
    assert Dataset.build(worlds.tables(), tmp_path / "d").fingerprint == built.fingerprint


# --- the folder ------------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return Dataset.build(worlds.tables(60), tmp_path / "data").folder


def test_every_file_is_guarded(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for _ in range(8):
            broken = bytearray(whole)
            broken[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
            path.write_bytes(bytes(broken))
            with pytest.raises(ValueError, match=re.escape(path.name)):
                Dataset.open(folder)
        path.write_bytes(whole[:-1])
        with pytest.raises(ValueError, match=re.escape(path.name)):
            Dataset.open(folder, verify=False)
        path.unlink()
        with pytest.raises(ValueError, match=rf"{re.escape(path.name)} is missing"):
            Dataset.open(folder)
        path.write_bytes(whole)
    Dataset.open(folder)


def test_a_newer_format_is_refused(folder: Path) -> None:
    path = folder / "dataset.json"
    data = json.loads(path.read_text())
    path.write_text(json.dumps({**data, "format": 2}))
    with pytest.raises(ValueError, match=r"has format 2, this version reads up to 1; upgrade funnelrec"):
        Dataset.open(folder)


def test_a_build_that_fails_leaves_the_old_dataset_and_no_litter(folder: Path) -> None:
    old = Dataset.open(folder).fingerprint
    with pytest.raises(ValueError, match="stands 2 times in column 'what'"):
        twice = worlds.items_table()
        Dataset.build(replace(worlds.tables(60), items=pl.concat([twice, twice[:1]])), folder)
    assert Dataset.open(folder).fingerprint == old
    assert [p.name for p in folder.parent.iterdir()] == ["data"]
    new = Dataset.build(worlds.tables(61), folder)
    assert new.fingerprint != old and [p.name for p in folder.parent.iterdir()] == ["data"]


def test_a_build_that_is_killed_half_way_leaves_the_old_dataset(folder: Path) -> None:
    code = (
        "import sys\nfrom tests.data import worlds\nfrom funnelrec.data.dataset import Dataset\n"
        "Dataset.build(worlds.tables(400_000), sys.argv[1])"
    )
    old, root = Dataset.open(folder).fingerprint, Path(__file__).parents[2]
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], cwd=root, env={**os.environ, "PYTHONPATH": str(root)}
    )
    while process.poll() is None and not list(folder.parent.glob("*.partial/facts.npy")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -signal.SIGKILL
    assert Dataset.open(folder, verify=True).fingerprint == old
    (draft,) = folder.parent.glob("*.partial")
    assert (draft / "facts.npy").is_file() and not (draft / "dataset.json").exists()
    assert Dataset.build(worlds.tables(61), folder).fingerprint != old


def test_faults_are_named(tmp_path: Path, folder: Path) -> None:
    schema = Schema(user="u", item="i", time="t", label="y")
    good = pl.DataFrame({"u": [1, 2, 1], "i": [1, 2, 3], "t": [1, 2, 3], "y": [1.0, 0.0, 1.0]})
    target = tmp_path / "new"

    def refuse(events: pl.DataFrame, match: str, split: GlobalTime | None = None, use: Schema = schema) -> None:
        with pytest.raises(ValueError, match=match) as caught:
            Dataset.build(Tables(events, use), target, split=split)
        assert "\n" not in str(caught.value) and not target.exists()

    refuse(good[:0], "the events table is empty")
    refuse(good.with_columns(t=pl.lit("monday")), "'t' needs whole seconds, received String")
    refuse(good.with_columns(t=pl.Series([1, None, 3])), "'t' has 1 missing values")
    refuse(good.with_columns(y=pl.Series([1.0, None, 3.0])), "'y' has 1 missing values")
    refuse(good.with_columns(y=pl.Series([1.0, float("nan"), 3.0])), "'y' has values that are NaN or infinite")
    refuse(good.with_columns(u=pl.Series([1, None, 3])), "'u' has 1 missing ids")
    refuse(good, "no event is left for training by GlobalTime", GlobalTime(boundaries=(0, 9)))
    with pytest.raises(ValueError, match=r"is no dataset; make one with Dataset\.build"):
        Dataset.open(tmp_path / "nowhere")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(ValueError, match="mine exists and is no dataset"):
        Dataset.build(Tables(good, schema), tmp_path / "mine")
    data = Dataset.open(folder)
    with pytest.raises(ValueError, match=r"no categorical item field is named 'genre'; there are: what, tags"):
        data.item_attribute("genre")
    with pytest.raises(ValueError, match=r"part must be one of train, valid, test, received 'all'"):
        inspect.unwrap(Dataset.rows)(data, "all")  # past the type check that only tests have
    text = Schema(user="u", item="i", context=(worlds.SCHEMA.items[1],))
    with pytest.raises(ValueError, match=r"context field 'title' is Text"):
        Dataset.build(Tables(good.with_columns(title=pl.lit("x")), text), target, split=LeaveLastOut())
