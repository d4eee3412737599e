// How answers are drawn, kept with each conversation. New conversations start with the values used last.
// 0.6 and 0.95 are what DeepSeek recommends for R1.

export const STANDARD = Object.freeze({ system: "", temperature: 0.6, top_p: 0.95, max_tokens: null, seed: null, thinking: "auto" });
export const RANGES = Object.freeze({ temperature: [0, 2], top_p: [0.01, 1], max_tokens: [1, 10_000_000], seed: [0, Number.MAX_SAFE_INTEGER] });
const KEY = "shoal-settings";

// Every setting from what was stored, each falling back to the standard where it is out of range.
export function checkedSettings(stored) {
  const settings = { ...STANDARD };
  for (const name of Object.keys(RANGES)) {
    const value = stored?.[name];
    if (value === null || isAllowed(name, value)) settings[name] = value ?? STANDARD[name];
  }
  if (typeof stored?.system === "string") settings.system = stored.system;
  if (["auto", "on", "off"].includes(stored?.thinking)) settings.thinking = stored.thinking;
  return settings;
}

export function isAllowed(name, value) {
  const [low, high] = RANGES[name];
  const isWhole = ["max_tokens", "seed"].includes(name);
  return typeof value === "number" && value >= low && value <= high && (!isWhole || Number.isSafeInteger(value));
}

export function lastSettings() {
  try {
    return { ...checkedSettings(JSON.parse(localStorage.getItem(KEY) ?? "{}")), system: "" };
  } catch {
    return { ...STANDARD };
  }
}

export function rememberSettings(settings) {
  try {
    localStorage.setItem(KEY, JSON.stringify(settings));
  } catch {
    // Without storage the next conversation starts from the standard.
  }
}

// The settings as fields of a request; what is empty is left to the server.
export function requestFields(settings) {
  const fields = { temperature: settings.temperature, top_p: settings.top_p };
  if (settings.max_tokens !== null) fields.max_tokens = settings.max_tokens;
  if (settings.seed !== null) fields.seed = settings.seed;
  if (settings.thinking !== "auto") fields.thinking = { type: settings.thinking === "on" ? "enabled" : "disabled" };
  return fields;
}
