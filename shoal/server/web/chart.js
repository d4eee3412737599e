// Line charts, drawn as SVG with what is at hand: round ticks, one line per series, a cursor that reads values out.
import { linearAcross, linearUp, logarithmicAcross, logarithmicUp } from "./axis.js";
import { element, svg } from "./dom.js";
import { rounded } from "./facts.js";

const WIDTH = 340;
const HEIGHT = 190;
const LEFT = 46;
const RIGHT = 16;
const TOP = 10;
const BOTTOM = 26;
const MAX_POINTS = 400;
export const NUM_COLOURS = 8;

export class LineChart {
  // `fromZero` draws the axis from zero even where the data stay above it.
  // `isDullAtZero` hides it while nothing in it differs from zero.
  // `isLogarithmic` spaces both axes by factors. `stepText` and `valueText` write numbers with their units; `isNamed` puts
  // the readout below, with the names of the series.
  constructor({
    title, about = "", fromZero = false, isDullAtZero = false, isLogarithmic = false, isNamed = false,
    stepText = (step) => `step ${step}`, valueText = rounded, stepTick = short, valueTick = short,
  }) {
    Object.assign(this, { title, fromZero, isDullAtZero, isLogarithmic, isNamed, stepText, valueText, stepTick, valueTick });
    Object.assign(this, { series: [], cursor: null });
    this.readout = element("p", { class: isNamed ? "readout named" : "readout", "aria-live": "off" });
    this.plot = svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", tabindex: 0 });
    const caption = element("figcaption", {}, element("span", { class: "chart-title", title: about || null }, title), isNamed ? null : this.readout);
    this.root = element("figure", { class: "figure" }, caption, this.plot, isNamed ? this.readout : null);
    this.plot.addEventListener("pointermove", (event) => this.point(event));
    this.plot.addEventListener("pointerleave", () => this.moveCursor(null));
    this.plot.addEventListener("blur", () => this.moveCursor(null));
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  // `series` is a list of { name, slot, points: [[step, value], ...] } with rising steps; slot picks the colour.
  update(series) {
    const isDull = ({ points }) => this.isDullAtZero && points.every(([, value]) => value === 0);
    this.series = series.filter((one) => one.points.length > 0 && !isDull(one));
    this.root.hidden = this.series.length === 0;
    if (this.root.hidden) return;
    this.scale = scaleOf(this.series, this);
    this.marker = svg("line", { class: "cursor", y1: TOP, y2: HEIGHT - BOTTOM, visibility: "hidden" });
    const lines = this.series.map((one) => this.line(one));
    this.plot.replaceChildren(...this.axes(), ...lines, this.marker);
    this.plot.setAttribute("aria-label", this.description());
    this.moveCursor(this.cursor);
  }

  line({ slot, points }) {
    const { x, y } = this.scale;
    const path = thinned(points).map(([step, value]) => `${x(step).toFixed(1)},${y(value).toFixed(1)}`);
    if (path.length === 1) {
      const [cx, cy] = path[0].split(",");
      return svg("circle", { class: `dot ${colour(slot)}`, cx, cy, r: 3 });
    }
    return svg("polyline", { class: `line ${colour(slot)}`, points: path.join(" ") });
  }

  axes() {
    const { x, y, steps, values } = this.scale;
    const rows = values.flatMap((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: WIDTH - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { class: "tick", x: LEFT - 6, y: y(value) + 3.5, "text-anchor": "end" }, this.valueTick(value)),
    ]);
    const columns = steps.map((step) => svg("text", { class: "tick", x: x(step), y: HEIGHT - 8, "text-anchor": "middle" }, this.stepTick(step)));
    return [...rows, ...columns];
  }

  description() {
    const parts = this.series.map(({ name, points }) => `${name}: ${this.valueText(points.at(-1)[1])} at ${this.stepText(points.at(-1)[0])}`);
    return `${this.title}. Last values: ${parts.join("; ")}. Arrow keys read values.`;
  }

  point(event) {
    const box = this.plot.getBoundingClientRect();
    const across = ((event.clientX - box.left) / box.width) * WIDTH;
    this.moveCursor(this.scale.stepAt(across));
  }

