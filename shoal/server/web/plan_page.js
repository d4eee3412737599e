// The Plan page: what a model costs to train and to serve, what it needs, and why.
import { connectionLost } from "./connection.js";
import { figure } from "./bars.js";
import { byId, element, setText } from "./dom.js";
import { askForKey } from "./key_dialog.js";
import { planCharts, sensitivityChart } from "./plan_charts.js";
import { sectionTable, tiles } from "./plan_figures.js";
import { PlanForm } from "./plan_form.js";
import { getJson } from "./server.js";

const ADDRESS = "/api/plan";

export class PlanPage {
  constructor() {
    this.form = null;
    this.asked = 0; // answers to older questions are dropped
  }

  // Shows the plan that `question` (URLSearchParams) asks for.
  async open(question) {
    this.asked += 1;
    const turn = this.asked;
    try {
      await this.prepare();
      const asked = new URLSearchParams(question);
      if (!asked.get("model")) asked.set("model", "v3");
      this.form.show(asked);
      const answers = await this.answers(asked);
      if (turn === this.asked) this.show(answers);
    } catch (error) {
      if (turn === this.asked) this.fail(error, question);
    }
  }

  async prepare() {
    if (this.form) return;
    const options = await getJson(`${ADDRESS}/options`);
    if (this.form) return;
    this.labels = new Map([...options.assumptions, ...options.choices].map(({ key, label }) => [key, label]));
    this.form = new PlanForm(options, (question) => { location.hash = `#/plan?${question}`; });
    byId("plan-question").replaceChildren(this.form.root);
  }

  async answers(question) {
    const beside = question.get("beside");
    question.delete("beside");
    this.query = String(question);
    const compared = new URLSearchParams(question);
    if (beside) compared.append("model", beside);
    const wanted = [`${ADDRESS}?${question}`, `${ADDRESS}/charts?${question}`, `${ADDRESS}/sensitivity?${question}`];
    const [plan, charts, sensitivity, comparison] = await Promise.all(
      [...wanted.map((address) => getJson(address)), beside ? getJson(`${ADDRESS}/compare?${compared}`) : null],
    );
    return { plan, charts, sensitivity, comparison };
  }

  show({ plan, charts, sensitivity, comparison }) {
    this.say("");
    this.form.tell(plan);
    const figures = new Map(plan.sections.flatMap((section) => section.figures).map((one) => [one.name, one]));
    const assumptions = new Map([...plan.assumptions, ...plan.choices].map((one) => [one.key, one]));
    const context = { figures, assumptions, beside: comparison };
    const hardware = plan.is_hardware_given ? plan.hardware : `${plan.hardware}, assumed`;
    const head = element("div", { class: "run-head" }, element("h2", {}, plan.model), element("p", { class: "quiet" }, `on ${hardware} · ${plan.source}`));
    const notes = [plan.note, ...(comparison?.notes ?? [])].filter(Boolean).map((text) => element("p", { class: "quiet" }, text));
    byId("plan-result").replaceChildren(
      head, ...notes, tiles(figures),
      element("div", { class: "figures" }, ...planCharts(charts), this.sensitivity(sensitivity, figures)),
      element("div", { class: "plan-sections" }, ...plan.sections.filter((one) => one.figures.length).map((one) => sectionTable(one, context))),
    );
    byId("plan-result").hidden = false;
  }

  // Which assumptions matter, for a figure that can be chosen.
  sensitivity(answer, figures) {
    const numbers = [...figures.values()].filter(({ value }) => typeof value === "number");
    const choice = element("select", { "aria-label": "Figure" }, ...numbers.map(({ name, label }) => element("option", { value: name }, label)));
    choice.value = answer.figure;
    const body = element("div", {}, sensitivityChart(answer, (key) => this.labels.get(key) ?? key));
    choice.addEventListener("change", async () => {
      try {
        const other = await getJson(`${ADDRESS}/sensitivity?${this.query}&figure=${encodeURIComponent(choice.value)}`);
        if (other.figure === choice.value) body.replaceChildren(sensitivityChart(other, (key) => this.labels.get(key) ?? key));
      } catch (error) {
        this.say(error.message);
      }
    });
    return figure("What moves it", "Each assumption over what it may honestly be; the line is the plan", choice, body);
  }

  fail(error, question) {
    if (error.status === 0) connectionLost();
    if (error.status === 401) askForKey(error.message).then(() => this.open(question));
    this.say(error.status === 404 ? "This server has no planner; it may be older than this page." : error.message);
    byId("plan-result").hidden = true;
  }

  say(text) {
    byId("plan-note").hidden = !text;
    setText(byId("plan-note"), text);
  }
}
