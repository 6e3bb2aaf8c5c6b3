"""The paths of the HTTP interface, in this process: shapes, refusals, limits, what is said and what is never said."""

from __future__ import annotations

import asyncio
import json
import logging
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch

from funnelrec.data.dataset import Dataset
from funnelrec.serve.admission import Admission, Busy, Watch
from funnelrec.serve.app import Settings, create_app
from funnelrec.serve.artifact import MANIFEST
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.gate import LOOPBACK
from funnelrec.serve.live import Live
from funnelrec.serve.recent import Recent
from funnelrec.serve.spool import Spool, SpoolFull
from serve.funnels import small_dataset, small_funnel

TOKEN = "open-sesame-12"
Ask = Callable[..., httpx.Response]


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    return small_dataset(tmp_path_factory.mktemp("shop") / "data")


@pytest.fixture(scope="module")
def folder(dataset: Dataset, tmp_path_factory: pytest.TempPathFactory) -> Path:
    funnel = small_funnel(dataset)
    funnel.item_map = torch.randn(dataset.spec.num_items, 2, generator=torch.Generator().manual_seed(0))
    funnel.item_map[:2] = torch.nan
    return funnel.save(tmp_path_factory.mktemp("shop") / "shop.funnel")


@pytest.fixture(scope="module")
def funnel(folder: Path) -> Funnel:
    return Funnel.load(folder)


def asker(folder: Path, **settings: Any) -> Ask:
    """Asks an application in this process; `ask.shop` is what its paths share."""
    live = Live(folder)
    live.swap(live.load())
    app = create_app(live, Settings(**settings))

    def ask(path: str, body: Any = None, *, verb: str | None = None, **options: Any) -> httpx.Response:
        async def once() -> httpx.Response:
            transport = httpx.ASGITransport(app)
            async with httpx.AsyncClient(transport=transport, base_url="http://127.0.0.1") as client:
                return await client.request(
                    verb or ("GET" if body is None and "content" not in options else "POST"), path, json=body, **options
                )

        return asyncio.run(once())

    ask.shop = app.app.state.shop  # type: ignore[attr-defined]
    return ask


@pytest.fixture(scope="module")
def ask(folder: Path) -> Ask:
    return asker(folder)


def test_an_answer_is_that_of_the_funnel(ask: Ask, funnel: Funnel) -> None:
    answer = ask("/v1/recommend", {"user_id": "u07", "k": 5}).json()
    expected = funnel.recommend(user="u07", k=5)
    assert [(i["item_id"], i["score"]) for i in answer["items"]] == [(str(r.item), r.score) for r in expected.items]
    assert [i["attributes"] for i in answer["items"]] == [
        {n: v for n, v in r.attributes.items() if n != "title"} for r in expected.items
    ]
    assert answer["items"][0]["title"] == expected.items[0].attributes["title"]
    assert (answer["fallback"], answer["degraded"]) == (None, False)
    assert answer["model_version"] == funnel.digest[:12] and len(answer["request_id"]) == 16
    assert set(answer["timing_ms"]) == {"queue", "match", "rank", "rerank", "total"}
    assert "places" not in answer["items"][0] and "interests" not in answer


@pytest.mark.parametrize(
    "question",
    [
        {"history": [101, "105", "nosuch"], "k": 7},
        {"user_id": "u03", "filters": {"kind": ["red", "blue"]}, "diversity": 0.5},
        {"user_id": "u03", "context": {"device": "phone"}, "exclude_seen": False},
        {"user_id": "nobody"},
        {"history": []},
        {"user_id": "u03", "k": 1000},
    ],
)
def test_every_condition_reaches_the_funnel(ask: Ask, funnel: Funnel, question: dict[str, Any]) -> None:
    answer = ask("/v1/recommend", question).json()
    asked = {("user" if name == "user_id" else name): value for name, value in question.items()}
    expected = funnel.recommend(**asked)
    assert [i["item_id"] for i in answer["items"]] == [str(i) for i in expected.ids]
    assert answer["fallback"] == expected.fallback


