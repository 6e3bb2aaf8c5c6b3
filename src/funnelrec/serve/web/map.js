// The item space on a canvas: pan, zoom, hover, keys. Knows places and colours, nothing of HTTP.

const FIT = 0.86; // share of the box that the whole map fills
const CLOSEST = 40; // how far one may zoom in, relative to the whole
const REACH = 13; // pixels within which the pointer finds an item
const STEP = 26; // pixels that an arrow key moves at least
const KEYS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
const calm = matchMedia("(prefers-reduced-motion: reduce)");
const wide = matchMedia("(min-width: 1240px)");

export class ItemMap {
  /** `show({index, x, y} | null)` hears of the item under the pointer or the keys, `pick(index)` of a click on one. */
  constructor(canvas, { show, pick }) {
    Object.assign(this, { canvas, show, pick, points: null, marks: empty(), mode: "group", focus: -1, lit: null });
    this.view = { zoom: 1, x: 0, y: 0 }; // the map's place in the middle of the box
    this.fingers = new Map();
    this.paint = this.paint.bind(this);
    new ResizeObserver(() => this.draw()).observe(canvas);
    this.listen();
  }

  /** Columns of GET /v1/map. */
  setPoints({ x, y, group }) {
    const names = group ? [...new Set(group)].filter((g) => g !== null).sort() : [];
    this.points = { x: Float32Array.from(x), y: Float32Array.from(y), count: x.length };
    this.groups = names;
    this.group = group ? group.map((g) => names.indexOf(g)) : null;
    this.labels = names.map((name, g) => this.middleOf(name, g)).filter(Boolean);
    this.draw();
  }

  /** recommended, history: indices in order; brought: index -> interest; interests: [{number, x, y}]. */
  setMarks(marks) {
    this.marks = { ...empty(), ...marks };
    this.draw();
  }

  /** After a change between light and dark. */
  recolour() { this.ink = null; this.draw(); }

  setMode(mode) { this.mode = mode; this.draw(); }

  /** Only these items in full strength; null for all. */
  light(indices) { this.lit = indices === null ? null : new Set(indices); this.draw(); }

  focusOn(index, { centre = false } = {}) {
    this.focus = index;
    if (centre && index >= 0) this.glide({ ...this.view, x: this.points.x[index], y: this.points.y[index] });
    this.draw();
  }

  // -------------------------------------------------------------------------------------------------- the view
  get size() { return [this.canvas.clientWidth, this.canvas.clientHeight]; }
  get scale() { return this.lens().s; }
  screen(x, y) { const { s, left, top } = this.lens(); return [left + x * s, top - y * s]; }

  /** The way from the map to the box, read once where many items take it: (left + x s, top - y s). */
  lens() {
    const [w, h] = this.size;
    const s = (Math.min(w, h) / 2) * FIT * this.view.zoom;
    return { s, left: w / 2 - this.view.x * s, top: h / 2 + this.view.y * s };
  }

  zoomBy(factor, at = null) {
    const zoom = Math.min(CLOSEST, Math.max(0.6, this.view.zoom * factor));
    const [w, h] = this.size;
    const [px, py] = at ?? [w / 2, h / 2];
    const old = this.scale;
    const x = this.view.x + (px - w / 2) / old;
    const y = this.view.y - (py - h / 2) / old;
    const now = (old * zoom) / this.view.zoom;
    return { zoom, x: x - (px - w / 2) / now, y: y + (py - h / 2) / now };
  }

  /** The whole map, or so that these items fill the box. */
  fit(indices = []) {
    if (!indices.length) { this.glide({ zoom: 1, x: 0, y: 0 }); return; }
    const [x, y] = [this.points.x, this.points.y].map((axis) => indices.map((i) => axis[i]));
    const [left, right, low, high] = [Math.min(...x), Math.max(...x), Math.min(...y), Math.max(...y)];
    const zoom = Math.min(CLOSEST / 2, 1.7 / Math.max(0.02, right - left, high - low));
    this.glide({ zoom: Math.max(1, zoom), x: (left + right) / 2, y: (low + high) / 2 });
  }

