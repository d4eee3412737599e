// Markdown inside a line: emphasis, code, links, formulas. Text in, a tree of plain objects and strings out; the work
// grows with the length of the text, whatever a model writes.
//
// Differs from CommonMark: a line end is a line break, as in chats; a single star between two letters or digits is a
// star, so that 3*4*5 stays a product; images are shown as links, for the page loads nothing from elsewhere.

const PLAIN = /[^\\`*_~[\]!<\n$h]+/y;
const ADDRESS = /https?:\/\/[^\s<>"`]{1,2000}/y;
const ANGLED = /<((?:https?:\/\/|mailto:)[^\s<>]*)>/y;
const PUNCTUATION = /[\p{P}\p{S}]/u;
const MAX_OPEN = 30; // emphasis left open at once; more is text
const MAX_DEPTH = 6; // links in emphasis in links
const MAX_FORMULA = 2000;

export function parseInline(text, depth = 0) {
  return new InlineParser(text, depth).parse();
}

class InlineParser {
  constructor(text, depth) {
    Object.assign(this, { text, depth, at: 0, out: [], openers: [], missingRuns: new Set() });
    this.brackets = depth < MAX_DEPTH ? bracketPairs(text) : new Map();
  }

  parse() {
    while (this.at < this.text.length) {
      PLAIN.lastIndex = this.at;
      const plain = PLAIN.exec(this.text);
      if (plain) this.take(plain[0], plain[0].length);
      else this.special();
    }
    return joined(this.out);
  }

  take(item, length) {
    this.out.push(item);
    this.at += length;
  }

  special() {
    const { text, at } = this;
    const character = text[at];
    const found = (character === "\\" && this.escape()) || (character === "`" && this.code())
      || (character === "$" && this.dollars()) || ("*_~".includes(character) && this.emphasis(character))
      || ((character === "[" || character === "!") && this.linkOrImage()) || (character === "<" && this.angled())
      || (character === "h" && this.bareAddress());
    if (found) return;
    if (character === "\n") this.take({ kind: "break" }, 1);
    else this.take(character, 1);
  }

  escape() {
    const { text, at } = this;
    for (const [open, close] of [["\\(", "\\)"], ["\\[", "\\]"]]) {
      if (!text.startsWith(open, at)) continue;
      const length = text.slice(at + 2, at + 2 + MAX_FORMULA).indexOf(close);
      if (length < 0) continue;
      const source = text.slice(at, at + length + 4);
      this.take({ kind: "math", text: source.slice(2, -2), display: open === "\\[", source }, source.length);
      return true;
    }
    if (!PUNCTUATION.test(text[at + 1] ?? "")) return false;
    this.take(text[at + 1], 2);
    return true;
  }

  code() {
    const { text, at } = this;
    const run = runLength(text, at);
    const end = this.missingRuns.has(run) ? -1 : sameRun(text, at + run, run);
    if (end < 0) {
      this.missingRuns.add(run); // so that a thousand unpaired backticks are not a thousand searches
      this.take("`".repeat(run), run);
      return true;
    }
    const inner = text.slice(at + run, end).replaceAll("\n", " ");
    const padded = inner.startsWith(" ") && inner.endsWith(" ") && inner.trim() !== "";
    this.take({ kind: "code", text: padded ? inner.slice(1, -1) : inner }, end + run - at);
    return true;
  }

  // $x$ is a formula unless it looks like money: no space inside the dollars, no digit after the second.
  dollars() {
    const { text, at } = this;
    const open = text.startsWith("$$", at) ? "$$" : "$";
    let end = text.indexOf(open, at + open.length);
    while (end > 0 && text[end - 1] === "\\") end = text.indexOf(open, end + 1);
    const inner = text.slice(at + open.length, end);
    if (end < 0 || !inner.trim() || inner.length > MAX_FORMULA) return false;
    if (open === "$" && (/^\s|\s$|\n/.test(inner) || /\d/.test(text[end + 1] ?? ""))) return false;
    const source = text.slice(at, end + open.length);
    this.take({ kind: "math", text: inner, display: open === "$$", source }, source.length);
    return true;
  }

  // Delimiter runs pair as they come: a closer takes the nearest opener of its kind, what lies between moves inside.
  emphasis(mark) {
    const { text, at } = this;
    const count = runLength(text, at);
    const { canOpen, canClose } = flanks(text, at, count, mark);
    let left = count;
    if (mark === "~" && count !== 2) {
      this.take(mark.repeat(count), count);
      return true;
    }
    while (canClose && left > 0) {
      const used = this.close(mark, left);
      if (used === 0) break;
      left -= used;
    }
    this.at += count;
    if (left === 0) return true;
    const opener = { kind: "delimiter", mark, count: left };
    this.out.push(opener);
    if (canOpen && this.openers.length < MAX_OPEN) this.openers.push(opener);
    return true;
  }

