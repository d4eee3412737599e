// Links that a model wrote. They open apart from the page, tell the other side nothing of it, and show where they lead,
// since the text of a link may claim anything.
import { element } from "./dom.js";

const ALLOWED = new Set(["http:", "https:", "mailto:"]);

// The address as the browser reads it, or null for anything but a complete web or mail address.
export function safeAddress(text) {
  let url;
  try {
    url = new URL(text.trim());
  } catch {
    return null;
  }
  return ALLOWED.has(url.protocol) && !url.username && !url.password ? url : null;
}

export function link(address, children, text) {
  const url = safeAddress(address);
  if (url === null) return element("span", { title: "This link leads nowhere safe" }, ...children);
  const anchor = element("a", { target: "_blank", rel: "noopener noreferrer nofollow", title: url.href }, ...children);
  anchor.setAttribute("href", url.href);
  const where = url.host || url.pathname;
  if (text.includes(where)) return anchor;
  return element("span", {}, anchor, element("span", { class: "link-host" }, ` (${where})`));
}

// Hands the browser a file to keep.
export function download(name, type, content) {
  const address = URL.createObjectURL(new Blob([content], { type }));
  const anchor = element("a", { download: name });
  anchor.setAttribute("href", address);
  anchor.click();
  setTimeout(() => URL.revokeObjectURL(address), 10_000);
}
