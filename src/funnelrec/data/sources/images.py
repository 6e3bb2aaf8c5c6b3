"""Pictures: folders, CSV tables, MNIST and Fashion-MNIST, CIFAR-10, MedMNIST.

| source          | what is read                                                                                |
|-----------------|---------------------------------------------------------------------------------------------|
| `from_folder`   | CLASS/file, or train|val|test/CLASS/file                                                    |
| `from_csv`      | a table that names files, labels, perhaps patients and parts                                |
| `mnist`         | four idx files, plain or .gz; downloaded and checked without a path (also Fashion-MNIST)    |
| `cifar10`       | the binary archive (downloaded and checked without a path) or JPEG files CLASS/id.jpg       |
| `medmnist`      | NAME.npz with {train,val,test}_{images,labels}; its publisher names no SHA-256: local only  |

Origin: LeCun et al. 1998 (MNIST); Xiao, Rasul, Vollgraf 2017 (Fashion-MNIST); Krizhevsky 2009 (CIFAR-10); Yang et al.
2023 (MedMNIST v2). Nothing is unpickled. Archives are read in place.
"""

from __future__ import annotations

import gzip
import io
import tarfile
import zipfile
import zlib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePosixPath
from typing import Literal

import numpy as np
import polars as pl
import torch

from funnelrec.data.download import cache_folder, fetch
from funnelrec.data.images import PIXELS, Action, Fault, ImageError, Images, actions, decode, map_pixels
from funnelrec.data.sources._files import read_first

__all__ = ["cifar10", "from_csv", "from_folder", "medmnist", "mnist"]

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
PARTS = {"train": 0, "val": 1, "valid": 1, "validation": 1, "test": 2}
IDX = ("train-images-idx3-ubyte", "train-labels-idx1-ubyte", "t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte")
MNIST = {
    "mnist": (
        "https://ossci-datasets.s3.amazonaws.com/mnist/",
        ("440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609", 9_912_422),
        ("3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c", 28_881),
        ("8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6", 1_648_877),
        ("f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6", 4_542),
    ),
    "fashion": (
        "https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/",
        ("3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84", 26_421_880),
        ("a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845", 29_515),
        ("346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073", 4_422_102),
        ("67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5", 5_148),
    ),
}
GARMENTS = ("t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle boot")
CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
CIFAR_BINARY = (
    "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz",
    "c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd",
    170_052_171,
)
LARGEST = 1 << 28  #: bytes of one file that is decoded, and of one array of an npz