  glide(target) {
    if (calm.matches) { this.view = target; this.draw(); return; }
    const from = { ...this.view };
    const began = performance.now();
    this.gliding = target;
    const step = (now) => {
      if (this.gliding !== target) return;
      const t = Math.min(1, (now - began) / 220);
      const e = 1 - (1 - t) ** 3;
      for (const key of ["zoom", "x", "y"]) this.view[key] = from[key] + (target[key] - from[key]) * e;
      this.draw();
      if (t < 1) requestAnimationFrame(step);
    };
    requestAnimationFrame(step);
  }

  // ---------------------------------------------------------------------------------------------------- listening
  listen() {
    const c = this.canvas;
    const at = (event) => { const box = c.getBoundingClientRect(); return [event.clientX - box.left, event.clientY - box.top]; };
    c.addEventListener("wheel", (event) => {
      if (!(wide.matches || event.ctrlKey || document.activeElement === c)) return; // elsewhere the page scrolls
      event.preventDefault();
      this.gliding = null;
      this.view = this.zoomBy(Math.exp(-event.deltaY * (event.deltaMode ? 0.05 : 0.0016)), at(event));
      this.draw();
    }, { passive: false });
    c.addEventListener("pointerdown", (event) => {
      c.setPointerCapture(event.pointerId);
      this.fingers.set(event.pointerId, at(event));
      this.pressed = { at: at(event), moved: false };
      this.gliding = null;
    });
    c.addEventListener("pointermove", (event) => this.move(event, at(event)));
    const up = (event) => {
      this.fingers.delete(event.pointerId);
      c.classList.remove("drag");
      if (event.type === "pointerup" && this.pressed && !this.pressed.moved) this.click(at(event), event.pointerType);
      if (!this.fingers.size) this.pressed = null;
    };
    c.addEventListener("pointerup", up);
    c.addEventListener("pointercancel", up);
    c.addEventListener("pointerleave", () => { if (!this.fingers.size) this.look(-1); });
    c.addEventListener("blur", () => this.look(-1));
    c.addEventListener("keydown", (event) => this.key(event));
  }

  move(event, here) {
    const before = this.fingers.get(event.pointerId);
    if (!before) { if (event.pointerType === "mouse") this.look(this.nearest(here)); return; }
    const all = [...this.fingers.keys()];
    if (all.length === 2) {
      const other = this.fingers.get(all.find((id) => id !== event.pointerId));
      const apart = (p) => Math.hypot(p[0] - other[0], p[1] - other[1]);
      this.view = this.zoomBy(apart(here) / Math.max(1, apart(before)), [(here[0] + other[0]) / 2, (here[1] + other[1]) / 2]);
      this.pressed.moved = true;
    } else if (this.pressed.moved || Math.hypot(here[0] - this.pressed.at[0], here[1] - this.pressed.at[1]) > 5) {
      this.pressed.moved = true;
      this.canvas.classList.add("drag");
      this.view.x -= (here[0] - before[0]) / this.scale;
      this.view.y += (here[1] - before[1]) / this.scale;
      this.look(-1);
    }
    this.fingers.set(event.pointerId, here);
    this.draw();
  }

  click(here, kind) {
    const index = this.nearest(here, kind === "mouse" ? REACH : REACH * 1.7);
    if (index < 0) this.look(-1);
    else if (kind === "mouse" || index === this.focus) this.pick(index); // a finger looks first, then picks
    else this.look(index);
  }

