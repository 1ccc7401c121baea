// The picture of the ring: a segment for each layer, in the colour of the rank that holds it, and the ranks in words.

import { busy } from "./rates.js";

const SVG = "http://www.w3.org/2000/svg";
const MIDDLE = 160, INNER = 98, OUTER = 126, OUTSIDE = 132, BADGE = 146;
const GAP = 8; // degrees at the top, where tokens come home
const picture = document.getElementById("ring-picture");
const list = document.getElementById("stages");
let parts = []; // the segments: embeddings, layers, head
let marks = null;

/** Shows what the server tells; `asleep` if that is how it was before. */
export function show(told, asleep) {
  const missing = told.missing.filter((each) => !told.ranks.some((stage) => stage.rank === each.rank) || told.mending);
  segments(told, missing);
  labels(told, missing);
  picture.classList.toggle("asleep", asleep);
  picture.classList.toggle("running", !asleep && !told.mending && told.ranks.some((each) => busy(each.rank) !== null));
  picture.setAttribute("aria-label", sentence(told, missing));
  rows(told, missing, asleep);
}

/** The colour of a rank. */
export const hue = (rank) => String(rank % 8);

function segments(told, missing) {
  const ends = [...told.ranks, ...missing].map((each) => each.layers?.[1] ?? 0);
  const count = Math.max(1, ...ends) + 2;
  if (parts.length !== count) {
    marks = make("g", {});
    parts = Array.from({ length: count }, () => make("path", { class: "part" }));
    const comet = make("g", { class: "comet" });
    comet.append(make("circle", { cx: MIDDLE, cy: MIDDLE - (INNER + OUTER) / 2, r: 5 }));
    picture.replaceChildren(...parts, comet, marks);
  }
  const lost = new Set(missing.map((each) => each.rank));
  const taken = missing.filter((each) => each.layers && told.mending); // by others, which load it now
  const holder = holders(told, count);
  parts.forEach((part, place) => {
    const rank = holder[place];
    part.setAttribute("d", arc(...angles(place, count, holder), INNER, OUTER));
    if (rank === undefined) delete part.dataset.rank;
    else part.dataset.rank = hue(rank);
    const moves = taken.some((each) => place > each.layers[0] && place <= each.layers[1]);
    part.classList.toggle("open", rank === undefined || lost.has(rank) || moves);
  });
}

/** The rank that has each segment. */
function holders(told, count) {
  const holder = Array(count).fill(undefined);
  told.ranks.forEach((stage, place) => {
    const first = place === 0 ? 0 : stage.layers[0] + 1;
    const last = place === told.ranks.length - 1 ? count : stage.layers[1] + 1;
    holder.fill(stage.rank, first, last);
  });
  return holder;
}

/** Where a segment begins and ends, in degrees from the top, with more room where the holder changes. */
function angles(place, count, holder) {
  const width = (360 - GAP) / count, slit = Math.min(0.5, width / 8);
  const from = GAP / 2 + place * width, edge = Math.min(1.2, width / 3);
  const apart = (other) => (other >= 0 && other < count && holder[other] !== holder[place] ? edge : slit);
  return [from + apart(place - 1), from + width - apart(place + 1)];
}

function labels(told, missing) {
  const count = parts.length, width = (360 - GAP) / count;
  const at = (layer) => GAP / 2 + layer * width;
  const drawn = [];
  told.ranks.forEach((stage, place) => {
    if (missing.some((each) => each.rank === stage.rank)) return;
    const first = place === 0 ? 0 : stage.layers[0] + 1;
    const last = place === told.ranks.length - 1 ? count : stage.layers[1] + 1;
    drawn.push(badge((at(first) + at(last)) / 2, stage.rank, "badge"));
  });
  for (const each of missing.filter((one) => one.layers)) {
    const [from, to] = [at(each.layers[0] + 1) + 1, at(each.layers[1] + 1) - 1];
    drawn.push(make("path", { class: "lost-arc", d: line(from, to, OUTSIDE) }));
    drawn.push(badge((from + to) / 2, each.rank, "badge lost"));
  }
  marks.replaceChildren(...drawn);
}

function badge(angle, rank, name) {
  const [x, y] = point(angle, BADGE);
  const group = make("g", { class: name, "data-rank": hue(rank) });
  const text = make("text", { x, y, dy: "0.36em" });
  text.textContent = rank;
  group.append(make("circle", { cx: x, cy: y, r: 11 }), text);
  return group;
}

/** The ranks in words, for those that do not see the picture. */
function sentence(told, missing) {
  const held = told.ranks.map((each) => `rank ${each.rank} holds ${each.span}`);
  const lost = missing.map((each) => `rank ${each.rank} is lost`);
  return `A ring of ${counted(told.ranks.length, "stage")}: ${[...held, ...lost].join(", ")}`;
}

