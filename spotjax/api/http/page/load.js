// How much is served, how fast, at what cost: tiles of numbers, and the token rate of the last two minutes.

import { dollars, element, integer, plural, say, seconds } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const SECONDS = 120;
const LEAST_SECONDS = 30; // that the chart spans, however little there is to show yet
const WINDOW = 60; // over which latencies are taken

export class Load {
  #samples = []; // {at, tokens}: at is the server's uptime, so that a late answer does not look like a slow server
  #cuts = [];
  #latest = [];
  #tiles = new Map();
  #box = document.querySelector("#load");

  constructor() {
    const wide = this.#tile("rate", "tokens per second", "wide");
    this.chart = document.createElementNS(SVG, "svg");
    this.chart.setAttribute("class", "chart");
    this.chart.setAttribute("preserveAspectRatio", "none");
    this.chart.setAttribute("viewBox", `0 0 ${SECONDS} 100`);
    this.chart.setAttribute("role", "img");
    this.chart.setAttribute("aria-label", "Tokens per second over the last two minutes; dashed lines are changes of the mesh");
    wide.box.append(this.chart);
    for (const [name, title] of [["running", "running"], ["waiting", "waiting"], ["first", "time to first token"], ["between", "between tokens"], ["pages", "KV in use"], ["cost", "cost"]]) {
      this.#tile(name, title);
    }
  }

  #tile(name, title, kind = "") {
    const tile = { value: element("p", { class: "value" }, "\u2013"), note: element("p", { class: "note" }) };
    const text = element("div", {}, element("p", { class: "name" }, title), tile.value, tile.note);
    tile.box = element("div", { class: `tile ${kind}` }, text);
    tile.box.dataset.name = name;
    this.#tiles.set(name, tile);
    this.#box.append(tile.box);
    return tile;
  }

  #set(name, value, note = "") {
    const tile = this.#tiles.get(name);
    tile.box.hidden = value === null;
    if (value === null) return;
    say(tile.value, value);
    say(tile.note, note);
  }

  restart() {
    this.#samples = [];
    this.#cuts = [];
    this.#latest = [];
  }

  /** The mesh changed just now. */
  cut() {
    const last = this.#samples.at(-1);
    if (last) this.#cuts.push(last.at);
  }

  show(status) {
    const sample = { at: status.uptime_seconds, tokens: status.tokens_committed };
    const last = this.#samples.at(-1);
    if (last && sample.at < last.at) this.restart();
    if (!last || sample.at > last.at + 0.2) this.#samples.push(sample);
    this.#samples = this.#samples.filter((one) => one.at > sample.at - SECONDS - 5);
    const rates = ratesOf(this.#samples);
    const recent = this.#samples.slice(-4);
    const now = recent.length > 1 ? (recent.at(-1).tokens - recent[0].tokens) / (recent.at(-1).at - recent[0].at) : 0;
    this.#set("rate", now < 10 && now > 0 ? now.toFixed(1) : integer(now), `${integer(status.tokens_committed)} so far`);
    this.#draw(rates, sample.at);
    const sum = (name) => status.replicas.reduce((total, replica) => total + replica[name], 0);
    this.#set("running", integer(sum("running")), `${plural(status.requests_finished, "request")} done`);
    this.#set("waiting", integer(status.queued + sum("waiting")), status.placement ? "" : "for instances");
    const pages = sum("pages_total");
    this.#set("pages", pages ? `${Math.round((100 * sum("pages_used")) / pages)} %` : "\u2013", pages ? `of ${integer(pages)} pages` : "");
    this.#cost(status.capacity);
  }

  #cost(capacity) {
    if (!capacity) {
      this.#set("cost", null);
      return;
    }
    const { cost_per_hour: spot, on_demand_per_hour: full, spent_today: today } = capacity;
    const part = full > spot && spot > 0 ? `, ${Math.round(100 * (1 - spot / full))} % less than on demand` : "";
    this.#set("cost", `${dollars(spot)}/h`, `${dollars(today)} today${part}`);
    this.#tiles.get("cost").box.title = full ? `the same machines on demand: ${dollars(full)} per hour` : "";
  }

  /** Takes what /metrics says; null where that is not to be had. */
  measured(text) {
    const now = performance.now() / 1000;
    const found = text === null ? null : { at: now, first: histogram(text, "spotjax_time_to_first_token_seconds"), between: histogram(text, "spotjax_inter_token_latency_seconds") };
    for (const name of ["first", "between"]) {
      if (!found?.[name].length) this.#set(name, null);
    }
    if (!found) return;
    this.#latest = [...this.#latest.filter((one) => one.at > now - WINDOW), found];
    for (const name of ["first", "between"]) {
      if (!found[name].length) continue;
      const counts = difference(found[name], this.#latest[0] === found ? [] : this.#latest[0][name]);
      const [middle, high] = [0.5, 0.99].map((part) => quantile(counts, part));
      this.#set(name, middle === null ? "\u2013" : seconds(middle), middle === null ? "none in the last minute" : `99 % within ${seconds(high)}`);
    }
  }

  #draw(rates, now) {
    const most = Math.max(...rates.map((one) => one.rate), 1);
    const span = Math.min(SECONDS, Math.max(LEAST_SECONDS, now - (rates[0]?.at ?? now)));
    const x = (at) => (SECONDS * (1 - (now - at) / span)).toFixed(2);
    const y = (rate) => (100 - (92 * rate) / most).toFixed(2);
    const line = rates.map((one, at) => `${at ? "L" : "M"}${x(one.at)} ${y(one.rate)}`).join("");
    const parts = [];
    if (rates.length > 1) {
      parts.push(path("area", `${line}L${x(rates.at(-1).at)} 100L${x(rates[0].at)} 100Z`), path("line", line));
    }
    for (const at of this.#cuts.filter((one) => one > now - span)) parts.push(path("cut", `M${x(at)} 0V100`));
    this.chart.replaceChildren(...parts);
  }
}

function path(kind, d) {
  const made = document.createElementNS(SVG, "path");
  made.setAttribute("class", kind);
  made.setAttribute("d", d);
  return made;
}

function ratesOf(samples) {
  return samples.slice(1).map((one, at) => ({ at: one.at, rate: (one.tokens - samples[at].tokens) / (one.at - samples[at].at) }));
}

/** Cumulative counts by upper bound, summed over other labels. */
export function histogram(text, name) {
  const counts = new Map();
  for (const line of text.split("\n")) {
    if (!line.startsWith(`${name}_bucket`)) continue;
    const bound = /le="([^"]+)"/.exec(line)[1];
    const value = Number(line.slice(line.lastIndexOf("}") + 1).trim().split(" ")[0]);
    const le = bound === "+Inf" ? Infinity : Number(bound);
    counts.set(le, (counts.get(le) ?? 0) + value);
  }
  return [...counts].sort((a, b) => a[0] - b[0]);
}

function difference(later, earlier) {
  const before = new Map(earlier);
  return later.map(([bound, count]) => [bound, count - (before.get(bound) ?? 0)]);
}

/** As Prometheus's histogram_quantile: linear within the bucket; null of nothing. */
export function quantile(counts, part) {
  const total = counts.at(-1)?.[1] ?? 0;
  if (!(total > 0)) return null;
  const wanted = part * total;
  let [low, below] = [0, 0];
  for (const [bound, count] of counts) {
    if (count >= wanted) return bound === Infinity ? low : low + ((bound - low) * (wanted - below)) / Math.max(count - below, 1e-9);
    [low, below] = [bound, count];
  }
  return low;
}
