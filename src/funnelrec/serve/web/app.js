// The page: one state, one question to POST /v1/recommend, and what it answered. No framework; text goes in as text.
import { ItemMap } from "./map.js";

const SHOWN = matchMedia("(max-width: 619px)").matches ? 10 : 20; // items of the list at first
const MOST = 100;
const HISTORY_SHOWN = matchMedia("(max-width: 859px)").matches ? 5 : 12;
const SVG = "http://www.w3.org/2000/svg";
const $ = (id) => document.getElementById(id);
const number = new Intl.NumberFormat("en");
const letter = (interest) => String.fromCharCode(65 + interest);
const calm = matchMedia("(prefers-reduced-motion: reduce)");

const state = {
  user: null, // user id; its stored history is asked for unless `history` was changed
  history: [], // item ids, newest last
  changed: false,
  diversity: null, // null: as the funnel was fitted
  k: SHOWN,
  answer: null,
  open: new Set(), // item ids whose "why" is open
  only: null, // the interest that is shown alone
  journey: false,
  all: false, // the whole history is shown
};
const items = new Map(); // item id -> {item_id, title, attributes, picture}: whatever was seen of it
let card = null;
let map = null;
let places = null; // item id -> index on the map
let mapped = []; // index -> item id
let token = null;

// ------------------------------------------------------------------------------------------------------ elements
/** An element; strings among the children become text nodes, so no word of the data is ever read as markup. */
function h(tag, attributes = {}, ...children) {
  const svg = SVG_TAGS.has(tag);
  const element = svg ? document.createElementNS(SVG, tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat(Infinity).filter((c) => c !== null && c !== undefined && c !== false));
  return element;
}
const SVG_TAGS = new Set(["svg", "path", "polyline", "circle", "line", "text", "g", "rect"]);
const strokes = (...paths) => h("svg", { viewBox: "0 0 24 24", "aria-hidden": "true" }, ...paths.map((d) => h("path", { d })));
const ICONS = {
  auto: () => strokes("M12 3a9 9 0 1 0 0 18Z", "M12 3a9 9 0 0 1 0 18"),
  light: () => strokes("M12 8a4 4 0 1 0 0 8 4 4 0 0 0 0-8Z", "M12 2v2M12 20v2M2 12h2M20 12h2M5 5l1.4 1.4M17.6 17.6 19 19M5 19l1.4-1.4M17.6 6.4 19 5"),
  dark: () => strokes("M20 14.5A8.5 8.5 0 0 1 9.5 4a8.5 8.5 0 1 0 10.5 10.5Z"),
  up: () => strokes("M12 19V6M6 11l6-6 6 6"),
  down: () => strokes("M12 5v13M6 13l6 6 6-6"),
  remove: () => strokes("M6 6l12 12M18 6 6 18"),
};

const many = (count, one) => `${number.format(count)} ${one}${count === 1 ? "" : "s"}`;
const nameOf = (item) => item.title ?? `Item ${item.item_id}`;
const known = (item) => { items.set(item.item_id, { ...items.get(item.item_id), ...item }); return items.get(item.item_id); };
const say = (words) => { $("say").textContent = words; };
const plain = (value) => Array.isArray(value) ? value.join(", ") : typeof value === "number" ? String(Math.round(value * 1000) / 1000) : String(value);

/** The categorical attributes on one line: "sport · ball · brand-12". */
function facts(item) {
  const fields = (card?.fields ?? []).filter((f) => f.side === "item" && f.kind === "category").map((f) => f.name);
  const values = (item.attributes ? fields.map((f) => item.attributes[f]) : []).filter((v) => v !== null && v !== undefined && String(v) !== "");
  return values.map(plain).join(" · ");
}

const pictures = new Map(); // item id -> data address, where a token keeps <img> from asking by itself

function pictureOf(item) {
  if (!item.picture) return null;
  const path = `/v1/items/${encodeURIComponent(item.item_id)}/picture`;
  const image = h("img", { class: "picture", src: token ? pictures.get(item.item_id) : path, alt: "", width: 40, height: 40, loading: "lazy" });
  if (token && !pictures.has(item.item_id)) fetchPicture(item.item_id, path, image);
  return image;
}

async function fetchPicture(id, path, image) {
  const answer = await fetch(path, { headers: { Authorization: `Bearer ${token}` } }).catch(() => null);
  if (!answer?.ok) return;
  const reader = new FileReader();
  reader.addEventListener("load", () => { pictures.set(id, reader.result); image.src = reader.result; });
  reader.readAsDataURL(await answer.blob());
}
const named = (item) => h("span", { class: "named" }, h("b", {}, nameOf(item)), h("span", {}, facts(item)));
const badge = (interest) => { const b = h("span", { class: "number", title: `interest ${letter(interest)}` }, letter(interest)); b.style.background = `var(--i${interest % 8})`; return b; };

// ---------------------------------------------------------------------------------------------------------- HTTP
class Problem extends Error {
  constructor(status, title, detail, wait) { super(detail || title); Object.assign(this, { status, title, wait }); }
}

async function ask(path, { body = null, signal = null } = {}) {
  const headers = { Accept: "application/json" };
  if (body) headers["Content-Type"] = "application/json";
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body), signal });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Problem(0, "No answer", "The server cannot be reached. Is it still running?", null);
  }
  if (answer.ok) return answer.json();
  const wait = Number(answer.headers.get("Retry-After")) || null;
  const told = await answer.json().catch(() => ({}));
  throw new Problem(answer.status, told.title ?? answer.statusText, told.detail ?? "", wait);
}

