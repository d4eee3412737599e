// How evenly the experts of each layer are used: one row a layer, one cell an expert, its load against an even share.
import { element, setText, svg } from "./dom.js";

const CELL = 30;
const LABEL = 50;
const MAX_LABELLED = 16; // more experts than this leave no room for numbers

export class ExpertLoad {
  constructor() {
    this.frames = []; // { stage, step, load }, oldest first
    this.follows = true;
    this.slider = element("input", { type: "range", min: 0, max: 0, step: 1, "aria-label": "Step of the expert load" });
    this.slider.addEventListener("input", () => {
      this.follows = this.slider.valueAsNumber === this.frames.length - 1;
      this.draw();
    });
    this.when = element("span", { class: "quiet" });
    this.box = element("div", { class: "heat-box", tabindex: 0, role: "region", "aria-label": "Expert load" });
    const caption = element("figcaption", {}, element("span", { class: "chart-title" }, "Expert load"), this.when);
    const about = element("p", { class: "quiet" }, "1 is an even share; more means busier. Rows are layers, columns are experts.");
    this.root = element("figure", { class: "figure heat" }, caption, this.box, this.slider, about);
  }

  update(frames) {
    this.frames = frames;
    this.root.hidden = frames.length === 0;
    if (this.root.hidden) return;
    this.slider.max = frames.length - 1;
    if (this.follows) this.slider.value = frames.length - 1;
    this.slider.hidden = frames.length < 2;
    this.draw();
  }

  draw() {
    const frame = this.frames[Math.min(this.slider.valueAsNumber, this.frames.length - 1)];
    setText(this.when, `${frame.stage}, step ${frame.step}`);
    this.slider.setAttribute("aria-valuetext", this.when.textContent);
    const rows = frame.load.map(shares);
    const columns = Math.max(...rows.map((row) => row.length));
    const [width, height] = [LABEL + columns * CELL, rows.length * CELL + 4];
    const isLabelled = columns <= MAX_LABELLED;
    const cells = rows.flatMap((row, layer) => [
      svg("text", { class: "tick", x: LABEL - 8, y: layer * CELL + 19, "text-anchor": "end" }, `layer ${layer}`),
      ...row.flatMap((share, expert) => cell(share, layer, expert, isLabelled)),
    ]);
    const worst = Math.max(...rows.flat());
    const label = `${this.when.textContent}: ${rows.length} layers of ${columns} experts; the busiest has ${worst.toFixed(2)} times an even share.`;
    // At its own size: what is wider than the page is scrolled.
    const shrunk = isLabelled ? 1.2 : 0.5;
    const size = { width: width * shrunk, height: height * shrunk };
    const map = svg("svg", { class: "heat-map", viewBox: `0 0 ${width} ${height}`, ...size, role: "img", "aria-label": label }, ...cells);
    this.box.replaceChildren(map);
  }
}

export function shares(load) {
  const total = load.reduce((sum, value) => sum + value, 0);
  return load.map((value) => (total > 0 ? (value / total) * load.length : 0));
}

function cell(share, layer, expert, isLabelled) {
  const [x, y] = [LABEL + expert * CELL, layer * CELL];
  // Half the even share and twice the even share are equally far from it.
  const distance = Math.max(-1, Math.min(1, Math.log2(Math.max(share, 0.01)) / 2));
  const title = svg("title", {}, `layer ${layer}, expert ${expert}: ${share.toFixed(2)} times an even share`);
  const shape = { x: x + 1, y: y + 1, width: CELL - 2, height: CELL - 2, rx: 3 };
  const box = svg("rect", { ...shape, class: distance > 0 ? "busy-cell" : "idle-cell", "fill-opacity": (0.08 + 0.8 * Math.abs(distance)).toFixed(2) }, title);
  if (!isLabelled) return [box];
  const strong = Math.abs(distance) > 0.6 ? " strong" : "";
  return [box, svg("text", { class: `share${strong}`, x: x + CELL / 2, y: y + 18.5, "text-anchor": "middle" }, share.toFixed(2))];
}
