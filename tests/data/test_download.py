"""Downloads from a server on this machine: the right bytes, or nothing."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import ClassVar

import pytest

from funnelrec.data.download import DownloadError, cache_folder, fetch

CONTENT = bytes(range(256)) * 5000  # 1.28 MB, more than one block
SHA256 = hashlib.sha256(CONTENT).hexdigest()
FLIPPED = CONTENT[:-1] + b"\x00"


class _Answers(BaseHTTPRequestHandler):
    requests: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.requests.append(self.path)
        if self.path.startswith("/to-ftp"):
            self._redirect("http://192.0.2.1/set.zip")
        elif self.path.startswith("/moved"):
            self._redirect("/good/set.zip")
        elif self.path.startswith("/gone"):
            self.send_error(404)
        else:
            body = {"good": CONTENT, "flipped": FLIPPED, "long": CONTENT + b"x", "short": CONTENT[:-1]}
            self._send(body.get(self.path.split("/")[1], CONTENT[:1000]), cut=self.path.startswith("/cut"))

    def _redirect(self, target: str) -> None:
        self.send_response(302)
        self.send_header("Location", target)
        self.end_headers()

    def _send(self, body: bytes, cut: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(CONTENT) if cut else len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: object) -> None:
        """Silent."""


@pytest.fixture
def server() -> Iterator[str]:
    _Answers.requests.clear()
    with ThreadingHTTPServer(("127.0.0.1", 0), _Answers) as httpd:
        thread = threading.Thread(target=httpd.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield f"http://127.0.0.1:{httpd.server_port}"
        httpd.shutdown()
        thread.join()


def fetched(url: str, folder: Path) -> Path:
    return fetch(url, folder, SHA256, len(CONTENT), timeout=5)


def test_the_right_file_is_fetched_once(server: str, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "folder"
    path = fetched(f"{server}/good/set.zip", folder)
    assert path == folder / "set.zip"
    assert path.read_bytes() == CONTENT
    assert [p.name for p in folder.iterdir()] == ["set.zip"]
    assert fetched(f"{server}/good/set.zip", folder) == path
    assert _Answers.requests == ["/good/set.zip"]


def test_a_wrong_file_of_that_name_is_fetched_anew(server: str, tmp_path: Path) -> None:
    (tmp_path / "set.zip").write_bytes(FLIPPED)
    assert fetched(f"{server}/good/set.zip", tmp_path).read_bytes() == CONTENT


def test_a_left_over_part_is_no_obstacle(server: str, tmp_path: Path) -> None:
    (tmp_path / "set.zip.part").write_bytes(b"half of an older attempt")
    assert fetched(f"{server}/good/set.zip", tmp_path).read_bytes() == CONTENT


def test_a_redirect_is_followed(server: str, tmp_path: Path) -> None:
    assert fetched(f"{server}/moved/set.zip", tmp_path).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("flipped", f"has the SHA-256 {hashlib.sha256(FLIPPED).hexdigest()} where {SHA256} is due; it was deleted"),
        ("long", r"is larger than the 1,280,000 bytes that are due"),
        ("short", r"sent 1,279,999 bytes where 1,280,000 are due"),
        ("cut", r"cannot be fetched|sent 1,000 bytes where 1,280,000 are due"),
        ("gone", r"cannot be fetched: HTTP Error 404"),
        ("to-ftp", r"only https addresses are fetched, received http://192\.0\.2\.1/set\.zip"),
    ],
)
def test_anything_else_leaves_nothing_behind(server: str, tmp_path: Path, case: str, message: str) -> None:
    with pytest.raises(DownloadError, match=message):
        fetched(f"{server}/{case}/set.zip", tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_failed_attempt_keeps_the_older_file(server: str, tmp_path: Path) -> None:
    """The file that is there is wrong by its digest, yet it is replaced by the right one only."""
    (tmp_path / "set.zip").write_bytes(b"older")
    with pytest.raises(DownloadError):
        fetched(f"{server}/flipped/set.zip", tmp_path)
    assert (tmp_path / "set.zip").read_bytes() == b"older"


@pytest.mark.parametrize(
    "url",
    ["http://example.org/set.zip", "ftp://127.0.0.1/set.zip", "file:///etc/passwd", "http://localhost.example.org/a"],
)
def test_only_https_and_loopback(url: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="only https addresses are fetched, received"):
        fetched(url, tmp_path)


def test_an_address_names_a_file(server: str, tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match="must end in a file name"):
        fetched(f"{server}/", tmp_path)


def test_a_server_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DownloadError, match=r"cannot be fetched.*fetch the file by another way"):
        fetched("http://127.0.0.1:9/set.zip", tmp_path)


def test_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FUNNELREC_CACHE", str(tmp_path))
    assert cache_folder() == tmp_path
    monkeypatch.delenv("FUNNELREC_CACHE")
    assert cache_folder().parts[-2:] == (".cache", "funnelrec")
