"""Images: pictures of one size as one uint8 tensor, and the batches of a classifier.

    pictures = images.from_folder("xray/", size=224)          # data/sources/images.py reads folders, CSV, idx, npz …
    train = Batches(ImageExamples(pictures, rows, augment=flip), 128, shuffle=True)

A file that cannot be taken as it is is a `Fault` of one of these kinds; what to do with each is told by `faults`:

| kind       | what it is                                                    | skip | refuse | use                     |
|------------|---------------------------------------------------------------|------|--------|-------------------------|
| `empty`    | no bytes                                                      | yes  | yes    |                         |
| `corrupt`  | no picture, cut off, not readable                             | yes  | yes    |                         |
| `huge`     | more pixels than `max_pixels`: told from its header, not read | yes  | yes    |                         |
| `animated` | several frames                                                | yes  | yes    | the first frame         |
| `cmyk`     | inks of print, not light                                      | yes  | yes    | converted               |
| `deep`     | 16 or 32 bits a channel, as scanners write                    | yes  | yes    | darkest 0, lightest 255 |
"""

from __future__ import annotations

import io
import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from jaxtyping import Int, UInt8
from torch import Tensor

from funnelrec.core.batch import Batch

__all__ = ["FAULTS", "Action", "Fault", "ImageError", "ImageExamples", "Images", "actions", "decode", "split_rows"]

Action = Literal["skip", "refuse", "use"]
FAULTS = ("empty", "corrupt", "huge", "animated", "cmyk", "deep")
USABLE = ("animated", "cmyk", "deep")  #: faults that can be mended
MAX_PIXELS = 50_000_000  #: a picture of 150 MB; a small file may claim a thousand times as much
PIXELS, FACTS = "pixels.bin", "images.json"


class ImageError(ValueError):
    """A file that is to be refused. `fault` says which and why."""

    def __init__(self, fault: Fault) -> None:
        super().__init__(
            f"{fault.name} is {fault.kind}: {fault.reason}; mend or remove it, or say what to do with {fault.kind} "
            f"files (skip{', use' if fault.kind in USABLE else ''})"
        )
        self.fault = fault


@dataclass(frozen=True, slots=True)
class Fault:
    """A file that is not as it should be, and what was done with it."""

    name: str
    kind: str
    reason: str
    action: Action = "skip"


def actions(told: Action | Mapping[str, Action] = "skip") -> dict[str, Action]:
    """What to do with each kind of fault. One word holds for all; "use" skips what cannot be mended."""
    if isinstance(told, str):
        told = {kind: "skip" if told == "use" and kind not in USABLE else told for kind in FAULTS}
    for kind, action in told.items():
        if kind not in FAULTS:
            raise ValueError(f"files have the faults {', '.join(FAULTS)}, received '{kind}'")
        if action not in ("skip", "refuse", "use") or (action == "use" and kind not in USABLE):
            allowed = "skip, refuse or use" if kind in USABLE else "skip or refuse"
            raise ValueError(f"{kind} files: {allowed}, received '{action}'")
    plain: dict[str, Action] = dict.fromkeys(FAULTS, "skip")
    return {**plain, **told}


def decode(
    data: bytes, name: str, *, size: int, channels: int = 3, told: Mapping[str, Action], max_pixels: int = MAX_PIXELS
) -> tuple[UInt8[np.ndarray, "C size size"] | None, Fault | None]:
    """Pixels of one picture, its middle square scaled to `size`; and its fault, if it has one.

    A skipped file has no pixels. Raises ImageError for a fault that is to be refused. A file may hold anything: no
    exception of the decoder leaves this function.
    """
    fault, pixels = None, None
    try:
        kind, reason, image = _look(data, max_pixels)
        if kind:
            fault = Fault(name, kind, reason, told[kind])
        if image is not None and (fault is None or fault.action == "use"):
            pixels = _pixels(image, size, channels)
    except MemoryError:
        fault = Fault(name, "huge", "it does not fit into memory", told["huge"])
    except Exception as error:  # decoders of strangers' files raise whatever they stumble over
        fault = Fault(name, "corrupt", str(error) or type(error).__name__, told["corrupt"])
    if fault is not None and fault.action == "refuse":
        raise ImageError(fault)
    return (None if fault is not None and fault.action == "skip" else pixels), fault


def _look(data: bytes, max_pixels: int) -> tuple[str, str, Any]:
    """Kind and reason of the fault that the header shows ("" if none), and the picture, not yet decoded."""
    pillow = _pillow()
    if not data:
        return "empty", "it has no bytes", None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            image = pillow.open(io.BytesIO(data))
        except pillow.DecompressionBombError:
            return "huge", f"more than {max_pixels:,} pixels", None
        if image.width * image.height > max_pixels:
            return "huge", f"{image.width} x {image.height} pixels, more than {max_pixels:,}", None
        if getattr(image, "n_frames", 1) > 1:
            return "animated", f"{image.n_frames} frames", image
    if image.mode == "CMYK":
        return "cmyk", "its colours are inks", image
    if image.mode[0] in "IF" or any("16" in str(part) for tile in image.tile for part in tile[3:]):
        return "deep", f"mode {image.mode}, more than 8 bits a channel", image
    return "", "", image


