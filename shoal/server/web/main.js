// Starts the page: which of its parts the address names, and the keys that work everywhere.
import { Chat } from "./chat.js";
import { byId } from "./dom.js";
import { icon } from "./icons.js";
import { prepareKeyDialog } from "./key_dialog.js";
import { PlanPage } from "./plan_page.js";
import { RunsPage } from "./runs_page.js";

const ICONS = { "open-sidebar": "menu", "open-settings": "settings", "close-settings": "close", jump: "down" };

const chat = new Chat();
const runs = new RunsPage();
const plan = new PlanPage();
const PARTS = ["chat", "runs", "plan"];

// #/ is the chat, #/runs/NAME a run, #/plan?model=v3&... a plan.
function route() {
  const [path, query = ""] = location.hash.split("?");
  const [, asked, name = ""] = path.split("/");
  const current = PARTS.includes(asked) ? asked : "chat";
  for (const part of PARTS) {
    byId(part).hidden = part !== current;
    if (part === current) byId(`to-${part}`).setAttribute("aria-current", "page");
    else byId(`to-${part}`).removeAttribute("aria-current");
  }
  for (const id of ["open-sidebar", "open-settings"]) byId(id).hidden = current !== "chat";
  if (current !== "chat") {
    chat.sidebar.close();
    chat.settings.close();
  }
  if (current === "runs") runs.open(decoded(name));
  else runs.close();
  if (current === "plan") plan.open(new URLSearchParams(query));
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
