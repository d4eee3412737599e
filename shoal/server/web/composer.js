// The field in which messages are written. What is typed is kept at every keystroke (drafts.js).
import { byId } from "./dom.js";
import { draft, keepDraft } from "./drafts.js";

export class Composer {
  // `handlers` has send(text), stop(), editLast().
  constructor(handlers) {
    this.handlers = handlers;
    this.field = byId("question");
    this.conversationId = null;
    byId("form").addEventListener("submit", (event) => { event.preventDefault(); this.send(); });
    byId("stop").addEventListener("click", () => handlers.stop());
    this.field.addEventListener("input", () => this.changed());
    this.field.addEventListener("keydown", (event) => this.key(event));
  }

  open(conversationId) {
    this.conversationId = conversationId;
    this.write(draft(conversationId, "new"));
  }

  write(text) {
    this.field.value = text;
    this.changed();
  }

  clear() {
    this.write("");
  }

  focus() {
    // On a phone the keyboard would cover what was just written.
    if (matchMedia("(pointer: fine)").matches) this.field.focus();
  }

  setBusy(isBusy) {
    byId("send").hidden = isBusy;
    byId("stop").hidden = !isBusy;
  }

  changed() {
    keepDraft(this.conversationId, "new", this.field.value);
    this.field.style.height = "auto";
    this.field.style.height = `${this.field.scrollHeight + 2}px`;
    byId("send").disabled = !this.field.value.trim();
  }

  key(event) {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      this.send();
    } else if (event.key === "ArrowUp" && this.field.value === "") {
      event.preventDefault();
      this.handlers.editLast();
    }
  }

  send() {
    if (this.field.value.trim()) this.handlers.send(this.field.value.trim());
  }
}
