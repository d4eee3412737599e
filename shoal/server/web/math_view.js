// Formulas as MathML, which browsers set themselves: no fonts to load and read aloud by screen readers.
import { element, math } from "./dom.js";
import { parseFormula, UnknownFormula } from "./math_parse.js";
import { styled } from "./math_symbols.js";

// A formula node; one that cannot be read is shown as its source.
export function formula(text, { display, source }) {
  try {
    const body = draw(parseFormula(text), { display, style: "" });
    return math("math", { display: display ? "block" : "inline", alttext: text }, body);
  } catch (error) {
    if (!(error instanceof UnknownFormula)) throw error;
    return element("code", { class: "formula-source", title: "This formula is shown as it was written" }, source);
  }
}

const DRAW = {
  row: drawRow,
  number: (node, { style }) => math("mn", {}, letters(node.text, style)),
  letter: drawLetter,
  operator: drawOperator,
  big: (node) => math("mo", { largeop: "true", movablelimits: "false" }, node.text),
  function: (node) => math("mrow", {}, math("mi", { mathvariant: "normal" }, node.text), math("mspace", { width: "0.12em" })),
  space: (node) => math("mspace", { width: `${node.width}em` }),
  text: (node) => math("mtext", { class: node.isBold ? "bold" : null }, node.text.replaceAll(" ", "\u00a0")),
  style: (node, context) => draw(node.body, { ...context, style: node.style }),
  fraction: (node, context) => {
    const inner = { ...context, display: false };
    return math("mfrac", { linethickness: node.isBare ? "0" : null }, draw(node.upper, inner), draw(node.lower, inner));
  },
  root: (node, context) => (node.index
    ? math("mroot", {}, draw(node.body, context), draw(node.index, context))
    : math("msqrt", {}, draw(node.body, context))),
  fence: (node, context) => math("mrow", {}, fence(node.open), draw(node.body, context), fence(node.close)),
  accent: (node, context) => {
    const mark = math("mo", { stretchy: /[¯→_⏞⏟]/.test(node.mark) ? "true" : "false" }, node.mark);
    return math(node.isUnder ? "munder" : "mover", { accent: node.isUnder ? null : "true" }, draw(node.body, context), mark);
  },
  boxed: (node, context) => math("mrow", { class: "boxed" }, draw(node.body, context)),
  stacked: (node, context) => math(node.upper ? "mover" : "munder", {}, draw(node.base, context), draw(node.upper ?? node.lower, context)),
  scripts: drawScripts,
  table: drawTable,
};

function draw(node, context) {
  return DRAW[node.kind](node, context);
}

// A sign that follows nothing it could join belongs to what comes after it: = −x, (−1).
function drawRow(node, context) {
  const isOpen = (before) => before === undefined || before.kind === "space" || (before.kind === "operator" && !/[)\]}!′]/.test(before.text));
  const drawn = node.children.map((child, index) => {
    const part = draw(child, context);
    if (/^[−+±∓]$/.test(child.text ?? "") && isOpen(node.children[index - 1])) part.setAttribute("form", "prefix");
    return part;
  });
  return math("mrow", {}, ...drawn);
}

function letters(text, style) {
  return [...text].map((character) => styled(character, style)).join("");
}

function drawLetter(node, { style }) {
  const isUpright = node.isUpright || style === "upright" || styled(node.text, style) !== node.text;
  return math("mi", { mathvariant: isUpright ? "normal" : null }, letters(node.text, style));
}

function drawOperator(node) {
  const isBar = node.text === "|" || node.text === "‖"; // it may open or close, which only its reader knows
  const space = isBar ? "0" : null;
  return math("mo", { stretchy: node.isFixed || /[()[\]|]/.test(node.text) ? "false" : null, lspace: space, rspace: space }, node.text);
}

function fence(text) {
  return text ? math("mo", { fence: "true", stretchy: "true" }, text) : null;
}

function drawScripts({ base, lower, upper }, context) {
  const isAround = base.kind === "accent" || (base.hasLimits && context.display);
  const [both, onlyLower, onlyUpper] = isAround ? ["munderover", "munder", "mover"] : ["msubsup", "msub", "msup"];
  const parts = [lower, upper].filter(Boolean).map((part) => draw(part, { ...context, display: false }));
  const tag = lower && upper ? both : lower ? onlyLower : onlyUpper;
  // The space after a function belongs behind its index.
  const drawn = base.kind === "function" ? math("mi", { mathvariant: "normal" }, base.text) : draw(base, context);
  return math(tag, {}, drawn, ...parts);
}

function drawTable({ rows, align }, context) {
  const side = (column) => (align === "alternating" ? (column % 2 ? "left" : "right") : align);
  const cell = (child, column) => math("mtd", { class: `align-${side(column)}` }, draw(child, context));
  return math("mtable", { class: `columns-${align}` }, ...rows.map((row) => math("mtr", {}, ...row.map(cell))));
}