def test_an_explanation_names_the_interest_with_the_largest_product_and_every_place(ask: Ask, funnel: Funnel) -> None:
    answer = ask("/v1/recommend", {"user_id": "u07", "k": 40, "explain": True, "diversity": 3.0}).json()
    plain = ask("/v1/recommend", {"user_id": "u07", "k": 40, "diversity": 0}).json()
    by_rank = [i["item_id"] for i in plain["items"]]
    items = answer["items"]
    assert [i["places"]["final"] for i in items] == list(range(1, len(items) + 1))
    assert [i["places"]["rank"] for i in items] == [by_rank.index(i["item_id"]) + 1 for i in items]
    assert [i["places"]["rank"] for i in items] != sorted(
        i["places"]["rank"] for i in items
    )  # re-ranking did move some
    by_match = sorted(items, key=lambda i: -i["scores"]["match"])
    assert [i["places"]["match"] for i in by_match] == sorted(i["places"]["match"] for i in items)
    batch, _, _ = funnel.batch([_request("u07")])
    with torch.no_grad():
        queries, _ = funnel.matcher.encode_users(batch)
    for item in items:
        row = int(funnel.store.item_rows([[item["item_id"]]])[0])
        products = queries[0] @ funnel.pipeline.vectors[row]
        assert item["interest"] == int(products.argmax())
        assert item["scores"]["match"] == pytest.approx(float(products.max()), abs=1e-5)
        assert item["scores"]["rank"] == item["score"]
    assert sum(i["candidates"] for i in answer["interests"]) == len(items)
    assert all(len(i["map"]) == 2 and len(i["items"]) <= 10 for i in answer["interests"])


def _request(user: str) -> Any:
    from funnelrec.serve.request import Request

    return Request(user=user)


def test_a_stranger_has_no_interests(ask: Ask) -> None:
    answer = ask("/v1/recommend", {"history": [], "explain": True}).json()
    assert answer["fallback"] == "empty history" and answer["interests"] == []
    assert answer["items"][0]["interest"] is None and answer["items"][0]["scores"]["rank"] is None


def test_a_batch_answers_each_or_says_why_not(ask: Ask) -> None:
    questions = [
        {"user_id": "u01", "k": 3},
        {"user_id": "u02", "filters": {"nosuch": "x"}},
        {"history": ["104"], "k": 3},
    ]
    answers = ask("/v1/recommend/batch", {"requests": questions}).json()["answers"]
    alone = [ask("/v1/recommend", q).json() for q in (questions[0], questions[2])]
    for together, single in zip((answers[0], answers[2]), alone, strict=True):
        for a, b in zip(together["items"], single["items"], strict=True):
            # a product of more rows may have other last bits
            assert a == {**b, "score": pytest.approx(b["score"], rel=1e-5)}
    assert answers[1]["problem"]["status"] == 422 and "no categorical item field" in answers[1]["problem"]["detail"]


def test_rank_orders_the_callers_items_and_puts_unknown_ones_last(ask: Ask, funnel: Funnel) -> None:
    answer = ask("/v1/rank", {"user_id": "u05", "items": ["nosuch", 101, 130, "120"]}).json()
    scores = [i["score"] for i in answer["items"]]
    assert answer["items"][-1] == {
        "item_id": "nosuch",
        "title": None,
        "attributes": {},
        "picture": False,
        "score": None,
        "probability": None,
    }
    assert scores[:3] == sorted(scores[:3], reverse=True) and {i["item_id"] for i in answer["items"][:3]} == {
        "101",
        "130",
        "120",
    }
    known = {i["item_id"]: i["score"] for i in ask("/v1/recommend", {"user_id": "u05", "k": 40}).json()["items"]}
    shared = [i for i in answer["items"][:3] if i["item_id"] in known]
    assert ask("/v1/rank", {"history": [], "items": ["nosuch"]}).json()["items"][0]["score"] is None
    assert shared and all(i["score"] == pytest.approx(known[i["item_id"]], abs=1e-5) for i in shared)


