// The list of conversations: search, open, rename, delete (and take it back).
import { byId, element } from "./dom.js";
import { matches, titleOf } from "./conversation.js";
import { iconButton } from "./message_view.js";
import { toast } from "./toast.js";

export class Sidebar {
  // `handlers` has open(id), create(), rename(id, title), remove(id), restore(conversation).
  constructor(store, handlers) {
    Object.assign(this, { store, handlers, current: null, busy: new Set(), renaming: null });
    this.search = byId("search");
    this.list = byId("conversations");
    byId("new-chat").addEventListener("click", () => { this.close(); handlers.create(); });
    byId("open-sidebar").addEventListener("click", () => this.open());
    byId("scrim").addEventListener("click", () => this.close());
    this.search.addEventListener("input", () => this.show());
    this.search.addEventListener("keydown", (event) => {
      if (event.key !== "Escape" || !this.search.value) return;
      event.stopPropagation();
      this.search.value = "";
      this.show();
    });
    matchMedia("(min-width: 60rem)").addEventListener("change", () => this.close());
    this.close();
  }

  get isOpen() {
    return document.body.classList.contains("sidebar-open");
  }

  open() {
    document.body.classList.add("sidebar-open");
    this.setReachable();
    byId("new-chat").focus();
  }

  close() {
    const wasOpen = this.isOpen;
    document.body.classList.remove("sidebar-open");
    this.setReachable();
    if (wasOpen) byId("open-sidebar").focus();
  }

  // A drawer that is out of sight must be out of the focus order too, and what it covers while it is open.
  setReachable() {
    const isDrawer = !matchMedia("(min-width: 60rem)").matches;
    byId("sidebar").inert = isDrawer && !this.isOpen;
    byId("page").inert = isDrawer && this.isOpen;
    byId("open-sidebar").setAttribute("aria-expanded", String(this.isOpen));
  }

  // `current` is the id of the open conversation, `busy` the ids in which answers are being written.
  show(current = this.current, busy = this.busy) {
    Object.assign(this, { current, busy });
    if (this.renaming) return;
    const found = this.store.newestFirst().filter((conversation) => matches(conversation, this.search.value));
    const focused = document.activeElement?.closest?.("#conversations li")?.dataset.id;
    this.list.replaceChildren(...found.map((conversation) => this.entry(conversation)));
    if (focused) this.list.querySelector(`li[data-id="${CSS.escape(focused)}"] .title`)?.focus();
    byId("no-conversations").hidden = found.length > 0;
    byId("no-conversations").textContent = this.search.value ? "Nothing found." : "Conversations are kept in this browser only.";
  }

  entry(conversation) {
    const { id } = conversation;
    const title = titleOf(conversation);
    const isCurrent = id === this.current;
    const open = element("button", {
      type: "button", class: "title", "aria-current": isCurrent ? "true" : null, title,
      on: { click: () => { this.close(); this.handlers.open(id); } },
    }, this.busy.has(id) ? element("span", { class: "busy", role: "img", "aria-label": "answer is being written" }) : null, title);
    const rename = iconButton("rename", `Rename ${title}`, () => this.startRenaming(conversation));
    const remove = iconButton("remove", `Delete ${title}`, () => this.remove(conversation));
    return element("li", { "data-id": id, class: isCurrent ? "current" : null }, open, rename, remove);
  }

  startRenaming(conversation) {
    this.renaming = conversation.id;
    const field = element("input", { type: "text", "aria-label": "Title", maxlength: 120 });
    field.value = titleOf(conversation);
    const end = (keep) => {
      if (this.renaming !== conversation.id) return;
      this.renaming = null;
      if (keep && field.value.trim() !== titleOf(conversation)) this.handlers.rename(conversation.id, field.value.trim());
      this.show();
      this.list.querySelector(`li[data-id="${CSS.escape(conversation.id)}"] .title`)?.focus();
    };
    field.addEventListener("keydown", (event) => {
      if (event.key !== "Enter" && event.key !== "Escape") return;
      event.preventDefault();
      event.stopPropagation();
      end(event.key === "Enter");
    });
    field.addEventListener("blur", () => end(true));
    this.list.querySelector(`li[data-id="${CSS.escape(conversation.id)}"]`).replaceChildren(field);
    field.select();
  }

  remove(conversation) {
    this.handlers.remove(conversation.id);
    toast(`Deleted “${titleOf(conversation)}”.`, "Undo", () => this.handlers.restore(conversation));
  }
}
