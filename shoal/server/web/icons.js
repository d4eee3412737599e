// Line icons on a 16 by 16 grid, drawn with the text's own colour.
import { svg } from "./dom.js";

const PATHS = {
  menu: "M2 4h12M2 8h12M2 12h12",
  settings: "M2 5h5M11 5h3M9 3v4M2 11h2M8 11h6M6 9v4",
  rename: "M3 13l.6-2.8L10.8 3l2.2 2.2-7.2 7.2L3 13zM9.4 4.4l2.2 2.2",
  remove: "M3 4.5h10M6.5 4V2.8h3V4M4.5 4.5l.6 8.7h5.8l.6-8.7M6.8 7v4M9.2 7v4",
  copy: "M6 5.5h7v8H6zM4 10.5H3v-8h7v1",
  again: "M13 8a5 5 0 1 1-1.5-3.6M13 2.5v3h-3",
  previous: "M10 3L5 8l5 5",
  next: "M6 3l5 5-5 5",
  down: "M8 3v10M3.5 8.5L8 13l4.5-4.5",
  close: "M3.5 3.5l9 9M12.5 3.5l-9 9",
  plus: "M8 3v10M3 8h10",
};

export function icon(name) {
  const line = svg("path", { d: PATHS[name] });
  return svg("svg", { class: "icon", viewBox: "0 0 16 16", "aria-hidden": "true", focusable: "false" }, line);
}
