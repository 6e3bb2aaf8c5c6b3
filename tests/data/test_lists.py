"""MIND's files and lists of impressions: who is beside whom, what is read and what is measured."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from funnelrec import Dataset
from funnelrec.core.batch import Batch
from funnelrec.data.batches import Batches
from funnelrec.data.lists import ImpressionLists, impressions_of
from funnelrec.data.sources import mind
from funnelrec.learn.losses import ListSoftmax

NEWS = "\n".join(f"N{i}\t{'sport' if i % 2 else 'news'}\tTitle {i}" for i in range(12)) + "\n"
LINES = [
    ("1", "U1", "11/13/2019 5:53:12 AM", "N0 N1", "N2-1 N3-0 N4-0"),
    ("2", "U1", "11/13/2019 6:00:00 PM", "N0 N1", "N5-0 N6-1"),
    ("3", "U2", "11/12/2019 11:59:59 PM", "", "N7-1 N8-1"),
    ("4", "U2", "11/14/2019 12:00:00 AM", "N9", "N10-0 N2-1 N7-0"),
]


def write(folder: Path, lines: list[tuple[str, ...]]) -> Path:
    (folder / "behaviors.tsv").write_text("\n".join("\t".join(line) for line in lines) + "\n", encoding="utf-8")
    (folder / "news.tsv").write_text(NEWS, encoding="utf-8")
    return folder


@pytest.fixture
def dataset(tmp_path: Path) -> Dataset:
    return Dataset.build(mind.load(write(tmp_path, LINES), valid=0.01, test=0.3), tmp_path / "d")


def test_events(dataset: Dataset, tmp_path: Path) -> None:
    tables = mind.load(tmp_path)
    assert len(tables.events) == 3 + 10
    read = tables.events.filter(user="U1").sort("time")
    assert read["item"].to_list()[:2] == ["N0", "N1"]  # before the first impression, in their order
    assert read["time"].to_list()[:3] == [1573624390, 1573624391, 1573624392]
    assert tables.events.filter(user="U2", item="N9")["time"].to_list() == [1573603198]  # 11/12/2019 11:59:58 PM
    assert set(tables.items["item"]) == set(tables.events["item"])
    test = dataset.rows("test")
    assert len(test) == 3  # the newest impression
    assert len(dataset.rows("train")) == 7


def test_lists(dataset: Dataset) -> None:
    lists = ImpressionLists(dataset, "train", negatives=5, max_len=4)
    assert len(lists) == 2  # all of U2's first impression was clicked
    batch = lists.gather(torch.arange(2), torch.Generator().manual_seed(0))
    ids = dataset.item_vocabulary.decode(batch.item.numpy()).to_numpy().reshape(2, 6)
    by_click = {row[0]: set(row[1:]) for row in ids}
    assert by_click == {"N2": {"N3", "N4"}, "N6": {"N5"}}
    assert batch.label.view(2, 6).tolist() == [[1.0] + [0.0] * 5] * 2
    history = [set(dataset.item_vocabulary.decode(h[h > 0].numpy())) for h in batch.history]
    assert history[list(ids[:, 0]).index("N2") * 6] == {"N0", "N1"}
    assert history[list(ids[:, 0]).index("N6") * 6] == {"N0", "N1", "N2"}
    groups = impressions_of(dataset, "train")
    assert sorted(np.bincount(groups.numpy()).tolist()) == [2, 2, 3]
    again = next(iter(Batches(lists, 2, shuffle=True).epoch(0)))
    assert again.item.shape == (12,)
    with pytest.raises(ValueError, match=r"give gather a torch\.Generator"):
        lists.gather(torch.arange(2))
    with pytest.raises(ValueError, match="at least 1, received 0"):
        ImpressionLists(dataset, "train", negatives=0)


def test_the_loss_by_hand() -> None:
    batch = Batch(logits=torch.tensor([1.0, 0.0, 2.0, 2.0]))
    loss = ListSoftmax(1)(lambda batch: batch.logits, batch)
    expected = (np.log(1 + np.exp(-1)) + np.log(2)) / 2
    assert float(loss) == pytest.approx(expected)
    with pytest.raises(ValueError, match="at least 1 negative, received 0"):
        ListSoftmax(0)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (("1", "U1", "yesterday", "", "N1-0"), r"behaviors.tsv, line 1: a time is written .*, received 'yesterday'"),
        (("1", "U1", "11/13/2019 5:53:12 AM", "", "N1-0 N2"), r"line 1: what was shown is written .*, received 'N2'"),
    ],
)
def test_bad_lines(line: tuple[str, ...], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        mind.load(write(tmp_path, [line]))
