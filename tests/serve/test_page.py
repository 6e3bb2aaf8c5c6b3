"""The page in a real browser: what a visitor does with it, by pointer and by keys, and what it must never do."""

from __future__ import annotations

import importlib.util
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl
import pytest
import torch
import uvicorn

from funnelrec.data.dataset import Dataset
from funnelrec.data.sources import simulate
from funnelrec.match.comirec_sa import ComiRecSA
from funnelrec.rank.din import DIN
from funnelrec.rerank.diversity import ControllableDiversity
from funnelrec.serve.app import Settings, create_app
from funnelrec.serve.funnel import Funnel
from funnelrec.serve.live import Live
from funnelrec.workflow import item_places

sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright; pip install 'funnelrec[dev]'")
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((path for name in BROWSERS if (path := shutil.which(name))), "")
expect = sync_api.expect
pytestmark = pytest.mark.skipif(not CHROMIUM, reason="no chromium on this machine: apt install chromium")

HOSTILE = "<img src=x onerror=window.hacked=1>"
ROW = "#list > li[data-id]"
TOKEN = "a-token-of-the-test"
PATIENCE = 60_000  #: ms; a machine at full load is no fault of the page


# --------------------------------------------------------------------------------------------------- server, browser
@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small world with pictures, hostile words, and an untrained funnel over it."""
    place = tmp_path_factory.mktemp("page")
    tables = simulate.load(users=80, items=90, events=7000, pictures=True).tables
    assert tables.items is not None
    hostile = pl.col("item") == 5
    items = tables.items.with_columns(
        pl.when(hostile).then(pl.lit(HOSTILE)).otherwise(pl.col("title")).alias("title"),
        pl.when(hostile).then(pl.lit("<b>bold</b>")).otherwise(pl.col("brand")).alias("brand"),
    )
    tables = type(tables)(tables.events, tables.schema, users=tables.users, items=items)
    dataset = Dataset.build(tables, place / "data")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        matcher = ComiRecSA(dataset.spec, embedding_dim=8, num_interests=3, max_len=20)
        torch.nn.init.normal_(matcher.items.weight[2:])
        ranker = DIN(dataset.spec, embedding_dim=4, hidden=(8,), attention_hidden=(8,))
    funnel = Funnel.build(
        dataset,
        matcher=matcher,
        ranker=ranker,
        reranker=ControllableDiversity(diversity=0.01),
        diversity_field="category",
        candidates=60,
        max_len=20,
        metrics={"match": {"ndcg@10": 0.25, "users": 80, "intervals": {"ndcg@10": [0.21, 0.29]}}},
    )
    funnel.item_map = item_places(funnel, dataset)
    return funnel.save(place / "world.funnel")


def _serve(folder: Path, settings: Settings) -> Iterator[str]:
    live = Live(folder)
    live.swap(live.load())
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = uvicorn.Config(create_app(live, settings), port=port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.02)
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join(timeout=20)


@pytest.fixture(scope="module")
def address(folder: Path) -> Iterator[str]:
    yield from _serve(folder, Settings(deadline_ms=PATIENCE))


@pytest.fixture(scope="module")
def guarded(folder: Path) -> Iterator[str]:
    yield from _serve(folder, Settings(token=TOKEN, deadline_ms=PATIENCE))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_api.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, headless=True, args=sandbox)
        expect.set_options(timeout=PATIENCE)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page with what it said and asked for."""

    page: Any
    address: str
    errors: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    questions: int = 0

    def watch(self) -> None:
        self.page.on("console", lambda m: self._said(m.type, m.text))
        self.page.on("pageerror", lambda e: self.errors.append(str(e)))
        self.page.on("request", self._request)

    def _said(self, kind: str, text: str) -> None:
        ours = "willReadFrequently" in text  # the test reads the canvas, the page does not
        if kind in ("error", "warning") and not ours:
            self.errors.append(text)

    def _request(self, request: Any) -> None:
        self.asked.append(request.url)
        self.questions += request.url.endswith("/v1/recommend")

    def strangers(self) -> list[str]:
        return [url for url in self.asked if not url.startswith((self.address + "/", "data:"))]

    def open(self, hash: str = "") -> Visit:
        self.page.goto(f"{self.address}/{hash}")
        self.page.wait_for_selector(ROW)
        self.settle()
        return self

    def settle(self) -> None:
        self.page.wait_for_selector('#list[aria-busy="false"]', state="attached")
        self.page.wait_for_timeout(60)

    def order(self) -> list[str]:
        ids: list[str] = self.page.eval_on_selector_all(ROW, "rows => rows.map(r => r.dataset.id)")
        return ids

    def texts(self, selector: str) -> list[str]:
        found: list[str] = self.page.locator(selector).all_inner_texts()
        return found


