// How answers are drawn, kept with each conversation. New conversations start with the values used last.
// 0.6 and 0.95 are what DeepSeek recommends for R1.

export const RANGES = Object.freeze({
  temperature: [0, 2], top_p: [0.01, 1], max_tokens: [1, 10_000_000], seed: [0, Number.MAX_SAFE_INTEGER], top_k: [1, 100_000],
  min_p: [0, 1], repetition_penalty: [0.01, 10], frequency_penalty: [-2, 2], presence_penalty: [-2, 2],
});
const WHOLE = ["max_tokens", "seed", "top_k"];
// Null leaves it to the server.
export const STANDARD = Object.freeze({
  ...Object.fromEntries(Object.keys(RANGES).map((name) => [name, null])), temperature: 0.6, top_p: 0.95, system: "", tools: "", thinking: "auto",
});
const KEY = "shoal-settings";

// Every setting from what was stored, each falling back to the standard where it is out of range.
export function checkedSettings(stored) {
  const settings = { ...STANDARD };
  for (const name of Object.keys(RANGES)) {
    const value = stored?.[name];
    if (value === null || isAllowed(name, value)) settings[name] = value ?? STANDARD[name];
  }
  for (const name of ["system", "tools"]) if (typeof stored?.[name] === "string") settings[name] = stored[name];
  if (["auto", "on", "off"].includes(stored?.thinking)) settings.thinking = stored.thinking;
  return settings;
}

export const isWhole = (name) => WHOLE.includes(name);

export function isAllowed(name, value) {
  const [low, high] = RANGES[name];
  return typeof value === "number" && value >= low && value <= high && (!isWhole(name) || Number.isSafeInteger(value));
}

export function lastSettings() {
  try {
    return { ...checkedSettings(JSON.parse(localStorage.getItem(KEY) ?? "{}")), system: "", tools: "" };
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
  const fields = {};
  for (const name of Object.keys(RANGES)) if (settings[name] !== null) fields[name] = settings[name];
  const { tools } = readTools(settings.tools);
  if (tools.length) fields.tools = tools;
  if (settings.thinking !== "auto") fields.thinking = { type: settings.thinking === "on" ? "enabled" : "disabled" };
  return fields;
}

// Functions that the model may ask for, from a JSON list of what OpenAI's API calls tools, or of their functions alone.
export function readTools(text) {
  if (!text.trim()) return { tools: [], wrong: "" };
  let list;
  try {
    list = JSON.parse(text);
  } catch (error) {
    return { tools: [], wrong: `this is no JSON (${error.message})` };
  }
  if (!Array.isArray(list)) list = [list];
  const tools = list.map((one) => ({ type: "function", function: one?.function ?? one }));
  const nameless = tools.some((tool) => !/^[\w-]{1,64}$/.test(tool.function?.name ?? ""));
  if (nameless) return { tools: [], wrong: "each function needs a name of up to 64 letters, digits, _ and -" };
  return { tools, wrong: "" };
}
