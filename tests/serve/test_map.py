"""What the page shows beside the lists: the map of the items and their pictures, in the artifact and out of answers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from funnelrec.data.dataset import Dataset
from funnelrec.data.sources import simulate
from funnelrec.match.popularity import Popularity
from funnelrec.serve.artifact import ArtifactError
from funnelrec.serve.funnel import Funnel
from tests.serve.funnels import small_dataset, small_funnel


def test_a_map_is_saved_verified_and_optional(tmp_path: Path) -> None:
    funnel = small_funnel(small_dataset(tmp_path / "d"))
    plain = funnel.save(tmp_path / "plain.funnel")
    assert Funnel.load(plain).item_map is None

    places = torch.randn(funnel.store.spec.num_items, 2)
    places[:2] = torch.nan  # padding and unknown stand nowhere
    funnel.item_map = places
    folder = funnel.save(tmp_path / "mapped.funnel")
    loaded = Funnel.load(folder).item_map
    assert loaded is not None
    assert loaded.dtype == torch.float32
    torch.testing.assert_close(loaded, places, rtol=0, atol=0, equal_nan=True)

    (member,) = folder.glob("map.*.safetensors")
    content = bytearray(member.read_bytes())
    content[-1] ^= 1
    member.write_bytes(content)
    with pytest.raises(ArtifactError, match=rf"{member.name} of .* is damaged"):
        Funnel.load(folder)


def test_a_map_has_a_place_for_every_row(tmp_path: Path) -> None:
    funnel = small_funnel(small_dataset(tmp_path / "d"))
    with pytest.raises(ValueError, match="a place for each of the 42 rows, received 3"):
        Funnel(funnel.store, matcher=funnel.matcher, fallback=funnel.fallback, item_map=torch.zeros(3, 2))


def test_pictures_stay_out_of_answers(tmp_path: Path) -> None:
    world = simulate.load(users=60, items=80, pictures=True)
    dataset = Dataset.build(world.tables, tmp_path / "d")
    matcher = Popularity(dataset.spec)
    matcher.fit(*dataset.taken())
    funnel = Funnel.load(Funnel.build(dataset, matcher=matcher).save(tmp_path / "world.funnel"))
    best = funnel.recommend(history=[], k=1).items[0]
    assert "title" in best.attributes
    assert "picture" not in best.attributes
    (row,) = funnel.store.item_rows([[best.item]])[0].tolist()
    picture = funnel.store.picture(row)
    assert picture is not None
    assert picture == world.tables.items["picture"][best.item - 1]
    assert picture[:8] == b"\x89PNG\r\n\x1a\n"
    assert funnel.store.picture(0) is None


def test_a_catalogue_without_pictures_has_none(tmp_path: Path) -> None:
    store = small_funnel(small_dataset(tmp_path / "d")).store
    assert store.picture_field is None
    assert store.picture(2) is None
    assert store.described.columns == store.catalogue.columns