function rows(told, missing, asleep) {
  const lost = new Map(missing.map((each) => [each.rank, each]));
  const shown = told.ranks.filter((each) => !lost.has(each.rank)).map((each) => ({ ...each, is: "stage" }));
  for (const each of [...missing.map((one) => ({ ...one, is: "lost" })), ...told.idle.map((one) => ({ ...one, is: "idle" }))]) {
    if (each.is === "idle" && lost.has(each.rank)) continue;
    const behind = each.layers ? shown.findIndex((stage) => stage.layers?.[0] > each.layers[0]) : -1;
    shown.splice(behind < 0 ? shown.length : behind, 0, each);
  }
  const kept = new Map([...list.children].map((row) => [row.dataset.name, row]));
  const wanted = shown.map((each) => {
    const name = `${each.is} ${each.rank}`;
    const row = kept.get(name) ?? blank(name, each);
    fill(row, each, asleep, told);
    return row;
  });
  if (wanted.some((row, place) => list.children[place] !== row) || list.children.length !== wanted.length) {
    list.replaceChildren(...wanted);
  }
}

function blank(name, each) {
  const row = document.createElement("li");
  row.dataset.name = name;
  row.dataset.rank = hue(each.rank);
  row.className = each.is;
  row.append(tag("span", "chip", each.rank), tag("span", "who"), tag("span", "holds"));
  if (each.is === "stage") {
    const load = tag("span", "load");
    load.append(tag("span", "worked"));
    row.append(load, tag("span", "share"));
  } else row.append(tag("span", "why"));
  row.append(tag("span", "facts"));
  return row;
}

function fill(row, each, asleep, told) {
  const put = (name, text) => { row.querySelector(`.${name}`).textContent = text; };
  put("who", `rank ${each.rank}`);
  const facts = (...those) => put("facts", those.map((one) => one.replaceAll(" ", "\u00a0")).join(" · "));
  const process = each.host ? [`host ${each.host}`, `pid ${each.pid}`] : [];
  if (each.is === "lost") {
    put("holds", "lost");
    put("why", reason(each));
    const held = each.layers ? `held layers ${each.layers[0]}–${each.layers[1] - 1}` : "held nothing";
    facts(held, ...process, `${age(told.time - each.since)} ago`);
    return;
  }
  if (each.is === "idle") {
    put("holds", each.state === "loading" ? "loading its part" : "spare");
    put("why", each.state === "loading" ? "It joins the ring when it has loaded." : "It holds no layers for now.");
    facts(...process);
    return;
  }
  const share = asleep || told.mending ? null : busy(each.rank);
  put("holds", each.span.replace(/(\d)-(\d)/, "$1–$2"));
  row.querySelector(".worked").style.width = `${100 * (share ?? 0)}%`;
  put("share", share === null ? "no steps now" : `busy ${percent(share)} · waiting ${percent(1 - share)}`);
  facts(...process, `${bytes(each.weight_bytes)} weights`, `${bytes(each.kv_bytes)} KV`);
}

/** How it was lost, without its name, which stands beside it. */
function reason(each) {
  const own = each.why.split("; rank ").find((part) => part.replace(/^rank /, "").startsWith(`${each.rank} `));
  return capital((own ?? each.why).replace(/^(rank )?\d+ \(.*?\) (is lost: )?/, ""));
}

export const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);

const percent = (share) => `${Math.round(100 * share)} %`;

export const counted = (count, noun) => `${count.toLocaleString("en")} ${noun}${count === 1 ? "" : "s"}`;

/** Three digits, in units of a thousand. */
export function bytes(count) {
  let unit = 0;
  while (count >= 999.5 && unit < 5) {
    count /= 1000;
    unit += 1;
  }
  return `${unit ? count.toPrecision(3) : count} ${["B", "kB", "MB", "GB", "TB", "PB"][unit]}`;
}

export function age(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.floor(seconds))} s`;
  return seconds < 3600 ? `${Math.floor(seconds / 60)} min` : `${Math.floor(seconds / 3600)} h`;
}

export function tag(name, style, text = "") {
  const element = document.createElement(name);
  if (style) element.className = style;
  element.textContent = text;
  return element;
}

function make(name, attributes) {
  const element = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  return element;
}

function point(angle, radius) {
  const turned = ((angle - 90) * Math.PI) / 180;
  return [MIDDLE + radius * Math.cos(turned), MIDDLE + radius * Math.sin(turned)].map((each) => each.toFixed(2));
}

const line = (from, to, radius) =>
  `M${point(from, radius)}A${radius} ${radius} 0 ${to - from > 180 ? 1 : 0} 1 ${point(to, radius)}`;

function arc(from, to, inner, outer) {
  const large = to - from > 180 ? 1 : 0;
  return `${line(from, to, outer)}L${point(to, inner)}A${inner} ${inner} 0 ${large} 0 ${point(from, inner)}Z`;
}
