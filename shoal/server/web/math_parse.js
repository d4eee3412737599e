// The LaTeX that chat models write, as a tree of plain objects. It is a reader of formulas, not TeX: no macros, no files,
// no counters, nothing that runs. What it does not know makes it give up, and the formula is shown as it was written.
import {
  ACCENTS, BIG_OPERATORS, ENVIRONMENTS, FENCES, FUNCTIONS, INTEGRALS, LETTERS, LIMIT_FUNCTIONS, OPERATORS, SPACES, STYLE_COMMANDS, UNDER_ACCENTS,
} from "./math_symbols.js";

const TOKEN = /\\(?:[a-zA-Z]+|[^])|\d+(?:[.,]\d+)*|\s+|[^]/gu;
const MAX_TOKENS = 3000;
const MAX_DEPTH = 40;
const TEXT_COMMANDS = new Set(["text", "textrm", "textbf", "textit", "mbox", "operatorname"]);
const IGNORED = new Set(["displaystyle", "textstyle", "limits", "nolimits", "notag", "nonumber", "left.", "right."]);
const SIZES = new Set("big Big bigg Bigg bigl bigr Bigl Bigr biggl biggr Biggl Biggr middle".split(" "));

export class UnknownFormula extends Error {}

export function parseFormula(source) {
  const tokens = source.match(TOKEN) ?? [];
  if (tokens.length > MAX_TOKENS) throw new UnknownFormula("too long");
  const parser = new Parser(tokens);
  const row = parser.row(() => false);
  if (parser.peek() !== undefined) throw new UnknownFormula(`${parser.peek()} where none belongs`);
  return row;
}

class Parser {
  constructor(tokens) {
    Object.assign(this, { tokens, at: 0, depth: 0 });
  }

  peek() {
    while (/^\s/.test(this.tokens[this.at] ?? "")) this.at += 1;
    return this.tokens[this.at];
  }

  next() {
    const token = this.peek();
    if (token === undefined) throw new UnknownFormula("it ends too early");
    this.at += 1;
    return token;
  }

  expect(wanted) {
    const token = this.next();
    if (token !== wanted) throw new UnknownFormula(`${token} in place of ${wanted}`);
  }

  // Everything up to a token for which `ends` is true; that one is left.
  row(ends) {
    this.depth += 1;
    if (this.depth > MAX_DEPTH) throw new UnknownFormula("too deep");
    const children = [];
    for (let token = this.peek(); token !== undefined && !ends(token) && token !== "}"; token = this.peek()) {
      const node = this.scripted();
      if (node) children.push(node);
    }
    this.depth -= 1;
    return { kind: "row", children };
  }

  scripted() {
    const base = "^_".includes(this.peek()) ? { kind: "row", children: [] } : this.atom();
    const scripts = {};
    for (let token = this.peek(); token === "^" || token === "_" || token === "'" || token === "\\limits"; token = this.peek()) {
      this.next();
      if (token === "\\limits") continue;
      if (token === "'") {
        const prime = { kind: "operator", text: "′" };
        scripts.upper = scripts.upper ? { kind: "row", children: [scripts.upper, prime] } : prime;
      } else {
        const name = token === "^" ? "upper" : "lower";
        if (scripts[name] && name === "lower") throw new UnknownFormula("two indices");
        const script = this.argument();
        scripts[name] = scripts[name] ? { kind: "row", children: [scripts[name], script] } : script;
      }
    }
    return scripts.upper || scripts.lower ? { kind: "scripts", base: base ?? { kind: "row", children: [] }, ...scripts } : base;
  }

  // A group in braces or the one token that stands for it.
  argument() {
    if (this.peek() !== "{") {
      this.depth += 1;
      if (this.depth > MAX_DEPTH) throw new UnknownFormula("too deep");
      const node = this.atom() ?? { kind: "row", children: [] };
      this.depth -= 1;
      return node;
    }
    this.next();
    const row = this.row(() => false);
    this.expect("}");
    return row;
  }

  atom() {
    if (this.peek() === "{") return this.argument();
    const token = this.next();
    if (token[0] === "\\") return this.command(token.slice(1));
    if (/^\d/.test(token)) return { kind: "number", text: token };
    if (/^\p{L}$/u.test(token)) return { kind: "letter", text: token };
    if (token === "&" || token === "}" || token === "#" || token === "$" || token === "%") throw new UnknownFormula(token);
    if (token === "~") return { kind: "space", width: 0.25 };
    return { kind: "operator", text: token === "-" ? "−" : token === "*" ? "∗" : token };
  }

