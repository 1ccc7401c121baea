// The chat: streams answers, and goes on with one whose stream breaks.

import { ask, sentence } from "./api.js";
import { tag } from "./ring.js";

const PAUSE_MS = 1000;
const QUIET_MS = 1500;
const PATIENCE_MS = 45_000; // the server says every 15 seconds that it lives

const at = (id) => document.getElementById(id);
const [turns, form, question] = ["turns", "ask", "question"].map(at);
const messages = []; // those that were said and answered
let model = null;
let stopping = null; // ends the answer that comes
let atEnd = true; // of what is shown

/** An answer that will not come; the sentence says why. */
class Refused extends Error {}

/** The name to ask for. */
export function serves(name) {
  model = name;
  at("send").disabled = stopping !== null;
}

at("send").disabled = true;
at("stop").onclick = () => stopping?.abort();
at("chat-new").onclick = () => {
  stopping?.abort();
  messages.length = 0;
  turns.replaceChildren();
  at("chat-new").hidden = true;
  question.focus();
};
turns.onscroll = () => {
  atEnd = turns.scrollHeight - turns.scrollTop - turns.clientHeight < 60;
};
question.onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  form.requestSubmit();
};
form.onsubmit = (event) => {
  event.preventDefault();
  const said = question.value.trim();
  if (!said || model === null || stopping !== null) return;
  if (messages.length === 0) turns.querySelector(".nothing")?.remove();
  question.value = "";
  add("user", said);
  answer([...messages, { role: "user", content: said }]);
};

/** Has a conversation answered, and shows the answer as it comes. */
async function answer(asked) {
  const shown = add("assistant", "");
  const place = shown.querySelector("p"), note = shown.querySelector("small");
  const began = performance.now();
  let text = "", pieces = 0, heard = began, broken = false, reason = null;
  const progress = () => follows(() => {
    const quiet = performance.now() - heard > QUIET_MS;
    if (broken) note.textContent = "The connection broke; going on when the server is back.";
    else if (pieces === 0) note.textContent = "…";
    else note.textContent = quiet ? "Waiting for the ranks; the answer goes on." : "";
    shown.classList.toggle("quiet", quiet || broken);
  });
  const timer = setInterval(progress, 250);
  stopping = new AbortController();
  busy(true);
  shown.classList.add("coming");
  try {
    const pieced = follow(JSON.stringify(body(asked)), stopping.signal, (now) => {
      broken = now;
      progress();
    });
    for await (const choice of pieced) {
      heard = performance.now();
      reason = choice.finish_reason ?? reason;
      if (!choice.delta.content) continue;
      pieces += 1;
      text += choice.delta.content;
      follows(() => { place.textContent = text; });
      progress();
    }
    note.textContent = reason === "length" ? "Cut at the most tokens." : "";
    at("chat-said").textContent = "The answer is whole.";
  } catch (error) {
    if (stopping.signal.aborted) note.textContent = "Stopped.";
    else fail(shown, asked, error instanceof Refused ? error.message : `This page failed: ${error.message}`);
  }
  clearInterval(timer);
  shown.classList.remove("coming", "quiet");
  shown.dataset.done = reason ?? "no";
  if (text && shown.isConnected) messages.splice(0, messages.length, ...asked, { role: "assistant", content: text });
  stopping = null;
  busy(false);
}

/** What is asked of the server. */
function body(asked) {
  const given = { temperature: number("temperature"), max_completion_tokens: number("most"), seed: number("seed") };
  const chosen = Object.entries(given).filter(([, value]) => value !== null);
  return { model, messages: asked, stream: true, ...Object.fromEntries(chosen) };
}

function number(id) {
  return at(id).value === "" ? null : Number(at(id).value);
}

/** The choices of an answer as they come; a stream that breaks is gone on with where it was.

    `told` hears whether it is broken now. */
async function* follow(asked, signal, told) {
  for (let last = null; ; ) {
    const headers = { "Content-Type": "application/json", ...(last !== null && { "Last-Event-ID": last }) };
    try {
      const response = await ask("/v1/chat/completions", { method: "POST", headers, body: asked, signal });
      if (response.status === 404 && last !== null) {
        throw new Refused("The answer broke off, and the server has not kept it. Ask again.");
      }
      if (!response.ok && !(last !== null && response.status >= 500)) {
        throw new Refused(`It cannot be answered: ${await sentence(response)}.`);
      }
      if (response.ok) {
        told(false);
        last ??= response.headers.get("X-Last-Event-ID");
        for await (const [id, data] of lines(response.body)) {
          if (data === "[DONE]") return;
          const chunk = JSON.parse(data);
          if (chunk.error) throw new Refused(`The answer ended early: ${chunk.error.message}.`);
          last = id ?? last;
          yield* chunk.choices;
        }
      }
    } catch (error) {
      if (error instanceof Refused || signal.aborted) throw error;
      console.debug(error);
    }
    told(true);
    await pause(PAUSE_MS, signal);
  }
}

/** The data of server-sent events, each with its id if it has one, until the stream ends or nothing comes any more. */
async function* lines(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "", id = null, late = null;
  try {
    for (;;) {
      late = setTimeout(() => reader.cancel(), PATIENCE_MS);
      const { done, value } = await reader.read();
      clearTimeout(late);
      if (done) return;
      const whole = (rest + value).split("\n");
      rest = whole.pop();
      for (const line of whole) {
        if (line.startsWith("id: ")) id = line.slice(4);
        if (!line.startsWith("data: ")) continue;
        yield [id, line.slice(6)];
        id = null;
      }
    }
  } finally {
    clearTimeout(late);
    reader.cancel().catch(() => {}); // of one that broke it fails
  }
}

/** Waits, as long as the person wants it. */
async function pause(ms, signal) {
  await new Promise((resolve) => {
    setTimeout(resolve, ms);
    signal.addEventListener("abort", resolve, { once: true });
  });
  signal.throwIfAborted();
}

function fail(shown, asked, why) {
  const note = shown.querySelector("small");
  note.textContent = why;
  shown.classList.add("failed");
  at("chat-said").textContent = why;
  const again = tag("button", "plain", "Try again");
  again.type = "button";
  again.onclick = () => {
    if (stopping !== null) return;
    shown.remove();
    answer(asked);
  };
  shown.append(again);
}

/** A message on the page. */
function add(role, text) {
  const shown = tag("article", role);
  shown.append(tag("h3", "unseen", role === "user" ? "You" : "The model"), tag("p", "", text), tag("small"));
  turns.append(shown);
  turns.scrollTop = turns.scrollHeight;
  at("chat-new").hidden = false;
  return shown;
}

/** Changes what is shown, and follows its end, unless the person has scrolled away. */
function follows(change) {
  change();
  if (atEnd) turns.scrollTop = turns.scrollHeight;
}

function busy(comes) {
  const held = [at("send"), at("stop")].includes(document.activeElement);
  at("send").hidden = comes;
  at("stop").hidden = !comes;
  at("send").disabled = comes || model === null;
  if (held) (comes ? at("stop") : question).focus({ preventScroll: true });
}