/** One line about what went wrong, with a way on: again, later by itself, or with a token. */
function complain(problem, again) {
  const notice = $("notice");
  clearTimeout(complain.timer);
  notice.hidden = false;
  if (problem.status === 401) {
    const field = h("input", { type: "password", id: "token", autocomplete: "off" });
    const enter = () => { token = field.value.trim(); again(); };
    field.addEventListener("keydown", (event) => event.key === "Enter" && enter());
    notice.replaceChildren(h("label", { for: "token" }, "This server asks for a token"), field, h("button", { type: "button", onclick: enter }, "Go on"));
    field.focus();
    return;
  }
  const parts = [h("strong", {}, problem.title), h("span", {}, problem.message === problem.title ? "" : problem.message)];
  if (problem.wait) {
    parts.push(h("span", {}, `Trying again in ${problem.wait} s.`));
    complain.timer = setTimeout(again, problem.wait * 1000);
  }
  notice.replaceChildren(...parts, h("button", { type: "button", class: "small", onclick: again }, "Try again"));
}
const content = () => { clearTimeout(complain.timer); $("notice").hidden = true; };

// ---------------------------------------------------------------------------------------------------- the question
let running = null;
let told = ""; // what was done, to be read out together with what came of it
let spinner = 0;

function question() {
  const body = { k: state.k, explain: true };
  if (state.user !== null) body.user_id = state.user;
  if (state.user === null || state.changed) body.history = state.history;
  if (state.diversity !== null && card?.diversity) body.diversity = state.diversity;
  return body;
}

async function refresh() {
  running?.abort();
  const mine = new AbortController();
  running = mine;
  clearTimeout(spinner);
  spinner = setTimeout(() => { $("progress").hidden = false; }, 150);
  $("list").setAttribute("aria-busy", "true");
  remember();
  try {
    const answer = await ask("/v1/recommend", { body: question(), signal: mine.signal });
    if (running !== mine) return;
    content();
    answer.items.forEach(known);
    (answer.interests ?? []).forEach((i) => i.items.forEach(known));
    state.answer = answer;
    if (state.only !== null && !(answer.interests ?? []).some((i) => i.interest === state.only)) state.only = null;
    setRange(answer);
    showAnswer();
    say([told, answer.items.length ? `first of the list: ${nameOf(answer.items[0])}` : "no item is left"].filter(Boolean).join("; "));
    told = "";
  } catch (error) {
    if (error.name === "AbortError" || running !== mine) return;
    if (!(error instanceof Problem)) throw error;
    if (!state.answer) blank("Nothing to show yet", "As soon as the server answers, the list appears here.");
    complain(error, state.answer || card ? refresh : start);
  } finally {
    if (running === mine) {
      clearTimeout(spinner);
      $("progress").hidden = true;
      $("list").setAttribute("aria-busy", "false");
    }
  }
}

/** The question in the address, so that a page can be sent to somebody. */
function remember() {
  const words = new URLSearchParams();
  if (state.user !== null) words.set("user", state.user);
  if (state.user === null || state.changed) state.history.forEach((id) => words.append("item", id));
  if (state.diversity !== null) words.set("diversity", state.diversity);
  const text = words.toString();
  history.replaceState(null, "", text ? `#${text}` : location.pathname);
}

async function recall() {
  const words = new URLSearchParams(location.hash.slice(1));
  const ids = words.getAll("item");
  if (words.has("diversity") && Number.isFinite(Number(words.get("diversity")))) state.diversity = Number(words.get("diversity"));
  if (words.has("user")) await choose(words.get("user"), { quiet: true });
  if (ids.length) {
    state.history = ids;
    state.changed = state.user !== null;
    const found = await ask(`/v1/items?ids=${ids.slice(-50).map(encodeURIComponent).join(",")}`);
    found.items.forEach(known);
  }
}

// ------------------------------------------------------------------------------------------------------- for whom
async function choose(user, { quiet = false } = {}) {
  try {
    const found = await ask(`/v1/users/${encodeURIComponent(user)}`);
    found.history.forEach(known);
    Object.assign(state, { user, history: found.history.map((i) => i.item_id), length: found.history_length, changed: false });
  } catch (error) {
    if (!(error instanceof Problem) || error.status !== 404) throw error;
    Object.assign(state, { user, history: [], length: 0, changed: false });
  }
  Object.assign(state, { all: false, only: null, k: SHOWN });
  state.open.clear();
  showHistory();
  if (!quiet) { told = `history of person ${user}, ${state.history.length} items`; await refresh(); }
}

function change(history, words) {
  state.history = history;
  state.changed = true;
  state.only = null;
  showHistory();
  told = words;
  return refresh();
}
const add = (id) => change([...state.history.filter((i) => i !== id), id], `${nameOf(items.get(id) ?? { item_id: id })} added to the history`);

function clear() {
  Object.assign(state, { user: null, history: [], changed: false, k: SHOWN, all: false, only: null });
  state.open.clear();
  showHistory();
  $("search").focus();
  return refresh();
}

function shift(from, to) {
  if (to < 0 || to >= state.history.length) return;
  const moved = [...state.history];
  moved.splice(to, 0, ...moved.splice(from, 1));
  change(moved, `${nameOf(items.get(moved[to]) ?? { item_id: moved[to] })} moved`);
}

