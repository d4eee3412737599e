// The chat: joins conversations, their storage, running answers and the views.
import { Answer } from "./answer.js";
import { Composer } from "./composer.js";
import { connectionLost, whenBack } from "./connection.js";
import { addMessage, choose, newConversation, siblings, visiblePath } from "./conversation.js";
import { afterFrame, byId, element, setText } from "./dom.js";
import { draft, dropDraftsExcept, keepDraft } from "./drafts.js";
import { askForKey } from "./key_dialog.js";
import { announce, MessageLog } from "./message_log.js";
import { getJson } from "./server.js";
import { checkedSettings, lastSettings } from "./settings.js";
import { SettingsPanel } from "./settings_panel.js";
import { Sidebar } from "./sidebar.js";
import { ConversationStore } from "./store.js";
import { toast } from "./toast.js";

const SAVE_EVERY_MS = 1000;
const OPEN_KEY = "shoal-open-conversation";

export class Chat {
  constructor() {
    this.answers = new Map(); // running ones, by message
    this.editing = null; // the message in whose place an editor stands
    this.store = new ConversationStore();
    this.log = new MessageLog({
      edit: (node) => this.edit(node), regenerate: (node) => this.regenerate(node), choose: (node, by) => this.chooseBranch(node, by),
      answerCalls: (node, results) => this.answerCalls(node, results),
    });
    this.composer = new Composer({ send: (text) => this.send(text), stop: () => this.stop(), editLast: () => this.editLast() });
    this.settings = new SettingsPanel({
      changed: (conversation) => this.save(conversation, { evenIfEmpty: true }), conversations: () => this.store.newestFirst(),
    });
    this.sidebar = new Sidebar(this.store, {
      open: (id) => this.open(this.store.conversations.get(id)),
      create: () => this.create(),
      rename: (id, title) => this.rename(id, title),
      remove: (id) => this.remove(id),
      restore: (conversation) => this.restore(conversation),
    });
  }

  async start() {
    this.store.addEventListener("failed", (event) => toast(event.detail.reason));
    this.store.addEventListener("changed", (event) => this.changedElsewhere(event.detail.id));
    whenBack.addEventListener("back", () => this.describe());
    addEventListener("pagehide", () => this.saveRunning());
    setInterval(() => this.tick(), SAVE_EVERY_MS);
    const idBefore = recall(OPEN_KEY); // read first: opening any conversation remembers that one
    this.create({ focus: false });
    const first = this.current;
    await this.store.open();
    if (this.store.database) dropDraftsExcept(new Set(this.store.conversations.keys()));
    const before = this.store.conversations.get(idBefore);
    const isUntouched = this.current === first && !this.store.conversations.has(first.id);
    if (before && isUntouched) this.open(before);
    else this.sidebar.show(this.current.id, this.busyConversations());
    await this.describe();
  }

  async describe() {
    let facts;
    try {
      facts = await getJson("/api/page");
    } catch (error) {
      if (error.status === 401) askForKey(error.message).then(() => this.describe());
      else if (error.status === 0) connectionLost();
      setText(byId("model"), error.message);
      return;
    }
    this.model = facts.name;
    setText(byId("model"), `${facts.name} · context ${facts.max_context} tokens`);
    setText(byId("description"), facts.description || "A model served from this machine.");
    const ask = (text) => element("button", { type: "button", on: { click: () => this.send(text) } }, text);
    byId("suggestions").replaceChildren(...(facts.suggestions ?? []).map((text) => ask(String(text))));
  }

  // -- conversations

  create({ focus = true } = {}) {
    const empty = this.store.newestFirst().find((conversation) => Object.keys(conversation.nodes).length === 0);
    this.open(empty ?? newConversation(lastSettings()), { focus });
  }

  open(conversation, { focus = true } = {}) {
    conversation.settings = checkedSettings(conversation.settings);
    this.current = conversation;
    this.editing = null;
    remember(OPEN_KEY, conversation.id);
    this.log.forgetAll();
    this.settings.show(conversation);
    this.composer.open(placeOfDraft(conversation));
    this.show();
    this.log.toEnd();
    if (focus) this.composer.focus();
  }

  rename(id, title) {
    const conversation = this.store.conversations.get(id);
    conversation.title = title;
    this.save(conversation);
    this.show();
  }

  remove(id) {
    for (const answer of this.answers.values()) if (answer.conversation.id === id) answer.stop();
    this.store.remove(id);
    if (this.current.id === id) this.create();
    else this.show();
  }

  restore(conversation) {
    this.save(conversation, { evenIfEmpty: true });
    this.open(conversation);
  }

  changedElsewhere(id) {
    if (this.current.id === id && !this.store.conversations.has(id)) this.create({ focus: false });
    else if (this.current.id === id && !this.editing && !this.answering()) {
      this.show();
      if (!this.settings.isOpen) this.settings.show(this.current);
    } else this.sidebar.show(this.current.id, this.busyConversations());
  }

  save(conversation, { evenIfEmpty = false } = {}) {
    if (!evenIfEmpty && Object.keys(conversation.nodes).length === 0) return Promise.resolve();
    return this.store.save(conversation);
  }

