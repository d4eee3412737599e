// Starts the page: which of its two parts the address names, and the keys that work everywhere.
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { icon } from "./icons.js";
import { prepareKeyDialog } from "./key_dialog.js";
import { RunsPage } from "./runs_page.js";

const ICONS = { "open-sidebar": "menu", "open-settings": "settings", "close-settings": "close", jump: "down" };

const chat = new Chat();
const runs = new RunsPage();

function route() {
  const [, part, name = ""] = location.hash.split("/");
  const isRuns = part === "runs";
  byId("chat").hidden = isRuns;
  byId("runs").hidden = !isRuns;
  for (const [id, isCurrent] of [["to-chat", !isRuns], ["to-runs", isRuns]]) {
    if (isCurrent) byId(id).setAttribute("aria-current", "page");
    else byId(id).removeAttribute("aria-current");
  }
  for (const id of ["open-sidebar", "open-settings"]) byId(id).hidden = isRuns;
  if (isRuns) {
    chat.sidebar.close();
    chat.settings.close();
    runs.open(decoded(name));
  } else {
    runs.close();
  }
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

// Escape closes what lies on top first and stops an answer last.
function onKey(event) {
  if (event.key === "Escape" && !document.querySelector("dialog[open]")) {
    if (chat.sidebar.isOpen) chat.sidebar.close();
    else if (chat.answering()) chat.stop();
    else if (chat.settings.isOpen) chat.settings.close();
  }
  const isTyping = event.target.closest?.("input, textarea, select");
  if (event.key === "/" && !isTyping && !byId("chat").hidden) {
    event.preventDefault();
    byId("question").focus();
  }
}

for (const [id, name] of Object.entries(ICONS)) byId(id).append(icon(name));
byId("new-chat").prepend(icon("plus"));
prepareKeyDialog();
document.addEventListener("keydown", onKey);
addEventListener("hashchange", route);
route();
chat.start();
