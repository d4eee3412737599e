// The one door into the page: every node is made here. Text becomes text nodes and attributes are set by name, so
// nothing that a model, a file or a person wrote can become markup, a handler, a style or a link. (Links: links.js.)

const SVG = "http://www.w3.org/2000/svg";
const MATHML = "http://www.w3.org/1998/Math/MathML";
const FORBIDDEN = /^(on.*|style|src|srcdoc|href|xlink:href|action|formaction)$/i;

export const byId = (id) => document.getElementById(id);

// element("button", { class: "quiet", type: "button", on: { click } }, "Stop"); false and null leave an attribute out.
export function element(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

export function math(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(MATHML, tag), attributes, children);
}

function fill(node, { on = {}, ...attributes }, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (FORBIDDEN.test(name)) throw new Error(`the attribute ${name} is not set through dom.js`);
    if (value === true) node.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) node.setAttribute(name, String(value));
  }
  for (const [event, handler] of Object.entries(on)) node.addEventListener(event, handler);
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== false));
  return node;
}

// Sets text only where it differs, so that a selection inside survives.
export function setText(node, text) {
  if (node.textContent !== text) node.textContent = text;
}

export function afterFrame(action) {
  let waiting = false;
  return () => {
    if (waiting) return;
    waiting = true;
    // A hidden page draws no frames, but answers must still arrive in it.
    const run = () => { waiting = false; action(); };
    if (document.hidden) setTimeout(run, 200);
    else requestAnimationFrame(run);
  };
}
