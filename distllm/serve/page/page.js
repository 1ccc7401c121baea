// The live page: asks /v1/cluster once a second, and shows it.

import { ask } from "./api.js";
import * as chat from "./chat.js";
import * as rates from "./rates.js";
import { age, capital, counted, hue, show as showRing, tag } from "./ring.js";

const POLL_MS = 1000;
const PATIENCE_MS = 5000;
const NAMES = { started: "Started", ready: "Ready", lost: "Lost", broke: "Ring broke", recovered: "Going on",
  changed: "Plan changed", joined: "Joined", left: "Left", ended: "Ended", failed: "Request failed" };

const at = (id) => document.getElementById(id);
const events = new Map(); // rows by time and id
let answered = 0; // when the server did

/** The server does not answer: what was known is shown as such. */
function away() {
  say("away", "The server does not answer; trying again");
  document.body.classList.add("away");
  at("ring-picture").classList.remove("running");
  note(answered ? `as it was ${age((Date.now() - answered) / 1000)} ago` : "");
}

function show(told) {
  answered = Date.now();
  document.body.classList.remove("away");
  at("model").textContent = told.model;
  document.title = `${told.model} · distllm`;
  chat.serves(told.model);
  showState(told);
  showRanks(told);
  showRequests(told.in_flight, told.unfinished);
  showEvents(told.events);
}

function showState(told) {
  if (told.mending && told.ready) say("mending", "The ring is being mended");
  else if (told.ready && told.missing?.length) say("mending", `Ready · ${named(told.missing)} lost`);
  else if (told.ready) say("ready", "Ready");
  else if (told.rank0_comings) say("loading", "Rank 0 is being started again");
  else say("loading", "The model is loading");
}

function say(state, words) {
  const place = at("state");
  place.dataset.state = state;
  if (place.textContent !== words) place.textContent = words; // else it would be read out each second
}

/** A few words in the middle of the ring. */
function note(words, style = "quiet") {
  at("ring-note").textContent = words;
  at("ring-note").className = style;
}

function showRanks(told) {
  if (!told.ranks) {
    note("the ranks come up");
    at("ring-sum").textContent = "Who holds which layers is told when the model is loaded.";
    return;
  }
  rates.take(told);
  showRing(told, !told.ready);
  const layers = Math.max(...told.ranks.map((each) => each.layers[1]));
  at("ring-sum").textContent = `${counted(told.ranks.length, "stage")} · ${layers} layers · epoch ${told.epoch}`;
  const rate = !told.ready ? null : told.mending ? 0 : rates.rate();
  at("rate").textContent = rate === null ? "–" : rate < 100 ? rate.toFixed(1) : Math.round(rate);
  if (told.ready && told.mending) note("ring broken", "wrong");
  else note(told.ready ? "" : "as it was");
  const losses = told.events.filter((each) => ["lost", "broke", "ended"].includes(each.kind));
  rates.draw(at("spark"), losses.map((each) => each.time));
  at("kv-used").textContent = told.kv_blocks_used.toLocaleString("en");
  at("kv-all").textContent = `of ${told.kv_blocks.toLocaleString("en")}`;
  at("kv").value = told.kv_blocks_used / told.kv_blocks;
  at("made").textContent = told.tokens.toLocaleString("en");
  at("made-how").textContent = `in ${counted(told.steps, "step")}`;
}

function showRequests(flight, count) {
  at("in-flight").textContent = count.toLocaleString("en");
  const how = ["running", "waiting"].filter((state) => flight[state]).map((state) => `${flight[state]} ${state}`);
  at("in-flight-how").textContent = how.join(" · ");
  at("no-requests").hidden = count > 0;
  at("requests").querySelector("table").hidden = count === 0;
  at("request-list").replaceChildren(...flight.oldest.map((each) => {
    const row = tag("tr");
    const name = tag("th", "id", `${each.id.slice(0, each.id.indexOf("-") + 9)}…`);
    name.scope = "row";
    name.title = each.id;
    row.append(name, tag("td", each.state, each.state), tag("td", "", age(each.age_s)),
      tag("td", "", each.tokens.toLocaleString("en")));
    return row;
  }));
  const more = count - flight.oldest.length;
  at("more-requests").hidden = more <= 0;
  at("more-requests").textContent = `and ${more} more`;
}

function showEvents(told) {
  const list = at("event-list");
  at("no-events").hidden = told.length > 0;
  const names = new Set(told.map(name));
  for (const [key, row] of events) {
    if (names.has(key)) continue;
    row.remove();
    events.delete(key);
  }
  for (const each of told) {
    if (events.has(name(each))) continue;
    const row = eventRow(each);
    events.set(name(each), row);
    list.prepend(row);
  }
  list.setAttribute("aria-live", "polite"); // what was there at first is not read out
}

function eventRow(event) {
  const row = tag("li", event.kind);
  const when = new Date(event.time * 1000);
  const time = tag("time", "", when.toLocaleTimeString("en-GB"));
  time.dateTime = when.toISOString();
  time.title = when.toLocaleString("en-GB");
  const rank = /^rank (\d+)/.exec(event.text)?.[1];
  if (rank !== undefined) row.dataset.rank = hue(Number(rank));
  row.append(time, tag("b", "", NAMES[event.kind] ?? event.kind), tag("p", "", capital(event.text)));
  return row;
}

const named = (ranks) => ranks.map((each) => `rank ${each.rank}`).join(", ");

const name = (event) => `${event.time} ${event.id}`;

/** What the server tells; null if it does not answer. */
async function heard() {
  try {
    const response = await ask("/v1/cluster", { signal: AbortSignal.timeout(PATIENCE_MS) });
    return response.ok ? await response.json() : null;
  } catch (error) {
    console.debug(error);
    return null;
  }
}

async function poll() {
  try {
    const told = await heard();
    if (told === null) away();
    else show(told);
  } finally {
    setTimeout(poll, POLL_MS);
  }
}

poll();
