// The fleet as a grid: a card for each instance, a cell for each of its devices, coloured by what it does in the mesh.

import { element, plural, say, seconds, shape } from "./format.js";

const HUES = 8;
const WORDS = { joining: "joining", ready: "ready", noticed: "notice", draining: "leaving", gone: "gone" };
const MANY = 24; // instances, from which on cards are small and few of the gone are shown
const GONE_SHOWN = 4;

export class Instances {
  #cards = new Map();
  #ends = new Map(); // when an instance's notice runs out, and how long it was
  #list = document.querySelector("#instances");
  #hidden = document.querySelector("#hidden-instances");

  /** `drill` is called with an instance's name; null where the caller may not. */
  constructor() {
    this.drill = null;
    setInterval(() => this.#count(), 200);
  }

  card(name) {
    return this.#cards.get(name)?.box;
  }

  show(status) {
    const all = status.instances;
    const gone = all.filter((one) => one.state === "gone").map((one) => one.name);
    const left = all.length > MANY ? new Set(gone.slice(0, -GONE_SHOWN)) : new Set();
    const shown = all.filter((one) => !left.has(one.name));
    this.#hidden.hidden = !left.size;
    say(this.#hidden, `${plural(left.size, "instance")} that went earlier ${left.size === 1 ? "is" : "are"} not shown.`);
    this.#list.classList.toggle("many", shown.length > MANY);
    const columns = shown.length > MANY ? 6 : Math.max(1, Math.ceil(Math.sqrt(shown.length)));
    this.#list.style.setProperty("--columns", columns);
    const names = new Set(shown.map((one) => one.name));
    for (const [name, card] of this.#cards) {
      if (!names.has(name)) {
        card.box.remove();
        this.#cards.delete(name);
      }
    }
    shown.forEach((one, at) => {
      const card = this.#cards.get(one.name) ?? this.#make(one.name);
      if (this.#list.children[at] !== card.box) this.#list.insertBefore(card.box, this.#list.children[at] ?? null);
      this.#fill(card, one, status.placement);
    });
  }

  #make(name) {
    const card = {
      state: element("span", { class: "badge" }),
      meta: element("p", { class: "meta" }),
      left: element("span"),
      bar: element("i"),
      devices: element("ul", { class: "devices" }),
      drill: element("button", { type: "button", class: "quiet", "aria-label": `Take ${name} away` }, "Take away"),
      drawn: "",
    };
    card.deadline = element("p", { class: "deadline", hidden: true }, card.left, card.bar);
    card.drill.addEventListener("click", () => this.drill?.(name));
    const top = element("div", { class: "top" }, element("h3", {}, name), card.state);
    const foot = element("div", { class: "top foot" }, card.meta, card.drill);
    card.box = element("li", { class: "instance" }, top, card.deadline, card.devices, foot);
    card.box.dataset.name = name;
    this.#cards.set(name, card);
    return card;
  }

  #fill(card, one, placement) {
    card.box.dataset.state = card.state.dataset.state = one.state;
    say(card.state, WORDS[one.state] + (one.advised && one.state === "ready" ? ", to be replaced" : ""));
    const price = one.price_class === "on_demand" ? "on demand" : "spot";
    say(card.meta, [one.type, one.zone, price].filter(Boolean).join(" \u00b7 "));
    card.drill.hidden = !this.drill || one.state === "gone";
    if (one.seconds_left === null) this.#ends.delete(one.name);
    else {
      const end = performance.now() / 1000 + one.seconds_left;
      const before = this.#ends.get(one.name);
      this.#ends.set(one.name, { end, whole: Math.max(before?.whole ?? 0, one.seconds_left) });
    }
    this.#count();
    const drawn = JSON.stringify([one.state === "gone", one.devices, one.positions, placement?.shape, placement?.layers]);
    if (drawn !== card.drawn) {
      card.drawn = drawn;
      card.devices.replaceChildren(...Array.from({ length: one.devices }, (_, index) => device(one, index, placement)));
    }
  }

  #count() {
    for (const [name, card] of this.#cards) {
      const notice = this.#ends.get(name);
      card.deadline.hidden = !notice;
      if (!notice) continue;
      const left = Math.max(0, notice.end - performance.now() / 1000);
      say(card.left, `taken in ${left < 100 ? `${left.toFixed(1)} s` : seconds(left)}`);
      card.bar.style.setProperty("--left", notice.whole ? left / notice.whole : 0);
    }
  }
}

/** One device: what it holds of the mesh, or that it is spare. */
function device(instance, index, placement) {
  const at = instance.positions[index];
  if (!at || !placement) {
    const what = instance.state === "gone" ? "gone" : "spare";
    return element("li", { class: "device spare" }, element("b", {}, what), `device ${index}`);
  }
  const [d, p, m] = at;
  const [, stages, tensor] = placement.shape.split("x").map(Number);
  const [first, end] = placement.layers[p];
  const layers = end - first === 1 ? `layer ${first}` : `layers ${first}\u2013${end - 1}`;
  const ticks = element("span", { class: "ticks", "aria-hidden": "true" });
  if (tensor > 1 && tensor <= 16) {
    ticks.append(...Array.from({ length: tensor }, (_, one) => element("i", { class: one === m ? "on" : "" })));
  }
  const cell = element("li", { class: "device" }, element("b", {}, `d${d} p${p} m${m}`), layers, ticks);
  cell.title = `device ${index}: replica ${d}, stage ${p} of ${stages}, tensor shard ${m} of ${tensor}, ${layers}`;
  cell.dataset.replica = d;
  cell.style.setProperty("--hue", `var(--r${d % HUES})`);
  cell.style.setProperty("--shade", `${stages > 1 ? 100 - (60 * p) / (stages - 1) : 100}%`);
  return cell;
}

export function meshText(status) {
  if (!status.placement) return "no mesh fits the instances: requests wait";
  const [d, p, m] = status.placement.shape.split("x");
  const parts = `${plural(+d, "replica")}, ${plural(+p, "stage")}, ${plural(+m, "tensor shard")}`;
  return `mesh ${shape(status.placement.shape)}: ${parts}; epoch ${status.placement.epoch}`;
}
