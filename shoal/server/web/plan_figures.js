// The figures of a plan as tables. Each can be opened: its formula, what went into it with values, where that is from.
import { element } from "./dom.js";
import { amount, digits, range } from "./quantities.js";

// The few figures that most people came for, with names that stand alone.
const TILES = [
  ["total_params", "Parameters"], ["active_params", "Active per token"], ["kv_bytes_per_token", "Cache per token"],
  ["training_usd", "Rent of training"], ["training_gpu_hours", "Device hours of training"],
  ["decode_tokens_per_s_per_device", "Decoding, one device"], ["usd_per_million_output_tokens", "A million output tokens"],
  ["joules_per_output_token", "Energy per output token"],
];

export function tiles(figures) {
  const found = TILES.map(([name, text]) => ({ ...figures.get(name), text })).filter(({ value }) => value !== null && value !== undefined);
  return element("dl", { class: "tiles" }, ...found.map((one) => element(
    "div", { title: one.label }, element("dt", { class: "quiet" }, one.text), element("dd", {}, amount(one.value, one.unit)), rangeOf(one),
  )));
}

// `beside` is what /api/plan/compare answered for this model and another one, or null.
export function sectionTable({ title, figures }, context) {
  const { beside } = context;
  const heads = beside ? ["", ...beside.models] : ["", ""];
  const head = element("thead", { class: beside ? null : "hidden" }, element("tr", {}, ...heads.map((text) => element("th", { scope: "col" }, text))));
  const body = element("tbody", {}, ...figures.flatMap((one) => figureRows(one, context)));
  const table = element("div", { class: "table", tabindex: 0, role: "region", "aria-label": title }, element("table", {}, head, body));
  return element("section", { "aria-label": title }, element("h3", {}, title), table);
}

function figureRows(one, context) {
  const detail = element("td", { colspan: context.beside ? 3 : 2 });
  const row = element("tr", { class: "why", hidden: true }, detail);
  const button = element("button", { type: "button", class: "figure-name", "aria-expanded": "false", title: one.name }, one.label);
  button.addEventListener("click", () => {
    row.hidden = !row.hidden;
    button.setAttribute("aria-expanded", String(!row.hidden));
    detail.replaceChildren(...explanation(one, context));
  });
  const value = element("td", { class: "number" }, amount(one.value, one.unit), rangeOf(one));
  const note = one.value === null && one.note ? element("p", { class: "quiet" }, one.note) : null;
  return [element("tr", {}, element("th", { scope: "row" }, button, note), value, besideCell(one, context)), row];
}

function besideCell(one, { beside }) {
  if (!beside) return null;
  const other = beside.rows.find(({ name }) => name === one.name);
  const times = other?.times[1];
  const isTelling = typeof times === "number" && times !== 0 && Math.abs(times - 1) > 0.005;
  const factor = isTelling ? element("p", { class: "quiet" }, `× ${digits(times, 3)}`) : null;
  return element("td", { class: "number" }, other ? amount(other.values[1], other.unit) : "", factor);
}

function rangeOf({ low, high, unit }) {
  return low === null || high === null ? null : element("p", { class: "quiet" }, range(low, high, unit));
}

function explanation(one, { figures, assumptions }) {
  const facts = [["name", element("code", {}, one.name)], ["formula", one.formula], ["source", one.source], ["note", one.note]];
  const inputs = one.inputs.map((key) => inputText(key, figures.get(key) ?? assumptions.get(key)));
  if (inputs.length) facts.splice(2, 0, ["from", element("ul", {}, ...inputs.map((text) => element("li", {}, text)))]);
  return [element("dl", {}, ...facts.filter(([, text]) => text).flatMap(([name, text]) => [element("dt", {}, name), element("dd", {}, text)]))];
}

function inputText(key, found) {
  if (!found) return key;
  return `${found.label}: ${amount(found.value, found.unit)}${assumedFrom(found)}`;
}

function assumedFrom({ formula, source }) {
  return formula || !source ? "" : ` (${source})`;
}