  // -- messages

  send(text) {
    if (this.answering()) {
      toast("An answer is being written. Stop it first, or wait; your text stays in its field.");
      return;
    }
    const last = visiblePath(this.current).at(-1);
    const isUnanswered = last?.role === "user";
    const question = addMessage(this.current, isUnanswered ? last.parent : last?.id ?? null, "user", text);
    if (this.composer.field.value.trim() === text) this.composer.clear();
    this.composer.open(placeOfDraft(this.current));
    this.write(question);
    this.log.toEnd();
  }

  regenerate(node) {
    if (this.answering()) return;
    // An answer that failed before its first word is nothing to come back to.
    if (node.state === "failed" && !node.content && !node.reasoning) this.grow(node);
    else this.write(this.current.nodes[node.parent]);
  }

  // `results` holds { id, name, content } for every call of the answer.
  answerCalls(node, results) {
    if (this.answering()) return;
    const message = addMessage(this.current, node.id, "tool", results.map(({ content }) => content).join("\n"));
    message.results = results;
    this.write(message);
  }

  edit(node) {
    if (this.answering()) return;
    if (this.editing) this.cancelEditing();
    this.editing = node;
    const place = `edit-${node.id}`;
    const { id } = this.current;
    this.log.edit(node, draft(id, place) || node.content, {
      onInput: (text) => keepDraft(id, place, text),
      onCancel: () => this.cancelEditing(),
      onDone: (text) => {
        if (this.answering()) return;
        keepDraft(id, place, "");
        this.endEditing();
        this.write(addMessage(this.current, node.parent, "user", text.trim()));
      },
    });
  }

  editLast() {
    const last = visiblePath(this.current).findLast((node) => node.role === "user");
    if (last) this.edit(last);
  }

  cancelEditing() {
    const node = this.editing;
    keepDraft(this.current.id, `edit-${node.id}`, "");
    this.endEditing();
    this.show();
    this.composer.field.focus();
  }

  endEditing() {
    this.log.forget(this.editing.id);
    this.editing = null;
  }

  chooseBranch(node, by) {
    const among = siblings(this.current, node);
    const wanted = among[among.findIndex((other) => other.id === node.id) + by];
    if (!wanted) return;
    choose(this.current, wanted);
    if (this.editing) this.endEditing();
    this.save(this.current);
    this.show();
    this.log.focusBranchSwitch(wanted, by < 0 ? "Previous version" : "Next version");
  }

  // -- answers

  write(question) {
    this.grow(addMessage(this.current, question.id, "assistant", ""));
  }

  async grow(node) {
    const conversation = this.current;
    for (const key of ["calls", "error", "usage", "finish_reason", "thought_s", "first_s", "tokens", "tokens_per_s"]) delete node[key];
    const redraw = afterFrame(() => {
      if (this.current === conversation && this.answers.has(node.id)) this.log.grow(conversation, node, this.answers.get(node.id));
    });
    const answer = new Answer(conversation, node, this.model, redraw);
    this.answers.set(node.id, answer);
    this.store.writing.add(node.id);
    const running = answer.run();
    this.save(conversation);
    this.show();
    announce("Answering");
    const failure = await running;
    this.answers.delete(node.id);
    conversation.updated = Date.now();
    if (this.store.conversations.has(conversation.id)) await this.save(conversation);
    this.store.writing.delete(node.id);
    this.show();
    announce(failure ? `Failed: ${failure.message}` : "Answer complete");
    if (failure) this.handle(failure, conversation, node);
  }

  handle(failure, conversation, node) {
    if (failure.status === 0) connectionLost();
    if (failure.status !== 401) return;
    askForKey(failure.message).then(() => {
      this.describe();
      if (this.current === conversation && !this.answering()) this.regenerate(node);
    });
  }

  stop() {
    this.answering()?.stop();
    this.composer.field.focus();
  }

  // The running answer of the open conversation.
  answering() {
    return [...this.answers.values()].find((answer) => answer.conversation === this.current);
  }

  busyConversations() {
    return new Set([...this.answers.values()].map((answer) => answer.conversation.id));
  }

  tick() {
    for (const answer of this.answers.values()) answer.onGrowth();
    this.saveRunning();
  }

  saveRunning() {
    for (const { conversation } of this.answers.values()) {
      if (this.store.conversations.has(conversation.id)) this.save(conversation);
    }
  }

  show() {
    this.log.show(this.current, this.answers);
    this.composer.setBusy(Boolean(this.answering()));
    this.sidebar.show(this.current.id, this.busyConversations());
  }
}

// A conversation without messages may not outlive this visit; what was typed into it waits for the next new one.
const placeOfDraft = (conversation) => (Object.keys(conversation.nodes).length ? conversation.id : "unsent");

function remember(key, value) {
  try {
    sessionStorage.setItem(key, value);
    localStorage.setItem(key, value);
  } catch {
    // The next visit starts with a new conversation.
  }
}

function recall(key) {
  try {
    return sessionStorage.getItem(key) ?? localStorage.getItem(key);
  } catch {
    return null;
  }
}
