// Takes instances away and lets them join: dialogs of those who may.

import { ApiError, json } from "./api.js";

const dialog = document.querySelector("#drill");
const grace = document.querySelector("#grace");
const toast = document.querySelector("#toast");
let hiding = 0;

/** Says what went wrong, for a while. */
export function complain(message) {
  toast.textContent = message;
  toast.hidden = false;
  clearTimeout(hiding);
  hiding = setTimeout(() => (toast.hidden = true), 8000);
}

async function change(path, body) {
  try {
    await json(path, { body });
  } catch (problem) {
    if (!(problem instanceof ApiError)) throw problem;
    complain(problem.message);
  }
}

/** Asks how an instance is to go, and has it go. */
export function drill(name) {
  dialog.querySelector("h2").textContent = `Take ${name} away`;
  dialog.returnValue = "";
  dialog.onclose = () => {
    if (dialog.returnValue !== "ok") return;
    const how = dialog.querySelector("input[name=how]:checked").value;
    if (how === "release") change("fleet/release", { instance: name });
    else change("fleet/preempt", { instance: name, grace_seconds: how === "now" ? 0 : grace.valueAsNumber });
  };
  dialog.showModal();
}

export const add = () => change("fleet/add", { count: 1 });

const choose = () => (grace.disabled = dialog.querySelector("input[name=how]:checked").value !== "notice");
dialog.addEventListener("change", choose);
for (const cancel of document.querySelectorAll("dialog .cancel")) {
  cancel.addEventListener("click", () => cancel.closest("dialog").close());
}