def _pixels(image: Any, size: int, channels: int) -> UInt8[np.ndarray, "C size size"]:
    from PIL import ImageOps

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of broken metadata; broken pixels raise
        image.load()
        image = ImageOps.exif_transpose(image)
        if image.mode[0] in "IF":  # conversion would cut everything above 255 off
            array = np.asarray(image).astype(np.float64)
            low, high = float(array.min()), float(array.max())
            image = _pillow().fromarray(((array - low) * (255 / max(high - low, 1e-9))).astype(np.uint8))
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")
        image = image.convert("L" if channels == 1 else "RGB")
        if image.size != (size, size):
            image = ImageOps.fit(image, (size, size), method=_pillow().Resampling.BILINEAR)
    array = np.asarray(image)
    return array[None] if channels == 1 else np.ascontiguousarray(array.transpose(2, 0, 1))


def _pillow() -> Any:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "pictures need Pillow, which is not installed; run: pip install 'funnelrec[image]'"
        ) from error
    return Image


@dataclass(frozen=True, eq=False)
class Images:
    """N pictures of one size with their class numbers.

    pixels: uint8 [N, C, H, W], perhaps a memory map. labels: int64 [N], -1 where none is known. classes: the name of
    each number. part: uint8 [N], 0 train, 1 valid, 2 test, where the source says. group: int64 [N], pictures of one
    patient have one number. names: of the files. faults: what was skipped or mended.
    """

    pixels: UInt8[Tensor, "N C H W"]
    labels: Int[Tensor, "N"]
    classes: tuple[str, ...]
    part: UInt8[Tensor, "N"] | None = None
    group: Int[Tensor, "N"] | None = None
    names: tuple[str, ...] = ()
    faults: tuple[Fault, ...] = ()

    def __post_init__(self) -> None:
        n = len(self.pixels)
        for what in ("labels", "part", "group"):
            value = getattr(self, what)
            if value is not None and len(value) != n:
                raise ValueError(f"{n} pictures need as many {what}, received {len(value)}")
        if n and not -1 <= int(self.labels.min()) <= int(self.labels.max()) < len(self.classes):
            raise ValueError(
                f"labels must be -1 or a class number below {len(self.classes)}, received {int(self.labels.min())} to "
                f"{int(self.labels.max())}"
            )

    def __len__(self) -> int:
        return len(self.pixels)

    def rows(self, part: int) -> Int[Tensor, "rows"]:
        """The pictures of a part. Raises ValueError where the source names no parts."""
        if self.part is None:
            raise ValueError("these pictures have no published parts; choose rows by `split_rows`")
        return torch.nonzero(self.part == part).squeeze(1)

    def select(self, rows: Int[Tensor, "rows"]) -> Images:
        """Some of the pictures, copied."""
        return replace(
            self,
            pixels=self.pixels[rows],
            labels=self.labels[rows],
            part=None if self.part is None else self.part[rows],
            group=None if self.group is None else self.group[rows],
            names=tuple(self.names[i] for i in rows.tolist()) if self.names else (),
        )

    def save(self, folder: Path | str) -> Path:
        """Write pixels.bin and images.json, from which `open` maps."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / PIXELS).write_bytes(self.pixels.contiguous().numpy().tobytes())
        self.save_facts(folder)
        return folder

    def save_facts(self, folder: Path) -> None:
        """All but the pixels, as images.json."""
        facts = {
            "shape": list(self.pixels.shape),
            "labels": self.labels.tolist(),
            "classes": list(self.classes),
            "part": None if self.part is None else self.part.tolist(),
            "group": None if self.group is None else self.group.tolist(),
            "names": list(self.names),
            "faults": [[f.name, f.kind, f.reason, f.action] for f in self.faults],
        }
        (folder / FACTS).write_text(json.dumps(facts), encoding="utf-8")

    @classmethod
    def open(cls, folder: Path | str) -> Images:
        """Map what `save` wrote; pixels are read when they are used. Raises ValueError for a damaged folder."""
        folder = Path(folder)
        try:
            facts = json.loads((folder / FACTS).read_text(encoding="utf-8"))
            shape, length = facts["shape"], (folder / PIXELS).stat().st_size
        except (OSError, ValueError, KeyError) as error:
            raise ValueError(f"{folder} holds no pictures: {error}; read them from their source again") from error
        if length != int(np.prod(shape)):
            raise ValueError(
                f"{folder / PIXELS} has {length:,} bytes where {int(np.prod(shape)):,} are due; read again"
            )
        pixels = map_pixels(folder / PIXELS, shape) if length else torch.empty(shape, dtype=torch.uint8)
        return cls(
            pixels,
            torch.tensor(facts["labels"], dtype=torch.int64),
            tuple(facts["classes"]),
            None if facts["part"] is None else torch.tensor(facts["part"], dtype=torch.uint8),
            None if facts["group"] is None else torch.tensor(facts["group"], dtype=torch.int64),
            tuple(facts["names"]),
            tuple(Fault(*fault) for fault in facts["faults"]),
        )


def map_pixels(path: Path, shape: list[int]) -> UInt8[Tensor, "N C H W"]:
    """A file of bytes as a tensor; what is written to it stays in memory."""
    flat = torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=torch.uint8)
    return flat.view(shape)


class ImageExamples:
    """Some rows of `images` for `Batches`: `image` uint8 [B, C, H, W] and `label` int64 [B].

    augment: (pictures, generator) -> pictures, e.g. of data/augment.py; its generator depends on seed, epoch and batch
    number alone. views: so many pictures of each row, each augmented on its own, as `image`, `image2`, …
    """

    def __init__(
        self,
        images: Images,
        rows: Int[Tensor, "rows"] | None = None,
        *,
        augment: Callable[[Tensor, torch.Generator], Tensor] | None = None,
        views: int = 1,
    ) -> None:
        if views < 1:
            raise ValueError(f"views is a number of pictures, at least 1, received {views}")
        self.images = images
        self.rows = torch.arange(len(images)) if rows is None else rows
        self.augment = augment
        self.views = views

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, index: Int[Tensor, "B"], generator: torch.Generator | None) -> Batch:
        """The pictures at `index` of these rows."""
        rows = self.rows[index]
        pixels = self.images.pixels[rows]
        tensors = {"label": self.images.labels[rows], "row": rows}
        for view in range(self.views):
            seen = pixels if self.augment is None or generator is None else self.augment(pixels, generator)
            tensors["image" if view == 0 else f"image{view + 1}"] = seen
        return Batch(**tensors)


def split_rows(
    images: Images, *, valid: float = 0.1, test: float = 0.2, seed: int = 0
) -> tuple[Int[Tensor, "a"], Int[Tensor, "b"], Int[Tensor, "c"]]:
    """Rows to train, to validate and to test on; only labelled ones.

    The published parts where there are any (a validation part is cut from training when there is none). Else by chance:
    all pictures of a `group` (a patient) go to one part, or, without groups, each class is divided in the same shares.
    Raises ValueError when a part would be empty.
    """
    if not (0 < valid < 1 and 0 < test < 1 and valid + test < 1):
        raise ValueError(f"valid and test are shares that leave something to train on, received {valid} and {test}")
    known = images.labels >= 0
    if images.part is not None:
        train_rows, valid_rows, test_rows = (torch.nonzero(known & (images.part == p)).squeeze(1) for p in range(3))
        if not len(valid_rows):
            chosen = _drawn(images, train_rows, [valid], seed) == 1
            train_rows, valid_rows = train_rows[~chosen], train_rows[chosen]
    else:
        rows = torch.nonzero(known).squeeze(1)
        part = _drawn(images, rows, [valid, test], seed)
        train_rows, valid_rows, test_rows = (rows[part == p] for p in range(3))
    for name, rows in (("train", train_rows), ("validate", valid_rows), ("test", test_rows)):
        if not len(rows):
            raise ValueError(f"no picture is left to {name} on; there are {int(known.sum())} labelled ones, bring more")
    return train_rows, valid_rows, test_rows


def _drawn(images: Images, rows: Tensor, shares: list[float], seed: int) -> Tensor:
    """Part 0, 1, … of each row; parts 1, 2, … hold about `shares` of the rows."""
    generator = torch.Generator().manual_seed(seed)
    part = torch.zeros(len(rows), dtype=torch.int64)
    if images.group is not None:
        _, which, size = torch.unique(images.group[rows], return_inverse=True, return_counts=True)
        order = torch.randperm(len(size), generator=generator)
        before = size[order].cumsum(0) - size[order]  # rows of the groups drawn so far
        of_group = torch.zeros(len(size), dtype=torch.int64)
        of_group[order] = _cut(before, shares, len(rows))
        return of_group[which]
    for label in torch.unique(images.labels[rows]):
        own = torch.nonzero(images.labels[rows] == label).squeeze(1)
        order = own[torch.randperm(len(own), generator=generator)]
        part[order] = _cut(torch.arange(len(own)), shares, len(own))
    return part


def _cut(position: Tensor, shares: list[float], total: int) -> Tensor:
    """Which part a position falls into when the last places are kept for part 0."""
    edges = (torch.tensor(shares).cumsum(0) * total).round()
    return (torch.searchsorted(edges, position.float(), right=True) + 1) % (len(shares) + 1)