function showHistory() {
  const count = state.history.length;
  $("history-title").textContent = state.user === null ? "History" : `Person ${state.user}`;
  const stored = state.user !== null && !state.changed;
  $("history-note").textContent = stored && state.length > count ? `${count} of ${number.format(state.length)} items`
    : count ? `${many(count, "item")}${state.user !== null && state.changed ? ", changed" : ""}` : "";
  $("clear").hidden = count === 0 && state.user === null;
  const shown = [...state.history.entries()].reverse().slice(0, state.all ? undefined : HISTORY_SHOWN);
  $("history").replaceChildren(...shown.map(([index, id]) => historyRow(index, items.get(id) ?? { item_id: id })));
  const more = count - shown.length;
  if (more > 0) $("history").append(h("li", { class: "more" }, h("button", { type: "button", class: "quiet small", onclick: () => { state.all = true; showHistory(); } }, `Show ${number.format(more)} older`)));
  showStart();
}

function historyRow(index, item) {
  const name = nameOf(item);
  const act = (icon, words, run, off = false) => h("button", { type: "button", class: "act", "aria-label": `${words}: ${name}`, title: words, disabled: off, onclick: run }, ICONS[icon]());
  const keep = (what) => () => { what(); refocus(item.item_id); };
  const row = h("li", { draggable: "true", "data-id": item.item_id }, pictureOf(item), named(item),
    h("span", { class: "acts" },
      act("up", "Newer", keep(() => shift(index, index + 1)), index === state.history.length - 1),
      act("down", "Older", keep(() => shift(index, index - 1)), index === 0),
      act("remove", "Remove", () => { change(state.history.filter((_, i) => i !== index), `${name} removed`); ($("history").querySelector("button") ?? $("search")).focus(); })));
  row.addEventListener("dragstart", (event) => { event.dataTransfer.setData("text/plain", String(index)); event.dataTransfer.effectAllowed = "move"; });
  row.addEventListener("dragover", (event) => { event.preventDefault(); row.classList.add("over"); });
  row.addEventListener("dragleave", () => row.classList.remove("over"));
  row.addEventListener("drop", (event) => { event.preventDefault(); row.classList.remove("over"); const from = Number(event.dataTransfer.getData("text/plain")); if (Number.isInteger(from) && from !== index) shift(from, index); });
  hover(row, item.item_id);
  return row;
}

function refocus(id) {
  const row = [...$("history").children].find((r) => r.dataset.id === id);
  row?.querySelector(".act:not(:disabled)")?.focus();
}

function showStart() {
  const box = $("start");
  if (state.history.length || state.user !== null) { box.replaceChildren(); return; }
  box.replaceChildren(h("p", {}, "Search above, click items on the list or the map, or look at the list of somebody:"),
    h("div", { class: "people" }, (showStart.people ?? []).map((p) => h("button", { type: "button", class: "chip", onclick: () => act(() => choose(p.user_id)) }, `Person ${p.user_id}`))));
}

/** Run something that asks the server; what goes wrong stands in the notice. */
async function act(run) {
  try { content(); await run(); } catch (error) { if (error instanceof Problem) complain(error, () => act(run)); else if (error.name !== "AbortError") throw error; }
}

// --------------------------------------------------------------------------------------------------------- search
const search = { options: [], at: -1, asked: 0, timer: 0 };

async function look() {
  const query = $("search").value.trim();
  const mine = ++search.asked;
  if (!query) { closeResults(); return; }
  await act(async () => {
    const words = encodeURIComponent(query);
    const [things, people] = await Promise.all([ask(`/v1/items?query=${words}&limit=8`), ask(`/v1/users?query=${words}&limit=4`)]);
    if (mine !== search.asked || document.activeElement !== $("search")) return;
    things.items.forEach(known);
    showResults(query, things.items, people.users);
  });
}

function showResults(query, things, people) {
  search.at = -1;
  search.options = [];
  const group = (title, rows) => rows.length ? h("div", { role: "group", "aria-label": title }, h("div", { class: "group", "aria-hidden": "true" }, title), ...rows) : null;
  const option = (run, ...inside) => {
    const row = h("div", { class: "option", role: "option", id: `option-${search.options.length}`, "aria-selected": "false" }, ...inside);
    row.addEventListener("pointerdown", (event) => event.preventDefault()); // the field keeps the focus
    row.addEventListener("click", run);
    search.options.push({ row, run });
    return row;
  };
  const itemRows = things.map((item) => option(() => { act(() => add(item.item_id)); $("search").select(); closeResults(); }, pictureOf(item), named(item), h("span", { class: "side", "aria-hidden": "true" }, state.history.includes(item.item_id) ? "in the history" : "+")));
  const userRows = people.map((p) => option(() => { $("search").value = ""; closeResults(); act(() => choose(p.user_id)); }, h("span", { class: "named" }, h("b", {}, `Person ${p.user_id}`)), h("span", { class: "side" }, many(p.history_length, "item"))));
  const found = [group("Items", itemRows), group("People", userRows)].filter(Boolean);
  $("results").replaceChildren(...(found.length ? found : [h("div", { class: "empty", role: "option", "aria-disabled": "true", "aria-selected": "false" }, `Nothing is called “${query}”. Try a part of a title, or an id.`)]));
  $("results").hidden = false;
  $("search").setAttribute("aria-expanded", "true");
  say(found.length ? `${many(things.length, "item")} and ${people.length} people found` : "nothing found");
}

function closeResults() {
  $("results").hidden = true;
  $("search").setAttribute("aria-expanded", "false");
  $("search").removeAttribute("aria-activedescendant");
  search.at = -1;
}

function selectOption(at) {
  search.options.forEach(({ row }, i) => row.setAttribute("aria-selected", String(i === at)));
  search.at = at;
  search.options[at].row.scrollIntoView({ block: "nearest" });
  $("search").setAttribute("aria-activedescendant", search.options[at].row.id);
}