  key(event) {
    const way = KEYS[event.key];
    if (way) this.look(this.towards(way), true);
    else if (event.key === "+" || event.key === "=") this.glide(this.zoomBy(1.6));
    else if (event.key === "-") this.glide(this.zoomBy(1 / 1.6));
    else if (event.key === "0") this.fit();
    else if ((event.key === "Enter" || event.key === " ") && this.focus >= 0) this.pick(this.focus);
    else if (event.key === "Escape") this.look(-1);
    else return;
    event.preventDefault();
  }

  look(index, keys = false) {
    if (index === this.focus && !keys) return;
    this.focus = index;
    this.canvas.classList.toggle("over", index >= 0);
    if (index >= 0 && keys) {
      const [x, y] = this.screen(this.points.x[index], this.points.y[index]);
      const [w, h] = this.size;
      if (x < 20 || y < 20 || x > w - 20 || y > h - 20) this.view = { ...this.view, x: this.points.x[index], y: this.points.y[index] };
    }
    const [x, y] = index < 0 ? [0, 0] : this.screen(this.points.x[index], this.points.y[index]);
    this.show(index < 0 ? null : { index, x, y, keys });
    this.draw();
  }

  /** The item at a place of the box; marked ones are found a little farther. */
  nearest(here, reach = REACH) {
    if (!this.points) return -1;
    const { x, y, count } = this.points;
    const marked = new Set([...this.marks.recommended, ...this.marks.history]);
    const { s, left, top } = this.lens();
    let best = -1, least = reach;
    for (let i = 0; i < count; i += 1) {
      const dx = left + x[i] * s - here[0], dy = top - y[i] * s - here[1];
      if (dx > 30 || dx < -30 || dy > 30 || dy < -30) continue;
      const far = Math.hypot(dx, dy) - (marked.has(i) ? 4 : 0);
      if (far < least) { least = far; best = i; }
    }
    return best;
  }

  /** The next item in a direction, from the one in focus, else from the first recommended. */
  towards([dx, dy]) {
    if (!this.points || !this.points.count) return -1;
    if (this.focus < 0) return this.marks.recommended[0] ?? 0;
    const { x, y, count } = this.points;
    const { s } = this.lens();
    let best = this.focus, least = Infinity;
    for (let i = 0; i < count; i += 1) {
      const right = (x[i] - x[this.focus]) * s, down = (y[this.focus] - y[i]) * s;
      const ahead = right * dx + down * dy;
      const aside = Math.abs(right * dy) + Math.abs(down * dx);
      if (ahead < STEP || aside > ahead) continue;
      const cost = ahead + 1.5 * aside;
      if (cost < least) { least = cost; best = i; }
    }
    return best;
  }

  // ------------------------------------------------------------------------------------------------------ drawing
  /** Where most of a group lies, if it lies together: from the median towards the densest place near it. */
  middleOf(name, g) {
    const own = [];
    this.group.forEach((value, i) => { if (value === g) own.push(i); });
    if (own.length < 4) return null;
    const { x, y } = this.points;
    const median = (values) => values.sort((a, b) => a - b)[values.length >> 1];
    let cx = median(own.map((i) => x[i])), cy = median(own.map((i) => y[i]));
    for (let round = 0; round < 12; round += 1) {
      let sx = 0, sy = 0, sum = 0;
      for (const i of own) {
        const weight = Math.exp(-((x[i] - cx) ** 2 + (y[i] - cy) ** 2) / 0.08);
        sx += weight * x[i]; sy += weight * y[i]; sum += weight;
      }
      if (sum < 1e-6) return null;
      cx = sx / sum; cy = sy / sum;
    }
    const near = own.filter((i) => Math.hypot(x[i] - cx, y[i] - cy) < 0.35);
    let around = 0; // items of any group: a name among others' items would mislead
    for (let i = 0; i < x.length; i += 1) around += Math.hypot(x[i] - cx, y[i] - cy) < 0.2;
    const pure = own.filter((i) => Math.hypot(x[i] - cx, y[i] - cy) < 0.2).length / Math.max(1, around);
    if (near.length / own.length < 0.4 || pure < 0.4) return null;
    const heights = near.filter((i) => Math.hypot(x[i] - cx, y[i] - cy) < 0.2).map((i) => y[i]).sort((a, b) => a - b);
    return { name, x: cx, y: heights[Math.floor(0.98 * (heights.length - 1))] ?? cy }; // above the items, not over them
  }

