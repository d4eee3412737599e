// The panel beside the chat: system prompt, sampling, thinking, and what to take along.
import { byId } from "./dom.js";
import { exportAll, exportJson, exportMarkdown } from "./export.js";
import { isAllowed, isWhole, RANGES, readTools, rememberSettings, STANDARD } from "./settings.js";

const NUMBERS = Object.keys(RANGES);

export class SettingsPanel {
  // `handlers` has changed(conversation) and conversations().
  constructor(handlers) {
    this.handlers = handlers;
    this.panel = byId("settings");
    byId("open-settings").addEventListener("click", () => this.toggle());
    byId("close-settings").addEventListener("click", () => this.close());
    for (const name of NUMBERS) byId(name).addEventListener("input", () => this.takeNumber(name));
    for (const name of ["system", "tools"]) byId(name).addEventListener("input", () => this.take(name, byId(name).value));
    byId("thinking").addEventListener("change", () => this.take("thinking", byId("thinking").value));
    byId("reset-settings").addEventListener("click", () => this.reset());
    byId("export-json").addEventListener("click", () => exportJson(this.conversation));
    byId("export-markdown").addEventListener("click", () => exportMarkdown(this.conversation));
    byId("export-all").addEventListener("click", () => exportAll(handlers.conversations()));
  }

  show(conversation) {
    this.conversation = conversation;
    const { settings } = conversation;
    for (const name of ["system", "tools"]) byId(name).value = settings[name];
    byId("thinking").value = settings.thinking;
    for (const name of NUMBERS) {
      byId(name).value = settings[name] ?? "";
      this.check(name, settings[name]);
    }
    this.showMarks();
  }

  get isOpen() {
    return !this.panel.hidden;
  }

  toggle() {
    if (this.isOpen) this.close();
    else this.open();
  }

  open() {
    this.panel.hidden = false;
    byId("open-settings").setAttribute("aria-expanded", "true");
    byId("close-settings").focus();
  }

  close() {
    if (!this.isOpen) return;
    this.panel.hidden = true;
    byId("open-settings").setAttribute("aria-expanded", "false");
    byId("open-settings").focus();
  }

  takeNumber(name) {
    const text = byId(name).value;
    // A field of type number is empty too while it holds what is no number.
    const value = text === "" && !byId(name).validity.badInput ? STANDARD[name] : Number(text || NaN);
    if (this.check(name, value)) this.take(name, value);
  }

  check(name, value) {
    const isFine = value === null || isAllowed(name, value);
    const [low, high] = RANGES[name];
    this.note(name, isFine ? "" : `Not used: allowed is ${low} to ${high}${isWhole(name) ? ", whole" : ""}.`);
    return isFine;
  }

  note(name, text) {
    byId(name).setAttribute("aria-invalid", String(text !== ""));
    byId(`${name}-note`).hidden = !text;
    byId(`${name}-note`).textContent = text;
  }

  take(name, value) {
    this.conversation.settings[name] = value;
    rememberSettings(this.conversation.settings);
    this.handlers.changed(this.conversation);
    this.showMarks();
  }

  reset() {
    const { system, tools } = this.conversation.settings;
    Object.assign(this.conversation.settings, STANDARD, { system, tools });
    rememberSettings(this.conversation.settings);
    this.handlers.changed(this.conversation);
    this.show(this.conversation);
  }

  showMarks() {
    const { system, tools } = this.conversation.settings;
    const { tools: offered, wrong } = readTools(tools);
    this.note("tools", wrong && `Not used: ${wrong}.`);
    const marks = [system.trim() ? "system prompt on" : "", offered.length ? `${offered.length} ${offered.length > 1 ? "tools" : "tool"} offered` : ""];
    const text = marks.filter(Boolean).join(" · ");
    byId("marks").hidden = !text;
    byId("marks").textContent = text;
  }
}
