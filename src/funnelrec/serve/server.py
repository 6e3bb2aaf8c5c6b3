"""Server: the application on a port. Bounds on slow and long headers, reloads, and a departure that loses nothing.

SIGTERM: /readyz says 503 and connections close after their answer, for `drain_seconds`, while load balancers look the
other way; then nothing new is accepted, what is being answered is finished within `grace_seconds`, and the exit code is
0. A second signal, or SIGINT, does not wait for the balancers. SIGHUP reads the folder again.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
from dataclasses import dataclass
from pathlib import Path
from time import monotonic
from types import FrameType
from typing import Any

import torch
import uvicorn

from funnelrec.serve.app import Settings, Shop, create_app
from funnelrec.serve.artifact import MANIFEST
from funnelrec.serve.gate import LOOPBACK
from funnelrec.serve.live import Live
from funnelrec.serve.problems import ProblemError
from funnelrec.serve.wire import guarded

__all__ = ["Place", "serve"]

SETTLE = 0.25  #: seconds between the last connection that is accepted and the closing of those that are idle
log = logging.getLogger("funnelrec.serve")


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where a server listens and how it comes and goes. `watch_seconds` 0: the folder is not watched."""

    host: str = "127.0.0.1"
    port: int = 8000
    connections: int = 512
    header_seconds: float = 10.0
    idle_seconds: int = 30
    drain_seconds: float = 5.0
    grace_seconds: int = 25
    watch_seconds: float = 0.0


def serve(folder: Path, settings: Settings, place: Place) -> None:
    """Answer until told to stop. Raises ArtifactError before the port opens where the folder holds no good funnel."""
    torch.set_num_threads(1)  # questions run beside one another instead
    live = Live(folder)
    loaded = live.load()
    live.swap(loaded)
    app = create_app(live, settings)
    shop: Shop = app.app.state.shop  # type: ignore[attr-defined]
    shop.measure.serves(loaded.name, loaded.version)
    logging.getLogger("uvicorn.error").setLevel(logging.ERROR)  # else a line for each malformed request
    config = uvicorn.Config(
        app,
        host=place.host,
        port=place.port,
        http=guarded(shop.measure, place.connections, place.header_seconds),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=place.idle_seconds,
        timeout_graceful_shutdown=place.grace_seconds,
    )
    _Server(config, shop, place).run()
    shop.admission.close()


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, shop: Shop, place: Place) -> None:
        super().__init__(config)
        self.shop = shop
        self.place = place
        self._leave_at: float | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    async def startup(self, sockets: Any = None) -> None:
        await super().startup(sockets)
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, self._start, _reload)
        if self.place.watch_seconds:
            self._start(_watch)
        port = self.servers[0].sockets[0].getsockname()[1]
        loaded = self.shop.loaded()
        log.info("%r, version %s, on http://%s:%d", loaded.funnel, loaded.version, self.place.host, port)

    def _start(self, what: Any) -> None:
        task = asyncio.get_running_loop().create_task(what(self.shop, self.place))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal begins the departure, the second ends it."""
        if self._leave_at is not None:
            self.should_exit = self.force_exit = True
        self.shop.leaving = True
        self._leave_at = monotonic() + (self.place.drain_seconds if sig == signal.SIGTERM else 0.0)

    async def on_tick(self, counter: int) -> bool:
        leave = self._leave_at is not None and monotonic() >= self._leave_at
        return await super().on_tick(counter) or leave

    async def shutdown(self, sockets: Any = None) -> None:
        for task in self._tasks:
            task.cancel()
        for server in self.servers:
            server.close()
        if not self.force_exit:
            await asyncio.sleep(SETTLE)  # what was accepted last has not been read yet
        await super().shutdown(sockets)


async def _reload(shop: Shop, place: Place) -> None:
    try:
        loaded = await shop.reload()
        log.info("reloaded, version %s", loaded.version)
    except ProblemError as error:
        log.error("%s", error.detail)


async def _watch(shop: Shop, place: Place) -> None:
    """Reload when the manifest is another file: an artifact is published by a rename."""
    seen = _identity(shop.live.folder)
    while True:
        await asyncio.sleep(place.watch_seconds)
        now = _identity(shop.live.folder)
        if now is not None and now != seen:
            seen = now
            await _reload(shop, place)


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        found = os.stat(folder / MANIFEST)
    except OSError:
        return None
    return found.st_dev, found.st_ino, found.st_mtime_ns


def allowed_hosts(host: str, more: list[str]) -> frozenset[str] | None:
    """The names a server goes by: on loopback those of loopback and `more`; elsewhere `more`, or any without them."""
    if is_loopback(host):
        return LOOPBACK | {name.lower() for name in more}
    return frozenset(name.lower() for name in more) or None


def is_loopback(host: str) -> bool:
    """Only this machine reaches it."""
    return host in {"localhost", "::1"} or host.startswith("127.")
