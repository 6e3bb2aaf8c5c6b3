"""A server in a process of its own, and a client that counts every request: sent, answered, lost."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import psutil

__all__ = ["Answer", "Client", "Server", "ask", "on_loop", "running"]

Result = TypeVar("Result")
LISTENING = re.compile(r"on http://127\.0\.0\.1:(\d+)")


@dataclass
class Server:
    """A server that was started; `log` is everything it wrote."""

    process: subprocess.Popen[bytes]
    port: int
    log_file: Path

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def memory(self) -> int:
        """Bytes that are its own: unique set size, which a shared library does not change."""
        return int(psutil.Process(self.process.pid).memory_full_info().uss)

    def files(self) -> int:
        """Open descriptors."""
        return int(psutil.Process(self.process.pid).num_fds())


@contextmanager
def running(folder: Path, log_file: Path, *options: str, program: str | None = None, **env: str) -> Iterator[Server]:
    """`funnelrec serve` on a free port; or `program`, Python text that starts one in another way."""
    start = ["-c", program] if program is not None else ["-m", "funnelrec"]
    words = ["serve", str(folder), "--port", "0", "--threads", "1", "--drain", "2", *options]
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, *start, *words],
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1", **env},
        )
    try:
        until = time.monotonic() + 300
        while not (found := LISTENING.search(log_file.read_text())):
            if process.poll() is not None or time.monotonic() > until:
                raise RuntimeError(f"the server did not start: {log_file.read_text()}")
            time.sleep(0.05)
        yield Server(process, int(found[1]), log_file)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGINT)
            try:
                process.wait(120)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@dataclass
class Answer:
    """What came back."""

    status: int
    headers: dict[str, str]
    body: bytes
    seconds: float

    def json(self) -> Any:
        return json.loads(self.body)


_CLIENTS: list[Client] = []  # of the loop that runs


@dataclass
class Client:
    """One connection that is kept; a new one when the server has closed it."""

    port: int
    headers: dict[str, str] = field(default_factory=dict)
    _reader: asyncio.StreamReader | None = None
    _writer: asyncio.StreamWriter | None = None

    def __post_init__(self) -> None:
        _CLIENTS.append(self)

    async def ask(self, path: str, body: Any = None, *, raw: bytes | None = None, verb: str | None = None) -> Answer:
        """One request. Raises ConnectionRefusedError when nobody listens, ConnectionError when it was lost."""
        content = raw if raw is not None else b"" if body is None else json.dumps(body).encode()
        verb = verb or ("GET" if body is None and raw is None else "POST")
        headers = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": str(len(content))}
        lines = [f"{verb} {path} HTTP/1.1", *(f"{n}: {v}" for n, v in {**headers, **self.headers}.items())]
        started = time.perf_counter()
        if self._writer is None or self._writer.is_closing():
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self.port)
        assert self._reader is not None
        try:
            self._writer.write("\r\n".join(lines).encode() + b"\r\n\r\n" + content)
            status, received = await _head(self._reader)
            answer = await self._reader.readexactly(int(received.get("content-length", 0)))
        except (OSError, asyncio.IncompleteReadError) as error:
            self.close()
            raise ConnectionError(f"lost: {error!r}") from error
        if received.get("connection") == "close":
            self.close()
        return Answer(status, received, answer, time.perf_counter() - started)

    def close(self) -> None:
        if self._writer is not None:
            self._writer.close()
        self._reader = self._writer = None


async def _head(reader: asyncio.StreamReader) -> tuple[int, dict[str, str]]:
    lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
    return int(lines[0].split()[1]), headers


def on_loop(work: Coroutine[Any, Any, Result]) -> Result:
    """`asyncio.run`, and every client's connection is closed in the end."""

    async def closing() -> Result:
        _CLIENTS.clear()
        try:
            return await work
        finally:
            for client in _CLIENTS:
                client.close()
            await asyncio.sleep(0.01)  # until they are

    return asyncio.run(closing())


def ask(port: int, path: str, body: Any = None, **options: Any) -> Answer:
    """One request on a connection of its own."""

    async def once() -> Answer:
        return await Client(port, options.pop("headers", {})).ask(path, body, **options)

    return on_loop(once())
