// The messages of the open conversation, as views that are kept by message, and the scrolling that follows an answer only
// while its end is in sight.
import { byId, element } from "./dom.js";
import { siblings, visiblePath } from "./conversation.js";
import { AnswerView, QuestionView } from "./message_view.js";
import { ResultsView } from "./tool_calls_view.js";

const NEAR_END_PX = 80;

export class MessageLog {
  constructor(actions) {
    this.actions = actions;
    this.log = byId("log");
    this.list = byId("messages");
    this.views = new Map();
    this.log.addEventListener("scroll", () => this.showJump(), { passive: true });
    byId("jump").addEventListener("click", () => this.toEnd());
  }

  // Draws the path through `conversation`; `answers` are those that run, by message.
  show(conversation, answers) {
    const follows = this.isAtEnd();
    const path = visiblePath(conversation);
    const isBusy = path.some((node) => answers.has(node.id));
    const kept = new Map();
    for (const [index, node] of path.entries()) {
      const view = this.views.get(node.id) ?? this.newView(node);
      view.node = node; // another tab may have brought a newer one
      kept.set(node.id, view);
      view.update({ among: siblings(conversation, node), isBusy, isLast: index === path.length - 1, answer: answers.get(node.id) });
    }
    this.views = kept;
    const roots = [...kept.values()].map((view) => view.root);
    if (roots.length !== this.list.children.length || roots.some((root, index) => root !== this.list.children[index])) {
      this.list.replaceChildren(...roots);
    }
    byId("welcome").hidden = path.length > 0;
    if (follows) this.toEnd();
    this.showJump();
  }

  newView(node) {
    if (node.role === "tool") return new ResultsView(node);
    return node.role === "user" ? new QuestionView(node, this.actions) : new AnswerView(node, this.actions);
  }

  // Only what grows: called for every few tokens.
  grow(conversation, node, answer) {
    const view = this.views.get(node.id);
    if (!view) return;
    const follows = this.isAtEnd();
    view.update({ among: siblings(conversation, node), isBusy: true, isLast: true, answer });
    if (follows) this.toEnd();
    this.showJump();
  }

  // Draws one message anew, for instance without its editor.
  forget(nodeId) {
    this.views.delete(nodeId);
  }

  forgetAll() {
    this.views.clear();
    this.list.replaceChildren();
  }

  edit(node, text, handlers) {
    this.views.get(node.id)?.startEditing(text, handlers);
  }

  // Keeps the keyboard where it was when a switch of branches replaced the button under it.
  focusBranchSwitch(node, label) {
    const root = this.views.get(node.id)?.root;
    const wanted = root?.querySelector(`.branches button[aria-label="${label}"]:not(:disabled)`);
    (wanted ?? root?.querySelector(".branches button:not(:disabled)"))?.focus();
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_END_PX;
  }

  toEnd() {
    this.log.scrollTop = this.log.scrollHeight;
  }

  showJump() {
    byId("jump").hidden = this.isAtEnd();
  }
}

// Says something to screen readers without showing it.
export function announce(text) {
  byId("announcer").replaceChildren(element("span", {}, text));
}
