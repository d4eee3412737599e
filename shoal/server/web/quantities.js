// Numbers with their units for people: three to four digits and a fitting prefix, as `shoal plan` prints them.

const BYTES = ["B", "kB", "MB", "GB", "TB", "PB", "EB"];
const OPERATIONS = ["FLOP", "kFLOP", "MFLOP", "GFLOP", "TFLOP", "PFLOP", "EFLOP", "ZFLOP", "YFLOP"];
const COUNTS = ["", "K", "M", "B", "T", "Q"];

export function amount(value, unit) {
  if (value === null || value === undefined) return "not known";
  if (typeof value !== "number") return String(value);
  if (unit === "bytes") return scaled(value, BYTES);
  if (unit === "FLOP") return scaled(value, OPERATIONS);
  if (unit === "parameters") return scaled(value, COUNTS);
  if (unit === "tokens") return `${value < 1e6 ? digits(value) : scaled(value, COUNTS)} tokens`;
  if (unit === "fraction") return `${digits(100 * value, 3)} %`;
  if (unit === "USD") return `${value < 0 ? "−" : ""}$${digits(Math.abs(value))}`;
  return `${digits(value)} ${unit}`.trimEnd();
}

// "5.2 to 10.4 h", with the unit once where both ends share it.
export function range(low, high, unit) {
  const [from, to] = [amount(low, unit), amount(high, unit)];
  const suffix = / \S+$/.exec(to)?.[0];
  return suffix && from.endsWith(suffix) ? `${from.slice(0, -suffix.length)} to ${to}` : `${from} to ${to}`;
}

export function digits(value, count = 4) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-6)) return value.toExponential(2);
  if (size >= 1000) return Math.round(value).toLocaleString("en-US");
  return String(Number(value.toPrecision(count)));
}

function scaled(value, units) {
  const size = Math.abs(value);
  const power = size < 1000 ? 0 : Math.min(units.length - 1, Math.floor(Math.log10(size) / 3));
  return `${digits(value / 1000 ** power)} ${units[power]}`.trimEnd();
}
