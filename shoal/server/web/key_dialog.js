// Asks for the API key when the server wants one.
import { byId } from "./dom.js";
import { apiKey, setApiKey } from "./server.js";

let waiting = null;

// Resolves when a key was given; stays pending when the person closes the dialog, until they open it again.
export function askForKey(reason) {
  byId("key-reason").textContent = reason;
  byId("key").value = apiKey();
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
  waiting ??= Promise.withResolvers ? Promise.withResolvers() : resolvers();
  return waiting.promise;
}

export function prepareKeyDialog() {
  byId("key-form").addEventListener("submit", (event) => {
    event.preventDefault();
    const key = byId("key").value.trim();
    if (!key) return;
    setApiKey(key, { remember: byId("remember-key").checked });
    byId("key-dialog").close();
    waiting?.resolve();
    waiting = null;
  });
  byId("key-later").addEventListener("click", () => byId("key-dialog").close());
  byId("key-button").addEventListener("click", () => askForKey("The key is sent to this server only."));
}

function resolvers() {
  const made = {};
  made.promise = new Promise((resolve, reject) => Object.assign(made, { resolve, reject }));
  return made;
}
