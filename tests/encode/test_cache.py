"""Vectors by content: each made once, none for another version, none lost."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from funnelrec.encode.cache import VectorCache


class Maker:
    """Vectors that say how long a content is; remembers what it was asked for."""

    def __init__(self, contents: list[str], width: int = 2) -> None:
        self.contents, self.width, self.asked = contents, width, [[""]][:0]

    def __call__(self, places: list[int]) -> Tensor:
        self.asked.append([self.contents[i] for i in places])
        return torch.tensor([[float(len(self.contents[i]))] * self.width for i in places])


def test_each_content_is_made_once(tmp_path: Path) -> None:
    contents = ["a", "bb", "a", "ccc"]
    maker, cache = Maker(contents), VectorCache(tmp_path, "v1")
    assert cache(contents, maker)[:, 0].tolist() == [1, 2, 1, 3]
    assert maker.asked == [["a", "bb", "ccc"]]
    again = Maker(more := ["ccc", "dddd", "a"])
    cache = VectorCache(tmp_path, "v1")
    assert cache(more, again)[:, 0].tolist() == [3, 4, 1]
    assert again.asked == [["dddd"]] and cache.made == 1
    silent = Maker(contents)
    assert cache(contents, silent)[:, 0].tolist() == [1, 2, 1, 3]
    assert silent.asked == []


def test_another_version_shares_nothing_and_bytes_are_contents_too(tmp_path: Path) -> None:
    VectorCache(tmp_path, "v1")(["a"], Maker(["a"]))
    other = Maker(["a"])
    VectorCache(tmp_path, "v2")(["a"], other)
    assert other.asked == [["a"]]
    picture = VectorCache(tmp_path, "v1")
    assert picture([b"a", b"\xff\x00"], lambda places: torch.zeros(len(places), 2)).tolist() == [[1, 1], [0, 0]]
    assert picture([], Maker([])).shape == (0, 2)
    assert VectorCache(tmp_path, "v3")([], Maker([])).shape == (0, 0)


def test_faults_say_how_to_mend_them(tmp_path: Path) -> None:
    cache = VectorCache(tmp_path, "v1")
    cache(["a"], Maker(["a"]))
    with pytest.raises(ValueError, match="holds vectors of 2 numbers, received 3: a changed encoder"):
        cache(["b"], Maker(["b"], width=3))
    with pytest.raises(ValueError, match=r"1 contents need as many vectors, received \[2, 2\]"):
        cache(["b"], lambda places: torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"letters, digits, - and _, received '\.\./x'"):
        VectorCache(tmp_path, "../x")
    cache.path.write_bytes(cache.path.read_bytes()[:-3])
    with pytest.raises(ValueError, match=r"is damaged .* delete it"):
        cache(["a"], Maker(["a"]))
