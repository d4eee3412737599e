// One answer on its way: the request, the stream into the message, and the times that are shown with it.
import { requestMessages } from "./conversation.js";
import { readEvents } from "./event_stream.js";
import { postJson, RequestFailure } from "./server.js";
import { requestFields } from "./settings.js";

const seconds = (from, to = performance.now()) => (to - from) / 1000;

export class Answer {
  // `onGrowth` is called whenever the message has changed; it must be quick.
  constructor(conversation, node, model, onGrowth) {
    Object.assign(this, { conversation, node, model, onGrowth });
    this.controller = new AbortController();
    this.pieces = 0;
    this.firstAt = this.lastAt = null;
  }

  stop() {
    this.controller.abort();
  }

  // Runs to the end and returns the failure, or null. The message's `state` says how it ended.
  async run() {
    const { node } = this;
    Object.assign(node, { content: "", reasoning: "", state: "running", model: this.model });
    this.startedAt = performance.now();
    let failure = null;
    try {
      await this.read();
      node.state = "done";
    } catch (error) {
      node.state = error.name === "AbortError" ? "stopped" : "failed";
      if (node.state === "failed") {
        failure = error instanceof RequestFailure ? error : broken(error);
        node.error = failure.message;
      }
    }
    this.settleThinking();
    this.measure();
    this.onGrowth();
    return failure;
  }

  async read() {
    const { conversation, node, controller } = this;
    const body = { messages: requestMessages(conversation, node), ...requestFields(conversation.settings) };
    if (this.model) body.model = this.model;
    const response = await postJson(
      "/v1/chat/completions", { ...body, stream: true, stream_options: { include_usage: true } }, controller.signal,
    );
    for await (const data of readEvents(response.body)) {
      if (data === "[DONE]") return;
      this.take(JSON.parse(data));
    }
    throw new RequestFailure("The connection broke before the answer was whole. What had come is kept; try again.");
  }

  take(chunk) {
    const { node } = this;
    if (chunk.error) throw new RequestFailure(String(chunk.error.message), { status: 500 });
    if (chunk.usage) node.usage = chunk.usage;
    const choice = chunk.choices?.[0];
    if (choice?.finish_reason) node.finish_reason = choice.finish_reason;
    const { reasoning_content: thought, content, tool_calls: calls } = choice?.delta ?? {};
    if (!thought && !content && !calls?.length) return;
    this.lastAt = performance.now();
    this.firstAt ??= this.lastAt;
    this.pieces += 1;
    if (thought) node.reasoning += thought;
    if (content) {
      this.settleThinking();
      node.content += content;
    }
    for (const call of calls ?? []) this.takeCall(call);
    this.measure();
    this.onGrowth();
  }

  // The name comes with a call's first piece, its arguments bit by bit.
  takeCall({ index, id, function: piece }) {
    this.settleThinking();
    this.node.calls ??= [];
    if (!Number.isInteger(index) || index < 0 || index > this.node.calls.length) return;
    const call = (this.node.calls[index] ??= { id: "", name: "", arguments: "" });
    if (id) call.id = String(id);
    call.name += piece?.name ?? "";
    call.arguments += piece?.arguments ?? "";
  }

  settleThinking() {
    if (this.node.reasoning && this.node.thought_s === undefined) this.node.thought_s = seconds(this.firstAt, this.lastAt);
  }

  // A piece of the stream is about a token; the true count comes with the usage at the end.
  measure() {
    const { node } = this;
    if (this.firstAt === null) return;
    node.first_s = seconds(this.startedAt, this.firstAt);
    node.tokens = node.usage?.completion_tokens ?? this.pieces;
    const writing_s = seconds(this.firstAt, this.lastAt);
    // Over less than this a speed would be noise.
    node.tokens_per_s = writing_s > 0.02 && node.tokens > 1 ? (node.tokens - 1) / writing_s : null;
  }

  // For a running clock on the thinking.
  thinkingFor_s() {
    return this.node.thought_s ?? seconds(this.firstAt ?? this.startedAt);
  }
}

function broken(error) {
  const what = error instanceof SyntaxError ? "The server sent something that is no event" : "The connection broke";
  return new RequestFailure(`${what} before the answer was whole. What had come is kept; try again.`);
}
