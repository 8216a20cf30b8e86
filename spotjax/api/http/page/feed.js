// What the server says, as it says it: status every second, events as they happen. Comes back by itself when the server
// is away, and with the last event's id, so that nothing is missed.

import { ApiError, call, json, sent } from "./api.js";

const STATUS_MILLISECONDS = 1000;
const METRICS_EVERY = 3;
const LIVE_SECONDS = 4; // an event that is older when it comes is history

const pause = (milliseconds) => new Promise((resume) => setTimeout(resume, milliseconds));

export class Feed extends EventTarget {
  #run = "";
  #last = "";
  #late = 0; // how far this clock is behind the server's, in milliseconds
  #wake = () => {};
  #state = "";
  #measured = true;

  start() {
    this.#watchStatus();
    this.#watchEvents();
    document.addEventListener("visibilitychange", () => this.refresh());
  }

  /** Asks for the status now. */
  refresh() {
    this.#wake();
  }

  #tell(name, detail) {
    this.dispatchEvent(Object.assign(new Event(name), { detail }));
  }

  #connection(state, message = "") {
    if (state !== this.#state || state === "lost") this.#tell("connection", { state, message });
    this.#state = state;
  }

  #failed(problem) {
    if (!(problem instanceof ApiError)) console.warn(problem);
    const refused = problem.status === 401 || problem.status === 403;
    this.#connection(refused ? "locked" : problem.status === 503 ? "starting" : "lost", problem.message);
  }

  async #watchStatus() {
    for (let turn = 0; ; turn += 1) {
      try {
        const answer = await call("fleet/status", { signal: AbortSignal.timeout(8000) });
        this.#late = Date.parse(answer.headers.get("date")) - Date.now() || 0;
        const status = await answer.json();
        this.#connection("ready");
        this.#tell("status", status);
        if (turn % METRICS_EVERY === 0) this.#readMetrics();
      } catch (problem) {
        this.#failed(problem instanceof DOMException ? new ApiError("the server does not answer", 0) : problem);
      }
      const sleep = document.hidden ? 15 * STATUS_MILLISECONDS : STATUS_MILLISECONDS;
      await Promise.race([pause(sleep), new Promise((resume) => (this.#wake = resume))]);
    }
  }

  async #readMetrics() {
    if (!this.#measured) return;
    try {
      this.#tell("metrics", await (await call("metrics", { headers: { Accept: "text/plain" } })).text());
    } catch {
      this.#measured = false; // until the server is another one
      this.#tell("metrics", null);
    }
  }

  async #watchEvents() {
    for (;;) {
      try {
        const headers = { Accept: "text/event-stream", ...(this.#last && { "Last-Event-ID": this.#last }) };
        for await (const { id, data } of sent(await call("fleet/events", { headers }))) this.#heard(id, JSON.parse(data));
      } catch (problem) {
        if (problem.status !== undefined) this.#failed(problem);
      }
      await pause(STATUS_MILLISECONDS);
    }
  }

  #heard(id, event) {
    const run = id.slice(0, id.lastIndexOf("-"));
    if (run !== this.#run) {
      this.#run = run;
      this.#measured = true;
      this.#tell("restart");
    }
    this.#last = id;
    const live = (Date.now() + this.#late) / 1000 - event.time < LIVE_SECONDS;
    this.#tell("happened", { ...event, live });
    if (live) this.refresh();
  }
}

/** Who this page acts for, and what that may do. */
export const caller = () => json("fleet/caller");