  draw() { if (!this.frame) this.frame = requestAnimationFrame(this.paint); }

  paint() {
    this.frame = 0;
    const [w, h] = this.size;
    const ratio = window.devicePixelRatio || 1;
    if (!w || !h) return;
    if (this.canvas.width !== Math.round(w * ratio) || this.canvas.height !== Math.round(h * ratio)) {
      this.canvas.width = Math.round(w * ratio);
      this.canvas.height = Math.round(h * ratio);
    }
    const g = this.canvas.getContext("2d");
    g.setTransform(ratio, 0, 0, ratio, 0, 0);
    g.clearRect(0, 0, w, h);
    if (!this.points) return;
    this.ink ??= inks(this.canvas);
    this.paintItems(g);
    this.paintNames(g);
    this.paintInterests(g);
    this.paintMarks(g);
    if (this.focus >= 0) this.paintFocus(g);
  }

  paintItems(g) {
    const { x, y, count } = this.points;
    const [w, h] = this.size;
    const radius = Math.min(5, Math.max(1.5, (85 / Math.sqrt(count)) * Math.sqrt(this.view.zoom)));
    const square = count > 5000 && radius < 2.2; // nobody sees the corners, and a circle costs ten times as much
    const paths = new Map();
    const hues = this.groups.map((_, n) => groupColour(n, this.groups.length, this.ink.dark));
    const { s, left, top } = this.lens();
    for (let i = 0; i < count; i += 1) {
      const sx = left + x[i] * s, sy = top - y[i] * s;
      if (sx < -9 || sy < -9 || sx > w + 9 || sy > h + 9) continue;
      const brought = this.marks.brought.get(i);
      let colour = this.ink.dot;
      if (this.mode === "group" && this.group && this.group[i] >= 0) colour = hues[this.group[i]];
      if (brought !== undefined && this.mode !== "group") colour = this.ink.interests[brought % 8];
      const faint = this.lit && !this.lit.has(i);
      const key = faint ? `${colour}|` : colour;
      let layer = paths.get(key);
      if (!layer) paths.set(key, layer = { colour, faint, path: new Path2D() });
      const r = radius * (this.lit && !faint ? 1.6 : 1);
      if (square) layer.path.rect(sx - r, sy - r, 2 * r, 2 * r);
      else { layer.path.moveTo(sx + r, sy); layer.path.arc(sx, sy, r, 0, 7); }
    }
    for (const { colour, faint, path } of paths.values()) {
      g.globalAlpha = faint ? 0.22 : 0.85;
      g.fillStyle = colour;
      g.fill(path);
    }
    g.globalAlpha = 1;
  }

  paintNames(g) {
    g.font = "600 12.5px system-ui, sans-serif";
    g.textAlign = "center";
    g.textBaseline = "middle";
    for (const { name, x, y } of this.labels) {
      const [sx, sy] = this.screen(x, y);
      this.text(g, String(name), sx, sy - 13, this.ink.text);
    }
  }

  text(g, words, x, y, colour) {
    g.lineWidth = 4;
    g.lineJoin = "round";
    g.strokeStyle = this.ink.page;
    g.strokeText(words, x, y);
    g.fillStyle = colour;
    g.fillText(words, x, y);
  }

  paintInterests(g) {
    for (const { number, x, y } of this.marks.interests) {
      const [sx, sy] = this.screen(x, y);
      const colour = this.ink.interests[number % 8];
      const wash = g.createRadialGradient(sx, sy, 4, sx, sy, 46);
      g.globalAlpha = 0.34;
      wash.addColorStop(0, colour);
      wash.addColorStop(1, colour.replace("rgb(", "rgba(").replace(")", ", 0)"));
      g.fillStyle = wash;
      g.beginPath(); g.arc(sx, sy, 46, 0, 7); g.fill();
      g.globalAlpha = 1;
    }
  }

