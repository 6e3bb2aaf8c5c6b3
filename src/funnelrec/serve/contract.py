"""Contract: /openapi.json. Bodies are read by serve/api.py and not by the framework; what it cannot know is added."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from funnelrec.serve import api

__all__ = ["contract"]

PATHS: dict[str, tuple[str | None, str, tuple[int, ...]]] = {
    # path: (question, answer, statuses of problems that are its own)
    "/v1/recommend": ("RecommendQuestion", "RecommendAnswer", (400, 408, 413, 415, 422, 429, 503)),
    "/v1/recommend/batch": ("BatchQuestion", "BatchAnswer", (400, 408, 413, 415, 422, 429, 503)),
    "/v1/rank": ("RankQuestion", "RankAnswer", (400, 408, 413, 415, 422, 429, 503)),
    "/v1/similar": ("SimilarQuestion", "SimilarAnswer", (400, 404, 408, 413, 415, 422, 429, 503)),
    "/v1/events": ("EventsQuestion", "EventsAnswer", (400, 408, 413, 415, 503, 507)),
    "/v1/items": (None, "ItemsAnswer", (400, 429, 503)),
    "/v1/items/{item_id}": (None, "Item", (404, 503)),
    "/v1/items/{item_id}/picture": (None, "", (404, 503)),
    "/v1/users": (None, "UsersAnswer", (400, 429, 503)),
    "/v1/users/{user_id}": (None, "UserAnswer", (404, 503)),
    "/v1/map": (None, "MapAnswer", (404, 429, 503)),
    "/v1/funnel": (None, "FunnelAnswer", (503,)),
    "/v1/models": (None, "ModelsAnswer", (503,)),
    "/v1/models/reload": (None, "ModelsAnswer", (403, 409, 422, 503)),
    "/healthz": (None, "Health", ()),
    "/readyz": (None, "Health", ()),
    "/metrics": (None, "", ()),
}
ALL = (401, 405, 421, 431, 500)
TEMPLATE = "#/components/schemas/{model}"


def contract(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document of the application, made once."""
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, definitions = models_json_schema(
            [(m, "validation") for m in api.QUESTIONS] + [(m, "serialization") for m in api.ANSWERS],
            ref_template=TEMPLATE,
        )
        document["components"] = {
            "schemas": definitions["$defs"],
            "securitySchemes": {"token": {"type": "http", "scheme": "bearer"}},
        }
        for path, operations in document["paths"].items():
            for operation in operations.values():
                _complete(path, operation)
        app.openapi_schema = document
    return app.openapi_schema


def _complete(path: str, operation: dict[str, Any]) -> None:
    question, answer, statuses = PATHS[path]
    if question is not None:
        operation["requestBody"] = {"required": True, "content": _json(question)}
    success = "202" if path == "/v1/events" else "200"
    found = {"description": "The answer."}
    operation["responses"] = {success: {**found, "content": _json(answer)} if answer else _bytes(path)}
    for status in sorted({*statuses, *ALL}):
        content = {"application/problem+json": {"schema": {"$ref": TEMPLATE.format(model="Problem")}}}
        operation["responses"][str(status)] = {"description": "A problem.", "content": content}
    if path == "/readyz":
        operation["responses"]["503"] = {"description": "Starting or leaving.", "content": _json("Health")}
    if path.startswith("/v1/") or path == "/metrics":
        operation["security"] = [{}, {"token": []}]


def _json(model: str) -> dict[str, Any]:
    return {"application/json": {"schema": {"$ref": TEMPLATE.format(model=model)}}}


def _bytes(path: str) -> dict[str, Any]:
    if path == "/metrics":
        return {"description": "Figures.", "content": {"text/plain": {"schema": {"type": "string"}}}}
    picture = {"schema": {"type": "string", "format": "binary"}}
    return {"description": "The picture.", "content": {"image/png": picture, "image/jpeg": picture}}