@pytest.fixture
def visit(browser: Any, address: str, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A visit with a tidy end: nothing in the console, nothing asked of another host."""
    options = {"viewport": {"width": 1440, "height": 900}, "reduced_motion": "reduce", **getattr(request, "param", {})}
    context = browser.new_context(**options)
    context.set_default_timeout(PATIENCE)
    found = Visit(context.new_page(), address)
    found.watch()
    yield found
    context.close()
    assert not found.errors
    assert not found.strangers()


# ------------------------------------------------------------------------------------------------------------- visits
def test_search_three_items_and_the_list_changes(visit: Visit) -> None:
    page = visit.open().page
    assert page.inner_text("#list-title") == "Popular of late"
    assert "Nothing is known yet" in page.inner_text("#reason")
    popular = visit.order()

    page.fill("#search", "the")
    page.wait_for_selector(".option")
    page.keyboard.press("ArrowDown")
    page.keyboard.press("ArrowDown")
    assert page.get_attribute("#search", "aria-activedescendant") == "option-1"
    chosen = page.inner_text("#option-1 b")
    page.keyboard.press("Enter")
    page.wait_for_selector("#history li")
    assert visit.texts("#history b") == [chosen]
    visit.settle()
    expect(page.locator("#list-title")).to_have_text("Recommendations")

    lists = [visit.order()]
    for _ in range(2):
        count = page.locator("#history li").count()
        page.locator(f"{ROW} .add").nth(1).click()
        expect(page.locator("#history li")).to_have_count(count + 1)
        visit.settle()
        lists.append(visit.order())
    assert len({tuple(ids) for ids in [popular, *lists]}) == 4, "each click brings another list"
    taken = page.eval_on_selector_all("#history li", "rows => rows.map(r => r.dataset.id)")
    assert len(taken) == 3
    assert not set(taken) & set(lists[-1])

    assert page.locator(".interest").count() > 0
    assert sum(int(t.split()[0]) for t in visit.texts(".interest .note")) == 60  # who brought the candidates
    page.locator(f"{ROW} .title").first.click()
    why = page.inner_text(".why")
    assert all(stage in why for stage in ("Match", "Rank", "Rerank", "Place 1"))

    page.locator("#history li").nth(2).hover()
    page.get_by_role("button", name="Newer").nth(2).click()
    visit.settle()
    moved = page.eval_on_selector_all("#history li", "rows => rows.map(r => r.dataset.id)")
    assert moved == [taken[0], taken[2], taken[1]]
    page.get_by_role("button", name="Remove").first.click()
    expect(page.locator("#history li")).to_have_count(2)
    page.click("#clear")
    expect(page.locator("#list-title")).to_have_text("Popular of late")
    visit.settle()
    assert visit.order() == popular


def test_the_slider_reorders_by_key_and_asks_once(visit: Visit) -> None:
    page = visit.open("#user=7").page
    assert page.inner_text("#history-title") == "Person 7"
    page.focus("#diversity")
    page.keyboard.press("Home")
    visit.settle()
    plain = visit.order()
    assert page.inner_text("#diversity-value") == "0.00"
    before = visit.questions
    page.keyboard.press("PageUp")
    visit.settle()
    assert visit.questions == before + 1
    slide = """() => {
      const slider = document.getElementById('diversity');
      for (let i = 1; i <= 12; i += 1) { slider.value = 8 * i; slider.dispatchEvent(new Event('input')); }
    }"""
    page.evaluate(slide)  # as a pointer does that drags it
    visit.settle()
    assert visit.order() != plain
    assert visit.questions == before + 2, "many moves in quick succession are one question"
    assert "diversity=" in page.url
    page.reload()
    page.wait_for_selector(ROW)
    visit.settle()
    assert float(page.inner_text("#diversity-value")) > 0
    page.click("#as-journey")
    assert page.locator("#journey g.way-of").count() == min(20, len(plain))


def _soon(page: Any, script: str, good: Callable[[Any], bool]) -> Any:
    """What a script finds, asked again until it is good; the policy of the page keeps Playwright's own waiting out."""
    for _ in range(100):
        found = page.evaluate(script)
        if good(found):
            break
        page.wait_for_timeout(100)
    return found


def test_the_map_is_drawn_and_walked_by_keys(visit: Visit) -> None:
    page = visit.open("#user=7").page
    drawn = """() => {
      const c = document.getElementById('map'), d = c.getContext('2d').getImageData(0, 0, c.width, c.height).data;
      let seen = 0; const colours = new Set();
      for (let i = 0; i < d.length; i += 4) {
        if (d[i + 3] > 200) { seen += 1; colours.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); }
      }
      return [seen, colours.size];
    }"""
    pixels, colours = _soon(page, drawn, lambda found: found[0] > 1500)
    assert pixels > 1500
    assert colours > 10

    page.focus("#map")
    page.keyboard.press("ArrowRight")
    first = page.inner_text("#tip b")
    for key in ("ArrowLeft", "ArrowUp", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    assert page.inner_text("#tip b")
    assert page.inner_text("#say")
    page.keyboard.press("0")
    count = page.locator("#history li[data-id]").count()
    focused = page.inner_text("#tip b")
    page.keyboard.press("Enter")
    expect(page.locator("#history-note")).to_contain_text("changed")
    assert visit.texts("#history b")[0] == focused
    assert first
    assert page.locator("#history li[data-id]").count() >= min(count, 12)

    box = page.locator("#map").bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    before = page.evaluate(drawn)
    page.mouse.wheel(0, -900)
    assert _soon(page, drawn, lambda found: found != before) != before, "the wheel zooms"


def test_words_of_the_data_stay_words(visit: Visit) -> None:
    page = visit.open("#item=5&item=6").page
    assert HOSTILE in visit.texts("#history b")
    assert "<b>bold</b>" in page.inner_text("#history")
    page.fill("#search", "onerror")
    page.wait_for_selector(".option")
    assert visit.texts(".option b") == [HOSTILE]
    assert page.evaluate("window.hacked") is None
    assert page.locator("img:not(.picture)").count() == 0


def test_every_control_is_reached_and_shows_it(visit: Visit) -> None:
    page = visit.open("#user=7").page
    look = """() => {
      const e = document.activeElement, s = getComputedStyle(e);
      const name = e.id || e.dataset.part || e.className || e.tagName;
      const ring = s.outlineStyle !== 'none' && parseFloat(s.outlineWidth) >= 1;
      return [name, ring || e.classList.contains('skip')];
    }"""
    seen: dict[str, bool] = {}
    for _ in range(120):
        page.keyboard.press("Tab")
        name, ring = page.evaluate(look)
        seen[name] = seen.get(name, True) and ring
        if name == "BODY":
            break
    wanted = {"skip", "open-card", "theme", "search", "clear", "act", "as-list", "as-journey", "diversity"}
    wanted |= {"title", "add", "colour", "map", "zoom-in", "zoom-out", "zoom-list", "zoom-fit"}
    assert wanted <= set(seen)
    assert [name for name, ring in seen.items() if not ring and name != "BODY"] == []

    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    page.focus("#open-card")
    page.keyboard.press("Enter")
    card = page.inner_text("#card")
    for words in ("comirec_sa", "0.2500", "0.2100–0.2900", "fingerprint", "SHA-256"):
        assert words in card
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "open-card"


@pytest.mark.parametrize("visit", [{"viewport": {"width": 360, "height": 740}}], indirect=True)
def test_a_phone_has_no_sideways_scrolling(visit: Visit) -> None:
    page = visit.open("#user=7").page
    page.locator(f"{ROW} .title").first.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    page.click("#theme")
    assert page.get_attribute("html", "data-theme") == "light"
    page.click("#theme")
    assert page.evaluate("getComputedStyle(document.documentElement).backgroundColor") == "rgb(19, 20, 24)"


# ------------------------------------------------------------------------------------------------ what goes wrong
def _problem(status: int, title: str, detail: str, **headers: str) -> dict[str, Any]:
    return {
        "status": status,
        "json": {"type": "about:blank", "title": title, "status": status, "detail": detail},
        "headers": {"content-type": "application/problem+json", **headers},
    }


def test_problems_are_told_and_mended(browser: Any, address: str) -> None:
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE)
    ways: list[dict[str, Any] | None] = [_problem(500, "Internal Server Error", "request 12 met a bug")]
    page.route("**/v1/recommend", lambda route: route.fulfill(**ways[0]) if ways and ways[0] else route.continue_())
    page.goto(address)
    page.wait_for_selector("#notice:not([hidden])")
    assert "request 12 met a bug" in page.inner_text("#notice")
    assert "Nothing to show yet" in page.inner_text("#list")

    ways[0] = _problem(429, "Too Many Requests", "the queue is full", **{"retry-after": "1"})
    page.click("#notice button")
    expect(page.locator("#notice")).to_contain_text("Trying again in 1 s")
    ways[0] = None
    page.wait_for_selector(ROW)  # by itself, after the second
    assert page.is_hidden("#notice")

    page.unroute("**/v1/recommend")
    page.route("**/v1/recommend", lambda route: route.abort())
    page.locator(f"{ROW} .add").first.click()
    page.wait_for_selector("#notice:not([hidden])")
    assert "The server cannot be reached" in page.inner_text("#notice")
    assert page.locator(ROW).count() > 0, "the last list stays"

    page.unroute("**/v1/recommend")
    degraded = page.request.post(f"{address}/v1/recommend", data={"user_id": "7", "explain": True}).json()
    page.route("**/v1/recommend", lambda route: route.fulfill(json={**degraded, "degraded": True}))
    page.click("#notice button")
    page.wait_for_selector("#reason.degraded")
    assert "no time to rank" in page.inner_text("#reason")
    page.context.close()


def test_a_token_is_asked_for(browser: Any, guarded: str) -> None:
    page = browser.new_context().new_page()
    page.set_default_timeout(PATIENCE)
    page.goto(guarded)
    page.fill("#token", TOKEN)
    page.keyboard.press("Enter")
    page.wait_for_selector(ROW)
    expect(page.locator("#list img").first).to_have_js_property("naturalWidth", 32)
    assert page.is_hidden("#notice")
    assert TOKEN not in page.url
    page.context.close()


def test_a_funnel_without_map_pictures_and_knob(browser: Any, folder: Path, tmp_path: Path) -> None:
    rich = Funnel.load(folder)
    plain = Funnel(rich.store, matcher=rich.matcher, fallback=rich.fallback, candidates=60, max_len=20)
    server = _serve(plain.save(tmp_path / "plain.funnel"), Settings(deadline_ms=PATIENCE))
    visit = Visit(browser.new_context().new_page(), next(server))
    visit.watch()
    page = visit.open("#user=7").page
    assert "No map in this funnel" in page.inner_text("#map-box")
    assert page.is_hidden("#knob")
    page.locator(f"{ROW} .title").first.click()
    assert "Place 1" in page.inner_text(".why")
    page.context.close()
    assert not visit.errors
    next(server, None)


# -------------------------------------------------------------------------------------------------------- accessibility
def _axe(page: Any) -> list[str]:
    """Serious findings of axe-core: "rule: where"."""
    found = importlib.util.find_spec("axe_playwright_python")
    if found is None or found.origin is None:
        pytest.skip("no axe-core here: pip install axe-playwright-python")
    page.evaluate(Path(found.origin).with_name("axe.min.js").read_text("utf-8"))
    result = page.evaluate("axe.run(document, {resultTypes: ['violations']})")
    return [
        f"{v['id']}: {node['target']} {node.get('failureSummary', '')}"
        for v in result["violations"]
        if v["impact"] in ("serious", "critical")
        for node in v["nodes"]
    ]


@pytest.mark.parametrize(
    "visit",
    [
        {"color_scheme": "light"},
        {"color_scheme": "dark"},
        {"color_scheme": "light", "viewport": {"width": 390, "height": 844}},
    ],
    ids=["light", "dark", "phone"],
    indirect=True,
)
def test_axe_finds_nothing_serious(visit: Visit) -> None:
    page = visit.open().page
    assert _axe(page) == []
    page.goto(f"{visit.address}/#user=7")
    page.reload()
    page.wait_for_selector(ROW)
    visit.settle()
    page.locator(f"{ROW} .title").first.click()
    page.fill("#search", "the")
    page.wait_for_selector(".option")
    assert _axe(page) == []
    page.keyboard.press("Escape")
    page.click("#as-journey")
    assert _axe(page) == []
    page.click("#open-card")
    assert _axe(page) == []


def test_the_checks_can_fail(browser: Any, address: str) -> None:
    """Planted faults: a script in the page, a call elsewhere, a control without a name."""
    visit = Visit(browser.new_context().new_page(), address)
    visit.watch()
    page = visit.open().page
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button id=bare></button>')")
    page.evaluate("document.getElementById('bare').setAttribute('onclick', 'window.ran = 1')")
    page.evaluate("document.getElementById('bare').click()")
    assert page.evaluate("window.ran") is None, "the policy forbids scripts inside the page"
    assert any("Content Security Policy" in text for text in visit.errors)
    page.evaluate("fetch('http://127.0.0.1:9/').catch(() => 0)")
    page.evaluate("location.href = 'http://127.0.0.1:9/elsewhere'")
    page.wait_for_timeout(200)
    assert visit.strangers()
    page = visit.open().page
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<button id=bare></button>')")
    assert any(finding.startswith("button-name") for finding in _axe(page))
    page.context.close()