def test_similar(ask: Ask, funnel: Funnel) -> None:
    answer = ask("/v1/similar", {"item_id": 105, "k": 4}).json()
    assert [i["item_id"] for i in answer["items"]] == [str(i) for i in funnel.similar(105, k=4).ids]
    assert ask("/v1/similar", {"item_id": "nosuch"}).status_code == 404


def test_events_are_seen_by_the_next_request_and_lie_in_the_spool(folder: Path, tmp_path: Path) -> None:
    ask = asker(folder, spool=tmp_path / "events.jsonl")
    before = ask("/v1/recommend", {"user_id": "new", "k": 3}).json()
    assert before["fallback"] == "unknown user"
    seen = {"user_id": "new", "item_id": 105, "event": "click", "timestamp": "2026-11-20T10:00:00Z"}
    told = ask("/v1/events", {"events": [seen, {"user_id": "u05", "item_id": "nosuch"}]})
    assert (told.status_code, told.json()["accepted"], told.json()["unknown_items"]) == (202, 2, 1)
    after = ask("/v1/recommend", {"user_id": "new", "k": 40}).json()
    with_history = ask("/v1/recommend", {"history": [105], "k": 40}).json()
    assert after["fallback"] is None and after["items"] == with_history["items"]
    assert "105" not in [i["item_id"] for i in after["items"]]
    assert ask("/v1/users/new").json()["history"][0]["item_id"] == "105"
    lines = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert [(e["user_id"], e["item_id"]) for e in lines] == [("new", 105), ("u05", "nosuch")]
    assert lines[0]["event"] == "click" and "received" in lines[0]


def test_recent_events_join_the_stored_history(folder: Path, funnel: Funnel) -> None:
    ask = asker(folder)
    stored = [i["item_id"] for i in ask("/v1/users/u05").json()["history"]]
    ask("/v1/events", {"events": [{"user_id": "u05", "item_id": 139}]})
    assert [i["item_id"] for i in ask("/v1/users/u05").json()["history"]] == [*stored, "139"]
    answer = ask("/v1/recommend", {"user_id": "u05", "k": 40}).json()
    expected = funnel.recommend(user="u05", history=[*stored, "139"], k=40)
    assert {i["item_id"] for i in answer["items"]} == {str(i) for i in expected.ids}


def test_recent_is_bounded_and_forgets_the_quiet() -> None:
    recent = Recent(each=3, everybody=5)
    for item in range(5):
        recent.add("a", item)
    recent.add(1, "x", 10.0)
    recent.add("1", "y", 20.0)
    assert recent.of("a") == ("2", "3", "4") and recent.of(1) == ("x", "y") and len(recent) == 5
    recent.add("b", "z")  # a sixth: whoever was quiet for longest goes
    assert recent.of("a") == () and recent.of("1") == ("x", "y") and len(recent) == 3
    assert recent.since(15.0).of("1") == ("y",)


