// A short note at the bottom that goes away by itself, with at most one thing to do about it.
import { byId, element } from "./dom.js";

const SHOWN_MS = 10_000;
let timer = 0;

export function toast(text, label = "", action = () => {}) {
  clearTimeout(timer);
  const close = () => byId("toast").replaceChildren();
  const act = label ? element("button", { type: "button", on: { click: () => { close(); action(); } } }, label) : null;
  byId("toast").replaceChildren(element("p", {}, text), act ?? "");
  timer = setTimeout(close, SHOWN_MS);
}
