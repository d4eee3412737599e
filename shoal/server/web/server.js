// Talking to the server: the key, and what went wrong in words that say what to do.

const KEY = "shoal-api-key";

export class RequestFailure extends Error {
  constructor(message, { status = 0 } = {}) {
    super(message);
    this.name = "RequestFailure";
    this.status = status; // 0: the server was not reached or the connection broke
  }
}

export function apiKey() {
  return stored(sessionStorage) || stored(localStorage);
}

export function setApiKey(key, { remember }) {
  for (const storage of [sessionStorage, localStorage]) {
    try {
      storage.removeItem(KEY);
      if (key && storage === (remember ? localStorage : sessionStorage)) storage.setItem(KEY, key);
    } catch {
      // The key then lasts for no longer than this answer; the server will ask again.
    }
  }
}

export async function getJson(path, signal) {
  const response = await request(path, { signal });
  return response.json();
}

export function postJson(path, body, signal) {
  return request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
}

async function request(path, options) {
  const headers = { ...options.headers };
  if (apiKey()) headers.Authorization = `Bearer ${apiKey()}`;
  let response;
  try {
    response = await fetch(path, { ...options, headers, cache: "no-store" });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new RequestFailure("The server cannot be reached. See whether it still runs; this page notices when it is back.");
  }
  if (!response.ok) throw new RequestFailure(inWords(response.status, await saidBy(response)), { status: response.status });
  return response;
}

async function saidBy(response) {
  try {
    const body = await response.json();
    return String(body.error?.message ?? body.detail ?? "");
  } catch {
    return "";
  }
}

const ADVICE = {
  401: "The server wants an API key.",
  402: "The balance of this key is used up; ask the operator to top it up.",
  404: "The server does not know this address; it may be older than this page. Reload the page.",
  413: "The conversation is too large for this server; start a new one or shorten it.",
  429: "Too many requests with this key; wait a moment, then try again.",
  500: "The server failed on this request; its log says why. Try again.",
  503: "The server is busy; wait a moment, then try again.",
};

function inWords(status, said) {
  const advice = ADVICE[status] ?? `The server refused this (status ${status}).`;
  if (!said) return advice;
  // On these the server's own words name the value and what is allowed.
  if (status === 400 || status === 422) return sentence(said);
  return `${advice} It said: ${sentence(said)}`;
}

function sentence(text) {
  const whole = text.trim();
  return /[.!?]$/.test(whole) ? whole : `${whole}.`;
}

function stored(storage) {
  try {
    return storage.getItem(KEY) ?? "";
  } catch {
    return "";
  }
}