def test_the_spool_is_bounded_and_mends_a_half_line(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "events.jsonl"
    spool = Spool(file, max_bytes=40)
    spool.append([{"a": 1}, {"a": 2}])
    with file.open("ab") as half:
        half.write(b'{"a": 3')
    spool = Spool(file, max_bytes=40)
    spool.append([{"a": 4}])
    assert file.read_text() == '{"a":1}\n{"a":2}\n{"a":4}\n'
    with pytest.raises(SpoolFull, match=r"24 of 40 bytes; move events\.jsonl away"):
        spool.append([{"text": "x" * 40}])
    assert file.read_text() == '{"a":1}\n{"a":2}\n{"a":4}\n'


def test_a_full_spool_is_507(folder: Path, tmp_path: Path) -> None:
    ask = asker(folder, spool=tmp_path / "s", spool_bytes=10)
    refused = ask("/v1/events", {"events": [{"user_id": "u05", "item_id": 139}]})
    assert refused.status_code == 507 and "move s away" in refused.json()["detail"]
    assert ask.shop.live.current.funnel.recent.of("u05") == ()  # type: ignore[attr-defined]


# --------------------------------------------------------------------------------------------- catalogue and facts
def test_search(ask: Ask) -> None:
    found = ask("/v1/items?query=ITEM 3&limit=4").json()["items"]
    assert len(found) == 4 and all(i["title"].startswith("Item 3") for i in found)
    assert ask("/v1/items?query=139").json()["items"][0]["item_id"] == "139"
    assert {i["attributes"]["kind"] for i in ask("/v1/items?query=gree&limit=50").json()["items"]} == {"green"}
    assert ask("/v1/items?query=").json()["items"] and ask("/v1/items?query=zzz").json()["items"] == []
    assert [i["item_id"] for i in ask("/v1/items?ids=120,nosuch,101").json()["items"]] == ["120", "101"]
    assert len(ask("/v1/items").json()["items"]) == 10 and ask("/v1/items?query=a&limit=51").status_code == 400
    assert ask("/v1/items/101").json()["title"] == "Item 1" and ask("/v1/items/nosuch").status_code == 404
    assert ask("/v1/items/101/picture").status_code == 404
    users = ask("/v1/users?query=U0&limit=3").json()["users"]
    assert len(users) == 3 and all(u["user_id"].startswith("u0") and u["history_length"] > 0 for u in users)
    assert ask("/v1/users?query=late").json()["users"][0] == {"user_id": "late", "history_length": 3}
    assert [i["item_id"] for i in ask("/v1/users/late").json()["history"]] == ["100", "101", "102"]
    assert ask("/v1/users/nobody").status_code == 404


def test_the_card_and_the_map(ask: Ask, folder: Path) -> None:
    card = ask("/v1/funnel").json()
    digest = json.loads((folder / MANIFEST).read_text())["sha256"]
    assert card["digest"] == digest and card["model_version"] == digest[:12] and card["metrics"] == {"ndcg@10": 0.25}
    assert [s["name"] for s in card["stages"]] == ["match/comirec_sa", "rank/din", "rerank/diversity"]
    assert card["counts"]["items"] == 40 and card["diversity"] == {"field": "kind", "default": 0.01}
    assert {f["name"]: f["values"] for f in card["fields"]}["kind"] == ["red", "green", "blue"] or len(
        card["fields"]
    ) == 3
    assert card["map"] is True and card["pictures"] is False
    places = ask("/v1/map").json()
    assert len(places["item_id"]) == len(places["x"]) == len(places["y"]) == len(places["group"]) == 40
    assert places["group_field"] == "kind"
    assert ask("/v1/models").json()["models"][0]["version"] == digest[:12]


def test_health_and_readiness(folder: Path) -> None:
    ask = asker(folder)
    assert ask("/healthz").json() == {"status": "ok"} and ask("/readyz").status_code == 200
    ask.shop.leaving = True  # type: ignore[attr-defined]
    leaving = ask("/readyz")
    assert (leaving.status_code, leaving.json()) == (503, {"status": "leaving"}) and leaving.headers[
        "retry-after"
    ] == "1"
    assert leaving.headers["connection"] == "close" and ask("/healthz").status_code == 200
    ask.shop.leaving, ask.shop.live.current = False, None  # type: ignore[attr-defined]
    assert ask("/readyz").json() == {"status": "starting"}
    assert ask("/v1/recommend", {"user_id": "a"}).status_code == 503


# ------------------------------------------------------------------------------------------------------- refusals
@pytest.mark.parametrize(
    ("content", "detail"),
    [
        (b"", "no JSON"),
        (b"{", "no JSON"),
        (b"[1]", "should be a valid dictionary"),
        (b'{"k": 3}', "needs user_id or history"),
        (b'{"user_id": "a", "kk": 3}', "kk: Extra inputs are not permitted"),
        (b'{"user_id": "a", "user_id": "b"}', "a key twice"),
        (b'{"user_id": "a", "k": 0}', "k: should be greater than or equal to 1"),
        (b'{"user_id": "a", "k": 1001}', "k: should be less than or equal to 1000"),
        (b'{"user_id": "a", "k": "3"}', "k: should be a valid integer"),
        (b'{"user_id": "a", "k": true}', "k: should be a valid integer"),
        (b'{"user_id": 1.5}', "user_id"),
        (b'{"user_id": ""}', "user_id"),
        (b'{"user_id": "a", "diversity": NaN}', "no JSON"),
        (b'{"user_id": "a", "diversity": 1e400}', "no JSON"),
        (b'{"user_id": "a", "diversity": -1}', "diversity: should be greater"),
        (b'{"user_id": "a", "filters": {"kind": []}}', "filters.kind"),
        (b'{"user_id": "a", "filters": {"kind": {"x": 1}}}', "filters.kind"),
        (b'{"user_id": "\\ud800"}', "no JSON"),
        (b'{"user_id": "\xff"}', "no JSON"),
        (b'{"history": ' + b"[" * 10_000 + b"]" * 10_000 + b"}", "no JSON"),
        (b'{"user_id": 1' + b"0" * 400 + b"}", "no JSON"),
    ],
)
def test_a_malformed_body_is_400_and_says_where(ask: Ask, content: bytes, detail: str) -> None:
    answer = ask("/v1/recommend", content=content, headers={"Content-Type": "application/json"})
    told = answer.json()
    assert answer.status_code == told["status"] == 400 and detail in told["detail"]
    assert answer.headers["content-type"] == "application/problem+json" and told["request_id"]


def test_a_whole_number_may_be_written_with_a_point(ask: Ask) -> None:
    raw = b'{"history": [101.0, 1.02e2], "k": 3.0, "diversity": 1}'
    answer = ask("/v1/recommend", content=raw, headers={"Content-Type": "application/json"})
    assert (
        answer.json()["items"] == ask("/v1/recommend", {"history": [101, 102], "k": 3, "diversity": 1}).json()["items"]
    )


def test_a_bug_is_500_and_told_to_the_log_only(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask = asker(folder)
    ask.shop.live.current.card = lambda: {}["secret"]  # type: ignore[attr-defined]
    answer = ask("/v1/funnel")
    assert answer.status_code == 500 and answer.headers["content-type"] == "application/problem+json"
    assert "secret" not in answer.text and "KeyError: 'secret'" in caplog.text
    assert answer.json()["request_id"] in caplog.text


@pytest.mark.parametrize(
    ("question", "detail"),
    [
        ({"user_id": "u01", "filters": {"nosuch": "x"}}, "no categorical item field is named 'nosuch'"),
        ({"user_id": "u01", "filters": {"kind": "mauve"}}, "no item has kind='mauve'"),
        ({"user_id": "u01", "context": {"nosuch": 1}}, "no context field is named 'nosuch'"),
    ],
)
def test_what_this_funnel_cannot_answer_is_422(ask: Ask, question: dict[str, Any], detail: str) -> None:
    answer = ask("/v1/recommend", question)
    assert answer.status_code == 422 and detail in answer.json()["detail"]


def test_what_is_no_json_or_too_long_is_refused_before_it_is_read(folder: Path) -> None:
    ask = asker(folder, max_body=1_000)
    sent = {"Content-Type": "application/json"}
    assert ask("/v1/recommend", content=b"{}", headers={"Content-Type": "text/plain"}).status_code == 415
    assert ask("/v1/recommend", content=b"{}", headers={**sent, "Content-Encoding": "gzip"}).status_code == 415
    assert ask("/v1/recommend", content=b" " * 1_001, headers=sent).status_code == 413

    async def chunks() -> Any:
        for _ in range(100):
            yield b" " * 100

    answer = ask("/v1/recommend", content=chunks(), headers=sent)
    assert answer.status_code == 413 and answer.headers["connection"] == "close"


def test_paths_and_verbs(ask: Ask) -> None:
    nothing = ask("/v1/nosuch")
    assert nothing.status_code == 404 and nothing.headers["content-type"] == "application/problem+json"
    other = ask("/v1/recommend", verb="DELETE")
    assert other.status_code == 405 and other.headers["allow"] == "POST"
    assert ask("/web/../../funnel.py").status_code == 404 and ask("/web/%2e%2e/app.py").status_code == 404


# ------------------------------------------------------------------------------------------------- who may ask what
def test_a_token_guards_everything_but_health_and_the_page(folder: Path) -> None:
    ask = asker(folder, token=TOKEN)
    for path in ("/v1/funnel", "/v1/items?query=a", "/metrics"):
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": TOKEN}, {"Authorization": "Bearer é"}):
            refused = ask(path, headers={n: v.encode() for n, v in headers.items()})
            assert refused.status_code == 401 and refused.headers["www-authenticate"] == "Bearer"
        assert ask(path, headers={"Authorization": f"Bearer {TOKEN}"}).status_code == 200
    for verb in ("POST", "PUT", "DELETE", "OPTIONS"):
        assert ask("/v1/recommend", verb=verb).status_code == 401
    assert ask("/healthz").status_code == ask("/readyz").status_code == ask("/openapi.json").status_code == 200


def test_a_name_that_is_not_ours_is_421(folder: Path) -> None:
    ask = asker(folder, hosts=LOOPBACK)
    for host in ("evil.example", "127.0.0.1.evil.example", "localhost:80:80", ""):
        assert ask("/healthz", headers={"Host": host}).status_code == 421
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert ask("/healthz", headers={"Host": host}).status_code == 200


def test_no_other_site_may_read_and_nothing_runs_but_our_own_scripts(ask: Ask) -> None:
    answer = ask("/v1/funnel", headers={"Origin": "http://evil.example"})
    assert not [name for name in answer.headers if name.startswith("access-control")]
    assert "script-src 'self'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_reload_is_closed_unless_it_was_opened(folder: Path) -> None:
    assert asker(folder)("/v1/models/reload", verb="POST").status_code == 403
    assert asker(folder, may_reload=True)("/v1/models/reload", verb="POST").status_code == 200


def test_the_request_id_is_taken_or_made(ask: Ask) -> None:
    assert ask("/healthz", headers={"X-Request-ID": "a-1"}).headers["x-request-id"] == "a-1"
    for bad in ("a b", "x" * 65, ""):
        assert len(ask("/healthz", headers={"X-Request-ID": bad}).headers["x-request-id"]) == 16


def test_logs_hold_no_token_no_query_and_no_history(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    ask = asker(folder, token=TOKEN)
    sent = {"Authorization": f"Bearer {TOKEN}"}
    with caplog.at_level(logging.DEBUG):
        ask("/v1/recommend", {"user_id": "secret-user", "history": ["secret-item"]}, headers=sent)
        ask("/v1/recommend", {"user_id": "secret-user", "filters": {"secret-field": 1}}, headers=sent)
        ask("/v1/users?query=secret-user", headers=sent)
        ask("/v1/users/secret-user", headers=sent)
        ask("/v1/funnel", headers={"Authorization": "Bearer secret-guess"})
    lines = [r.getMessage() for r in caplog.records if r.name == "funnelrec.serve"]
    assert len(lines) == 5 and lines[3].startswith("GET /v1/users/{user_id} 404 ")
    assert not [line for line in lines if "secret" in line or TOKEN in line]


# -------------------------------------------------------------------------------------------------- life and limits
def test_a_corrupt_artifact_is_refused_and_the_old_one_goes_on(dataset: Dataset, tmp_path: Path) -> None:
    folder = small_funnel(dataset).save(tmp_path / "shop.funnel")
    ask = asker(folder, may_reload=True)
    before = ask("/v1/recommend", {"user_id": "u07"}).json()
    member = next(folder.glob("rank.*.safetensors"))
    content = bytearray(member.read_bytes())
    content[-1] ^= 1
    member.write_bytes(content)
    refused = ask("/v1/models/reload", verb="POST")
    assert refused.status_code == 422 and member.name in refused.json()["detail"]
    after = ask("/v1/recommend", {"user_id": "u07"}).json()
    assert (after["items"], after["model_version"]) == (before["items"], before["model_version"])
    assert ask("/readyz").status_code == 200
    assert 'funnelrec_reload_total{result="refused"} 1.0' in ask("/metrics").text
    changed = small_funnel(dataset)
    changed.metrics = {"ndcg@10": 0.5}
    changed.save(folder)
    assert ask("/v1/models/reload", verb="POST").status_code == 200
    assert ask("/v1/recommend", {"user_id": "u07"}).json()["model_version"] != before["model_version"]
    assert f'version="{before["model_version"]}"' not in ask("/metrics").text


def test_events_outlive_a_reload(dataset: Dataset, tmp_path: Path) -> None:
    ask = asker(small_funnel(dataset).save(tmp_path / "shop.funnel"), may_reload=True)
    ask("/v1/events", {"events": [{"user_id": "new", "item_id": 105}]})
    assert ask("/v1/models/reload", verb="POST").status_code == 200
    assert ask("/v1/recommend", {"user_id": "new"}).json()["fallback"] is None


def test_a_deadline_leaves_the_order_of_retrieval_and_says_so(folder: Path, funnel: Funnel) -> None:
    ask = asker(folder)
    ranker = ask.shop.live.current.funnel.pipeline.ranker  # type: ignore[attr-defined]
    forward = ranker.forward

    asked: list[int] = []

    def slow(batch: Any) -> torch.Tensor:
        asked.append(batch.size)
        time.sleep(0.2)
        return forward(batch)

    ranker.forward = slow
    patient = {"user_id": "u07", "k": 5, "deadline_ms": 60_000}
    hurried = {"user_id": "u07", "k": 5, "deadline_ms": 100, "explain": True}
    for _ in range(12):  # until it is known how slow the ranker is
        assert ask("/v1/recommend", patient).json()["degraded"] is False
    assert len(asked) == 12
    answer = ask("/v1/recommend", hurried).json()
    assert len(asked) == 12  # it was not waited for
    assert answer["degraded"] is True and "rank" not in answer["timing_ms"]
    assert [i["places"]["match"] for i in answer["items"]] == [1, 2, 3, 4, 5]
    assert answer["items"][0]["scores"]["rank"] is None
    assert "funnelrec_degraded_total 1.0" in ask("/metrics").text


def test_a_ranker_that_was_left_out_is_tried_again() -> None:
    costs = [1.0]
    skipped = 0
    while not Watch(time.perf_counter(), time.perf_counter() + 0.5, costs).may_rank():
        skipped += 1
    assert 3 <= skipped <= 10


def test_numbers_that_are_not_finite_never_leave(folder: Path) -> None:
    ask = asker(folder)
    pipeline = ask.shop.live.current.funnel.pipeline  # type: ignore[attr-defined]
    pipeline.ranker.forward = lambda batch: torch.full((batch.size,), torch.nan)
    answer = ask("/v1/recommend", {"user_id": "u07", "explain": True})
    assert (
        answer.status_code == 200
        and answer.json()["degraded"] is True
        and "null" not in answer.text.split("items")[1][:60]
    )
    assert [i["places"]["match"] for i in answer.json()["items"]] == list(range(1, 11))


def test_a_full_queue_is_429_at_once_and_health_answers(folder: Path) -> None:
    live = Live(folder)
    live.swap(live.load())
    app = create_app(live, Settings(threads=1, queue=2))
    recommend = live.current.recommend
    live.current.recommend = lambda *a, **o: (time.sleep(0.3), recommend(*a, **o))[1]  # type: ignore[method-assign]

    async def crowd() -> tuple[list[httpx.Response], float, int]:
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1") as client:
            asked = [asyncio.create_task(client.post("/v1/recommend", json={"user_id": "u01"})) for _ in range(8)]
            await asyncio.sleep(0.1)
            started = time.perf_counter()
            health = (await client.get("/healthz")).status_code
            return await asyncio.gather(*asked), time.perf_counter() - started, health

    answers, _, health = asyncio.run(crowd())
    refused = [a for a in answers if a.status_code == 429]
    assert len(refused) == 5 and health == 200 and [a.status_code for a in answers].count(200) == 3
    assert all(int(a.headers["retry-after"]) >= 1 for a in refused)


def test_admission_counts_what_a_batch_costs() -> None:
    admission = Admission(threads=1, queue=3)
    admission.check(cost=100)  # it fits an idle server
    admission.inside = 2
    admission.check(cost=2)
    with pytest.raises(Busy, match="come back in 1 s"):
        admission.check(cost=3)
    with pytest.raises(ValueError, match="1 thread or more"):
        Admission(0, 1)
    admission.close()


def test_figures_add_up_to_the_requests(folder: Path) -> None:
    ask = asker(folder)
    sent = 0
    for path, body in (("/v1/recommend", {"user_id": "u01"}), ("/v1/recommend", {"k": 0}), ("/nosuch", None)) * 5:
        ask(path, body)
        sent += 1
    lines = [line for line in ask("/metrics").text.splitlines() if line.startswith("funnelrec_http_requests_total")]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in lines) == sent
    counts = [line for line in ask("/metrics").text.splitlines() if "duration_seconds_count{route" in line]
    assert sum(float(line.rsplit(" ", 1)[1]) for line in counts) == sent + 1  # errors are timed too


def test_no_label_holds_what_a_client_chose(folder: Path) -> None:
    ask = asker(folder)
    ask("/healthz")
    ask("/v1/users/x")
    ask("/nosuch/0")
    ask("/metrics")
    before = len(ask("/metrics").text.splitlines())
    for n in range(50):
        ask(f"/v1/users/{n}")
        ask(f"/nosuch/{n}", verb=f"VERB{n}")
    grown = len(ask("/metrics").text.splitlines()) - before
    assert grown <= 4  # the verb "other" once


def test_timestamps_are_read(folder: Path) -> None:
    ask = asker(folder)
    for good in ("2026-11-20T10:00:00Z", "2026-11-20t10:00:60.123456789z", "2026-11-20T10:00:00+05:30", 1, None):
        assert ask("/v1/events", {"events": [{"user_id": 1, "item_id": 1, "timestamp": good}]}).status_code == 202
    for bad in ("yesterday", "", -1, 2**60, 1.5, "2026-13-01T00:00:00Z"):
        assert ask("/v1/events", {"events": [{"user_id": 1, "item_id": 1, "timestamp": bad}]}).status_code == 400


@pytest.fixture(scope="module")
def contract(ask: Ask) -> Iterator[dict[str, Any]]:
    yield ask("/openapi.json").json()


def test_the_contract_names_every_path_with_its_shapes(contract: dict[str, Any]) -> None:
    from funnelrec.serve.contract import PATHS

    assert set(contract["paths"]) == set(PATHS)
    post = contract["paths"]["/v1/recommend"]["post"]
    assert post["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/RecommendQuestion")
    assert {"200", "400", "401", "413", "415", "422", "429", "503"} <= set(post["responses"])
    assert contract["components"]["schemas"]["RecommendQuestion"]["additionalProperties"] is False
