// Conversations in the browser's own database, one record each. Nothing leaves the browser but what is asked.
import { isConversation, mergedNodes } from "./conversation.js";

const NAME = "shoal";
const RECORDS = "conversations";

export class ConversationStore extends EventTarget {
  // Events: "changed" (another tab saved or removed something; detail.id), "failed" (nothing is kept; detail.reason).
  constructor() {
    super();
    this.conversations = new Map();
    this.stored = new Set(); // ids that have been in the database: when such a one is gone, another tab removed it
    this.writing = new Set(); // messages that this tab is writing
    this.database = null;
    this.tabs = "BroadcastChannel" in window ? new BroadcastChannel("shoal-conversations") : null;
    this.tabs?.addEventListener("message", (message) => this.reload(String(message.data)));
  }

  async open() {
    try {
      this.database = await opened(indexedDB.open(NAME, 1));
      for (const found of await finished(this.records("readonly").getAll())) {
        if (!isConversation(found)) continue;
        this.conversations.set(found.id, found);
        this.stored.add(found.id);
      }
    } catch (error) {
      this.fail(error);
    }
  }

  newestFirst() {
    return [...this.conversations.values()].sort((one, other) => other.updated - one.updated);
  }

  async save(conversation) {
    this.conversations.set(conversation.id, conversation);
    if (this.database === null) return;
    try {
      const records = this.records("readwrite");
      const before = await finished(records.get(conversation.id));
      if (before === undefined && this.stored.has(conversation.id)) return;
      if (isConversation(before)) conversation.nodes = mergedNodes(before, conversation, this.writing);
      await finished(records.put(plain(conversation)));
      this.stored.add(conversation.id);
      this.tabs?.postMessage(conversation.id);
    } catch (error) {
      this.fail(error);
    }
  }

  async remove(id) {
    this.conversations.delete(id);
    this.stored.delete(id);
    if (this.database === null) return;
    try {
      await finished(this.records("readwrite").delete(id));
      this.tabs?.postMessage(id);
    } catch (error) {
      this.fail(error);
    }
  }

  async reload(id) {
    if (this.database === null) return;
    const found = await finished(this.records("readonly").get(id)).catch(() => undefined);
    const mine = this.conversations.get(id);
    if (isConversation(found)) {
      // The same object goes on living here: an answer may be growing in it. Which branch is seen is this tab's matter.
      const nodes = mine && mergedNodes(found, mine, this.writing);
      if (mine) Object.assign(mine, found, { nodes, chosen: { ...found.chosen, ...mine.chosen } });
      else this.conversations.set(id, found);
      this.stored.add(id);
    } else if (this.stored.has(id)) {
      this.conversations.delete(id);
    }
    this.dispatchEvent(new CustomEvent("changed", { detail: { id } }));
  }

  records(mode) {
    return this.database.transaction(RECORDS, mode).objectStore(RECORDS);
  }

  fail(error) {
    const full = error?.name === "QuotaExceededError";
    const reason = full
      ? "The browser has no room left for conversations. Delete some, or export what you want to keep."
      : "This browser keeps no data for this page (a private window does that). Export what you want to keep.";
    this.dispatchEvent(new CustomEvent("failed", { detail: { reason } }));
  }
}

function opened(request) {
  request.addEventListener("upgradeneeded", () => request.result.createObjectStore(RECORDS, { keyPath: "id" }));
  return finished(request);
}

function finished(request) {
  return new Promise((resolve, reject) => {
    request.addEventListener("success", () => resolve(request.result));
    request.addEventListener("error", () => reject(request.error));
    request.addEventListener("blocked", () => reject(new Error("blocked by another tab")));
  });
}

const plain = (conversation) => JSON.parse(JSON.stringify(conversation));