  key(event) {
    const by = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!by) return;
    event.preventDefault();
    const steps = [...new Set(this.series.flatMap(({ points }) => points.map(([step]) => step)))].sort((one, other) => one - other);
    const at = this.cursor === null ? steps.length : steps.findIndex((step) => step >= this.cursor);
    this.moveCursor(steps[Math.max(0, Math.min(steps.length - 1, at + by))]);
  }

  // Reads out every series at a step; at null the last values.
  moveCursor(step) {
    this.cursor = step;
    const found = this.series.map(({ name, slot, points }) => {
      const [at, value] = step === null ? points.at(-1) : nearest(points, step);
      return { name, slot, at, value };
    });
    const values = found.map(({ name, slot, value }) => element(
      "span", { class: `value ${colour(slot)}`, title: name },
      this.isNamed ? element("span", { class: "series-name" }, element("span", { class: "swatch" }), name) : null, this.valueText(value),
    ));
    this.readout.replaceChildren(...values);
    if (this.isNamed) this.readout.prepend(element("span", { class: "quiet" }, `at ${this.stepText(found[0].at)}`));
    if (step === null) {
      this.marker?.setAttribute("visibility", "hidden");
      return;
    }
    const at = this.scale.x(found[0].at);
    for (const [name, value] of Object.entries({ x1: at, x2: at, visibility: "visible" })) this.marker.setAttribute(name, value);
    if (!this.isNamed) this.readout.append(element("span", { class: "quiet" }, this.stepText(found[0].at)));
  }
}

export class Legend {
  constructor(onToggle) {
    this.onToggle = onToggle;
    this.hiddenNames = new Set();
    this.root = element("div", { class: "legend", role: "group", "aria-label": "Stages shown" });
  }

  update(names) {
    if (this.names?.join("\n") === names.join("\n")) return;
    this.names = names;
    this.root.replaceChildren(...names.map((name, slot) => {
      const box = element("input", { type: "checkbox", checked: !this.hiddenNames.has(name) });
      box.addEventListener("change", () => {
        if (box.checked) this.hiddenNames.delete(name);
        else this.hiddenNames.add(name);
        this.onToggle();
      });
      return element("label", { class: colour(slot) }, box, element("span", { class: "swatch" }), name);
    }));
  }

  shows(name) {
    return !this.hiddenNames.has(name);
  }
}

export const colour = (slot) => `series-${slot % NUM_COLOURS}`;

function scaleOf(series, { fromZero, isLogarithmic }) {
  const points = series.flatMap((one) => one.points);
  const steps = extent(points.map(([step]) => step));
  const values = extent(points.map(([, value]) => value));
  const across = isLogarithmic ? logarithmicAcross(...steps) : linearAcross(...steps);
  const up = isLogarithmic ? logarithmicUp(...values) : linearUp(...values, fromZero);
  const [width, height] = [WIDTH - LEFT - RIGHT, HEIGHT - TOP - BOTTOM];
  return {
    values: up.ticks,
    steps: across.ticks,
    x: (step) => LEFT + across.share(step) * width,
    y: (value) => HEIGHT - BOTTOM - up.share(value) * height,
    stepAt: (position) => across.at((position - LEFT) / width),
  };
}

function extent(numbers) {
  let [low, high] = [numbers[0], numbers[0]];
  for (const number of numbers) {
    if (number < low) low = number;
    if (number > high) high = number;
  }
  return [low, high];
}

// At most MAX_POINTS, keeping the lowest and highest of each stretch, so that no spike is lost.
export function thinned(points) {
  if (points.length <= MAX_POINTS) return points;
  const out = [];
  const stretch = points.length / (MAX_POINTS / 2);
  for (let start = 0; start < points.length; start += stretch) {
    const part = points.slice(Math.floor(start), Math.max(Math.floor(start + stretch), Math.floor(start) + 1));
    const low = part.reduce((one, other) => (other[1] < one[1] ? other : one));
    const high = part.reduce((one, other) => (other[1] > one[1] ? other : one));
    out.push(...(low[0] < high[0] ? [low, high] : low === high ? [low] : [high, low]));
  }
  return out;
}

function nearest(points, step) {
  let [low, high] = [0, points.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (points[middle][0] < step) low = middle;
    else high = middle;
  }
  return step - points[low][0] < points[high][0] - step ? points[low] : points[high];
}

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e6) return `${Number((value / 1e6).toPrecision(3))}M`;
  if (size >= 1e4) return `${Number((value / 1e3).toPrecision(3))}k`;
  if (size > 0 && size < 1e-3) return value.toExponential(0);
  return String(Number(value.toPrecision(4)));
}
