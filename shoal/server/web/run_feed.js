// Follows one run: metrics lines as they are written, stages and samples now and then. A hidden page asks for nothing.
import { connectionLost, whenBack } from "./connection.js";
import { getJson } from "./server.js";

const LIVE_MS = 2000;
const IDLE_MS = 15_000;

export class RunFeed {
  // `handlers` has metrics(lines), about(run), samples(groups), failed(error).
  constructor(name, handlers) {
    Object.assign(this, { name, handlers, lines: [], offset: 0, file: "", isClosed: false, timer: 0 });
    this.address = `/api/runs/${encodeURIComponent(name)}`;
    this.wake = () => { if (!document.hidden && !this.isClosed) this.again(0); };
    document.addEventListener("visibilitychange", this.wake);
    whenBack.addEventListener("back", this.wake);
    this.again(0);
  }

  close() {
    this.isClosed = true;
    clearTimeout(this.timer);
    document.removeEventListener("visibilitychange", this.wake);
    whenBack.removeEventListener("back", this.wake);
  }

  again(after_ms) {
    clearTimeout(this.timer);
    this.timer = setTimeout(() => this.look(), after_ms);
  }

  async look() {
    if (this.isClosed || document.hidden || this.isLooking) return;
    this.isLooking = true;
    try {
      const hasNews = await this.readMetrics();
      const about = await getJson(this.address);
      const samples = hasNews || !this.isShown ? await getJson(`${this.address}/samples`) : null;
      if (this.isClosed) return;
      this.isShown = true;
      this.handlers.metrics(this.lines);
      this.handlers.about(about);
      if (samples) this.handlers.samples(samples.groups);
      this.again(about.is_live ? LIVE_MS : IDLE_MS);
    } catch (error) {
      if (this.isClosed) return;
      if (error.status === 0) connectionLost();
      this.handlers.failed(error);
    } finally {
      this.isLooking = false;
    }
  }

  // All pieces that are there now; whether there were any.
  async readMetrics() {
    let hasNews = false;
    for (;;) {
      const piece = await getJson(`${this.address}/metrics?offset=${this.offset}&file=${encodeURIComponent(this.file)}`);
      if (piece.restarted) this.lines = [];
      this.lines.push(...piece.lines);
      Object.assign(this, { offset: piece.offset, file: piece.file });
      hasNews ||= piece.lines.length > 0 || piece.restarted;
      if (!piece.more) return hasNews;
    }
  }
}