def from_folder(
    folder: Path | str,
    *,
    size: int,
    channels: int = 3,
    faults: Action | Mapping[str, Action] = "skip",
    to: Path | str | None = None,
) -> Images:
    """Pictures in one folder a class; `to` is where the decoded pixels are kept as a memory map, if anywhere.

    Raises ValueError when there is no class or no picture, ImageError (a ValueError) for a file that is to be refused.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root} is no folder; pass one that holds a folder of pictures for each class")
    split = [p for p in sorted(root.iterdir()) if p.is_dir() and p.name in PARTS]
    tops = [(p, PARTS[p.name]) for p in split] or [(root, -1)]
    files = [
        (file, kind.name, part)
        for top, part in tops
        for kind in sorted(top.iterdir())
        if kind.is_dir()
        for file in sorted(kind.rglob("*"))
        if file.suffix.lower() in SUFFIXES and file.is_file()
    ]
    if not files:
        raise ValueError(f"{root} holds no CLASS/picture file; its classes are its folders, their files end in .png, …")
    classes = tuple(sorted({kind for _, kind, _ in files}))
    number = {kind: n for n, kind in enumerate(classes)}
    return _gather(
        ((file.relative_to(root).as_posix(), _read(file)) for file, _, _ in files),
        len(files), size, channels, faults, to, classes,
        labels=[number[kind] for _, kind, _ in files],
        part=[part for _, _, part in files] if split else None,
    )  # fmt: skip


def from_csv(
    path: Path | str,
    *,
    size: int,
    channels: int = 3,
    image: str = "image",
    label: str = "label",
    patient: str | None = None,
    part: str | None = None,
    faults: Action | Mapping[str, Action] = "skip",
    to: Path | str | None = None,
) -> Images:
    """Pictures that the table `path` names: columns of file names (from the table's folder) and labels.

    patient: a column; pictures of one patient get one `group`. part: a column of train, val or test.
    Raises ValueError for a missing column or an unknown part.
    """
    path = Path(path)
    table = pl.read_csv(path, infer_schema=False)
    for column in (image, label, patient, part):
        if column is not None and column not in table.columns:
            raise ValueError(f"{path} has no column '{column}'; its columns are {', '.join(table.columns)}")
    kinds = table[label].fill_null("").to_list()
    classes = tuple(sorted({kind for kind in kinds if kind}))
    number = {kind: n for n, kind in enumerate(classes)}
    parts = None
    if part is not None:
        unknown = [p for p in table[part].unique().to_list() if p not in PARTS]
        if unknown:
            raise ValueError(f"{path}: column '{part}' holds train, val or test, received {unknown[0]!r}")
        parts = [PARTS[p] for p in table[part].to_list()]
    names = table[image].fill_null("").to_list()
    return _gather(
        ((name, _read(path.parent / name)) for name in names),
        len(names), size, channels, faults, to, classes,
        labels=[number.get(kind, -1) for kind in kinds],
        part=parts,
        group=None if patient is None else table[patient].fill_null("").rank("dense").cast(pl.Int64).to_list(),
    )  # fmt: skip


def mnist(path: Path | str | None = None, *, kind: Literal["mnist", "fashion"] = "mnist") -> Images:
    """60,000 training and 10,000 test pictures, 28 x 28, grey; `part` is 0 and 2."""
    if path is None:
        address, *checks = MNIST[kind]
        path = cache_folder() / kind
        for name, (digest, length) in zip(IDX, checks, strict=True):
            fetch(f"{address}{name}.gz", path, digest, length)
    arrays = [_idx(*read_first(Path(path), [name])) for name in IDX]
    for pictures, labels in (arrays[:2], arrays[2:]):
        if pictures.ndim != 3 or labels.ndim != 1 or len(pictures) != len(labels):
            raise ValueError(f"{path}: pictures {pictures.shape} and labels {labels.shape} do not belong together")
    classes = GARMENTS if kind == "fashion" else tuple("0123456789")
    return Images(
        torch.from_numpy(np.concatenate([arrays[0], arrays[2]])[:, None]),
        torch.from_numpy(np.concatenate([arrays[1], arrays[3]]).astype(np.int64)),
        classes,
        _parts([len(arrays[0]), 0, len(arrays[2])]),
    )


def _idx(name: str, data: bytes) -> np.ndarray:
    """An idx file of bytes: 0, 0, 8 (unsigned bytes), number of dimensions, each as 4 bytes, then the values."""
    if len(data) < 4 or data[:3] != b"\0\0\x08" or not 1 <= data[3] <= 3 or len(data) < 4 + 4 * data[3]:
        raise ValueError(f"{name} is no idx file of bytes; fetch it again")
    shape = tuple(np.frombuffer(data, dtype=">u4", count=data[3], offset=4).astype(np.int64).tolist())
    values = np.frombuffer(data, dtype=np.uint8, offset=4 + 4 * data[3])
    if values.size != int(np.prod(shape)):
        raise ValueError(f"{name} holds {values.size:,} values where {int(np.prod(shape)):,} are due; fetch it again")
    return values.reshape(shape)


def cifar10(path: Path | str | None = None, *, to: Path | str | None = None) -> Images:
    """32 x 32 colour pictures of ten classes.

    The binary archive has parts 0 (50,000) and 2 (10,000); JPEG files, a folder or tar[.gz|.zst] of CLASS/id.jpg, have
    none. Raises ValueError for anything else, the pickled Python version among it.
    """
    path = fetch(CIFAR_BINARY[0], cache_folder() / "cifar10", *CIFAR_BINARY[1:]) if path is None else Path(path)
    if path.is_dir() and not any(path.rglob("*_batch*.bin")):
        return from_folder(path, size=32, to=to)
    members = dict(_members(path))
    batches = {name: data for name, data in members.items() if name.endswith(".bin") and "_batch" in name}
    if not batches:
        pictures = {name: data for name, data in members.items() if name.lower().endswith(SUFFIXES)}
        if not pictures:
            raise ValueError(
                f"{path} holds neither *_batch*.bin nor CLASS/id.jpg; fetch cifar-10-binary.tar.gz (the Python version "
                "is pickled and is not read)"
            )
        return _from_members(pictures, to)
    wrong = [name for name, data in batches.items() if len(data) % 3073 or not data]
    if wrong:
        raise ValueError(f"{path}: {wrong[0]} has {len(batches[wrong[0]]):,} bytes, not a multiple of 3,073")
    ordered = sorted(batches, key=lambda name: ("test" in name, name))
    rows = [np.frombuffer(batches[name], dtype=np.uint8).reshape(-1, 3073) for name in ordered]
    test = sum(len(r) for name, r in zip(ordered, rows, strict=True) if "test" in name)
    every = np.concatenate(rows)
    return Images(
        torch.from_numpy(every[:, 1:].reshape(-1, 3, 32, 32).copy()),
        torch.from_numpy(every[:, 0].astype(np.int64)),
        CIFAR,
        _parts([len(every) - test, 0, test]),
    )


def _from_members(pictures: dict[str, bytes], to: Path | str | None) -> Images:
    kinds = {name: PurePosixPath(name).parent.name for name in sorted(pictures)}
    classes = tuple(sorted(set(kinds.values())))
    number = {kind: n for n, kind in enumerate(classes)}
    files = ((name, pictures[name]) for name in kinds)
    return _gather(files, len(kinds), 32, 3, "skip", to, classes, labels=[number[k] for k in kinds.values()])


def _members(path: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the files of a folder or a tar archive, plain, gzipped or packed with Zstandard."""
    if path.is_dir():
        yield from ((p.relative_to(path).as_posix(), p.read_bytes()) for p in sorted(path.rglob("*.bin")))
        return
    try:
        if path.suffix == ".zst":
            import pyarrow as pa

            with pa.input_stream(str(path), compression="zstd") as stream:
                source = io.BytesIO(stream.read())
        else:
            source = io.BytesIO(gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes())
        with tarfile.open(fileobj=source) as archive:
            for member in archive:
                if member.isfile() and (file := archive.extractfile(member)) is not None:
                    yield member.name, file.read()
    except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
        raise ValueError(f"{path} cannot be read: {error}; pass a folder or a whole .tar[.gz|.zst]") from error


def medmnist(path: Path | str) -> Images:
    """NAME.npz: 28 x 28 or larger, grey or colour, one label a picture, in its official parts."""
    path = Path(path)
    arrays = []
    try:
        with np.load(path, allow_pickle=False) as file:
            for part in ("train", "val", "test"):
                arrays.append((file[f"{part}_images"], file[f"{part}_labels"]))
    except (OSError, KeyError, ValueError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(
            f"{path} is no MedMNIST file: {error}; it holds {{train,val,test}}_{{images,labels}}"
        ) from error
    pictures = np.concatenate([images for images, _ in arrays])
    labels = np.concatenate([labels for _, labels in arrays])
    if pictures.dtype != np.uint8 or pictures.ndim not in (3, 4) or labels.reshape(len(labels), -1).shape[1] != 1:
        raise ValueError(
            f"{path}: pictures {pictures.dtype} {pictures.shape} with labels {labels.shape}; 2-dimensional pictures "
            "with one label each are read"
        )
    pixels = pictures[:, None] if pictures.ndim == 3 else pictures.transpose(0, 3, 1, 2).copy()
    flat = torch.from_numpy(labels.reshape(-1).astype(np.int64))
    classes = tuple(str(n) for n in range(int(flat.max()) + 1))
    return Images(torch.from_numpy(pixels), flat, classes, _parts([len(images) for images, _ in arrays]))


def _parts(sizes: list[int]) -> torch.Tensor:
    return torch.repeat_interleave(torch.arange(3, dtype=torch.uint8), torch.tensor(sizes))


def _read(path: Path) -> bytes | str:
    """The bytes, or why there are none."""
    try:
        if path.stat().st_size > LARGEST:
            return f"{path.stat().st_size:,} bytes"
        return path.read_bytes()
    except OSError as error:
        return error.strerror or str(error)


def _gather(
    files: Iterable[tuple[str, bytes | str]],
    number: int,
    size: int,
    channels: int,
    faults: Action | Mapping[str, Action],
    to: Path | str | None,
    classes: tuple[str, ...],
    *,
    labels: list[int],
    part: list[int] | None = None,
    group: list[int] | None = None,
) -> Images:
    """Decode one file after another into one block of memory, or into a file that is mapped."""
    if channels not in (1, 3) or size < 1:
        raise ValueError(f"channels is 1 or 3 and size at least 1, received {channels} and {size}")
    if number == 0:
        raise ValueError("there is no picture to read: the table or archive names none")
    told, shape = actions(faults), (number, channels, size, size)
    if to is None:
        block = np.empty(shape, dtype=np.uint8)
    else:
        Path(to).mkdir(parents=True, exist_ok=True)
        block = np.memmap(Path(to) / PIXELS, dtype=np.uint8, mode="w+", shape=shape)
    kept: list[int] = []
    names: list[str] = []
    found: list[Fault] = []
    for place, (name, data) in enumerate(files):
        if isinstance(data, str):
            unreadable = Fault(name, "corrupt", data, told["corrupt"])
            if unreadable.action == "refuse":
                raise ImageError(unreadable)
            found.append(unreadable)
            continue
        pixels, fault = decode(data, name, size=size, channels=channels, told=told)
        if fault is not None:
            found.append(fault)
        if pixels is not None:
            block[len(kept)] = pixels
            kept.append(place)
            names.append(name)
    if not kept:
        raise ValueError(f"none of {number} files is a picture that can be used; the first: {found[0].reason}")
    keep = torch.tensor(kept)
    if isinstance(block, np.memmap) and to is not None:
        block.flush()
        del block
        path = Path(to) / PIXELS
        with path.open("r+b") as file:
            file.truncate(len(kept) * channels * size * size)
        pixels_tensor = map_pixels(path, [len(kept), channels, size, size])
    else:
        pixels_tensor = torch.from_numpy(block[: len(kept)])
    images = Images(
        pixels_tensor,
        torch.tensor(labels)[keep],
        classes,
        None if part is None else torch.tensor(part, dtype=torch.uint8)[keep],
        None if group is None else torch.tensor(group)[keep],
        tuple(names),
        tuple(found),
    )
    if to is not None:
        images.save_facts(Path(to))
    return images
