// Bars: one per row under its words and its number, or one that stacks its parts against a limit. The words say
// everything, so the drawing is hidden from screen readers.
import { colour } from "./chart.js";
import { element, svg } from "./dom.js";

const FULL = 100;

export function figure(title, about, ...children) {
  const caption = element("figcaption", {}, element("span", { class: "chart-title" }, title));
  return element("figure", { class: "figure" }, caption, about ? element("p", { class: "quiet" }, about) : null, ...children);
}

// `rows` holds { label, text, from, to } in one unit; `low` and `high` are the ends of the axis.
export function bars(rows, { low = 0, high = Math.max(...rows.map(({ to }) => to)), mark = null, slot = 0 } = {}) {
  const at = (value) => ((value - low) / (high - low || 1)) * FULL;
  return element("ul", { class: "bars" }, ...rows.map(({ label, text, title, from = low, to }) => {
    const [left, right] = [Math.min(at(from), at(to)), Math.max(at(from), at(to))];
    const bar = svg("rect", { class: "bar", x: left, y: 0, width: Math.max(right - left, 0.6), height: 6 });
    const here = mark === null ? null : svg("line", { class: "mark", x1: at(mark), x2: at(mark), y1: 0, y2: 6 });
    return element("li", { class: colour(slot), title }, element("span", {}, label), element("span", { class: "number" }, text), drawing(6, bar, here));
  }));
}

// `parts` holds { label, text, size }; `limit` is drawn as a line and `reserved` as the stretch below it that is kept free.
export function stack(parts, { limit, reserved }) {
  const total = parts.reduce((sum, { size }) => sum + size, 0);
  const high = Math.max(total, limit) * 1.02;
  const at = (value) => (value / high) * FULL;
  let from = 0;
  const boxes = parts.map(({ size }, slot) => {
    const box = svg("rect", { class: `bar ${colour(slot)}`, x: at(from), y: 2, width: at(size), height: 14 });
    from += size;
    return box;
  });
  const free = svg("rect", { class: "reserved", x: at(limit - reserved), y: 0, width: at(reserved), height: 18 });
  const line = svg("line", { class: "mark", x1: at(limit), x2: at(limit), y1: 0, y2: 18 });
  const key = parts.map(({ label, text }, slot) => element(
    "li", { class: colour(slot) }, element("span", { class: "swatch" }), element("span", {}, label), element("span", { class: "number" }, text),
  ));
  return element("div", { class: "stack" }, drawing(18, free, ...boxes, line), element("ul", {}, ...key));
}

function drawing(height, ...parts) {
  return svg("svg", { viewBox: `0 0 ${FULL} ${height}`, preserveAspectRatio: "none", "aria-hidden": "true", height }, ...parts);
}
