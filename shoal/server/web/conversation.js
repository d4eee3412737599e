// A conversation is a tree: editing a question or asking again grows a sibling, and nothing is ever overwritten. What is
// seen is one path through it, from the root along the chosen children.

export function newConversation(settings) {
  const now = Date.now();
  return { id: crypto.getRandomValues(new Uint32Array(4)).join("-"), title: "", created: now, updated: now, settings, nodes: {}, chosen: {} };
}

// A message below `parent` (an id, or null for a first one); it becomes the chosen one.
export function addMessage(conversation, parent, role, content) {
  const order = Object.keys(conversation.nodes).length;
  const id = `${order}-${crypto.getRandomValues(new Uint32Array(2)).join("-")}`;
  const node = { id, parent, role, content, order, created: Date.now() };
  conversation.nodes[id] = node;
  choose(conversation, node);
  conversation.updated = Date.now();
  return node;
}

export function choose(conversation, node) {
  conversation.chosen[node.parent ?? "root"] = node.id;
}

// The node and its siblings, oldest first.
export function siblings(conversation, node) {
  return childrenByParent(conversation).get(node.parent ?? "root");
}

// The messages on screen, first to last.
export function visiblePath(conversation) {
  const children = childrenByParent(conversation);
  const path = [];
  for (let at = "root"; children.has(at); at = path.at(-1).id) {
    const among = children.get(at);
    path.push(among.find((node) => node.id === conversation.chosen[at]) ?? among.at(-1));
  }
  return path;
}

function childrenByParent(conversation) {
  const children = new Map();
  for (const node of Object.values(conversation.nodes)) {
    const parent = node.parent ?? "root";
    if (!children.has(parent)) children.set(parent, []);
    children.get(parent).push(node);
  }
  for (const among of children.values()) among.sort((one, other) => one.order - other.order || one.created - other.created);
  return children;
}

// What the model is shown before it writes `answer`: everything above it, without thinking, as the chat format wants.
export function requestMessages(conversation, answer) {
  const messages = [];
  let after = answer;
  for (let node = conversation.nodes[answer.parent]; node; node = conversation.nodes[node.parent]) {
    messages.unshift(...asSent(node, after));
    after = node;
  }
  const system = conversation.settings.system.trim();
  return system ? [{ role: "system", content: system }, ...messages] : messages;
}

function asSent(node, after) {
  const { role, content } = node;
  if (role === "tool") return node.results.map((result) => ({ role, tool_call_id: result.id, content: result.content }));
  // Calls without results are no part of the history: the format wants a result for each.
  if (role === "assistant" && after.role === "tool") return [{ role, content, tool_calls: node.calls.map(callAsSent) }];
  if (role === "assistant" && !content) return []; // it failed or was stopped before its first word
  return [{ role, content }];
}

function callAsSent({ id, name, arguments: text }) {
  return { id, type: "function", function: { name, arguments: text } };
}

export function titleOf(conversation) {
  if (conversation.title) return conversation.title;
  const first = visiblePath(conversation).find((node) => node.role === "user");
  if (!first) return "New conversation";
  const line = first.content.trim().replace(/\s+/g, " ");
  return line.length > 60 ? `${line.slice(0, 59)}…` : line;
}

export function matches(conversation, words) {
  const needle = words.trim().toLowerCase();
  if (!needle) return true;
  const texts = Object.values(conversation.nodes).map((node) => node.content);
  return [titleOf(conversation), ...texts].some((text) => text.toLowerCase().includes(needle));
}

// Two tabs may have grown the same tree: every message of both, the stored one where both have it, save for those that
// this tab is `writing` (their ids).
export function mergedNodes(stored, mine, writing) {
  const own = Object.fromEntries(Object.entries(mine.nodes).filter(([id]) => writing.has(id)));
  return { ...mine.nodes, ...stored.nodes, ...own };
}

// Whether something read back from the browser's storage is a conversation that this page can show. A message lies under
// its own id, so that no chain of parents can run in a circle.
export function isConversation(value) {
  if (!isRecord(value) || typeof value.id !== "string" || typeof value.title !== "string") return false;
  if (![value.settings, value.nodes, value.chosen].every(isRecord)) return false;
  return Object.entries(value.nodes).every(([id, node]) => isRecord(node) && node.id === id && isMessage(node));
}

function isMessage({ role, content, parent, reasoning = "", calls = [], results = [] }) {
  const texts = (list, ...keys) => Array.isArray(list) && list.every((one) => keys.every((key) => typeof one?.[key] === "string"));
  return ["user", "assistant", "tool"].includes(role) && [content, reasoning, parent ?? ""].every((text) => typeof text === "string")
    && texts(calls, "id", "name", "arguments") && texts(results, "id", "name", "content");
}

const isRecord = (value) => typeof value === "object" && value !== null && !Array.isArray(value);
