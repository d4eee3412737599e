// What the model wrote during a run: texts as they are, with question and reward where these were kept.
import { element } from "./dom.js";
import { rounded } from "./facts.js";

const SHOWN = 20;

export class SamplesView {
  constructor() {
    this.body = element("div", { class: "samples" });
    this.choice = element("select", { "aria-label": "Samples of", on: { change: () => this.draw() } });
    this.root = element("section", { "aria-label": "Sample completions" }, element("h3", {}, "Samples"), this.choice, this.body);
  }

  // `groups` is a list of { name, samples: [{ text, prompt?, reward?, step?, right? }] }, oldest first.
  update(groups) {
    const chosen = this.choice.value;
    this.groups = groups;
    this.root.hidden = groups.length === 0;
    this.choice.replaceChildren(...groups.map(({ name }) => element("option", { value: name }, name)));
    this.choice.value = groups.some(({ name }) => name === chosen) ? chosen : groups.at(-1)?.name ?? "";
    this.draw();
  }

  draw() {
    const group = this.groups.find(({ name }) => name === this.choice.value);
    const newest = (group?.samples ?? []).slice(-SHOWN).reverse();
    this.body.replaceChildren(...newest.map(card));
  }
}

function card({ text, prompt, reward, step, right }) {
  const facts = [];
  if (typeof step === "number") facts.push(`step ${step}`);
  if (typeof reward === "number") facts.push(`reward ${rounded(reward)}`);
  if (typeof right === "boolean") facts.push(right ? "right" : "wrong");
  return element(
    "article", { class: "sample" },
    prompt ? element("p", { class: "sample-prompt" }, prompt) : null,
    element("pre", { tabindex: 0 }, text),
    facts.length ? element("p", { class: "quiet" }, facts.join(" · ")) : null,
  );
}