  close(mark, available) {
    const index = this.openers.findLastIndex((opener) => opener.mark === mark);
    if (index < 0) return 0;
    const opener = this.openers[index];
    const used = opener.count >= 2 && available >= 2 ? 2 : 1;
    this.openers.length = index + 1;
    const children = joined(this.out.splice(this.out.lastIndexOf(opener) + 1));
    opener.count -= used;
    if (opener.count === 0) {
      this.out.pop();
      this.openers.pop();
    }
    this.out.push({ kind: mark === "~" ? "strike" : used === 2 ? "strong" : "emphasis", children });
    return used;
  }

  linkOrImage() {
    const { text, at } = this;
    const isImage = text[at] === "!";
    const open = isImage ? at + 1 : at;
    const close = text[open] === "[" ? this.brackets.get(open) : undefined;
    if (close === undefined || text[close + 1] !== "(") return false;
    const target = linkTarget(text, close + 1);
    if (target === null) return false;
    const label = text.slice(open + 1, close);
    const children = isImage ? [`image: ${label || "without description"}`] : parseInline(label, this.depth + 1);
    this.take({ kind: "link", address: target.address, children, text: label }, target.end - at);
    return true;
  }

  angled() {
    ANGLED.lastIndex = this.at;
    const found = ANGLED.exec(this.text);
    if (!found) return false;
    this.take({ kind: "link", address: found[1], children: [found[1]], text: found[1] }, found[0].length);
    return true;
  }

  bareAddress() {
    const { text, at } = this;
    ADDRESS.lastIndex = at;
    const found = /\w/.test(text[at - 1] ?? "") ? null : ADDRESS.exec(text);
    if (!found) return false;
    const address = withoutSentenceEnd(found[0]);
    this.take({ kind: "link", address, children: [address], text: address }, address.length);
    return true;
  }
}

function runLength(text, at) {
  let end = at;
  while (text[end] === text[at]) end += 1;
  return end - at;
}

function sameRun(text, from, length) {
  for (let at = text.indexOf("`", from); at >= 0;) {
    const run = runLength(text, at);
    if (run === length) return at;
    at = text.indexOf("`", at + run);
  }
  return -1;
}

function flanks(text, at, count, mark) {
  const before = text[at - 1] ?? " ";
  const after = text[at + count] ?? " ";
  const [spaceBefore, spaceAfter] = [/\s/.test(before), /\s/.test(after)];
  const [markBefore, markAfter] = [PUNCTUATION.test(before), PUNCTUATION.test(after)];
  const left = !spaceAfter && (!markAfter || spaceBefore || markBefore);
  const right = !spaceBefore && (!markBefore || spaceAfter || markAfter);
  const isInsideWord = !spaceBefore && !spaceAfter && !markBefore && !markAfter;
  if (isInsideWord && (mark === "_" || count === 1)) return { canOpen: false, canClose: false };
  if (mark === "_") return { canOpen: left && (!right || markBefore), canClose: right && (!left || markAfter) };
  return { canOpen: left, canClose: right };
}

function bracketPairs(text) {
  const pairs = new Map();
  const open = [];
  for (let at = 0; at < text.length; at += 1) {
    if (text[at] === "\\") at += 1;
    else if (text[at] === "[") open.push(at);
    else if (text[at] === "]" && open.length) pairs.set(open.pop(), at);
  }
  return pairs;
}

// "(address)" or "(address "title")" from the opening parenthesis on; parentheses inside may pair.
function linkTarget(text, open) {
  const limit = Math.min(text.length, open + 2000);
  let depth = 0;
  for (let at = open; at < limit && text[at] !== "\n"; at += 1) {
    if (text[at] === "(") depth += 1;
    else if (text[at] === ")" && (depth -= 1) === 0) {
      const inner = text.slice(open + 1, at).trim();
      return { address: inner.split(/\s/)[0].replace(/^<|>$/g, ""), end: at + 1 };
    }
  }
  return null;
}

function withoutSentenceEnd(address) {
  let end = address.length;
  let unpaired = address.split(")").length - address.split("(").length;
  for (; end > 0; end -= 1) {
    const last = address[end - 1];
    if (!".,;:!?'*_~)]}|$".includes(last) || (last === ")" && unpaired <= 0)) break;
    if (last === ")") unpaired -= 1;
  }
  return address.slice(0, end);
}

// Delimiters that found no partner are text after all; neighbouring strings become one.
function joined(items) {
  const out = [];
  for (const item of items) {
    const piece = item.kind === "delimiter" ? item.mark.repeat(item.count) : item;
    if (typeof piece === "string" && typeof out.at(-1) === "string") out[out.length - 1] += piece;
    else out.push(piece);
  }
  return out;
}
