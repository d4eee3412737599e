// Server-sent events out of a response's body, by the WHATWG rules that matter here: lines end in LF, CR or CRLF, lines
// of a data field join with LF, comments (keep-alives) are nothing, and an event ends at an empty line.

export async function* readEvents(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  const splitter = new EventSplitter();
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      yield* splitter.push(value);
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

export class EventSplitter {
  constructor() {
    this.rest = "";
    this.data = [];
  }

  // The data of every event that `text` completes.
  push(text) {
    const events = [];
    const lines = (this.rest + text).split(/\r\n|\n|\r(?!$)/);
    this.rest = lines.pop();
    for (const line of lines) {
      if (line === "") {
        if (this.data.length) events.push(this.data.join("\n"));
        this.data = [];
      } else if (line.startsWith("data:")) {
        this.data.push(line.slice(line[5] === " " ? 6 : 5));
      }
    }
    return events;
  }
}
