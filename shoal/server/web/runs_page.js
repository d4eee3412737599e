// The Runs page: which runs there are, and of one of them curves, expert load, stages and samples, live while it goes on.
import { LineChart, Legend } from "./chart.js";
import { connectionLost } from "./connection.js";
import { byId, element, setText } from "./dom.js";
import { counted, duration, energy } from "./facts.js";
import { ExpertLoad } from "./heat_map.js";
import { askForKey } from "./key_dialog.js";
import { RunFeed } from "./run_feed.js";
import { SamplesView } from "./samples_view.js";
import { getJson } from "./server.js";

const LIST_MS = 15_000;

// Metrics as training writes them, in the order in which they are shown. What training and RL both write stands apart
// (isOfRl), since a step of the one is not a step of the other.
const CHARTS = [
  { key: "loss", title: "Loss", about: "Training loss, nats per token" },
  { key: "eval_loss", title: "Held-out loss", about: "Nats per token on text that is not trained on" },
  { key: "eval_bits_per_byte", title: "Bits per byte", about: "On held-out text" },
  { key: "accuracy", title: "Accuracy", about: "Share of right answers in the step's rollouts", fromZero: true },
  { key: "reward", title: "Reward", about: "Mean over the step's rollouts", fromZero: true },
  { key: "response_tokens", title: "Response length", about: "Mean tokens per answer", fromZero: true },
  { key: "max_vio", title: "MaxVio", about: "How far the busiest expert lies above an even share; 0 is balanced", fromZero: true, isOfRl: false },
  { key: "max_vio", title: "MaxVio in RL", about: "As above, while learning by reinforcement", fromZero: true, isOfRl: true },
  { key: "entropy", title: "Entropy", about: "Of the policy, nats per token", fromZero: true },
  { key: "kl", title: "KL to the reference", isDullAtZero: true, fromZero: true },
  { key: "mtp_acceptance", title: "MTP acceptance", about: "Share of the extra predictions that hold", fromZero: true },
  { key: "grad_norm", title: "Gradient norm", fromZero: true, isOfRl: false },
  { key: "grad_norm", title: "Gradient norm in RL", fromZero: true, isOfRl: true },
  { key: "tokens_per_s", title: "Tokens per second", about: "Training", fromZero: true },
  { key: "rollout_tokens_per_s", title: "Rollout tokens per second", fromZero: true },
  { key: "learning_rate", title: "Learning rate", fromZero: true },
];

export class RunsPage {
  constructor() {
    this.feed = null;
    this.timer = 0;
    this.parts = null;
  }

  // Opens the page on a run, or on the newest when `name` is empty.
  async open(name) {
    this.isOpen = true;
    this.wanted = name;
    await this.list();
  }

  close() {
    this.isOpen = false;
    clearTimeout(this.timer);
    this.feed?.close();
    this.feed = null;
  }

  async list() {
    clearTimeout(this.timer);
    let runs;
    try {
      ({ runs } = await getJson("/api/runs"));
    } catch (error) {
      this.fail(error);
      return;
    }
    if (!this.isOpen) return;
    this.timer = setTimeout(() => this.list(), LIST_MS);
    const name = this.wanted || runs[0]?.name || "";
    byId("run-list").replaceChildren(...runs.map((run) => entry(run, name)));
    this.say(runs.length ? "" : "There are no runs yet. Start one, for example with “shoal run demo”; it appears here by itself.");
    byId("run").hidden = runs.length === 0;
    if (name && this.feed?.name !== name) this.show(name);
  }

  show(name) {
    this.feed?.close();
    this.parts = runParts(() => this.draw());
    this.lines = [];
    byId("run").replaceChildren(...this.parts.nodes);
    this.parts.heading.textContent = name;
    this.feed = new RunFeed(name, {
      metrics: (lines) => { this.lines = lines; this.draw(); },
      about: (run) => this.showAbout(run),
      samples: (groups) => this.parts.samples.update(groups),
      failed: (error) => this.fail(error),
    });
  }

  draw() {
    const stages = [...new Set(this.lines.map((line) => line.stage).filter((stage) => typeof stage === "string"))];
    const { charts, legend, heat, empty, now } = this.parts;
    setText(now, newest(this.lines.at(-1)));
    legend.update(stages);
    for (const { key, isOfRl, chart } of charts) {
      const series = stages.map((name, slot) => ({ name, slot, points: pointsOf(this.lines, name, key) }));
      const belongs = (name) => isOfRl === undefined || isOfRl === name.startsWith("rl");
      chart.update(series.filter(({ name }) => belongs(name) && legend.shows(name)));
    }
    heat.update(this.lines.filter((line) => legend.shows(line.stage) && isLoad(line.expert_load))
      .map(({ stage, step, expert_load: load }) => ({ stage, step, load })));
    empty.hidden = this.lines.length > 0;
  }

