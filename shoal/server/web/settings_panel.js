// The panel beside the chat: system prompt, sampling, thinking, and what to take along.
import { byId } from "./dom.js";
import { exportAll, exportJson, exportMarkdown } from "./export.js";
import { isAllowed, RANGES, rememberSettings, STANDARD } from "./settings.js";

const NUMBERS = Object.keys(RANGES);

export class SettingsPanel {
  // `handlers` has changed(conversation) and conversations().
  constructor(handlers) {
    this.handlers = handlers;
    this.panel = byId("settings");
    byId("open-settings").addEventListener("click", () => this.toggle());
    byId("close-settings").addEventListener("click", () => this.close());
    for (const name of NUMBERS) byId(name).addEventListener("input", () => this.takeNumber(name));
    byId("system").addEventListener("input", () => this.take("system", byId("system").value));
    byId("thinking").addEventListener("change", () => this.take("thinking", byId("thinking").value));
    byId("reset-settings").addEventListener("click", () => this.reset());
    byId("export-json").addEventListener("click", () => exportJson(this.conversation));
    byId("export-markdown").addEventListener("click", () => exportMarkdown(this.conversation));
    byId("export-all").addEventListener("click", () => exportAll(handlers.conversations()));
  }

  show(conversation) {
    this.conversation = conversation;
    const { settings } = conversation;
    byId("system").value = settings.system;
    byId("thinking").value = settings.thinking;
    for (const name of NUMBERS) {
      byId(name).value = settings[name] ?? "";
      this.check(name, settings[name]);
    }
    this.showSystemMark();
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
    const note = byId(`${name}-note`);
    byId(name).setAttribute("aria-invalid", String(!isFine));
    note.hidden = isFine;
    note.textContent = isFine ? "" : `Not used: allowed is ${low} to ${high}${high > 2 ? ", whole" : ""}.`;
    return isFine;
  }

  take(name, value) {
    this.conversation.settings[name] = value;
    rememberSettings(this.conversation.settings);
    this.handlers.changed(this.conversation);
    this.showSystemMark();
  }

  reset() {
    const { system } = this.conversation.settings;
    Object.assign(this.conversation.settings, STANDARD, { system });
    rememberSettings(this.conversation.settings);
    this.handlers.changed(this.conversation);
    this.show(this.conversation);
  }

  showSystemMark() {
    byId("system-mark").hidden = !this.conversation.settings.system.trim();
  }
}