function listenToSearch() {
  const field = $("search");
  field.addEventListener("input", () => { clearTimeout(search.timer); search.timer = setTimeout(look, 140); });
  field.addEventListener("focus", () => { if (field.value.trim()) look(); });
  field.addEventListener("blur", closeResults);
  field.addEventListener("keydown", (event) => {
    const count = $("results").hidden ? 0 : search.options.length;
    if (event.key === "ArrowDown" && count) selectOption((search.at + 1) % count);
    else if (event.key === "ArrowUp" && count) selectOption((search.at - 1 + count) % count);
    else if (event.key === "Enter" && count) search.options[Math.max(0, search.at)].run();
    else if (event.key === "Escape" && !$("results").hidden) closeResults();
    else return;
    event.preventDefault();
  });
}

// ------------------------------------------------------------------------------------------------------- diversity
const knob = { most: 1, set: false };

/** The slider goes from 0 to what surely reorders: a few times the spread of the first list's scores. */
function setRange(answer) {
  if (!card?.diversity || knob.set || answer.fallback || !answer.items.length) return;
  const scores = answer.items.map((i) => i.score);
  const spread = Math.max(...scores) - Math.min(...scores);
  knob.most = Math.max(5 * card.diversity.default, 4 * spread, state.diversity ?? 0) || 1;
  knob.set = true;
  const now = state.diversity ?? card.diversity.default;
  $("diversity").value = Math.round(100 * Math.sqrt(now / knob.most));
  showKnob(now);
}

function showKnob(value) {
  const text = value >= 10 ? value.toFixed(0) : value.toFixed(3).replace(/0$/, "");
  $("diversity-value").textContent = text;
  $("diversity").setAttribute("aria-valuetext", `${text}${value === 0 ? ", the plain order of the scores" : ""}`);
}

function listenToKnob() {
  let timer = 0;
  $("diversity").addEventListener("input", () => {
    const share = Number($("diversity").value) / 100;
    state.diversity = Number((knob.most * share * share).toPrecision(3)); // finer where small values matter
    showKnob(state.diversity);
    $("list").setAttribute("aria-busy", "true");
    clearTimeout(timer);
    timer = setTimeout(refresh, 110);
  });
}

// -------------------------------------------------------------------------------------------------------- the answer
function showAnswer() {
  const { answer } = state;
  const t = answer.timing_ms ?? {};
  $("list-title").textContent = answer.fallback ? "Popular of late" : "Recommendations";
  $("timing").textContent = t.total === undefined ? "" : `in ${t.total < 10 ? t.total.toFixed(1) : Math.round(t.total)} ms`;
  $("timing").title = Object.entries(t).map(([stage, ms]) => `${stage} ${ms} ms`).join(" · ");
  $("knob").hidden = !card?.diversity || Boolean(answer.fallback);
  showReason(answer);
  const explained = !answer.fallback && answer.items.some((i) => i.places);
  document.querySelector(".switch").hidden = !explained;
  const journey = state.journey && explained;
  $("journey").hidden = !journey;
  $("list").hidden = journey;
  if (journey) showJourney(answer); else showList(answer);
  showInterests(answer);
  showMarks(answer);
}

const REASONS = {
  "unknown user": "Nobody of that name is known, so these are the items that were popular of late.",
  "empty history": "Nothing is known yet, so these are the items that were popular of late. Click + on some that you like.",
  "unknown items": "None of these items was known when the funnel was fitted, so these are the items that were popular of late.",
};

function showReason(answer) {
  const line = $("reason");
  const alone = (answer.interests ?? []).find((i) => i.interest === state.only);
  line.hidden = !answer.fallback && !answer.degraded && !alone;
  line.classList.toggle("degraded", Boolean(answer.degraded));
  if (alone && !answer.degraded) {
    const count = answer.items.filter((i) => i.interest === state.only).length;
    line.replaceChildren(badge(state.only), ` Interest ${letter(state.only)} has ${count} of these ${answer.items.length} items; it brought ${many(alone.candidates, "candidate")} to be ranked. `,
      h("button", { type: "button", class: "small", onclick: () => { state.only = null; showAnswer(); } }, "Show all"));
    return;
  }
  line.textContent = answer.degraded ? "There was no time to rank, so this is the order of retrieval. The next answer may be better." : REASONS[answer.fallback] ?? `Popular items: ${answer.fallback}.`;
}

function blank(title, words) {
  $("list").hidden = false;
  $("journey").hidden = true;
  $("list").replaceChildren(h("li", { class: "blank" }, h("b", {}, title), words));
}

/** The rows glide from their old places to the new ones. */
function showList(answer) {
  const list = $("list");
  const before = new Map([...list.children].filter((r) => r.dataset.id).map((r) => [r.dataset.id, r.getBoundingClientRect().top]));
  const held = document.activeElement?.closest?.("#list > li[data-id]");
  const focus = held && [held.dataset.id, document.activeElement.dataset.part];
  if (!answer.items.length) { blank("No item is left", "Everything that qualifies is in the history already."); return; }
  list.replaceChildren(...answer.items.map((item, place) => row(item, place, answer)));
  if (answer.items.length >= state.k && state.k < MOST) list.append(h("li", { class: "more" }, h("button", { type: "button", class: "quiet", onclick: () => { state.k = Math.min(MOST, state.k * 2); refresh(); } }, "Show more")));
  if (focus) list.querySelector(`li[data-id="${CSS.escape(focus[0])}"] [data-part="${focus[1]}"]`)?.focus();
  if (calm.matches) return;
  for (const element of list.children) {
    const old = before.get(element.dataset.id);
    const now = element.getBoundingClientRect().top;
    if (old === undefined && before.size) element.animate([{ opacity: 0 }, { opacity: 1 }], { duration: 260, easing: "ease-out" });
    else if (old !== undefined && Math.abs(old - now) > 1) element.animate([{ transform: `translateY(${old - now}px)` }, { transform: "none" }], { duration: 320, easing: "cubic-bezier(.2,.8,.2,1)" });
  }
}

