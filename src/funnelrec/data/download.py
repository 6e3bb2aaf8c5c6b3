"""Download: one public archive, checked before anything reads it.

The bytes go to NAME.part, are hashed on the way, fsynced, and renamed to NAME only when the SHA-256 is the expected
one. So a file of that name is whole and right, and a process killed at any instant leaves at most a .part behind.
The modules that speak to the network are imported when `fetch` is called, not before.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
from pathlib import Path
from typing import Any

__all__ = ["DownloadError", "cache_folder", "fetch"]

BLOCK = 1 << 20


class DownloadError(ValueError):
    """The file could not be had, or is not the file that was expected."""


def cache_folder() -> Path:
    """Where downloads are kept: FUNNELREC_CACHE, else ~/.cache/funnelrec."""
    return Path(os.environ.get("FUNNELREC_CACHE") or Path.home() / ".cache" / "funnelrec")


def fetch(url: str, folder: Path | str, sha256: str, size: int, *, timeout: int | float = 60) -> Path:
    """Download `url` into `folder` unless the right file is there already; its path.

    `size` is the number of bytes expected: reading stops when more arrive. `timeout`: seconds without a byte. Only
    https is spoken, to the end of every redirect; plain http is for loopback addresses alone. Raises DownloadError
    when the address is refused or not reached, and when size or SHA-256 differ: the file is then deleted.
    """
    _allowed(url)
    name = Path(_parts(url)[2]).name
    if not name:
        raise DownloadError(f"the address must end in a file name, received {url}")
    folder = Path(folder)
    path, part = folder / name, folder / f"{name}.part"
    if path.is_file() and _digest(path) == sha256.lower():
        return path
    folder.mkdir(parents=True, exist_ok=True)
    try:
        received, digest = _receive(url, part, size, timeout)
        if received != size:
            raise DownloadError(f"{url} sent {received:,} bytes where {size:,} are due; try again")
        if digest != sha256.lower():
            raise DownloadError(
                f"{url} has the SHA-256 {digest} where {sha256.lower()} is due; it was deleted, try again "
                "or fetch the file by another way and pass its path"
            )
        part.replace(path)
        _sync_folder(folder)
    except OSError as error:
        raise _unreachable(url, error) from error
    finally:
        part.unlink(missing_ok=True)
    return path


def _unreachable(url: str, error: Exception) -> DownloadError:
    return DownloadError(
        f"{url} cannot be fetched: {error}; try again or fetch the file by another way and pass its path"
    )


def _parts(url: str) -> tuple[str, str, str]:
    """Scheme, host and path."""
    from urllib.parse import urlsplit

    parts = urlsplit(url)
    return parts.scheme, parts.hostname or "", parts.path


def _allowed(url: str) -> None:
    scheme, host, _ = _parts(url)
    if not (host and (scheme == "https" or (scheme == "http" and _is_loopback(host)))):
        raise DownloadError(f"only https addresses are fetched, received {url}")


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _opener(url: str) -> Any:
    """An opener that holds every redirect to the rule of the first address, before it is followed."""
    from urllib.request import BaseHandler, HTTPRedirectHandler, ProxyHandler, Request, build_opener

    class CheckedRedirects(HTTPRedirectHandler):
        def redirect_request(
            self, req: Request, fp: Any, code: int, msg: str, headers: Any, newurl: str
        ) -> Request | None:
            _allowed(newurl)
            return super().redirect_request(req, fp, code, msg, headers, newurl)

    handlers: list[BaseHandler] = [CheckedRedirects()]
    if _is_loopback(_parts(url)[1]):
        handlers.append(ProxyHandler({}))  # a proxy would look for its own loopback
    return build_opener(*handlers)


def _receive(url: str, part: Path, size: int, timeout: int | float) -> tuple[int, str]:
    """Write the answer to `part`, at most one byte more than `size`; bytes written and their SHA-256."""
    from http.client import HTTPException

    digest, received = hashlib.sha256(), 0
    try:
        with _opener(url).open(url, timeout=timeout) as answer, part.open("wb") as file:
            while received <= size and (block := answer.read(min(BLOCK, size + 1 - received))):
                file.write(block)
                digest.update(block)
                received += len(block)
            file.flush()
            os.fsync(file.fileno())
    except HTTPException as error:  # a broken answer; what the system reports is an OSError
        raise _unreachable(url, error) from error
    if received > size:
        raise DownloadError(f"{url} is larger than the {size:,} bytes that are due; it was deleted")
    return received, digest.hexdigest()


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync_folder(folder: Path) -> None:
    """Make the rename itself durable, where the system lets a folder be opened."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
