"""Gate: what every request passes on its way in and out. An ASGI application around the one that answers.

in      a request id · the `Host` is one of ours (a page elsewhere that resolves its name to 127.0.0.1 gets nothing) ·
        the token, where one is wanted
out     counted by route, verb and status, timed, one line in the log: never a body, a query, a token or an id of a user
"""

from __future__ import annotations

import hmac
import logging
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from time import perf_counter
from typing import Any

from starlette.datastructures import Headers

from funnelrec.serve.measure import Measure
from funnelrec.serve.problems import ProblemError, problem

__all__ = ["Gate"]

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})
VERBS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE"})
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
GUARDED = ("/v1/", "/metrics")
CSP = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = [
    (b"content-security-policy", CSP.encode()),
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cross-origin-resource-policy", b"same-origin"),
]
log = logging.getLogger("funnelrec.serve")


class Gate:
    """`hosts` are the names this server goes by (None: any), `token` what /v1 and /metrics ask for (None: nothing).

    `leaving` is asked whether the server is about to go: then connections are closed after their answer.
    """

    def __init__(
        self,
        app: App,
        *,
        measure: Measure,
        hosts: frozenset[str] | None,
        token: str | None,
        leaving: Callable[[], bool],
    ) -> None:
        self.app = app
        self.measure = measure
        self.hosts = hosts
        self.token = None if token is None else f"Bearer {token}".encode()
        self.leaving = leaving

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """One request; other kinds of connection (lifespan) pass through."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = perf_counter()
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        request_id = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        scope.setdefault("state", {})
        scope["state"] |= {"request_id": request_id, "arrived": started}
        status = 0

        async def out(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                own = [(b"x-request-id", request_id.encode()), *HEADERS]
                if self.leaving() or status in (408, 413):
                    own.append((b"connection", b"close"))
                message = {**message, "headers": [*message.get("headers", []), *own]}
                route = getattr(scope.get("route"), "path", "other")
                verb = scope["method"] if scope["method"] in VERBS else "other"
                seconds = perf_counter() - started
                self.measure.answered(route, verb, status, seconds)
                log.info("%s %s %d %.1f ms %s", verb, route, status, 1e3 * seconds, request_id)
            await send(message)

        try:
            self._check(scope["path"], headers)
            await self.app(scope, receive, out)
        except ProblemError as error:
            if not status:
                await problem(error, scope["path"], request_id)(scope, receive, out)
        except Exception:
            log.exception("request %s failed", request_id)
            if not status:
                bug = ProblemError(500, "something went wrong here; the log has it under this request_id")
                await problem(bug, scope["path"], request_id)(scope, receive, out)

    def _check(self, path: str, headers: Headers) -> None:
        if self.hosts is not None:
            host = headers.get("host", "").rsplit(":", 1)
            name = host[0] if len(host) == 2 and host[1].isdigit() else headers.get("host", "")
            if name.lower() not in self.hosts:
                raise ProblemError(421, "this server does not go by that name; use one of its own, or --allow-host")
        if self.token is not None and path.startswith(GUARDED):
            received = headers.get("authorization", "").encode("latin-1", "replace")
            if not hmac.compare_digest(received, self.token):
                raise ProblemError(
                    401, "a token is wanted: Authorization: Bearer …", headers={"WWW-Authenticate": "Bearer"}
                )
