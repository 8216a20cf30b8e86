// A completion, streamed over the OpenAI-compatible interface, with a mark where the mesh changed under it.

import { ApiError, call, sent } from "./api.js";
import { element, plural, say, seconds } from "./format.js";

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
    this.#run = { changes: 0, tokens: 0, largest: 0, last: 0, part: null };
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
      if (this.#running.signal.aborted) say(this.#state, `Stopped: ${this.#summary()}`);
      else if (problem instanceof ApiError || problem instanceof TypeError) say(this.#state, `Not complete: ${problem.message}`);
      else throw problem;
    } finally {
      this.#running = this.#run = null;
      say(this.#go, "Generate");
    }
  }

  async #read(body) {
    const answer = await call("v1/completions", { body, signal: this.#running.signal, headers: { Accept: "text/event-stream" } });
    let finish = "";
    for await (const { data } of sent(answer)) {
      if (data === "[DONE]") return finish;
      const said = JSON.parse(data);
      if (said.error) throw new ApiError(said.error.message, 0);
      finish = said.choices?.[0]?.finish_reason ?? finish;
      if (said.choices?.[0]?.text) this.#came(said.choices[0].text);
    }
    throw new ApiError("the stream broke", 0);
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
    if (run.tokens === 1) say(this.#state, "Text is coming. Take an instance away now.");
  }

  #summary() {
    const { tokens, largest, changes } = this.#run;
    const over = changes ? ` across ${plural(changes, "change")} of the mesh` : "";
    return `${plural(tokens, "piece")} of text${over}; the longest wait for one was ${seconds(largest)}.`;
  }
}
