"""App: the paths of the HTTP interface. docs/http.md is its description, /openapi.json its contract.

A request goes through the gate (serve/gate.py), is read and checked here, waits for its turn (serve/admission.py), is
answered in a thread by the funnel that served when it was taken up (serve/live.py), and leaves as JSON.
"""

from __future__ import annotations

import asyncio
import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar

import orjson
from fastapi import FastAPI, Query
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.requests import Request as Call
from starlette.responses import Response
from starlette.staticfiles import StaticFiles

import funnelrec
from funnelrec.serve import api
from funnelrec.serve.admission import Admission, Busy, Watch
from funnelrec.serve.contract import contract
from funnelrec.serve.gate import Gate
from funnelrec.serve.live import Live, Loaded
from funnelrec.serve.measure import Measure
from funnelrec.serve.problems import ProblemError, body, problem
from funnelrec.serve.request import Request, RequestError
from funnelrec.serve.spool import Spool, SpoolFull

__all__ = ["Settings", "Shop", "create_app"]

WEB = Path(__file__).with_name("web")
PAGE_CACHE = "no-cache"
PICTURES = {b"\x89PNG": "image/png", b"\xff\xd8\xff": "image/jpeg", b"GIF8": "image/gif", b"RIFF": "image/webp"}
Result = TypeVar("Result")
Limit = Annotated[int, Query(ge=1, le=50)]
Search = Annotated[str | None, Query(max_length=200)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """How a server behaves. `hosts` None: any name; `token` None: nobody is asked; `spool` None: events are not kept.

    `threads` answer and `queue` more questions wait; a question without `deadline_ms` has the one here; a body is at
    most `max_body` bytes and arrives within `body_seconds`. `may_reload` opens POST /v1/models/reload.
    """

    threads: int = 1
    queue: int = 16
    deadline_ms: int = 1_000
    max_body: int = 2**20
    body_seconds: float = 10.0
    hosts: frozenset[str] | None = None
    token: str | None = None
    spool: Path | None = None
    spool_bytes: int = 256 * 2**20
    may_reload: bool = False


class Shop:
    """What the paths share: the live funnel, the queue, the figures. `leaving`: the server is about to go."""

    def __init__(self, live: Live, settings: Settings) -> None:
        self.live = live
        self.settings = settings
        self.admission = Admission(settings.threads, settings.queue)
        self.measure = Measure()
        self.measure.inside.set_function(lambda: self.admission.inside)
        self.spool = None if settings.spool is None else Spool(settings.spool, settings.spool_bytes)
        self.leaving = False
        self._rank_seconds = [0.0]
        self._reloading = asyncio.Lock()

    def loaded(self) -> Loaded:
        """The version that serves. 503 before there is one."""
        if self.live.current is None:
            raise ProblemError(503, "the funnel is being loaded; come back in a moment", headers={"Retry-After": "1"})
        return self.live.current

    async def reload(self) -> Loaded:
        """Load what the folder holds beside the answers, and swap. 409 while one runs, 422 for a refused artifact."""
        if self._reloading.locked():
            raise ProblemError(409, "a reload is running; wait for it")
        async with self._reloading:
            try:
                loaded = await asyncio.to_thread(self.live.load)
            except Exception as error:  # whatever is wrong with the new one, the old one goes on
                self.measure.reloads.labels("refused").inc()
                raise ProblemError(422, f"the artifact was refused, the old one goes on: {error}") from error
            self.live.swap(loaded)
            self.measure.reloads.labels("done").inc()
            self.measure.serves(loaded.name, loaded.version)
        await asyncio.to_thread(_give_back)
        return loaded

    async def answer(self, work: Callable[[], Result], cost: int = 1) -> Result:
        """The result of `work` when its turn has come. 429 when the queue is full, 422 when it cannot be answered."""
        try:
            return await self.admission.run(work, cost)
        except Busy as busy:
            raise self.full(busy) from None
        except RequestError as error:
            raise ProblemError(422, str(error)) from None

    def check_room(self) -> None:
        """Refuses before the body is read."""
        try:
            self.admission.check()
        except Busy as busy:
            raise self.full(busy) from None

    def full(self, busy: Busy) -> ProblemError:
        """The problem to say so."""
        self.measure.shed.inc()
        return ProblemError(429, str(busy), headers={"Retry-After": str(busy.retry_after)})

    def watch(self, call: Call, deadline_ms: int | None, entries: int = 1) -> Watch:
        """The pace of a question that has just arrived."""
        arrived = call.state.arrived
        deadline = arrived + 1e-3 * (self.settings.deadline_ms if deadline_ms is None else deadline_ms)
        return Watch(arrived, deadline, self._rank_seconds, entries)

    def tell(self, watch: Watch, fallbacks: list[str | None]) -> None:
        """What an answer adds to the figures."""
        for stage, seconds in watch.seconds.items():
            self.measure.stages.labels(stage).observe(seconds)
        if watch.degraded:
            self.measure.degraded.inc()
        for reason in fallbacks:
            if reason is not None:
                self.measure.fallbacks.labels(reason).inc()


def _give_back() -> None:
    """What the old version held goes back to the system; glibc's allocator would keep it."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def create_app(live: Live, settings: Settings) -> Gate:
    """The whole application; `gate.app.state.shop` is what it shares."""
    app = FastAPI(title="funnelrec", version=funnelrec.__version__, docs_url=None, redoc_url=None)
    shop = app.state.shop = Shop(live, settings)
    _questions(app, shop)
    _events(app, shop)
    _catalogue(app, shop)
    _facts(app, shop)
    _page(app)
    app.openapi = partial(contract, app)  # type: ignore[method-assign]
    app.add_exception_handler(HTTPException, _refused)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(ProblemError, _problem)
    app.add_exception_handler(Exception, _bug)
    return Gate(
        app,
        measure=shop.measure,
        hosts=settings.hosts,
        token=settings.token,
        leaving=lambda: shop.leaving,
    )


# ------------------------------------------------------------------------------------------------------------- paths
def _questions(app: FastAPI, shop: Shop) -> None:
    @app.post("/v1/recommend")
    async def recommend(call: Call) -> Response:
        """The k best items for a user, or for anyone with a history."""
        shop.check_room()
        question = await _read(call, shop, api.RecommendQuestion)
        loaded, watch, request = shop.loaded(), shop.watch(call, question.deadline_ms), _request(question)

        def work() -> dict[str, Any]:
            watch.begin()
            return loaded.recommend(request, watch, explain=question.explain)

        answer = await shop.answer(work)
        shop.tell(watch, [answer["fallback"]])
        return _json({"request_id": call.state.request_id, **answer})

    @app.post("/v1/recommend/batch")
    async def recommend_batch(call: Call) -> Response:
        """Up to 256 questions at once; each has an answer or a problem."""
        shop.check_room()
        question = await _read(call, shop, api.BatchQuestion)
        count = len(question.requests)
        loaded, watch = shop.loaded(), shop.watch(call, question.deadline_ms, count)
        requests = [_request(entry) for entry in question.requests]

        def work() -> list[dict[str, Any] | RequestError]:
            watch.begin()
            return loaded.recommend_many(requests, watch)

        answers = [_entry(a) for a in await shop.answer(work, count)]
        shop.tell(watch, [a.get("fallback") for a in answers])
        told = {"answers": answers, "degraded": watch.degraded, "timing_ms": watch.timing()}
        return _json({"request_id": call.state.request_id, **loaded.stamp(), **told})

    @app.post("/v1/rank")
    async def rank(call: Call) -> Response:
        """The caller's own candidates, scored by the ranker and ordered."""
        shop.check_room()
        question = await _read(call, shop, api.RankQuestion)
        loaded, watch = shop.loaded(), shop.watch(call, None)
        request = _request(question)

        def work() -> dict[str, Any]:
            watch.begin()
            return loaded.rank(request, question.items, watch)

        return _json({"request_id": call.state.request_id, **await shop.answer(work)})

    @app.post("/v1/similar")
    async def similar(call: Call) -> Response:
        """Items like an item."""
        shop.check_room()
        question = await _read(call, shop, api.SimilarQuestion)
        loaded = shop.loaded()
        answer = await shop.answer(lambda: loaded.similar(question.item_id, question.k, question.filters))
        if answer is None:
            raise ProblemError(404, "no item has this id; GET /v1/items?query=… finds those there are")
        return _json({"request_id": call.state.request_id, **answer})


def _events(app: FastAPI, shop: Shop) -> None:
    @app.post("/v1/events", status_code=202)
    async def events(call: Call) -> Response:
        """What users did: the next request sees it, and the spool keeps it."""
        question = await _read(call, shop, api.EventsQuestion)
        loaded = shop.loaded()
        now = time.time()
        moments = [_moment(event.timestamp, now) for event in question.events]
        if shop.spool is not None:
            received = datetime.fromtimestamp(now).astimezone().isoformat()
            lines = [{**e.model_dump(exclude_none=True), "received": received} for e in question.events]
            try:
                await asyncio.to_thread(shop.spool.append, lines)
            except SpoolFull as error:
                raise ProblemError(507, str(error)) from None
            except OSError:
                raise ProblemError(507, "the disk did not take the events; make room on it") from None
        rows = loaded.store.item_rows([[e.item_id for e in question.events]])[0]
        current = shop.loaded()  # a reload may have come in between
        for event, moment in zip(question.events, moments, strict=True):
            current.funnel.recent.add(event.user_id, event.item_id, moment)
        shop.measure.events.inc(len(question.events))
        answer = {"accepted": len(question.events), "unknown_items": int((rows < 2).sum())}
        return _json({"request_id": call.state.request_id, **answer}, 202)


def _catalogue(app: FastAPI, shop: Shop) -> None:
    @app.get("/v1/items")
    async def items(
        query: Search = None, ids: Annotated[str | None, Query(max_length=4_096)] = None, limit: Limit = 10
    ) -> Response:
        """Search items by id, title and text; or describe those of `ids`, with commas between."""
        loaded = shop.loaded()
        if ids is not None:
            wanted = [i for i in ids.split(",") if i][:256]
            rows = loaded.store.item_rows([wanted])[0].tolist() if wanted else []
            return _json({"items": loaded.items(row for row in rows if row >= 2)})
        asked = query or ""
        return _json({"items": await shop.answer(lambda: loaded.find_items(asked, limit))})

    @app.get("/v1/items/{item_id}")
    async def item(item_id: str) -> Response:
        """One item."""
        loaded = shop.loaded()
        return _json(loaded.item(_row(loaded, item_id)))

    @app.get("/v1/items/{item_id}/picture")
    async def picture(item_id: str) -> Response:
        """The picture of an item, as the catalogue holds it."""
        loaded = shop.loaded()
        content = loaded.store.picture(_row(loaded, item_id))
        kind = next((kind for start, kind in PICTURES.items() if content and content.startswith(start)), None)
        if content is None or kind is None:
            raise ProblemError(404, "this item has no picture")
        return Response(content, media_type=kind, headers={"Cache-Control": "max-age=3600"})

    @app.get("/v1/users")
    async def users(query: Search = "", limit: Limit = 10) -> Response:
        """Search users by id."""
        loaded, asked = shop.loaded(), query or ""
        return _json({"users": await shop.answer(lambda: loaded.find_users(asked, limit))})

    @app.get("/v1/users/{user_id}")
    async def user(user_id: str) -> Response:
        """One user and the newest items of the history."""
        found = shop.loaded().user(user_id)
        if found is None:
            raise ProblemError(404, "no user has this id; GET /v1/users?query=… finds those there are")
        return _json(found)

    @app.get("/v1/map")
    async def item_map() -> Response:
        """The item space in a plane."""
        loaded = shop.loaded()
        found = await shop.answer(loaded.map)
        if found is None:
            raise ProblemError(404, "this artifact holds no map; `funnelrec fit` makes one")
        return _json(found)


def _facts(app: FastAPI, shop: Shop) -> None:
    @app.get("/v1/funnel")
    async def card() -> Response:
        """The model card."""
        return _json(shop.loaded().card())

    @app.get("/v1/models")
    async def models() -> Response:
        """What is loaded."""
        return _json({"models": [_version(shop.loaded())]})

    @app.post("/v1/models/reload")
    async def reload() -> Response:
        """Read the folder again; the old version serves until the new one is loaded, verified and warm."""
        if not shop.settings.may_reload:
            raise ProblemError(403, "reload over HTTP is closed; start with --allow-reload, or send SIGHUP")
        return _json({"models": [_version(await shop.reload())]})

    @app.get("/healthz")
    async def healthz() -> Response:
        """The process answers."""
        return _json({"status": "ok"})

    @app.get("/readyz")
    async def readyz() -> Response:
        """A funnel is loaded and warm, and the server is not about to go."""
        status = "leaving" if shop.leaving else "starting" if shop.live.current is None else "ok"
        answer = _json({"status": status}, 200 if status == "ok" else 503)
        if status != "ok":
            answer.headers["Retry-After"] = "1"
        return answer

    @app.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(shop.measure.text(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _page(app: FastAPI) -> None:
    @app.get("/", include_in_schema=False)
    async def page() -> Response:
        """The page."""
        file = WEB / "index.html"
        if not file.is_file():
            raise ProblemError(404, "this installation has no page; the HTTP interface is at /openapi.json")
        return Response(file.read_bytes(), media_type="text/html", headers={"Cache-Control": PAGE_CACHE})

    class Files(StaticFiles):
        """The files of the page; asked for anew each time, answered by 304 when they are the same."""

        async def get_response(self, path: str, scope: Any) -> Response:
            answer = await super().get_response(path, scope)
            answer.headers["Cache-Control"] = PAGE_CACHE
            return answer

    app.mount("/web", Files(directory=WEB, check_dir=False), name="web")


# ---------------------------------------------------------------------------------------------------------- reading
Question = TypeVar("Question", bound=BaseModel)


async def _read(call: Call, shop: Shop, model: type[Question]) -> Question:
    """The checked body. 415, 413, 408 or 400 for what is none."""
    kind = call.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ProblemError(415, f"the body must be application/json, received {kind[:64] or 'no content type'}")
    if call.headers.get("content-encoding", "identity").lower() != "identity":
        raise ProblemError(415, "compressed bodies are not read; send it as it is")
    largest = shop.settings.max_body
    length = call.headers.get("content-length", "0")
    if length.isdigit() and len(length) < 20 and int(length) > largest:
        raise ProblemError(413, f"the body has {length} bytes, at most {largest} are read")
    try:
        async with asyncio.timeout(shop.settings.body_seconds):
            parts, size = [], 0
            async for part in call.stream():
                size += len(part)
                if size > largest:
                    raise ProblemError(413, f"the body is longer than the {largest} bytes that are read")
                parts.append(part)
    except TimeoutError:
        raise ProblemError(408, f"the body did not arrive in {shop.settings.body_seconds:g} s") from None
    except ClientDisconnect:
        raise ProblemError(400, "the client went away before the body had arrived") from None
    try:
        return api.parse(b"".join(parts), model)
    except api.BodyError as error:
        raise ProblemError(400, str(error), errors=error.errors) from None


def _request(question: Any) -> Request:
    try:
        if isinstance(question, api.RankQuestion):
            return Request(user=question.user_id, history=question.history, context=question.context)
        request: Request = question.request()
        return request
    except RequestError as error:
        raise ProblemError(400, str(error)) from None


def _moment(timestamp: int | str | None, now: float) -> float:
    """Seconds since 1970; the future is now."""
    if timestamp is None:
        return now
    try:
        if isinstance(timestamp, int):
            return min(now, timestamp / 1000)
        written = timestamp.upper().replace(":60", ":59")  # a leap second
        return min(now, datetime.fromisoformat(written).astimezone().timestamp())
    except (ValueError, OverflowError, OSError):
        raise ProblemError(400, "a timestamp is written 2026-11-20T10:00:00Z, or in milliseconds since 1970") from None


def _row(loaded: Loaded, item_id: str) -> int:
    row = loaded.row_of(item_id)
    if row is None:
        raise ProblemError(404, "no item has this id; GET /v1/items?query=… finds those there are")
    return row


# ---------------------------------------------------------------------------------------------------------- writing
def _json(content: Any, status: int = 200) -> Response:
    """Numbers that are not finite become null."""
    return Response(
        orjson.dumps(content, default=str, option=orjson.OPT_NON_STR_KEYS | orjson.OPT_SERIALIZE_NUMPY),
        status_code=status,
        media_type="application/json",
    )


def _entry(answer: dict[str, Any] | RequestError) -> dict[str, Any]:
    return {"problem": body(ProblemError(422, str(answer)))} if isinstance(answer, RequestError) else answer


def _version(loaded: Loaded) -> dict[str, Any]:
    return {"name": loaded.name, "version": loaded.version, "digest": loaded.digest, "loaded_at": loaded.loaded_at}


async def _problem(call: Call, error: Exception) -> Response:
    assert isinstance(error, ProblemError)
    return problem(error, call.url.path, call.state.request_id)


async def _bug(call: Call, error: Exception) -> Response:
    return await _problem(call, ProblemError(500, "something went wrong here; the log has it under this request_id"))


async def _refused(call: Call, error: Exception) -> Response:
    """What Starlette refuses by itself: an unknown path, another verb."""
    assert isinstance(error, HTTPException)
    details = {404: "there is nothing at this path; /openapi.json lists them", 405: "this path takes another verb"}
    detail = details.get(error.status_code, str(error.detail))
    return await _problem(call, ProblemError(error.status_code, detail, headers=error.headers))


async def _invalid(call: Call, error: Exception) -> Response:
    """A parameter of the path or the query that does not fit."""
    assert isinstance(error, RequestValidationError)
    errors = [(str(e["loc"][-1]), str(e["msg"]).removeprefix("Input ")) for e in error.errors()]
    return await _problem(call, ProblemError(400, "; ".join(f"{p}: {m}" for p, m in errors[:3]), errors=errors[:20]))
