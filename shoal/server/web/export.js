// Conversations as files: JSON holds every branch, Markdown what is on screen.
import { titleOf, visiblePath } from "./conversation.js";
import { factsOf, duration } from "./facts.js";
import { download } from "./links.js";

export function exportJson(conversation) {
  download(`${fileName(conversation)}.json`, "application/json", JSON.stringify(conversation, null, 2));
}

export function exportAll(conversations) {
  download("shoal-conversations.json", "application/json", JSON.stringify({ conversations }, null, 2));
}

export function exportMarkdown(conversation) {
  download(`${fileName(conversation)}.md`, "text/markdown", asMarkdown(conversation));
}

export function asMarkdown(conversation) {
  const parts = [`# ${titleOf(conversation)}`];
  const { system } = conversation.settings;
  if (system.trim()) parts.push("## System prompt", system);
  for (const node of visiblePath(conversation)) {
    parts.push(headOf(node));
    if (node.reasoning) parts.push(quoted(node));
    if (node.content || !node.calls) parts.push(node.content || "*(nothing)*");
    for (const { name, arguments: text } of node.calls ?? []) parts.push(`Calls \`${name}\`:`, "```json\n" + text + "\n```");
    if (node.role === "assistant") parts.push(`*${factsOf(node).join(" · ")}*`);
  }
  return `${parts.filter((part) => part !== "**").join("\n\n")}\n`;
}

function headOf({ role, model }) {
  if (role === "tool") return "## Results of the calls";
  return role === "user" ? "## You" : `## ${model || "Answer"}`;
}

function quoted(node) {
  const title = node.thought_s === undefined ? "Thinking" : `Thought for ${duration(node.thought_s)}`;
  return [`> **${title}**`, ">", ...node.reasoning.trim().split("\n").map((line) => `> ${line}`)].join("\n");
}

function fileName(conversation) {
  const words = titleOf(conversation).toLowerCase().replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-+|-+$/g, "");
  return `shoal-${words.slice(0, 50) || "conversation"}`;
}
