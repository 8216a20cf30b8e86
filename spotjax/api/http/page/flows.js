// Bytes on their way, drawn as arrows between the cards of instances. Which ones there are is told by `history`.

import { bytes } from "./format.js";

const SVG = "http://www.w3.org/2000/svg";
const LABELLED = 8; // the largest; more would cover each other

const make = (tag, attributes) => {
  const made = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  return made;
};

export class Flows {
  #svg = document.querySelector("#flows");
  #floor = document.querySelector("#floor");
  #checkpoint = document.querySelector("#checkpoint");
  #flows = [];

  constructor(instances) {
    this.instances = instances;
    new ResizeObserver(() => this.draw()).observe(this.#floor);
  }

  /** Shows these; `live` ones move. */
  show(flows, live) {
    this.#flows = flows.filter((flow) => flow.source !== flow.target && flow.bytes > 0);
    this.#svg.classList.toggle("live", live);
    this.draw();
  }

  draw() {
    this.#checkpoint.hidden = !this.#flows.some((flow) => flow.source === "");
    const floor = this.#floor.getBoundingClientRect();
    const box = (name) => {
      const shown = name === "" ? this.#checkpoint : this.instances.card(name);
      if (!shown) return null;
      const { left, top, width, height } = shown.getBoundingClientRect();
      return { x: left - floor.left + width / 2, y: top - floor.top + height / 2, w: width / 2 + 4, h: height / 2 + 4 };
    };
    const largest = [...this.#flows].sort((a, b) => b.bytes - a.bytes).slice(0, LABELLED);
    const most = largest[0]?.bytes ?? 1;
    const lines = [];
    const labels = [];
    for (const flow of this.#flows) {
      const from = box(flow.source);
      const to = box(flow.target);
      if (!from || !to) continue;
      const stacked = floor.width - from.w - from.x < 60 && from.x === to.x; // on a phone
      const arrow = stacked ? arcOf(from, to, floor.width) : arrowOf(from, to, floor.width);
      const width = 2 + 3 * Math.sqrt(flow.bytes / most);
      lines.push(make("path", { class: "flow", d: arrow.path, "stroke-width": width }));
      lines.push(make("path", { class: "head", d: "M0 0L-11 -6L-11 6Z", transform: arrow.head }));
      if (largest.includes(flow)) labels.push(label(arrow.middle, bytes(flow.bytes), floor.width));
    }
    this.#svg.replaceChildren(...lines, ...labels);
  }
}

/** A curve from the edge of one box to the edge of another, to the right of the straight line: both ways are seen. */
function arrowOf(from, to, width) {
  const dx = to.x - from.x;
  const dy = to.y - from.y;
  const far = Math.hypot(dx, dy) || 1;
  const bend = Math.min(26, far * 0.14);
  const [nx, ny] = [-dy / far, dx / far];
  const inside = (x) => Math.max(8, Math.min(width - 8, x));
  const control = { x: inside((from.x + to.x) / 2 + nx * bend * 2), y: (from.y + to.y) / 2 + ny * bend * 2 };
  const start = edge(from, control);
  const end = edge(to, control);
  const angle = (Math.atan2(end.y - control.y, end.x - control.x) * 180) / Math.PI;
  return {
    path: `M${start.x} ${start.y}Q${control.x} ${control.y} ${end.x} ${end.y}`,
    head: `translate(${end.x} ${end.y}) rotate(${angle})`,
    middle: {
      x: (start.x + 2 * control.x + end.x) / 4,
      y: (start.y + 2 * control.y + end.y) / 4,
      aside: Math.abs(nx) > 0.95 ? [nx, 0] : Math.abs(ny) > 0.95 ? [0, ny] : [0, 0],
    },
  };
}

/** A bracket in the margin, between boxes that lie below each other. */
function arcOf(from, to, width) {
  const right = from.x + from.w - 4;
  const out = right + (width - right) * 1.2;
  return {
    path: `M${right} ${from.y + 8}C${out} ${from.y + 8} ${out} ${to.y - 8} ${right + 10} ${to.y - 8}`,
    head: `translate(${right} ${to.y - 8}) rotate(180)`,
    middle: { x: width, y: (from.y + to.y) / 2, aside: [0, 0] },
  };
}

/** Where the line from a box's centre towards a point leaves the box. */
function edge(box, towards) {
  const dx = towards.x - box.x;
  const dy = towards.y - box.y;
  const part = Math.min(box.w / (Math.abs(dx) || 1e-9), box.h / (Math.abs(dy) || 1e-9), 1);
  return { x: box.x + dx * part, y: box.y + dy * part };
}

function label(at, text, floor) {
  const width = text.length * 7 + 14;
  const x = Math.max(width / 2, Math.min(floor - width / 2, at.x + at.aside[0] * (width / 2 + 8)));
  const group = make("g", { transform: `translate(${x} ${at.y + at.aside[1] * 19})` });
  group.append(make("rect", { class: "pill", x: -width / 2, y: -11, width, height: 22, rx: 11 }));
  group.append(Object.assign(make("text", {}), { textContent: text }));
  return group;
}