function row(item, place, answer) {
  const id = item.item_id;
  const open = state.open.has(id);
  const picture = pictureOf(item);
  const inside = h("div", { class: picture ? "row" : "row bare" },
    h("span", { class: "place" }, String(place + 1)), picture,
    h("span", { class: "named" },
      h("button", { type: "button", class: "title", "data-part": "title", "aria-expanded": String(open), onclick: () => { if (open) state.open.delete(id); else state.open.add(id); showList(state.answer); } }, nameOf(item)),
      h("span", { class: "facts" }, item.interest === null || item.interest === undefined ? null : badge(item.interest), facts(item))),
    answer.fallback || !item.places ? h("span") : way(item),
    h("button", { type: "button", class: "add", "data-part": "add", "aria-label": `Add to the history: ${nameOf(item)}`, title: "Add to the history", onclick: () => act(() => add(id)) }, "+"));
  const element = h("li", { "data-id": id, class: state.only !== null && item.interest !== state.only ? "dim" : "" }, inside, open ? why(item, answer) : null);
  hover(element, id);
  return element;
}

/** Three places on a line: as match, rank and rerank had it. */
function way(item) {
  const { match, rank, final } = item.places;
  const stops = [match, rank, final].map((p) => p ?? null);
  const most = Math.log(Math.max(50, card?.candidates ?? 500));
  const y = (p) => 4 + 22 * Math.min(1, Math.log(p) / most);
  const points = stops.map((p, i) => p === null ? null : [5 + 25 * i, y(p)]).filter(Boolean);
  const moved = match - final;
  const words = `Place ${match} after match, ${rank ?? "–"} after rank, ${final} in the end`;
  return h("span", { class: "way", title: words },
    h("svg", { viewBox: "0 0 60 30", role: "img", "aria-label": words }, h("polyline", { points: points.map((p) => p.join(",")).join(" ") }), points.map(([cx, cy], i) => h("circle", { cx, cy, r: i === points.length - 1 ? 4 : 2.6 }))),
    h("span", { class: `moved ${moved > 0 ? "up" : moved < 0 ? "down" : ""}`, "aria-hidden": "true" }, moved > 0 ? `▲ ${moved}` : moved < 0 ? `▼ ${-moved}` : "="));
}

function why(item, answer) {
  const { places: p, scores: s } = item;
  const parts = [];
  if (p && !answer.fallback) {
    const step = (from, to) => from === to ? "kept its place" : from > to ? `moved up ${from - to}` : `moved down ${to - from}`;
    parts.push(h("ol", {},
      h("li", {}, h("h3", {}, "Match"), h("p", { class: "big" }, `Place ${p.match}`), h("p", {}, item.interest === null || item.interest === undefined ? "found in the whole catalogue" : h("span", {}, "closest to interest ", badge(item.interest)), s?.match === null || s?.match === undefined ? "" : `, score ${s.match.toFixed(2)}`)),
      s?.rank === null || s?.rank === undefined ? null : h("li", {}, h("h3", {}, "Rank"), h("p", { class: "big" }, `Place ${p.rank}`), h("p", {}, `${step(p.match, p.rank)}; ${item.probability === null || item.probability === undefined ? `logit ${s.rank.toFixed(2)}` : `${(100 * item.probability).toFixed(1)} % chance of a click`}`)),
      h("li", {}, h("h3", {}, "Rerank"), h("p", { class: "big" }, `Place ${p.final}`), h("p", {}, reranked(item, answer, step)))));
  }
  const attributes = Object.entries(item.attributes ?? {}).filter(([, v]) => v !== null && String(v) !== "");
  if (attributes.length) parts.push(h("dl", {}, attributes.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, plain(value))))));
  parts.push(like(item.item_id));
  return h("div", { class: "why" }, parts);
}

const likes = new Map(); // item id -> what is like it; [] where the matcher knows no such thing

/** Items like an item, asked for when somebody wants to know; a click takes one into the history. */
function like(id) {
  const box = h("div", { class: "like" });
  const fill = (found) => found.length && box.replaceChildren(h("span", { class: "note" }, "Like it"),
    ...found.map((other) => { const chip = h("button", { type: "button", class: "chip", "aria-label": `Add to the history: ${nameOf(other)}`, onclick: () => act(() => add(other.item_id)) }, nameOf(other)); hover(chip, other.item_id); return chip; }));
  if (likes.has(id)) fill(likes.get(id));
  else {
    ask("/v1/similar", { body: { item_id: id, k: 4 } }).then((found) => { found.items.forEach(known); likes.set(id, found.items); fill(found.items); })
      .catch((error) => { if (!(error instanceof Problem)) throw error; if (error.status === 422) likes.set(id, []); });
  }
  return box;
}

/** What re-ranking did to an item, in the reranker's own terms: how much it lost to what stands above it. */
function reranked(item, answer, step) {
  const { rank, final } = item.places;
  const field = card?.diversity?.field;
  const value = state.diversity ?? card?.diversity?.default;
  if (!value) return step(rank, final);
  const own = field === null || field === undefined ? [] : [item.attributes?.[field]].flat().filter((v) => v !== null && v !== undefined);
  const above = answer.items.slice(0, final - 1).filter((other) => [other.attributes?.[field]].flat().some((v) => own.includes(v)));
  const like = above.length === 0 ? `first of ${own.join(", ")}` : `${above.length} above it ${above.length === 1 ? "is" : "are"} ${own.join(", ")} too`;
  return own.length ? `${step(rank, final)}; ${like}` : step(rank, final);
}

