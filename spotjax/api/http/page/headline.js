// One sentence about what happened last, for whoever looks for the first time and for screen readers.

import { bytes, plural, say, seconds, shape } from "./format.js";
import { kept } from "./history.js";

export class Headline {
  #box = document.querySelector("#headline");
  #lead = this.#box.querySelector(".lead");
  #more = this.#box.querySelector(".more");
  #told = false;

  #say(tone, lead, more) {
    this.#box.dataset.tone = tone;
    say(this.#lead, lead);
    say(this.#more, more);
  }

  restart() {
    this.#told = false;
  }

  /** Before anything has happened. */
  calm(status) {
    if (this.#told) return;
    const alive = status.instances.filter((one) => one.state !== "gone").length;
    if (status.placement) {
      this.#say("calm", `${plural(alive, "instance")} serve${alive === 1 ? "s" : ""} ${status.model}.`, "Nothing has been taken away since this controller started.");
    } else this.#say("warn", "Waiting for instances.", "No mesh fits those that are there. Requests wait; none fails.");
  }

  hear(event, epoch) {
    const { instance, seconds: left, source, kind } = event.fields;
    if (epoch) this.#changed(epoch);
    else if (event.kind === "notice" && left !== undefined) {
      this.#say("warn", `${instance} will be taken in ${seconds(left)}.`, `Says ${source}${kind ? ` (${kind})` : ""}. Decoding goes on while bytes move.`);
    } else if (event.kind === "notice" && instance && !source) {
      this.#say("calm", `${instance} leaves.`, "The mesh moves off it, however long that takes.");
    } else if (event.kind === "lost" && instance && event.fields.notice_seconds === undefined) {
      this.#say("bad", `${instance} is gone, without notice.`, "A new mesh is formed of what is left.");
    } else if (event.kind === "plan" && this.#told) {
      const size = event.fields.bytes_moved + event.fields.bytes_loaded;
      say(this.#more, `Mesh ${shape(event.fields.shape)} is planned: ${bytes(size)} on the way, ${bytes(event.fields.bytes_in_place)} stay in place.`);
      return;
    } else if (event.kind === "stop") {
      this.#say("warn", "Waiting for instances.", "No mesh fits those that are left. Requests wait; none fails.");
    } else if (event.kind === "withdrawn") {
      this.#say("calm", `${instance} may stay.`, `${source} took its notice back.`);
    } else return;
    this.#told = true;
  }

  #changed(epoch) {
    if (epoch.cause.kind === "start") {
      this.#told = false;
      return;
    }
    const [who] = epoch.cause.text.split(" ");
    const what = {
      lost: `Survived: ${who} was taken without notice.`,
      notice: `Survived: ${epoch.cause.text}.`,
      joined: `${epoch.cause.text[0].toUpperCase()}${epoch.cause.text.slice(1)}.`,
    }[epoch.cause.kind];
    const moved = `${bytes(epoch.moved + epoch.kv)} moved, ${bytes(epoch.stayed)} stayed in place`;
    this.#say("good", what, `Decoding paused for ${seconds(epoch.pause)}. ${kept(epoch)} Mesh ${shape(epoch.shape)}, epoch ${epoch.number}; ${moved}.`);
    this.#told = true;
  }
}
