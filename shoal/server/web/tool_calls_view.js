// Functions that a model wants called. The page calls nothing: it shows what is asked for, and the person may write what
// came of it, which goes back to the model.
import { element } from "./dom.js";

export class CallsView {
  // `onResults` gets [{ id, name, content }, ...].
  constructor(onResults) {
    this.onResults = onResults;
    this.shown = "";
    this.list = element("div");
    this.submit = element("button", { type: "submit" }, "Send results");
    this.root = element("form", { class: "calls", hidden: true, on: { submit: (event) => this.send(event) } }, this.list, this.submit);
  }

  // `isOpen`: nothing has come of the calls yet, so results may be written.
  update(calls, { isOpen }) {
    this.root.hidden = calls.length === 0;
    this.submit.hidden = !isOpen;
    const now = JSON.stringify([calls, isOpen]);
    if (now === this.shown) return; // what is being typed stays
    this.shown = now;
    this.calls = calls;
    this.fields = calls.map(({ name }) => element("textarea", { rows: 2, "aria-label": `Result of ${name}`, placeholder: "What did it give?" }));
    this.list.replaceChildren(...calls.map((call, index) => card(call, isOpen ? this.fields[index] : null)));
  }

  send(event) {
    event.preventDefault();
    const empty = this.fields.find((field) => !field.value.trim());
    if (empty) empty.focus();
    else this.onResults(this.calls.map(({ id, name }, index) => ({ id, name, content: this.fields[index].value })));
  }
}

function card({ name, arguments: text }, field) {
  const title = element("p", { class: "quiet" }, "Calls ", element("code", {}, name));
  return element("div", { class: "call" }, title, element("pre", { tabindex: 0, "aria-label": `Arguments of ${name}` }, indented(text)), field);
}

// The results that a person wrote, as a message of their own.
export class ResultsView {
  constructor(node) {
    const parts = node.results.map(({ name, content }) => element(
      "div", { class: "call" }, element("p", { class: "quiet" }, "Result of ", element("code", {}, name)), element("pre", { tabindex: 0 }, content),
    ));
    this.root = element("article", { class: "message results", "aria-label": "Results of calls", "data-node": node.id }, ...parts);
  }

  update() {} // results never change
}

function indented(text) {
  try {
    return JSON.stringify(JSON.parse(text), null, 2);
  } catch {
    return text; // still on its way, or not what it should be
  }
}