// --------------------------------------------------------------------------------------------------------- journey
/** Rungs for the places of the list; below them one for each place, in order, that an item of it came from. */
function showJourney(answer) {
  const rows = answer.items.slice(0, 20);
  const width = Math.max(430, $("journey").clientWidth);
  const columns = [46, 46 + 0.22 * width, 46 + 0.44 * width];
  const top = 46, gap = 26;
  const stopsOf = ({ places: p }) => [p.match, p.rank ?? p.match, p.final];
  const below = [...new Set(rows.flatMap(stopsOf))].filter((p) => p > rows.length).sort((a, b) => a - b);
  const end = top + gap * (rows.length - 1);
  const y = (place) => place <= rows.length ? top + gap * (place - 1) : end + 36 + 16 * below.indexOf(place);
  const height = below.length ? end + 36 + 16 * below.length : end + 20;
  const letters = Math.floor((width - columns[2] - 48) / 7.2);
  const bend = (columns[1] - columns[0]) / 2;
  const ways = rows.map((item) => {
    const stops = stopsOf(item);
    const [a, b, c] = stops.map(y);
    const ink = item.interest === null || item.interest === undefined ? "var(--accent)" : `var(--i${item.interest % 8})`;
    const line = h("path", { class: "line", d: `M${columns[0]} ${a}C${columns[0] + bend} ${a} ${columns[1] - bend} ${b} ${columns[1]} ${b}C${columns[1] + bend} ${b} ${columns[2] - bend} ${c} ${columns[2]} ${c}` });
    line.style.stroke = ink;
    const dots = columns.map((x, i) => { const dot = h("circle", { cx: x, cy: [a, b, c][i], r: 4.5 }); dot.style.fill = ink; return dot; });
    const name = nameOf(item);
    const group = h("g", { class: "way-of", "data-id": item.item_id }, line, dots,
      h("text", { class: "soft small", x: columns[0] - 11, y: a + 4, "text-anchor": "end" }, String(stops[0])),
      h("text", { class: "strong", x: columns[2] + 30, y: c + 4.5, "text-anchor": "end" }, String(stops[2])),
      h("text", { x: columns[2] + 40, y: c + 4.5 }, name.length > letters ? `${name.slice(0, letters - 1)}…` : name));
    hover(group, item.item_id);
    return group;
  });
  const words = `The way of ${rows.length} items from match through rank to rerank; the list view tells the same in words.`;
  $("journey").replaceChildren(h("svg", { width, height, viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": words },
    ["Match", "Rank", "Rerank"].map((title, i) => h("text", { class: "soft", x: columns[i], y: 20, "text-anchor": "middle" }, title)),
    below.length ? h("line", { class: "rule", x1: 8, x2: columns[2] + 12, y1: end + 18, y2: end + 18 }) : null, ways));
}

// ------------------------------------------------------------------------------------------------- map and interests
function hover(element, id) {
  const light = () => { lit(id); if (map && places?.has(id)) map.focusOn(places.get(id)); };
  const dark = () => { lit(null); map?.focusOn(-1); };
  element.addEventListener("pointerenter", light);
  element.addEventListener("pointerleave", dark);
  element.addEventListener("focusin", light);
  element.addEventListener("focusout", dark);
}

function lit(id) {
  $("journey").classList.toggle("some", id !== null);
  document.querySelectorAll("#list > li, #journey g.way-of").forEach((e) => e.classList.toggle("lit", id !== null && e.dataset.id === id));
}

function showInterests(answer) {
  const found = answer.interests ?? [];
  const total = found.reduce((sum, i) => sum + i.candidates, 0);
  $("interests-note").textContent = found.length ? `${found.length} found in the history, ${number.format(total)} candidates brought` : "";
  if (!found.length) {
    const words = answer.fallback ? "They appear when there is a history to read." : "This matcher does not describe people by vectors.";
    $("interests").replaceChildren(h("div", { class: "note", role: "listitem" }, words));
    return;
  }
  $("interests").replaceChildren(...found.map((interest) => {
    const n = interest.interest;
    const bar = h("i");
    bar.style.width = `${(100 * interest.candidates) / Math.max(1, total)}%`;
    bar.style.background = `var(--i${n % 8})`;
    const shown = answer.items.filter((i) => i.interest === n).length;
    const on = state.only === n;
    return h("article", { class: on ? "interest on" : "interest", role: "listitem" },
      h("h3", {}, badge(n), h("button", { type: "button", class: "title", "aria-pressed": String(on), title: on ? "Show all interests" : "Show this one alone", onclick: () => { state.only = on ? null : n; showAnswer(); [...$("interests").querySelectorAll("button")][found.indexOf(interest)]?.focus(); } }, about(interest) || `Interest ${letter(n)}`)),
      h("div", { class: "share" }, bar),
      h("p", { class: "note" }, `${many(interest.candidates, "candidate")}, ${shown} in the list`),
      h("ol", {}, interest.items.slice(0, 4).map((item) => { const line = h("li", { title: nameOf(item) }, nameOf(item)); hover(line, item.item_id); return line; })));
  }));
}

/** What an interest is about: the commonest values of its first items. */
function about(interest) {
  const fields = (card?.fields ?? []).filter((f) => f.side === "item" && f.kind === "category").map((f) => f.name);
  const half = Math.max(2, interest.items.length / 2);
  const words = [];
  for (const field of fields) {
    const counts = new Map();
    interest.items.forEach((i) => [i.attributes?.[field]].flat().forEach((v) => v !== null && v !== undefined && counts.set(v, (counts.get(v) ?? 0) + 1)));
    const [best] = [...counts].sort((a, b) => b[1] - a[1]);
    if (best && best[1] >= half) words.push(String(best[0]));
  }
  return words.slice(0, 2).join(" · ");
}

function showMarks(answer) {
  if (!map || !places) return;
  const at = (ids) => ids.map((id) => places.get(id)).filter((i) => i !== undefined);
  const brought = new Map();
  for (const interest of answer.interests ?? []) at(interest.items.map((i) => i.item_id)).forEach((i) => brought.set(i, interest.interest));
  const interest = new Map();
  answer.items.forEach((i) => { if (places.has(i.item_id) && i.interest !== null && i.interest !== undefined) interest.set(places.get(i.item_id), i.interest); });
  const where = (answer.interests ?? []).filter((i) => i.map).map((i) => ({ number: i.interest, x: i.map[0], y: i.map[1] }));
  map.setMarks({ recommended: at(answer.items.map((i) => i.item_id)), history: at(state.history), brought, interest, interests: where });
  const alone = state.only === null ? null : (answer.interests ?? []).find((i) => i.interest === state.only);
  map.light(alone ? [...at(alone.items.map((i) => i.item_id)), ...at(answer.items.filter((i) => i.interest === state.only).map((i) => i.item_id))] : null);
}

async function startMap() {
  const box = $("map-box");
  if (!card.map) {
    box.replaceChildren(h("p", { class: "blank" }, h("b", {}, "No map in this funnel"), "Fit it with --map to see the items laid out by likeness."));
    $("map-help").hidden = true;
    document.querySelector(".select").hidden = true;
    return;
  }
  const found = await ask("/v1/map");
  mapped = found.item_id;
  places = new Map(mapped.map((id, i) => [id, i]));
  const colour = $("colour");
  colour.replaceChildren(...(found.group_field ? [h("option", { value: "group" }, `by ${found.group_field}`)] : []), h("option", { value: "interest" }, "by interest"));
  colour.addEventListener("change", () => map.setMode(colour.value));
  map = new ItemMap($("map"), {
    show: (what) => showTip(what, found),
    pick: (index) => act(() => { known({ item_id: mapped[index], title: found.title[index] }); return add(mapped[index]); }),
  });
  map.setMode(colour.value);
  map.setPoints(found);
  $("zoom-in").addEventListener("click", () => map.glide(map.zoomBy(1.7)));
  $("zoom-out").addEventListener("click", () => map.glide(map.zoomBy(1 / 1.7)));
  $("zoom-list").addEventListener("click", () => map.fit([...map.marks.recommended, ...map.marks.history]));
  $("zoom-fit").addEventListener("click", () => map.fit());
  if (state.answer) showMarks(state.answer);
}

function showTip(what, found) {
  const tip = $("tip");
  tip.hidden = what === null;
  lit(what === null ? null : mapped[what.index]);
  if (what === null) return;
  const id = mapped[what.index];
  const item = items.get(id) ?? { item_id: id, title: found.title[what.index] };
  const place = state.answer?.items.findIndex((i) => i.item_id === id) ?? -1;
  const role = place >= 0 ? `place ${place + 1} of the list` : state.history.includes(id) ? "in the history" : "";
  const more = item.attributes ? facts(item) : found.group?.[what.index] ?? "";
  const picture = pictureOf({ item_id: id, picture: item.picture ?? card.pictures });
  tip.replaceChildren(...[picture, h("span", { class: "named" }, h("b", {}, nameOf(item)), h("span", {}, [more, role].filter(Boolean).join(" · ")))].filter(Boolean));
  const [w, height] = map.size;
  const { offsetWidth: tw, offsetHeight: th } = tip;
  tip.style.left = `${Math.max(6, Math.min(w - tw - 6, what.x - tw / 2))}px`;
  tip.style.top = `${what.y - th - 16 > 4 ? what.y - th - 16 : Math.min(height - th - 6, what.y + 18)}px`;
  if (what.keys) say(`${nameOf(item)}${more ? `, ${more}` : ""}${role ? `, ${role}` : ""}`);
  if (!item.attributes) describe(id, () => { if (!tip.hidden && map.focus === what.index) showTip(what, found); });
}

/** The attributes of an item on the map, asked for when the pointer rests on it. */
function describe(id, then) {
  clearTimeout(describe.timer);
  describe.timer = setTimeout(async () => {
    try { known(await ask(`/v1/items/${encodeURIComponent(id)}`)); then(); } catch (error) { if (!(error instanceof Problem)) throw error; } // the title is enough
  }, 120);
}

// ------------------------------------------------------------------------------------------------------ model card
function showCard() {
  const rows = (pairs) => h("dl", {}, pairs.filter(([, v]) => v !== null && v !== undefined).map(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]));
  const body = $("card-body");
  const versions = Object.entries(card.versions ?? {}).map(([name, v]) => `${name} ${v}`).join(", ");
  body.replaceChildren(
    h("h3", {}, "Stages"),
    h("ol", { class: "stages" }, card.stages.map((s) => h("li", {}, h("span", { class: "note" }, s.stage), h("b", {}, s.name.split("/").pop()),
      Object.keys(s.config ?? {}).length ? h("details", {}, h("summary", {}, "settings"), h("dl", {}, Object.entries(s.config).map(([k, v]) => [h("dt", {}, k), h("dd", {}, Array.isArray(v) ? v.join(", ") : String(v))]))) : null))),
    ...metricTable(card.metrics ?? {}),
    h("h3", {}, "Data"),
    rows([["events", card.counts?.events === undefined || card.counts.events === null ? null : number.format(card.counts.events)], ["items", number.format(card.counts.items)], ["people", number.format(card.counts.users)],
      ["candidates", `${number.format(card.candidates)} an answer`], ["history", `the newest ${number.format(card.max_len)} are read`], ["fingerprint", h("code", {}, card.fingerprint)]]),
    h("h3", {}, "Artifact"),
    rows([["version", h("code", {}, card.model_version)], ["SHA-256", h("code", {}, card.digest)], ["loaded", new Date(card.loaded_at).toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" })], ["made with", versions],
      ["probabilities", card.calibrated ? "calibrated" : "not calibrated: scores are logits"]]));
}

/** Stages down, metrics across; an interval where the artifact holds one. */
function metricTable(metrics) {
  const stages = Object.entries(metrics).filter(([, m]) => m && typeof m === "object");
  if (!stages.length) return [h("h3", {}, "Measured"), h("p", { class: "note" }, "The artifact holds no measurements.")];
  const names = [...new Set(stages.flatMap(([, m]) => Object.keys(m)))].filter((n) => stages.some(([, m]) => typeof m[n] === "number"));
  const wanted = ["recall@10", "ndcg@10", "recall@50", "ndcg@50", "diversity@10"].filter((n) => names.includes(n));
  const shown = wanted.length ? wanted : names.slice(0, 6);
  const cell = (m, n) => {
    const range = m.intervals?.[n];
    return h("td", {}, typeof m[n] === "number" ? m[n].toFixed(4) : "–", range ? h("small", {}, ` ${range[0].toFixed(4)}–${range[1].toFixed(4)}`) : null);
  };
  const users = stages.map(([, m]) => m.users).find((u) => typeof u === "number");
  return [h("h3", {}, "Measured on events after training"),
    h("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": "Metrics" }, h("table", {}, h("thead", {}, h("tr", {}, h("th", { scope: "col" }, "stage"), shown.map((n) => h("th", { scope: "col" }, n)))),
      h("tbody", {}, stages.map(([stage, m]) => h("tr", {}, h("td", {}, stage), shown.map((n) => cell(m, n))))))),
    h("p", { class: "note" }, [users ? `Means over ${number.format(users)} people.` : "", stages.some(([, m]) => m.intervals) ? "Small figures: 95 % bootstrap interval." : ""].filter(Boolean).join(" "))];
}

