// Markdown's blocks: headings, paragraphs, lists, quotes, code, tables, rules, displayed formulas. Text in, plain objects
// out; every block keeps its source, so that a growing answer redraws only what changed.
//
// Differs from CommonMark, because chat models write this way: HTML is text; four spaces make no code block; a line of
// dashes under text is a rule and not a heading; two spaces are enough to nest a list.

const MAX_DEPTH = 8; // deeper quotes and lists are shown flat; a model can open thousands
const MAX_FORMULA_LINES = 100;
const FENCE = /^ {0,3}(`{3,}|~{3,})[ \t]*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})(?:[ \t]+(.*))?$/;
const ITEM = /^( *)([-*+]|\d{1,9}[.)])(?:( +)(.*))?$/;
const MATH_PAIRS = [["$$", "$$"], ["\\[", "\\]"]];

export function parseBlocks(text, depth = 0) {
  const lines = text.replaceAll("\r\n", "\n").replaceAll("\t", "    ").split("\n");
  const blocks = [];
  for (let at = 0; at < lines.length;) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const [block, next] = blockAt(lines, at, depth);
    blocks.push({ ...block, source: lines.slice(at, next).join("\n") });
    at = next;
  }
  return blocks;
}

function blockAt(lines, at, depth) {
  return fencedCode(lines, at) ?? displayedMath(lines, at) ?? heading(lines, at) ?? rule(lines, at)
    ?? (depth < MAX_DEPTH ? quote(lines, at, depth) ?? list(lines, at, depth) : null)
    ?? table(lines, at) ?? paragraph(lines, at, depth);
}

function fencedCode(lines, at) {
  const opening = FENCE.exec(lines[at]);
  if (!opening) return null;
  const [, fence, about] = opening;
  const indent = lines[at].indexOf(fence);
  let end = at + 1;
  while (end < lines.length && !closesFence(lines[end], fence)) end += 1;
  const text = lines.slice(at + 1, end).map((line) => line.slice(Math.min(indent, line.search(/\S|$/)))).join("\n");
  return [{ kind: "code", language: about.trim().split(/\s/)[0], text }, Math.min(end + 1, lines.length)];
}

function closesFence(line, fence) {
  const text = line.trim();
  return text.length >= fence.length && text === fence[0].repeat(text.length);
}

// A formula of its own, on one line or until its closing line; it ends at an empty line at the latest.
function displayedMath(lines, at) {
  const start = lines[at].trim();
  for (const [open, close] of MATH_PAIRS) {
    if (!start.startsWith(open)) continue;
    let text = start.slice(open.length);
    for (let end = at; end < Math.min(lines.length, at + MAX_FORMULA_LINES) && lines[end].trim(); end += 1) {
      if (end > at) text += `\n${lines[end].trim()}`;
      if (!text.endsWith(close)) continue;
      const formula = text.slice(0, -close.length);
      return formula.includes(close) || !formula.trim() ? null : [{ kind: "math", text: formula.trim() }, end + 1];
    }
  }
  return null;
}

function heading(lines, at) {
  const found = HEADING.exec(lines[at]);
  if (!found) return null;
  const text = (found[2] ?? "").trim();
  const trailing = /^#+$/.test(text) ? "" : text.replace(/ #+$/, "");
  return [{ kind: "heading", level: found[1].length, text: trailing }, at + 1];
}

function isRule(line) {
  const marks = line.replaceAll(" ", "");
  return marks.length >= 3 && "-*_".includes(marks[0]) && marks === marks[0].repeat(marks.length);
}

function rule(lines, at) {
  return isRule(lines[at]) ? [{ kind: "rule" }, at + 1] : null;
}

function quote(lines, at, depth) {
  let end = at;
  while (end < lines.length && /^ {0,3}>/.test(lines[end])) end += 1;
  if (end === at) return null;
  const inner = lines.slice(at, end).map((line) => line.replace(/^ {0,3}> ?/, "")).join("\n");
  return [{ kind: "quote", blocks: parseBlocks(inner, depth + 1) }, end];
}

function itemAt(line) {
  const found = isRule(line) ? null : ITEM.exec(line);
  if (!found) return null;
  const [, spaces, marker, gap = " ", text = ""] = found;
  const ordered = /\d/.test(marker);
  const offset = spaces.length + marker.length + (gap.length > 4 ? 1 : gap.length);
  return { indent: spaces.length, marker, ordered, style: ordered ? marker.at(-1) : marker, offset, text };
}

function list(lines, at, depth) {
  const first = itemAt(lines[at]);
  if (!first) return null;
  const items = [];
  let isTight = true;
  let end = at;
  while (end < lines.length) {
    const item = itemAt(lines[end]);
    if (!item || item.style !== first.style || item.indent > first.indent + 1 || item.indent < first.indent) break;
    const next = endOfItem(lines, end, item);
    const inner = [item.text, ...lines.slice(end + 1, next).map((line) => dedented(line, item.offset))];
    isTight &&= !inner.some((line, index) => !line.trim() && index > 0 && index < inner.length - 1);
    items.push(listItem(inner.join("\n"), depth));
    end = afterEmptyLines(lines, next);
    if (end > next && end < lines.length && itemAt(lines[end])?.style === first.style) isTight = false;
  }
  while (end > at && !lines[end - 1].trim()) end -= 1;
  return [{ kind: "list", ordered: first.ordered, start: parseInt(first.marker, 10) || 0, isTight, items }, end];
}

function endOfItem(lines, at, item) {
  let end = at + 1;
  for (; end < lines.length; end += 1) {
    const line = lines[end];
    if (!line.trim()) continue;
    const indent = line.search(/\S/);
    if (indent >= Math.min(item.offset, item.indent + 2)) continue;
    const followsText = lines[end - 1].trim() !== "";
    if (!followsText || itemAt(line) || startsBlock(lines, end)) break;
  }
  while (end > at + 1 && !lines[end - 1].trim()) end -= 1;
  return end;
}

function dedented(line, offset) {
  return line.slice(Math.min(offset, line.search(/\S|$/)));
}

function afterEmptyLines(lines, at) {
  let next = at;
  while (next < lines.length && !lines[next].trim()) next += 1;
  return next;
}

function listItem(text, depth) {
  const task = /^\[([ xX])\] /.exec(text);
  const rest = task ? text.slice(4) : text;
  return { isDone: task ? task[1] !== " " : null, blocks: parseBlocks(rest, depth + 1) };
}

function table(lines, at) {
  if (!isTableHead(lines, at)) return null;
  const head = cells(lines[at]);
  const align = cells(lines[at + 1]).map((cell) => {
    if (!cell.endsWith(":")) return "left";
    return cell.startsWith(":") ? "center" : "right";
  });
  const rows = [];
  let end = at + 2;
  for (; end < lines.length && lines[end].trim() && lines[end].includes("|"); end += 1) {
    const row = cells(lines[end]);
    rows.push(head.map((_, column) => row[column] ?? ""));
  }
  return [{ kind: "table", head, align, rows }, end];
}

function isTableHead(lines, at) {
  if (!lines[at].includes("|") || at + 1 >= lines.length || !/^[\s|:-]*-[\s|:-]*$/.test(lines[at + 1])) return false;
  const below = cells(lines[at + 1]);
  return below.length === cells(lines[at]).length && below.every((cell) => /^:?-+:?$/.test(cell));
}

// The cells of a row; a bar inside code or behind a backslash does not part cells.
function cells(line) {
  const parts = [""];
  let inCode = false;
  for (let at = 0; at < line.length; at += 1) {
    if (line[at] === "\\" && line[at + 1] === "|") {
      parts[parts.length - 1] += "|";
      at += 1;
    } else if (line[at] === "|" && !inCode) {
      parts.push("");
    } else {
      if (line[at] === "`") inCode = !inCode && line.includes("`", at + 1);
      parts[parts.length - 1] += line[at];
    }
  }
  const trimmed = parts.map((part) => part.trim());
  if (trimmed[0] === "") trimmed.shift();
  if (trimmed.at(-1) === "") trimmed.pop();
  return trimmed;
}

function paragraph(lines, at, depth) {
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !startsBlock(lines, end) && !startsList(lines[end], depth)) end += 1;
  return [{ kind: "paragraph", text: lines.slice(at, end).map((line) => line.trim()).join("\n") }, end];
}

function startsBlock(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || isRule(line) || /^ {0,3}>/.test(line) || isTableHead(lines, at)
    || displayedMath(lines, at) !== null;
}

// "1986. A good year" inside a paragraph is text: only a list that begins at 1 may interrupt one.
function startsList(line, depth) {
  const item = depth < MAX_DEPTH ? itemAt(line) : null;
  return item !== null && item.text !== "" && (!item.ordered || parseInt(item.marker, 10) === 1);
}
