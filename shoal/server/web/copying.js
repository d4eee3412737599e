// Copy buttons. Browsers give the clipboard only to secure pages; on others the old way through a selection is taken.
import { element } from "./dom.js";
import { icon } from "./icons.js";

export function copyButton(text, label) {
  const button = element("button", { type: "button", class: "small", "aria-label": label, title: label }, icon("copy"), element("span", {}, "Copy"));
  button.addEventListener("click", async () => {
    const worked = await copy(text());
    button.lastChild.textContent = worked ? "Copied" : "Select and copy by hand";
    setTimeout(() => { button.lastChild.textContent = "Copy"; }, 1500);
  });
  return button;
}

async function copy(text) {
  try {
    await navigator.clipboard.writeText(text);
    return true;
  } catch {
    return copyBySelection(text);
  }
}

function copyBySelection(text) {
  const field = element("textarea", { class: "hidden", "aria-hidden": "true", readonly: true });
  const focused = document.activeElement;
  field.value = text;
  document.body.append(field);
  field.select();
  const worked = document.execCommand("copy");
  field.remove();
  focused?.focus();
  return worked;
}
