// The chat page. Everything a model or a person wrote enters the page through textContent, never as markup.
"use strict";

const byId = (id) => document.getElementById(id);
const log = byId("log"), form = byId("form"), question = byId("question");
const messages = [];
let running = null;

async function describe() {
  const facts = await (await fetch("/api/page")).json();
  byId("model").textContent = `${facts.name} · context ${facts.max_context} tokens`;
  byId("description").textContent = facts.description || "A model served from this machine.";
  if (facts.description) {
    byId("reminder").textContent = `${facts.description} Anything else it has never seen.`;
  }
  for (const text of facts.suggestions) {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = text;
    button.addEventListener("click", () => ask(text));
    byId("suggestions").append(button);
  }
}

function ask(text) {
  if (running || !text.trim()) return;
  byId("welcome").hidden = true;
  byId("clear").hidden = false;
  byId("reminder").hidden = !byId("reminder").textContent;
  const bubble = document.createElement("div");
  bubble.className = "question";
  bubble.textContent = text;
  log.append(bubble);
  messages.push({ role: "user", content: text });
  question.value = "";
  resize();
  answer();
}

async function answer() {
  const view = byId("answer").content.cloneNode(true).firstElementChild;
  log.querySelectorAll(".again").forEach((button) => { button.hidden = true; });
  log.append(view);
  busy(new AbortController());
  const state = { started: performance.now(), first: null, thought: null, tokens: 0, reasoning: "", content: "", usage: null };
  try {
    await read(state, view);
  } catch (error) {
    if (error.name !== "AbortError") fail(view, error.message);
  }
  finish(state, view);
}

async function read(state, view) {
  const response = await fetch("/v1/chat/completions", {
    method: "POST",
    headers: { "Content-Type": "application/json" },
    body: JSON.stringify({ messages, stream: true, stream_options: { include_usage: true }, temperature: 0.6 }),
    signal: running.signal,
  });
  if (!response.ok) throw new Error((await response.json()).error.message);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let buffer = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    buffer += value;
    const events = buffer.split("\n\n");
    buffer = events.pop();
    for (const event of events) {
      if (event.startsWith("data: ") && event !== "data: [DONE]") take(JSON.parse(event.slice(6)), state, view);
    }
  }
}

function take(chunk, state, view) {
  if (chunk.error) throw new Error(chunk.error.message);
  if (chunk.usage) state.usage = chunk.usage;
  const delta = chunk.choices.length ? chunk.choices[0].delta : {};
  if (!delta.reasoning_content && !delta.content) return;
  state.first ??= performance.now();
  state.tokens += 1;
  if (delta.reasoning_content) {
    state.reasoning += delta.reasoning_content;
    view.querySelector("details").hidden = false;
    view.querySelector(".reasoning").textContent = state.reasoning;
  } else {
    if (state.reasoning && state.thought === null) settleThinking(state, view);
    state.content += delta.content;
    view.querySelector(".content").textContent = state.content;
  }
  view.querySelector(".facts").textContent = speed(state, state.tokens);
  log.scrollTop = log.scrollHeight;
}

function settleThinking(state, view) {
  state.thought = (performance.now() - state.started) / 1000;
  view.querySelector("summary").textContent = `Thought for ${state.thought.toFixed(1)} s`;
}

function speed(state, tokens) {
  const seconds = (performance.now() - state.started) / 1000;
  return `${tokens} tokens · ${(tokens / seconds).toFixed(0)} tokens/s · first after ${Math.round(state.first - state.started)} ms`;
}

function finish(state, view) {
  if (state.reasoning && state.thought === null) settleThinking(state, view);
  if (state.first !== null) {
    const usage = state.usage;
    const counted = usage ? usage.completion_tokens : state.tokens;
    view.querySelector(".facts").textContent = speed(state, counted) + (usage ? ` · prompt ${usage.prompt_tokens}` : " · stopped");
  }
  messages.push({ role: "assistant", content: state.content });
  const again = view.querySelector(".again");
  again.hidden = false;
  again.addEventListener("click", () => {
    if (running) return;
    messages.pop();
    view.remove();
    answer();
  });
  busy(null);
  question.focus();
}

function fail(view, text) {
  view.classList.add("error");
  view.querySelector(".content").textContent = text;
}

function busy(controller) {
  running = controller;
  byId("send").hidden = Boolean(controller);
  byId("stop").hidden = !controller;
}

function resize() {
  question.style.height = "auto";
  question.style.height = `${question.scrollHeight}px`;
}

form.addEventListener("submit", (event) => { event.preventDefault(); ask(question.value); });
question.addEventListener("input", resize);
question.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); ask(question.value); }
});
document.addEventListener("keydown", (event) => { if (event.key === "Escape" && running) running.abort(); });
byId("stop").addEventListener("click", () => running && running.abort());
byId("clear").addEventListener("click", () => {
  if (running) running.abort();
  messages.length = 0;
  log.querySelectorAll(".question, .answer").forEach((element) => element.remove());
  byId("welcome").hidden = false;
  byId("clear").hidden = true;
});
describe();
