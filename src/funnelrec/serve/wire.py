"""Wire: HTTP on a connection, with bounds that uvicorn lacks: of connections, of the size of headers, of their time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from funnelrec.serve.measure import Measure

__all__ = ["MAX_HEADERS", "guarded"]

MAX_HEADERS = 16 * 2**10  #: bytes


class _Guarded(HttpToolsProtocol):
    measure: Measure
    most: int
    header_seconds: float

    _timer: asyncio.TimerHandle | None = None
    _head = 0  # bytes of a request whose headers are not complete
    _reading = True  # its headers

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._await_headers()
        if len(self.connections) > self.most:
            self._refuse(503, b"too many connections", b"retry-after: 1\r\n")

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_timer()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        if self.transport.is_closing():
            return
        super().data_received(data)
        if self._reading:
            self._head += len(data)
            if self._head > MAX_HEADERS:
                self._refuse(431, b"headers are longer than is read")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head, self._reading = 0, True
        if self._timer is None:
            self._await_headers()

    def on_headers_complete(self) -> None:
        self._stop_timer()
        self._reading = False
        size = len(self.url) + sum(len(name) + len(value) + 4 for name, value in self.headers)
        if size > MAX_HEADERS:
            self._refuse(431, b"headers are longer than is read")
        else:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:  # it is None after headers that were refused
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None:
            super().on_message_complete()

    def send_400_response(self, msg: str) -> None:
        self.measure.invalid.inc()
        if not self.transport.is_closing():
            super().send_400_response(msg)

    def _await_headers(self) -> None:
        self._timer = self.loop.call_later(self.header_seconds, self._refuse, 408, b"headers did not arrive in time")

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: int, why: bytes, extra: bytes = b"") -> None:
        """An answer before there is a request."""
        self._stop_timer()
        if self.transport.is_closing():
            return
        self.measure.invalid.inc()
        head = b"HTTP/1.1 %d \r\ncontent-type: text/plain\r\ncontent-length: %d\r\nconnection: close\r\n%s\r\n%s"
        self.transport.write(head % (status, len(why), extra, why))
        self.transport.close()


def guarded(measure: Measure, connections: int, header_seconds: float) -> type[HttpToolsProtocol]:
    """The protocol class for a server: at most so many connections, headers within so many seconds."""
    bounds = {"measure": measure, "most": connections, "header_seconds": header_seconds}
    return type("Guarded", (_Guarded,), bounds)
