// Text that was typed and not sent yet, kept at every keystroke, so that neither a reload nor a crash loses it.

const key = (conversationId, place) => `shoal-draft:${conversationId}:${place}`;

export function keepDraft(conversationId, place, text) {
  try {
    if (text) localStorage.setItem(key(conversationId, place), text);
    else localStorage.removeItem(key(conversationId, place));
  } catch {
    // No storage here: the text still stands in its field.
  }
}

export function draft(conversationId, place) {
  try {
    return localStorage.getItem(key(conversationId, place)) ?? "";
  } catch {
    return "";
  }
}

// Drafts of conversations that are gone.
export function dropDraftsExcept(conversationIds) {
  try {
    for (const name of Object.keys(localStorage)) {
      const [prefix, id] = name.split(":");
      if (prefix === "shoal-draft" && id !== "unsent" && !conversationIds.has(id)) localStorage.removeItem(name);
    }
  } catch {
    // As above.
  }
}
