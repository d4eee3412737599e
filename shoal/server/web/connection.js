// Notices when the server is gone and when it is back.
import { byId } from "./dom.js";

const RETRY_MS = 2000;
let lost = false;

export const whenBack = new EventTarget(); // "back" when the server answers again

export function connectionLost() {
  if (lost) return;
  lost = true;
  byId("connection").hidden = false;
  setTimeout(retry, RETRY_MS);
}

async function retry() {
  try {
    await fetch("/health", { cache: "no-store" });
  } catch {
    setTimeout(retry, RETRY_MS);
    return;
  }
  lost = false;
  byId("connection").hidden = true;
  whenBack.dispatchEvent(new Event("back"));
}

addEventListener("offline", () => connectionLost());