  showAbout(run) {
    const { status, stages } = this.parts;
    const age = run.idle_s < 5 ? "just now" : `${duration(Math.round(run.idle_s))} ago`;
    setText(status, `${run.recipe ? `recipe ${run.recipe} · ` : ""}${run.is_live ? "going on · " : ""}last written ${age}`);
    status.classList.toggle("live", run.is_live);
    stages.hidden = run.stages.length === 0;
    stages.querySelector("tbody").replaceChildren(...run.stages.map(stageRow));
    this.say("");
  }

  fail(error) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.list(), LIST_MS);
    if (error.status === 401) askForKey(error.message).then(() => this.list());
    if (error.status === 0) connectionLost();
    const without = "This server shows no runs. Start it with --runs-dir and the directory that holds them.";
    const gone = "This run is no longer there. Choose another.";
    this.say(error.status === 404 ? (this.feed ? gone : without) : error.message);
  }

  say(text) {
    byId("runs-note").hidden = !text;
    setText(byId("runs-note"), text);
  }
}

function runParts(redraw) {
  const charts = CHARTS.map((about) => ({ ...about, chart: new LineChart(about) }));
  const parts = {
    charts,
    legend: new Legend(redraw),
    heat: new ExpertLoad(),
    samples: new SamplesView(),
    heading: element("h2"),
    status: element("p", { class: "quiet status" }),
    now: element("p", { class: "now" }),
    empty: element("p", { class: "quiet" }, "No metrics yet; the first lines come after a few steps."),
    stages: stageTable(),
  };
  for (const { chart } of charts) chart.root.hidden = true;
  for (const part of [parts.heat, parts.samples]) part.root.hidden = true;
  const figures = element("div", { class: "figures" }, ...charts.map(({ chart }) => chart.root));
  const head = element("div", { class: "run-head" }, parts.heading, parts.status, parts.now);
  parts.nodes = [head, parts.empty, parts.legend.root, figures, parts.heat.root, parts.stages, parts.samples.root];
  return parts;
}

function entry(run, current) {
  const mark = run.is_live ? element("span", { class: "busy", role: "img", "aria-label": "going on" }) : null;
  const link = element("a", { "aria-current": run.name === current ? "true" : null, title: run.recipe || null }, mark, run.name);
  link.setAttribute("href", `#/runs/${encodeURIComponent(run.name)}`);
  return element("li", {}, link);
}

// Where the run stands, by its last line.
function newest({ stage, step, tokens, peak_memory_bytes: memory } = {}) {
  if (typeof stage !== "string" || typeof step !== "number") return "";
  const facts = [stage, `step ${step}`];
  if (typeof tokens === "number") facts.push(`${counted(tokens)} tokens`);
  if (typeof memory === "number") facts.push(`at most ${counted(memory)}B of memory`);
  return facts.join(" · ");
}

function stageTable() {
  const head = ["Stage", "Time", "Energy", "Result"].map((text) => element("th", { scope: "col" }, text));
  const table = element("table", {}, element("thead", {}, element("tr", {}, ...head)), element("tbody"));
  return element("div", { class: "table", tabindex: 0, role: "region", "aria-label": "Stages", hidden: true }, table);
}

function stageRow({ name, wall_s: wall, energy_j: used, energy_kind: kind, done, result }) {
  const joules = typeof used === "number" ? `${energy(used)}${kind === "modelled" ? " (modelled)" : ""}` : "";
  const outcome = typeof result === "string" ? result : done ? "done" : "not finished";
  const cells = [name, typeof wall === "number" ? duration(wall) : "", joules, outcome];
  return element("tr", {}, ...cells.map((text) => element("td", {}, String(text))));
}

function pointsOf(lines, stage, key) {
  return lines.filter((line) => line.stage === stage && typeof line[key] === "number" && typeof line.step === "number")
    .map((line) => [line.step, line[key]]);
}

function isLoad(load) {
  return Array.isArray(load) && load.length > 0
    && load.every((row) => Array.isArray(row) && row.length > 0 && row.every((share) => typeof share === "number"));
}
