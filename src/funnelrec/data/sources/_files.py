"""Reading the files of a public data set: plain, gzipped, or in place inside the zip archive it is published as."""

from __future__ import annotations

import gzip
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

__all__ = ["read_first"]

LARGEST_FILE = 1 << 30  # no file of the sets read here comes near; stops a decompression bomb


def read_first(home: Path, names: Sequence[str]) -> tuple[str, bytes]:
    """Name and bytes of the first of `names` that exists in `home`, a folder or a zip archive; NAME.gz also serves.

    Nothing is ever extracted to disk. Raises ValueError when no name is found, or a file is damaged or over 1 GiB.
    """
    try:
        if home.is_dir():
            return _from_folder(home, names)
        if zipfile.is_zipfile(home):
            return _from_zip(home, names)
    except (OSError, EOFError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{home} is damaged: {error}; fetch it again") from error
    what = "neither a folder nor a zip archive" if home.exists() else "not there"
    raise ValueError(f"{home} is {what}; pass the folder or the archive that holds {names[0]}")


def _from_folder(folder: Path, names: Sequence[str]) -> tuple[str, bytes]:
    for name in names:
        path = folder / name
        if path.is_file():
            return name, path.read_bytes()
        packed = folder / f"{name}.gz"
        if packed.is_file():
            with gzip.open(packed) as file:
                data = file.read(LARGEST_FILE + 1)
            return name, _bounded(data, packed)
    raise ValueError(f"{folder} holds no {' or '.join(names)}; pass the folder that does")


def _from_zip(archive: Path, names: Sequence[str]) -> tuple[str, bytes]:
    with zipfile.ZipFile(archive) as file:
        members = {PurePosixPath(info.filename).name: info for info in file.infolist() if not info.is_dir()}
        for name in names:
            if name in members:
                with file.open(members[name]) as member:
                    data = member.read(LARGEST_FILE + 1)
                return name, _bounded(data, archive / name)
    raise ValueError(f"{archive} holds no {' or '.join(names)}; pass the archive that does")


def _bounded(data: bytes, path: Path) -> bytes:
    if len(data) > LARGEST_FILE:
        raise ValueError(f"{path} is larger than {LARGEST_FILE:,} bytes, which no file of this data set is")
    return data