// ---------------------------------------------------------------------------------------------------------- theme
const THEMES = ["auto", "light", "dark"];
const stored = { get: () => { try { return localStorage.getItem("theme"); } catch { return null; } }, set: (v) => { try { localStorage.setItem("theme", v); } catch { /* private mode */ } } };

function setTheme(theme) {
  if (theme === "auto") delete document.documentElement.dataset.theme; else document.documentElement.dataset.theme = theme;
  const words = `Theme: ${theme === "auto" ? "follow the system" : theme}`;
  $("theme").replaceChildren(ICONS[theme]());
  $("theme").setAttribute("aria-label", words);
  $("theme").title = words;
  $("theme").dataset.now = theme;
  map?.recolour();
}

// ----------------------------------------------------------------------------------------------------------- start
async function start() {
  $("list").replaceChildren(...Array.from({ length: 8 }, () => h("li", { class: "skeleton", "aria-hidden": "true" })));
  try {
    card = await ask("/v1/funnel");
    content();
    const names = card.stages.filter((s) => s.stage !== "fallback").map((s) => s.name.split("/").pop());
    $("summary").textContent = `${names.join(" → ")} · ${number.format(card.counts.items)} items · ${number.format(card.counts.users)} people`;
    showCard();
    $("open-card").disabled = false;
    const people = await ask("/v1/users?limit=5").catch(() => ({ users: [] }));
    showStart.people = people.users;
    await recall();
    showHistory();
    await refresh();
    if (!map) await startMap();
  } catch (error) {
    if (!(error instanceof Problem)) throw error;
    if (!state.answer) blank("Nothing to show yet", "As soon as the server answers, the list appears here.");
    complain(error, start);
  }
}

function listen() {
  listenToSearch();
  listenToKnob();
  $("clear").addEventListener("click", () => act(clear));
  for (const [id, journey] of [["as-list", false], ["as-journey", true]]) {
    $(id).addEventListener("click", () => {
      state.journey = journey;
      $("as-list").setAttribute("aria-pressed", String(!journey));
      $("as-journey").setAttribute("aria-pressed", String(journey));
      if (state.answer) showAnswer();
    });
  }
  $("open-card").disabled = true;
  $("open-card").addEventListener("click", () => $("card").showModal());
  $("close-card").addEventListener("click", () => $("card").close());
  $("card").addEventListener("click", (event) => event.target === $("card") && $("card").close());
  $("theme").addEventListener("click", () => { const next = THEMES[(THEMES.indexOf($("theme").dataset.now) + 1) % THEMES.length]; stored.set(next); setTheme(next); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => map?.recolour());
  addEventListener("keydown", (event) => {
    if (event.key !== "/" || event.ctrlKey || event.metaKey || /INPUT|TEXTAREA|SELECT/.test(document.activeElement?.tagName)) return;
    event.preventDefault();
    $("search").focus();
  });
}

setTheme(THEMES.includes(stored.get()) ? stored.get() : "auto");
listen();
start();
