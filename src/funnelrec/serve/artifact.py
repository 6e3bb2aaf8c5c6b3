"""A folder of files that is either whole or refused: how a funnel lies on disk.

    shop.funnel/
        funnel.json                          the manifest: everything that is not a tensor or a table
        match.5f0c2a91d3e7.safetensors       members, named by the first 12 digits of their SHA-256
        catalogue.8f14e45fceea.arrow
        ...

**Atomic.** New members have new names, so writing them touches nothing that a reader could be using. The one rename
of `funnel.json` is the commit: before it the folder is the old funnel, after it the new one, and there is no between.
Members that the manifest no longer names are removed afterwards; after a kill they stay until the next save. Writers of
one folder wait for one another (a lock on the folder, which the system releases when its holder dies). A reader whose
members were removed under its hands finds another manifest when it looks again, and reads that one.

**Verified.** `funnel.json` carries its own SHA-256 and must be byte for byte what this module writes; each member must
have the size and the SHA-256 that the manifest states. Members are hashed and parsed from the same bytes in memory.
safetensors alone would accept most flipped bits. Nothing here is ever executed: JSON, safetensors and Arrow only.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

__all__ = ["FORMAT", "MANIFEST", "ArtifactError", "read_artifact", "write_artifact"]

FORMAT = 1
MANIFEST = "funnel.json"
MAX_MANIFEST_BYTES = 16 * 2**20
_MEMBER = re.compile(r"[a-z0-9_]+\.[0-9a-f]{12}\.(safetensors|arrow|faiss)")


class ArtifactError(ValueError):
    """The folder is not a funnel that can be trusted; the message names the file."""


def _canonical(manifest: Mapping[str, Any]) -> bytes:
    text = json.dumps(manifest, indent=1, sort_keys=True, ensure_ascii=False, allow_nan=False)
    return (text + "\n").encode()


def _write(path: Path, content: bytes) -> None:
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_artifact(folder: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    """Write or replace the artifact at `folder` so that at every instant it is the old one or the new one.

    `members`: name with its kind ("match.safetensors") -> content. The same inputs give the same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with _only_writer(folder):
        _write_artifact(folder, manifest, members)


@contextmanager
def _only_writer(folder: Path) -> Iterator[None]:
    """Wait until no other process writes into the folder: its tidying would remove what this one has not named yet."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        fcntl.flock(descriptor, fcntl.LOCK_UN)  # closing alone would leave it with a child forked meanwhile
        os.close(descriptor)


def _write_artifact(folder: Path, manifest: Mapping[str, Any], members: Mapping[str, bytes]) -> None:
    files: dict[str, dict[str, Any]] = {}
    for name, content in sorted(members.items()):
        digest = hashlib.sha256(content).hexdigest()
        stem, kind = name.rsplit(".", 1)
        member = f"{stem}.{digest[:12]}.{kind}"
        if not _MEMBER.fullmatch(member):
            raise ValueError(f"'{name}' cannot be a member's name; use small letters, digits and _ and a known ending")
        files[name] = {"file": member, "sha256": digest, "bytes": len(content)}
        temporary = folder / f"{member}.tmp"
        _write(temporary, content)
        temporary.replace(folder / member)
    body = {**manifest, "format": FORMAT, "files": files}
    body["sha256"] = hashlib.sha256(_canonical(body)).hexdigest()
    temporary = folder / f"{MANIFEST}.tmp"
    _write(temporary, _canonical(body))
    _sync_folder(folder)
    temporary.replace(folder / MANIFEST)  # the commit
    _sync_folder(folder)
    kept = {MANIFEST, *(f["file"] for f in files.values())}
    for path in folder.iterdir():
        ours = _MEMBER.fullmatch(path.name.removesuffix(".tmp")) or path.name == f"{MANIFEST}.tmp"
        if ours and path.name not in kept:
            path.unlink()


def read_artifact(folder: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The manifest and the verified content of every member. Raises ArtifactError that names the faulty file."""
    manifest = _read_manifest(folder)
    while True:
        try:
            return manifest, {name: _read_member(folder, entry) for name, entry in manifest["files"].items()}
        except (ArtifactError, FileNotFoundError):
            newer = _read_manifest(folder)
            if newer["sha256"] == manifest["sha256"]:
                raise
            manifest = newer  # replaced while it was read


def _read_manifest(folder: Path) -> dict[str, Any]:
    path = folder / MANIFEST
    if not path.is_file():
        raise ArtifactError(f"{folder} is not a funnel: it has no {MANIFEST}; make one with `funnelrec fit`")
    if path.stat().st_size > MAX_MANIFEST_BYTES:
        raise ArtifactError(f"{MANIFEST} of {folder} is larger than {MAX_MANIFEST_BYTES} bytes and was not read")
    content = path.read_bytes()
    damaged = ArtifactError(f"{MANIFEST} of {folder} is damaged; restore the funnel from a copy or fit it again")
    try:
        manifest = json.loads(content)
        stated = manifest.pop("sha256")
        intact = hashlib.sha256(_canonical(manifest)).hexdigest() == stated
        intact = intact and _canonical({**manifest, "sha256": stated}) == content
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise damaged from None
    if not intact:
        raise damaged
    if manifest.get("format") != FORMAT:
        raise ArtifactError(
            f"{MANIFEST} of {folder} has format {manifest.get('format')!r}, this version reads {FORMAT}; "
            "upgrade funnelrec or fit again"
        )
    manifest["sha256"] = stated
    return dict(manifest)


def _read_member(folder: Path, entry: Mapping[str, Any]) -> bytes:
    file = str(entry["file"])
    path = folder / file
    if not _MEMBER.fullmatch(file):
        raise ArtifactError(f"{MANIFEST} of {folder} names {file!r}, which is no member's name")
    if path.is_symlink() or not path.is_file():
        raise ArtifactError(f"{file} is missing from {folder}; restore the funnel from a copy or fit it again")
    if path.stat().st_size != entry["bytes"]:
        raise ArtifactError(f"{file} of {folder} has {path.stat().st_size} bytes, {entry['bytes']} were written")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ArtifactError(f"{file} of {folder} is damaged: its SHA-256 differs from the one that was written")
    return content