  command(name) {
    if (LETTERS.has(name)) return { kind: "letter", text: LETTERS.get(name), isUpright: /^[A-Z]|infty|partial|nabla|emptyset|forall|exists/.test(name) };
    if (OPERATORS.has(name)) return { kind: "operator", text: OPERATORS.get(name) };
    if (BIG_OPERATORS.has(name)) return { kind: "big", text: BIG_OPERATORS.get(name), hasLimits: true };
    if (INTEGRALS.has(name)) return { kind: "big", text: INTEGRALS.get(name), hasLimits: false };
    if (FUNCTIONS.has(name)) return { kind: "function", text: name };
    if (LIMIT_FUNCTIONS.has(name)) return { kind: "function", text: name, hasLimits: true };
    if (FENCES.has(name)) return { kind: "operator", text: FENCES.get(name), isFixed: true };
    if (SPACES.has(name)) return { kind: "space", width: SPACES.get(name) };
    if (STYLE_COMMANDS.has(name)) return { kind: "style", style: STYLE_COMMANDS.get(name), body: this.argument() };
    if (ACCENTS.has(name)) return { kind: "accent", mark: ACCENTS.get(name), body: this.argument() };
    if (UNDER_ACCENTS.has(name)) return { kind: "accent", isUnder: true, mark: UNDER_ACCENTS.get(name), body: this.argument() };
    if (TEXT_COMMANDS.has(name)) return this.text(name);
    if (SIZES.has(name)) return { kind: "operator", text: this.fence(), isFixed: true };
    if (IGNORED.has(name)) return null;
    return this.construction(name);
  }

  construction(name) {
    if (["frac", "dfrac", "tfrac", "cfrac"].includes(name)) return { kind: "fraction", upper: this.argument(), lower: this.argument() };
    if (["binom", "dbinom", "tbinom"].includes(name)) {
      const column = { kind: "fraction", isBare: true, upper: this.argument(), lower: this.argument() };
      return { kind: "fence", open: "(", close: ")", body: column };
    }
    if (name === "sqrt") return this.root();
    if (name === "left") return this.leftRight();
    if (name === "begin") return this.environment();
    if (name === "boxed" || name === "fbox") return { kind: "boxed", body: this.argument() };
    if (["overset", "stackrel"].includes(name)) return { kind: "stacked", upper: this.argument(), base: this.argument() };
    if (name === "underset") return { kind: "stacked", lower: this.argument(), base: this.argument() };
    if (name === "not") return { kind: "operator", text: `${this.relation()}̸` };
    if (name === "pmod") return { kind: "row", children: [{ kind: "space", width: 0.5 }, { kind: "text", text: "(mod " }, this.argument(), { kind: "text", text: ")" }] };
    if (name === "bmod" || name === "mod") return { kind: "operator", text: "mod" };
    if ("{}%$#&_|".includes(name)) return { kind: "operator", text: name === "|" ? "‖" : name, isFixed: true };
    throw new UnknownFormula(`\\${name}`);
  }

  relation() {
    const node = this.atom();
    if (node?.kind !== "operator") throw new UnknownFormula("\\not");
    return node.text;
  }

  root() {
    let index = null;
    if (this.peek() === "[") {
      this.next();
      index = this.row((token) => token === "]");
      this.expect("]");
    }
    return { kind: "root", index, body: this.argument() };
  }

  fence() {
    const token = this.next();
    if (token === ".") return "";
    if (token === "\\|") return "‖";
    const name = token.replace(/^\\/, "");
    return FENCES.get(name) ?? OPERATORS.get(name) ?? (/^[()[\]{}|/<>]$/.test(name) ? name : this.unknown(token));
  }

  unknown(token) {
    throw new UnknownFormula(`${token} as a bracket`);
  }

  leftRight() {
    const open = this.fence();
    const body = this.row((token) => token === "\\right");
    this.expect("\\right");
    return { kind: "fence", open, close: this.fence(), body };
  }

  // Spaces count inside \text{...}, so the raw tokens are taken.
  text(name) {
    this.expect("{");
    let text = "";
    let open = 1;
    for (; this.at < this.tokens.length; this.at += 1) {
      const token = this.tokens[this.at];
      open += token === "{" ? 1 : token === "}" ? -1 : 0;
      if (open === 0) break;
      text += token.replace(/^\\(?=[^a-zA-Z])/, "");
    }
    this.expect("}");
    return name === "operatorname" ? { kind: "function", text } : { kind: "text", text, isBold: name === "textbf" };
  }

  environment() {
    const name = this.name();
    const fences = ENVIRONMENTS.get(name);
    if (!fences) throw new UnknownFormula(`\\begin{${name}}`);
    if (name === "array" || name === "alignedat") this.name(); // the columns' alignment
    const rows = [[]];
    for (;;) {
      rows.at(-1).push(this.row((token) => token === "&" || token === "\\\\" || token === "\\end" || token === "\\hline"));
      const token = this.next();
      if (token === "\\end") break;
      if (token === "\\\\") rows.push([]);
    }
    if (this.name() !== name) throw new UnknownFormula(`\\end of another than ${name}`);
    const isEmpty = (row) => row.every((cell) => cell.children.length === 0);
    const kept = rows.filter((row, index) => index < rows.length - 1 || !isEmpty(row));
    const align = /align|split/.test(name) ? "alternating" : name === "cases" ? "left" : "center";
    return { kind: "fence", open: fences[0], close: fences[1], body: { kind: "table", rows: kept, align } };
  }

  name() {
    this.expect("{");
    let name = "";
    while (this.peek() !== "}") name += this.next();
    this.expect("}");
    return name;
  }
}