  paintMarks(g) {
    const { x, y } = this.points;
    const taken = [];
    for (const i of this.marks.history) {
      const [sx, sy] = this.screen(x[i], y[i]);
      diamond(g, sx, sy, 6.5);
      g.fillStyle = this.ink.text; g.fill();
      g.lineWidth = 2; g.strokeStyle = this.ink.page; g.stroke();
    }
    [...this.marks.recommended.entries()].reverse().forEach(([place, i]) => {
      const [sx, sy] = this.screen(x[i], y[i]);
      const brought = this.marks.interest.get(i);
      const colour = brought === undefined ? this.ink.accent : this.ink.interests[brought % 8];
      const first = place < 10;
      g.globalAlpha = this.lit && !this.lit.has(i) ? 0.3 : 1;
      g.beginPath(); g.arc(sx, sy, first ? 9 : 5, 0, 7);
      g.fillStyle = colour; g.fill();
      g.lineWidth = 2; g.strokeStyle = this.ink.page; g.stroke();
      if (first) {
        g.font = "700 10.5px system-ui, sans-serif"; g.textAlign = "center"; g.textBaseline = "middle";
        g.fillStyle = this.ink.dark ? "#15161b" : "#fff";
        g.fillText(String(place + 1), sx, sy + 0.5);
      }
      g.globalAlpha = 1;
    });
    for (const { number, x: ix, y: iy } of this.marks.interests) {
      const [sx, sy] = this.screen(ix, iy);
      let top = sy - 25;
      while (taken.some(([tx, ty]) => Math.abs(tx - sx) < 26 && Math.abs(ty - top) < 20)) top -= 4;
      taken.push([sx, top]);
      g.beginPath(); g.roundRect(sx - 12, top - 9, 24, 18, 9);
      g.fillStyle = this.ink.panel; g.fill();
      g.lineWidth = 2; g.strokeStyle = this.ink.interests[number % 8]; g.stroke();
      g.font = "700 11px system-ui, sans-serif"; g.textAlign = "center"; g.textBaseline = "middle";
      g.fillStyle = this.ink.text; g.fillText(String.fromCharCode(65 + number), sx, top + 0.5);
    }
  }

  paintFocus(g) {
    const [sx, sy] = this.screen(this.points.x[this.focus], this.points.y[this.focus]);
    g.beginPath(); g.arc(sx, sy, 12, 0, 7);
    g.lineWidth = 2.5; g.strokeStyle = this.ink.text; g.stroke();
  }
}

const empty = () => ({ recommended: [], history: [], brought: new Map(), interest: new Map(), interests: [] });

function diamond(g, x, y, r) {
  g.beginPath(); g.moveTo(x, y - r); g.lineTo(x + r, y); g.lineTo(x, y + r); g.lineTo(x - r, y); g.closePath();
}

export const groupColour = (g, count, dark) => `oklch(${dark ? 0.66 : 0.7} 0.1 ${Math.round((g * 360) / Math.max(1, count) + 20) % 360})`;

/** The colours of the style sheet, as the canvas wants them. */
function inks(element) {
  const probe = document.createElement("i");
  probe.hidden = true;
  element.parentElement.append(probe);
  const read = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
  const found = Object.fromEntries(["dot", "text", "page", "panel", "accent"].map((name) => [name, read(name)]));
  found.interests = Array.from({ length: 8 }, (_, n) => read(`i${n}`));
  probe.style.color = "light-dark(#000, #fff)";
  found.dark = getComputedStyle(probe).color === "rgb(255, 255, 255)";
  probe.remove();
  return found;
}
