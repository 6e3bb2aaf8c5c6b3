"""Problems: errors over HTTP as application/problem+json (RFC 9457)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import orjson
from starlette.responses import Response

__all__ = ["ProblemError", "problem"]

TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    403: "Forbidden",
    404: "Not Found",
    405: "Method Not Allowed",
    408: "Request Timeout",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    421: "Misdirected Request",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    431: "Request Header Fields Too Large",
    500: "Internal Server Error",
    503: "Service Unavailable",
    507: "Insufficient Storage",
}


class ProblemError(Exception):
    """Ends a request with a status and one line that says what was received and how to mend it."""

    def __init__(
        self,
        status: int,
        detail: str,
        *,
        errors: Iterable[tuple[str, str]] = (),
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.errors = [{"path": path, "message": message} for path, message in errors]
        self.headers = dict(headers or {})


def problem(error: ProblemError, instance: str | None = None, request_id: str | None = None) -> Response:
    """The answer that tells of it."""
    return Response(
        orjson.dumps(body(error, instance, request_id)),
        status_code=error.status,
        headers=error.headers,
        media_type="application/problem+json",
    )


def body(error: ProblemError, instance: str | None = None, request_id: str | None = None) -> dict[str, Any]:
    """The members of the problem; those that hold nothing are left out."""
    members = {
        "type": "about:blank",
        "title": TITLES.get(error.status, "Error"),
        "status": error.status,
        "detail": error.detail,
        "instance": instance,
        "request_id": request_id,
        "errors": error.errors or None,
    }
    return {name: value for name, value in members.items() if value is not None}
