// The page: puts its parts together. Each part is in a module of its own; what the server says comes from `feed`.

import { key } from "./api.js";
import { add, complain, drill } from "./drill.js";
import { caller, Feed } from "./feed.js";
import { Flows } from "./flows.js";
import { clock, element, say } from "./format.js";
import { Headline } from "./headline.js";
import { Changes, History, together } from "./history.js";
import { Instances, meshText } from "./instances.js";
import { Load } from "./load.js";
import { TryIt } from "./tryit.js";

const EVENTS_SHOWN = 60;
const FLOWS_MILLISECONDS = 6000; // for which arrows stay when all has arrived
const $ = (selector) => document.querySelector(selector);

const feed = new Feed();
const headline = new Headline();
const instances = new Instances();
const flows = new Flows(instances);
const load = new Load();
const tryIt = new TryIt();
let changes = new Changes();
let chosen = null;
let fading = 0;

const history = new History((epoch) => {
  chosen = epoch;
  flows.show(epoch?.flows ?? [], false);
});

function showFlows(now, done) {
  if (chosen) return;
  clearTimeout(fading);
  flows.show(together(now), true);
  fading = setTimeout(() => chosen || flows.show([], false), done ? FLOWS_MILLISECONDS : 10 * FLOWS_MILLISECONDS);
}

feed.addEventListener("status", ({ detail: status }) => {
  document.title = `Spotjax: ${status.model}`;
  tryIt.model = status.model;
  say($("#serving"), `serving ${status.model}`);
  say($("#mesh"), meshText(status));
  instances.show(status);
  load.show(status);
  headline.calm(status);
  badge(status.draining ? "draining" : status.ready ? "ready" : "joining", status.draining ? "draining" : status.ready ? "live" : "not ready");
  flows.draw();
});

feed.addEventListener("metrics", ({ detail }) => load.measured(detail));

feed.addEventListener("restart", () => {
  changes = new Changes();
  history.clear();
  headline.restart();
  $("#events").replaceChildren();
});

feed.addEventListener("happened", ({ detail: event }) => {
  const epoch = changes.hear(event);
  headline.hear(event, epoch);
  if (epoch) history.add(epoch);
  if (event.live && event.kind === "plan") showFlows(event.flows, false);
  if (event.live && epoch) {
    showFlows(epoch.flows, true);
    if (epoch.cause.kind !== "start") load.cut();
    tryIt.changed(epoch);
  }
  const line = element("li", {}, element("time", {}, clock(event.time)), element("b", {}, event.kind), element("p", {}, event.message));
  $("#events").prepend(line);
  $("#events").children[EVENTS_SHOWN]?.remove();
});

function badge(state, text) {
  $("#connection").dataset.state = state;
  say($("#connection"), text);
}

feed.addEventListener("connection", ({ detail: { state, message } }) => {
  document.body.classList.toggle("away", state === "lost" || state === "locked");
  if (state === "ready") whoAmI();
  else if (state === "locked") {
    badge("lost", "needs a key");
    askForKey(message);
  } else badge(state === "starting" ? "joining" : "lost", state === "starting" ? "starting" : "disconnected, trying again");
});

async function whoAmI() {
  try {
    const { rights } = await caller();
    const operates = rights.includes("operate");
    instances.drill = operates ? drill : null;
    $("#add").hidden = !operates;
    $("#try").hidden = !rights.includes("generate");
    $("#key-open").hidden = !key.get();
    feed.refresh();
  } catch (problem) {
    if (problem.status === 401) askForKey(problem.message);
    else complain(problem.message);
  }
}

function askForKey(why) {
  $("#key-open").hidden = false;
  if ($("#key").open || $("#key").dataset.left) return;
  if (why) say($("#key-why"), `${why}. A key is kept in this tab until you close it.`);
  $("#key").returnValue = "";
  $("#key").showModal();
}

$("#key").addEventListener("close", () => {
  $("#key").dataset.left = $("#key").returnValue === "ok" ? "" : "yes"; // who leaves it is not asked again and again
  const given = $("#key-value").value.trim();
  $("#key-value").value = "";
  if ($("#key").returnValue !== "ok") return;
  key.set(given);
  whoAmI();
});
$("#key-open").addEventListener("click", () => {
  $("#key").dataset.left = "";
  askForKey("");
});
$("#add").addEventListener("click", add);

feed.start();
