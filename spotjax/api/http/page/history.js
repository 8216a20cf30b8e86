// Makes epochs of events: what led to each change of the mesh, what it moved, for how long decoding paused. Shows them
// as bars, and one of them in full.

import { bytes, clock, element, plural, say, seconds, shape } from "./format.js";

const SHOWN = 32;

/** Collects events; pure of the page. */
export class Changes {
  epochs = [];
  #plan = null;
  #cause = { kind: "start", text: "the first mesh" };
  #taken = new Set(); // instances whose notice was a cause already
  #serving = false;
  #heard = false;

  /** Takes an event; returns the epoch that it completes, if it does. */
  hear(event) {
    const { instance, seconds: left, source } = event.fields;
    if (event.number > 1 && !this.#heard) this.#forget();
    this.#heard = true;
    this.#serving ||= event.kind === "ready";
    if (event.kind === "plan") this.#plan = event;
    else if (event.kind === "notice" && left !== undefined) {
      this.#taken.add(instance);
      this.#because("notice", `${instance} was taken with ${seconds(left)} of notice`);
    } else if (event.kind === "notice" && !source) {
      this.#taken.add(instance);
      this.#because("notice", `${instance} was released`);
    } else if (event.kind === "lost" && instance && !this.#taken.delete(instance)) {
      this.#because("lost", `${instance} was taken without notice`);
    } else if (event.kind === "joined" && this.#serving) this.#because("joined", `${instance} joined`);
    else if (event.kind === "switch") return this.#complete(event);
    return null;
  }

  /** What moves now, or moved in the change that was planned last. */
  get planned() {
    return this.#plan;
  }

  /** What was before is not remembered any more: the first change that is seen is not the first mesh. */
  #forget() {
    this.#serving = true;
    this.#cause = { kind: "joined", text: "the mesh was changed" };
  }

  #because(kind, text) {
    const rank = ["start", "joined", "notice", "lost"];
    if (rank.indexOf(kind) >= rank.indexOf(this.#cause.kind)) this.#cause = { kind, text };
  }

  #complete(event) {
    const plan = this.#plan;
    const epoch = {
      number: event.epoch,
      time: event.time,
      cause: this.#cause,
      shape: event.fields.shape ?? "",
      pause: event.fields.pause_seconds ?? 0,
      stayed: plan?.fields.bytes_in_place ?? 0,
      moved: plan?.fields.bytes_moved ?? 0,
      loaded: plan?.fields.bytes_loaded ?? 0,
      kv: (event.fields.kv_bytes_moved ?? 0) + (event.fields.kv_bytes_precopied ?? 0),
      kept: event.fields.kept ?? 0,
      recomputed: event.fields.recomputed ?? 0,
      undisturbed: event.fields.replicas_undisturbed ?? 0,
      flows: together([...(plan?.flows ?? []), ...event.flows]),
    };
    this.epochs.push(epoch);
    this.#cause = { kind: "joined", text: "the mesh was improved" };
    return epoch;
  }
}

/** Flows with the same ends as one. */
export function together(flows) {
  const sums = new Map();
  for (const { source, target, bytes: size } of flows) {
    const name = `${source}\n${target}`;
    sums.set(name, { source, target, bytes: (sums.get(name)?.bytes ?? 0) + size });
  }
  return [...sums.values()].sort((a, b) => b.bytes - a.bytes);
}

export class History {
  #list = document.querySelector("#epochs");
  #box = document.querySelector("#epoch");
  #bars = new Map();
  #chosen = null;

  /** `choose` is called with an epoch when somebody asks for it, with null when nobody does any more. */
  constructor(choose) {
    this.choose = choose;
    say(this.#box, "None yet.");
  }

  clear() {
    this.#bars.clear();
    this.#list.replaceChildren();
    this.#chosen = null;
    say(this.#box, "None yet.");
  }

  add(epoch) {
    const bar = element("i");
    bar.dataset.cause = epoch.cause.kind;
    const button = element("button", { type: "button", "aria-pressed": "false" }, seconds(epoch.pause), bar, `${epoch.number}`);
    button.setAttribute("aria-label", `Epoch ${epoch.number}: ${epoch.cause.text}, paused ${seconds(epoch.pause)}`);
    button.addEventListener("click", () => this.#toggle(epoch));
    const item = element("li", {}, button);
    this.#bars.set(epoch, { item, button, bar });
    this.#list.append(item);
    for (const old of [...this.#bars.keys()].slice(0, -SHOWN)) {
      this.#bars.get(old).item.remove();
      this.#bars.delete(old);
    }
    const most = Math.max(...[...this.#bars.keys()].map((one) => one.pause), 1e-9);
    for (const [one, parts] of this.#bars) parts.bar.style.setProperty("--part", one.pause / most);
    this.#list.scrollLeft = this.#list.scrollWidth;
    if (!this.#chosen) this.#show(epoch);
  }

  #toggle(epoch) {
    this.#chosen = this.#chosen === epoch ? null : epoch;
    for (const [one, { button }] of this.#bars) button.setAttribute("aria-pressed", `${one === this.#chosen}`);
    this.#show(this.#chosen ?? [...this.#bars.keys()].at(-1));
    this.choose(this.#chosen);
  }

  #show(epoch) {
    const parts = [
      ["mesh", shape(epoch.shape)],
      ["decoding paused", seconds(epoch.pause)],
      ["parameters moved", bytes(epoch.moved)],
      ["read from the checkpoint", bytes(epoch.loaded)],
      ["stayed in place", bytes(epoch.stayed)],
      ["KV moved", bytes(epoch.kv)],
      ["sequences that kept their KV", `${epoch.kept}`],
      ["sequences that recompute it", `${epoch.recomputed}`],
      ["replicas that never stopped", `${epoch.undisturbed}`],
    ];
    const list = element("dl", {}, ...parts.map(([name, value]) => element("div", {}, element("dt", {}, name), element("dd", {}, value))));
    const title = element("p", {}, element("b", {}, `Epoch ${epoch.number}`), `, ${clock(epoch.time)}: ${epoch.cause.text}`);
    const flows = epoch.flows.map((flow) => element("li", {}, flowText(flow)));
    this.#box.replaceChildren(title, list, ...(flows.length ? [element("ul", { "aria-label": "What moved from where to where" }, ...flows)] : []));
  }
}

function flowText({ source, target, bytes: size }) {
  if (source === target) return `within ${target}: ${bytes(size)}`;
  return `${source || "checkpoint"} \u2192 ${target}: ${bytes(size)}`;
}

export const kept = ({ kept: going, recomputed }) => {
  if (!going && !recomputed) return "No request was running.";
  const parts = [going && `${plural(going, "sequence")} kept ${going === 1 ? "its" : "their"} KV`];
  if (recomputed) parts.push(`${plural(recomputed, "sequence")} recompute${recomputed === 1 ? "s" : ""} it`);
  return `${parts.filter(Boolean).join(", ")}.`;
};
