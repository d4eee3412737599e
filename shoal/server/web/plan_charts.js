// The charts of the Plan page, from what /api/plan/charts and /api/plan/sensitivity answer.
import { bars, figure, stack } from "./bars.js";
import { LineChart } from "./chart.js";
import { element } from "./dom.js";
import { amount, digits, range } from "./quantities.js";

const SHOWN_EFFECTS = 8;

// All charts that the plan can give.
export function planCharts(data) {
  return [
    trainingByPart(data.training_by_part), servingByPart(data.serving_by_part), memory(data.memory_by_part),
    cacheOverContext(data.kv_over_context), costOverHitRate(data.cost_over_hit_rate),
  ].filter(Boolean);
}

function trainingByPart(parts) {
  if (!parts.length) return null;
  const hasMoney = parts.every(({ usd }) => usd !== null);
  const rows = [...parts].sort((one, other) => other.share_fraction - one.share_fraction).map((one) => ({
    label: one.part, to: one.share_fraction, title: `${amount(one.flops_per_token, "FLOP")} per token`,
    text: hasMoney ? `${amount(one.usd, "USD")} · ${amount(one.share_fraction, "fraction")}` : amount(one.share_fraction, "fraction"),
  }));
  const about = hasMoney ? "Rent, shared out by operations" : "By operations; give training tokens to see money";
  return figure("Cost of training by part", about, bars(rows));
}

function servingByPart(parts) {
  if (!parts.length) return null;
  const rows = parts.map((one) => ({
    label: one.part, to: one.usd_per_day, text: `${amount(one.usd_per_day, "USD")} a day`,
    title: `${digits(one.machines, 3)} machines, ${amount(one.kwh_per_day, "kWh")} a day`,
  }));
  const total = parts.reduce((sum, one) => sum + one.usd_per_day, 0);
  return figure("Cost of serving by part", `Rent of a day, ${amount(total, "USD")} in all`, bars(rows, { slot: 1 }));
}

function memory({ device, device_bytes: limit, reserved_bytes: reserved, ...loads }) {
  const found = ["training", "serving"].filter((name) => loads[name]);
  if (!found.length) return null;
  const about = `The line is what one ${device} has, ${amount(limit, "bytes")}; the grey part is kept free`;
  return figure("Memory by part", about, ...found.flatMap((name) => memoryOf(name, loads[name], limit, reserved)));
}

function memoryOf(name, { bytes_by_part: sizes, total_bytes: total, num_devices: count }, limit, reserved) {
  const parts = Object.entries(sizes).filter(([, size]) => size > 0)
    .map(([part, size]) => ({ label: part.replaceAll("_", " "), size, text: amount(size, "bytes") }));
  const fits = total <= limit - reserved;
  const verdict = fits ? "fits" : total <= limit ? "leaves too little free" : "does not fit";
  const text = `${name}, ${count > 1 ? `fullest of ${digits(count)}` : "one device"}: ${amount(total, "bytes")}, `;
  return [element("p", { class: "load" }, text, element("strong", { class: fits ? null : "wrong" }, verdict)), stack(parts, { limit, reserved })];
}

function cacheOverContext(curves) {
  const chart = new LineChart({
    title: "Cache over context", about: "Bytes of keys and values that one sequence needs", isLogarithmic: true, isNamed: true,
    stepText: (tokens) => `${contextText(tokens)} tokens`, stepTick: contextText,
    valueText: (bytes) => amount(bytes, "bytes"), valueTick: (bytes) => amount(bytes, "bytes"),
  });
  chart.update(curves.map(({ name, context_tokens: tokens, kv_bytes: bytes }, slot) => ({
    name, slot, points: tokens.map((count, index) => [count, bytes[index]]),
  })));
  return chart.root;
}

// Contexts are powers of two, and are called so.
function contextText(tokens) {
  if (tokens >= 2 ** 20) return `${digits(tokens / 2 ** 20, 3)} Mi`;
  return tokens >= 1024 ? `${digits(tokens / 1024, 3)} Ki` : String(Math.round(tokens));
}

function costOverHitRate({ points, price_model: model, source }) {
  if (!points?.length) return null;
  const chart = new LineChart({
    title: "Million prompt tokens over cache hits", about: source, fromZero: true, isNamed: true,
    stepText: (hits) => `${Math.round(100 * hits)} % hits`, stepTick: (hits) => `${Math.round(100 * hits)}%`,
    valueText: (usd) => amount(usd, "USD"), valueTick: (usd) => `$${digits(usd, 2)}`,
  });
  const series = (name, slot, key) => ({ name, slot, points: points.map((point) => [point.hit_fraction, point[key]]) });
  chart.update([series(`price of ${model}`, 0, "price_usd"), series("cost at the roofline", 1, "cost_usd")]);
  return chart.root;
}

// Which assumptions move a figure most, each over what it may honestly be.
export function sensitivityChart({ value, unit, effects }, labelOf) {
  const shown = effects.slice(0, SHOWN_EFFECTS);
  if (!shown.length) return element("p", { class: "quiet" }, "No assumption moves this figure.");
  const ends = shown.flatMap((one) => [one.at_low, one.at_high]);
  const rows = shown.map((one) => ({
    label: labelOf(one.key), from: one.at_low, to: one.at_high,
    text: range(Math.min(one.at_low, one.at_high), Math.max(one.at_low, one.at_high), unit),
    title: `${one.key} from ${digits(one.low)} to ${digits(one.high)} ${one.unit}`,
  }));
  return bars(rows, { low: Math.min(value, ...ends), high: Math.max(value, ...ends), mark: value, slot: 2 });
}
