// One message on the page: a question in a bubble or an answer with its thinking, its text, what it took and what can be
// done with it. A view is made once and then updated, so that folded thinking stays folded while it grows.
import { copyButton } from "./copying.js";
import { element, setText } from "./dom.js";
import { duration, factsOf } from "./facts.js";
import { icon } from "./icons.js";
import { showMarkdown } from "./markdown_view.js";
import { CallsView } from "./tool_calls_view.js";

// `actions` has edit(node), regenerate(node), choose(node, step), answerCalls(node, results).
export class QuestionView {
  constructor(node, actions) {
    this.node = node;
    this.branches = new BranchSwitch(this, actions);
    this.text = element("div", { class: "bubble" }, node.content);
    this.edit = button("rename", "Edit", "Edit this message and branch off", () => actions.edit(this.node));
    const tools = element("div", { class: "tools" }, this.branches.root, this.edit, copyButton(() => this.node.content, "Copy message"));
    this.root = element("article", { class: "message question", "aria-label": "You", "data-node": node.id }, this.text, tools);
  }

  update({ among, isBusy }) {
    setText(this.text, this.node.content);
    this.branches.update(among, this.node);
    this.edit.disabled = isBusy;
  }

  // Puts an editor in the bubble's place; `text` may be an earlier draft.
  startEditing(text, { onInput, onDone, onCancel }) {
    const field = element("textarea", { "aria-label": "Edit message", rows: Math.min(12, text.split("\n").length + 1) });
    field.value = text;
    const send = element("button", { type: "submit", class: "primary" }, "Send as new branch");
    const cancel = element("button", { type: "button", on: { click: onCancel } }, "Cancel");
    const editor = element("form", { class: "editor" }, field, element("div", { class: "row" }, cancel, send));
    const submit = (event) => {
      event.preventDefault();
      if (field.value.trim()) onDone(field.value);
    };
    editor.addEventListener("submit", submit);
    field.addEventListener("input", () => onInput(field.value));
    field.addEventListener("keydown", (event) => {
      if (event.key === "Enter" && !event.shiftKey && !event.isComposing) submit(event);
      if (event.key !== "Escape") return;
      event.stopPropagation();
      onCancel();
    });
    this.root.classList.add("editing");
    this.root.append(editor);
    field.focus();
  }
}

export class AnswerView {
  constructor(node, actions) {
    this.node = node;
    this.branches = new BranchSwitch(this, actions);
    this.summary = element("summary");
    this.reasoning = element("div", { class: "reasoning" });
    this.thinking = element("details", { class: "thinking", hidden: true }, this.summary, this.reasoning);
    this.thinking.addEventListener("toggle", () => this.showReasoning());
    this.content = element("div", { class: "content" });
    this.calls = new CallsView((results) => actions.answerCalls(this.node, results));
    this.error = element("p", { class: "error", role: "alert", hidden: true });
    this.facts = element("p", { class: "facts quiet" });
    this.copy = copyButton(() => this.node.content, "Copy answer");
    this.again = button("again", "Regenerate", "Write another answer", () => actions.regenerate(this.node));
    this.again.classList.add("again");
    this.tools = element("div", { class: "tools" }, this.branches.root, this.again, this.copy);
    this.root = element(
      "article", { class: "message answer", "aria-label": "Answer", "data-node": node.id },
      this.thinking, this.content, this.calls.root, this.error, element("div", { class: "below" }, this.facts, this.tools),
    );
  }

  // `answer` is the running Answer of this message, if there is one.
  update({ among, isBusy, isLast, answer }) {
    const { node } = this;
    const isRunning = Boolean(answer);
    const hasBegun = node.content || node.reasoning || node.calls;
    this.thinking.hidden = !node.reasoning;
    setText(this.summary, this.thinkingSummary(answer));
    this.showReasoning();
    showMarkdown(this.content, node.content);
    this.calls.update(node.calls ?? [], { isOpen: isLast && !isRunning });
    this.root.classList.toggle("waiting", isRunning && !hasBegun);
    this.root.classList.toggle("growing", isRunning);
    this.showError(isRunning);
    const facts = factsOf(node);
    if (!isRunning && node.state === "running") facts.push("unfinished: the page was closed while it was written");
    setText(this.facts, facts.join(" · "));
    this.branches.update(among, node);
    this.tools.hidden = isRunning;
    this.again.disabled = isBusy;
    this.copy.hidden = !node.content;
  }

  thinkingSummary(answer) {
    const { thought_s: thought } = this.node;
    if (thought !== undefined) return thought < 0.05 ? "Thought for a moment" : `Thought for ${duration(thought)}`;
    return answer ? `Thinking… ${Math.floor(answer.thinkingFor_s())} s` : "Thinking, unfinished";
  }

  // Long thinking costs nothing while it is folded.
  showReasoning() {
    if (this.thinking.open) setText(this.reasoning, this.node.reasoning ?? "");
  }

  showError(isRunning) {
    const text = !isRunning && this.node.state === "failed" ? this.node.error ?? "" : "";
    this.error.hidden = !text;
    setText(this.error, text);
    setText(this.again.lastChild, text ? "Try again" : "Regenerate");
  }
}

// < 2/3 >
class BranchSwitch {
  constructor(view, actions) {
    const step = (by) => () => actions.choose(view.node, by);
    this.previous = iconButton("previous", "Previous version", step(-1));
    this.next = iconButton("next", "Next version", step(1));
    this.place = element("span");
    this.root = element("div", { class: "branches", role: "group", "aria-label": "Versions" }, this.previous, this.place, this.next);
  }

  update(among, node) {
    const index = among.findIndex((other) => other.id === node.id);
    this.root.hidden = among.length < 2;
    setText(this.place, `${index + 1}/${among.length}`);
    this.previous.disabled = index <= 0;
    this.next.disabled = index >= among.length - 1;
  }
}

function button(image, text, label, click) {
  return element("button", { type: "button", class: "small", title: label, on: { click } }, icon(image), element("span", {}, text));
}

export function iconButton(image, label, click) {
  return element("button", { type: "button", class: "icon-only", "aria-label": label, title: label, on: { click } }, icon(image));
}
