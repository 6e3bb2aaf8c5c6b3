"""Augmentations: what each may change, and that nothing but the generator decides."""

from __future__ import annotations

import pytest
import torch

from funnelrec.data.augment import Augment, affine, crop, cutout, flip, jitter


def draw(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ramp(b: int = 64) -> torch.Tensor:
    """[b, 1, 8, 8] whose pixel (y, x) is 1 + 8 y + x."""
    return (1 + torch.arange(64, dtype=torch.uint8)).view(1, 1, 8, 8).repeat(b, 1, 1, 1)


def test_a_crop_shifts_each_picture_by_itself() -> None:
    shifted = crop(ramp(400), 2, draw())
    corners = set()
    for picture in shifted[:, 0]:
        y, x = [int(v) for v in torch.nonzero(picture == 28)[0]]  # pixel (3, 3) stood there
        corners.add((y, x))
        inner = picture[picture > 0]
        assert torch.equal(inner, inner.sort().values)  # order kept: a window of the same picture
    assert corners == {(y, x) for y in range(1, 6) for x in range(1, 6)}
    assert torch.equal(crop(ramp(), 0, draw()), ramp())


def test_a_flip_mirrors_half() -> None:
    flipped = flip(ramp(400), draw())
    mirrored = (flipped[:, 0, 0, 0] == 8).sum().item()
    assert 160 < mirrored < 240
    assert torch.equal(flipped.sort(3).values, ramp(400))


def test_cutout_leaves_a_square_of_grey() -> None:
    holes = (cutout(ramp(200), 4, draw()) == 127)[:, 0].sum((1, 2))
    assert int(holes.max()) == 16
    assert int(holes.min()) >= 4  # a corner at least
    assert torch.equal(cutout(ramp(), 4, draw(1)), cutout(ramp(), 4, draw(1)))


def test_jitter_changes_light_within_its_bounds() -> None:
    grey = torch.full((300, 3, 2, 2), 100, dtype=torch.uint8)
    light = jitter(grey, 0.2, 0.0, 0.0, draw())
    assert int(light.min()) >= 80
    assert int(light.max()) <= 120
    assert len(light[:, 0, 0, 0].unique()) > 20
    assert torch.equal(jitter(grey, 0.0, 0.5, 0.5, draw()), grey)  # no contrast, no colour: nothing to change
    red = torch.tensor([200, 20, 20], dtype=torch.uint8).view(1, 3, 1, 1)
    assert len(jitter(red.repeat(20, 1, 1, 1), 0.0, 0.0, 0.9, draw())[:, 0].unique()) > 10


def test_affine_turns_and_its_identity_is_one() -> None:
    assert torch.equal(affine(ramp(), 0.0, (1.0, 1.0), 0.0, draw()), ramp())
    one = torch.zeros(50, 1, 9, 9, dtype=torch.uint8)
    one[:, :, 4] = 255  # a level bar
    turned = affine(one, 45.0, (1.0, 1.0), 0.0, draw())
    assert torch.equal(turned[:, 0, 4, 4] > 200, torch.ones(50, dtype=torch.bool))  # the middle stays
    assert bool((turned[:, 0, :3].amax((1, 2)) > 50).any())
    halved = affine(one, 0.0, (0.5, 0.5), 0.0, draw())
    assert (halved[0, 0] > 0).sum() < (one[0, 0] > 0).sum()


def test_steps_that_are_off_change_nothing() -> None:
    assert torch.equal(Augment()(ramp(), draw()), ramp())
    every = Augment(degrees=5, zoom=(0.9, 1.1), shift=0.1, crop=1, flip=True, brightness=0.1, contrast=0.1, cutout=2)
    one, two = every(ramp(), draw(5)), every(ramp(), draw(5))
    assert torch.equal(one, two)
    assert one.dtype == torch.uint8
    assert not torch.equal(one, every(ramp(), draw(6)))
    before = torch.random.get_rng_state()
    every(ramp(), draw())
    assert torch.equal(before, torch.random.get_rng_state())


@pytest.mark.parametrize("channels", [1, 3])
def test_any_channels(channels: int) -> None:
    pictures = torch.randint(0, 256, (4, channels, 12, 12), dtype=torch.uint8)
    assert Augment(crop=1, flip=True, saturation=0.5, cutout=3)(pictures, draw()).shape == pictures.shape
