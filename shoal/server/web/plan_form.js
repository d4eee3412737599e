// What is asked of the planner: model, hardware, tokens and any assumption, as fields and as the page's address, so that a
// plan can be linked to. Numbers are sent as they were typed; the server knows units (14.8T, 1.1kW) and refuses mistakes.
import { element } from "./dom.js";

const HARDWARE = ["8x h800", "8x h100", "8x h200", "8x h20", "1x rtx4090", "2 cores, 24 GiB"];

export class PlanForm {
  // `options` is what /api/plan/options answered; `onChange` gets the new question as URLSearchParams.
  constructor(options, onChange) {
    this.onChange = onChange;
    const models = options.models.map(({ name, note }) => ({ value: name, text: name, title: note }));
    this.model = select("plan-model", models);
    this.beside = select("plan-beside", [{ value: "", text: "nothing" }, ...models]);
    this.hardware = input("plan-hardware", { list: "plan-hardware-list", placeholder: "assumed" });
    this.tokens = input("plan-tokens", { placeholder: "for example 14.8T" });
    const known = [...HARDWARE, ...options.hardware.map(({ name }) => name)];
    const list = element("datalist", { id: "plan-hardware-list" }, ...known.map((value) => element("option", { value })));
    this.numbers = options.assumptions.filter(({ key }) => key !== "tokens").map((one) => ({ ...one, field: input(`set-${one.key}`, {}) }));
    this.words = options.choices.map((one) => ({
      ...one, field: select(`set-${one.key}`, [{ value: "", text: "" }, ...one.words.map((word) => ({ value: word, text: word }))]),
    }));
    const main = [["Model", this.model], ["Compared with", this.beside], ["Hardware", this.hardware], ["Training tokens", this.tokens]];
    this.root = element(
      "form", { "aria-label": "What to plan", on: { change: () => this.changed(), submit: (event) => { event.preventDefault(); this.changed(); } } },
      element("div", { class: "plan-main" }, ...main.map(([text, field]) => labelled(text, field)), list), this.assumptions(),
    );
  }

  assumptions() {
    this.count = element("span", { class: "quiet" });
    const back = element("button", { type: "button", on: { click: () => this.forget() } }, "Back to the defaults");
    const all = [...this.numbers, ...this.words].map((one) => {
      one.about = element("span", { class: "quiet" }, one.source);
      return element("div", {}, labelled(one.label, one.field), one.about);
    });
    return element(
      "details", { class: "assumptions" }, element("summary", {}, "Assumptions ", this.count), element("div", { class: "assumption-fields" }, ...all), back,
    );
  }

  // Shows a question (URLSearchParams) in the fields.
  show(question) {
    this.model.value = question.get("model") ?? "v3";
    this.beside.value = question.get("beside") ?? "";
    this.hardware.value = question.get("hardware") ?? "";
    this.tokens.value = question.get("tokens") ?? "";
    const given = new Map(question.getAll("set").map((pair) => [pair.split("=", 1)[0], pair.slice(pair.indexOf("=") + 1)]));
    for (const { key, field } of [...this.numbers, ...this.words]) field.value = given.get(key) ?? "";
    this.count.textContent = given.size ? `${given.size} changed` : "";
  }

  // Shows what a plan took for each assumption that is left open.
  tell({ assumptions, choices }) {
    const used = new Map(assumptions.map((one) => [one.key, one]));
    for (const one of this.numbers) {
      const found = used.get(one.key);
      one.field.placeholder = found ? `${Number(found.value.toPrecision(6))} ${found.unit}` : `in ${one.unit}`;
      one.about.textContent = found?.source ?? one.source;
    }
    for (const { key, value } of choices) {
      const choice = this.words.find((one) => one.key === key);
      if (choice) choice.field.options[0].textContent = choice.field.value ? choice.default : value;
    }
  }

  question() {
    const question = new URLSearchParams({ model: this.model.value });
    for (const name of ["beside", "hardware", "tokens"]) if (this[name].value.trim()) question.set(name, this[name].value.trim());
    for (const { key, field } of [...this.numbers, ...this.words]) if (field.value.trim()) question.append("set", `${key}=${field.value.trim()}`);
    return question;
  }

  changed() {
    this.onChange(this.question());
  }

  forget() {
    for (const { field } of [...this.numbers, ...this.words]) field.value = "";
    this.changed();
  }
}

function input(id, attributes) {
  return element("input", { id, type: "text", autocomplete: "off", spellcheck: "false", ...attributes });
}

function select(id, options) {
  return element("select", { id }, ...options.map(({ value, text, title }) => element("option", { value, title: title || null }, text)));
}

function labelled(text, field) {
  return element("label", {}, element("span", {}, text), field);
}
