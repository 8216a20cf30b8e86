// A completion, streamed over the OpenAI-compatible interface, with a mark where the mesh changed under it. A stream that
// breaks is taken up where it was: the controller may be taken away, too.

import { ApiError, call, sent } from "./api.js";
import { element, plural, say, seconds } from "./format.js";

const PATIENCE = 60; // seconds for which a server that is away is waited for
const AGAIN_MILLISECONDS = 500;

export class TryIt {
  #form = document.querySelector("#try form");
  #text = document.querySelector("#text");
  #state = document.querySelector("#text-state");
  #go = document.querySelector("#go");
  #running = null;
  #run = null;

  constructor() {
    this.model = "";
    this.#form.addEventListener("submit", (event) => {
      event.preventDefault();
      if (this.#running) this.#running.abort();
      else this.#generate();
    });
  }

  /** The mesh changed: says so in the text, if it comes just now. */
  changed(epoch) {
    if (!this.#run) return;
    const mark = element("mark", { title: epoch.cause.text }, `epoch ${epoch.number}, ${seconds(epoch.pause)}`);
    this.#run.changes += 1;
    this.#run.part = null;
    this.#text.append(mark);
  }

  async #generate() {
    const asked = document.querySelector("#prompt").value;
    this.#running = new AbortController();
    this.#run = { changes: 0, breaks: 0, tokens: 0, largest: 0, last: 0, part: null };
    say(this.#go, "Stop");
    this.#text.replaceChildren(element("span", { class: "asked" }, asked));
    say(this.#state, "Waiting for the first token.");
    try {
      const finish = await this.#read({
        model: this.model,
        prompt: asked,
        max_tokens: document.querySelector("#tokens").valueAsNumber || 200,
        temperature: 0.8,
        seed: 1, // so that whoever asks again, without a preemption, gets the same text
        stream: true,
      });
      say(this.#state, `${finish === "stop" ? "The model ended it" : "Complete"}: ${this.#summary()}`);
    } catch (problem) {
      if (this.#running.signal.aborted) say(this.#state, `Left alone, the server ends it: ${this.#summary()}`);
      else if (problem instanceof ApiError || problem instanceof TypeError) say(this.#state, `Not complete: ${problem.message}`);
      else throw problem;
    } finally {
      this.#running = this.#run = null;
      say(this.#go, "Generate");
    }
  }

  /** Reads to the end, over as many connections as that takes. Returns why it ended. */
  async #read(body) {
    const name = [...crypto.getRandomValues(new Uint8Array(12))].map((one) => one.toString(16).padStart(2, "0")).join("");
    const place = { last: "", finish: "" };
    let deadline = 0;
    for (;;) {
      const headers = { Accept: "text/event-stream", "Idempotency-Key": name, ...(place.last && { "Last-Event-ID": place.last }) };
      try {
        const answer = await call("v1/completions", { body, signal: this.#running.signal, headers });
        deadline = 0;
        if (await this.#follow(answer, place)) return place.finish;
      } catch (problem) {
        if (this.#running.signal.aborted || ![0, 503].includes(problem.status ?? 0)) throw problem;
      }
      const now = performance.now() / 1000;
      if (!deadline) this.#run.breaks += 1;
      deadline ||= now + PATIENCE;
      if (now > deadline) throw new ApiError("the server is away", 0);
      say(this.#state, "The server is away. The text goes on when it is back.");
      await new Promise((resume) => setTimeout(resume, AGAIN_MILLISECONDS));
    }
  }

  /** Reads one connection; returns whether that was all. */
  async #follow(answer, place) {
    for await (const { id, data } of sent(answer)) {
      if (data === "[DONE]") return true;
      const said = JSON.parse(data);
      if (said.error) throw new ApiError(said.error.message, 500);
      place.last = id;
      place.finish = said.choices?.[0]?.finish_reason ?? place.finish;
      if (said.choices?.[0]?.text) this.#came(said.choices[0].text);
    }
    return false;
  }

  #came(text) {
    const run = this.#run;
    const now = performance.now() / 1000;
    if (run.tokens) run.largest = Math.max(run.largest, now - run.last);
    run.last = now;
    run.tokens += 1;
    if (!run.part) this.#text.append((run.part = document.createTextNode("")));
    const atEnd = this.#text.scrollHeight - this.#text.scrollTop - this.#text.clientHeight < 40;
    run.part.data += text;
    if (atEnd) this.#text.scrollTop = this.#text.scrollHeight;
    if (run.tokens === 1 || this.#state.textContent.startsWith("The server")) say(this.#state, "Text is coming. Take an instance away now.");
  }

  #summary() {
    const { tokens, largest, changes, breaks } = this.#run;
    const passed = [changes && `${plural(changes, "change")} of the mesh`, breaks && `${plural(breaks, "broken connection")}`].filter(Boolean);
    const over = passed.length ? ` across ${passed.join(" and ")}` : "";
    return `${plural(tokens, "piece")} of text${over}; the longest wait for one was ${seconds(largest)}.`;
  }
}
