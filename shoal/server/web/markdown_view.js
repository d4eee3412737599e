// Markdown on the page: blocks become nodes. A growing text keeps the nodes of the blocks it already had, so that a
// selection, an open link or a copy button survives the next token.
import { element } from "./dom.js";
import { copyButton } from "./copying.js";
import { link } from "./links.js";
import { parseBlocks } from "./markdown_blocks.js";
import { parseInline } from "./markdown_inline.js";
import { formula } from "./math_view.js";

const shown = new WeakMap(); // container -> sources of its blocks

export function showMarkdown(container, text) {
  const blocks = parseBlocks(text);
  const before = shown.get(container) ?? [];
  let same = 0;
  while (same < before.length && same < blocks.length && before[same] === keyOf(blocks[same])) same += 1;
  while (container.childNodes.length > same) container.lastChild.remove();
  for (const block of blocks.slice(same)) container.append(blockNode(block));
  shown.set(container, blocks.map(keyOf));
}

const keyOf = (block) => `${block.kind}\n${block.source}`;

function blockNode(block) {
  switch (block.kind) {
    case "heading":
      // The page itself has the first two levels; an answer's headings stand below them.
      return element(`h${Math.min(block.level + 2, 6)}`, { class: `heading-${block.level}` }, ...inlineNodes(block.text));
    case "code":
      return codeNode(block);
    case "math":
      return element("div", { class: "math-block", tabindex: 0 }, formula(block.text, { display: true, source: block.source }));
    case "rule":
      return element("hr");
    case "quote":
      return element("blockquote", {}, ...block.blocks.map(blockNode));
    case "list":
      return listNode(block);
    case "table":
      return tableNode(block);
    default:
      return element("p", {}, ...inlineNodes(block.text));
  }
}

function codeNode({ language, text }) {
  const head = element("figcaption", {}, element("span", {}, language), copyButton(() => text, "Copy code"));
  // Focusable, so that long lines can be scrolled by keyboard.
  return element("figure", { class: "code" }, head, element("pre", { tabindex: 0 }, element("code", {}, text)));
}

function listNode({ ordered, start, isTight, items }) {
  const nodes = items.map((item) => {
    const isBare = isTight && item.blocks[0]?.kind === "paragraph";
    const first = isBare ? inlineNodes(item.blocks[0].text) : [];
    const rest = (isBare ? item.blocks.slice(1) : item.blocks).map(blockNode);
    if (item.isDone === null) return element("li", {}, ...first, ...rest);
    const box = element("input", { type: "checkbox", disabled: true, checked: item.isDone, "aria-label": item.isDone ? "done" : "open" });
    return element("li", { class: "task" }, box, ...first, ...rest);
  });
  return element(ordered ? "ol" : "ul", { start: ordered && start !== 1 ? start : null }, ...nodes);
}

function tableNode({ head, align, rows }) {
  const cell = (tag) => (text, column) => element(tag, { class: `align-${align[column]}` }, ...inlineNodes(text));
  const body = rows.map((row) => element("tr", {}, ...row.map(cell("td"))));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head.map(cell("th")))), element("tbody", {}, ...body));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Table" }, table);
}

const inlineNodes = (text) => parseInline(text).map(inlineNode);

const TAGS = { strong: "strong", emphasis: "em", strike: "s" };

function inlineNode(item) {
  if (typeof item === "string") return document.createTextNode(item);
  if (item.kind === "break") return element("br");
  if (item.kind === "code") return element("code", {}, item.text);
  if (item.kind === "math") return formula(item.text, { display: item.display, source: item.source });
  const children = item.children.map(inlineNode);
  if (item.kind === "link") return link(item.address, children, item.text);
  return element(TAGS[item.kind], {}, ...children);
}
