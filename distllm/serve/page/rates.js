// What the ranks do now, from totals that they tell once a second.

const KEPT_S = 120;
const RATE_S = 3;
const SHARE_S = 6;

const samples = []; // {time, epoch, tokens, busy, ranks: {rank: seconds of work}}
const history = []; // {time, rate}

/** Takes what the server tells; the same twice is no harm. */
export function take(told) {
  const last = samples.at(-1);
  if (last && told.time <= last.time) return;
  if (last && told.tokens < last.tokens) samples.length = 0; // another rank 0 counts anew
  const ranks = Object.fromEntries(told.ranks.map((each) => [each.rank, each.layers_s + each.head_s]));
  samples.push({ time: told.time, epoch: told.epoch, tokens: told.tokens, busy: told.busy_s, ranks });
  while (samples.length > 2 && samples[0].time < told.time - SHARE_S) samples.shift();
  history.push({ time: told.time, rate: rate() ?? 0 });
  while (history[0].time < told.time - KEPT_S) history.shift();
}

/** Tokens a second now; null while that is not known. */
export function rate() {
  const last = samples.at(-1);
  const first = samples.find((each) => each.time >= last?.time - RATE_S);
  return last && last !== first ? (last.tokens - first.tokens) / (last.time - first.time) : null;
}

/** The share of a step's time in which a rank works; null if there was no step lately. */
export function busy(rank) {
  const last = samples.at(-1);
  const first = samples.find((each) => each.epoch === last?.epoch);
  if (!last || last === first || last.busy - first.busy < 0.01) return null;
  return Math.min(1, Math.max(0, (last.ranks[rank] - first.ranks[rank]) / (last.busy - first.busy)));
}

/** The last minutes as a line, with a mark at each of some times. */
export function draw(svg, marks) {
  const end = history.at(-1)?.time ?? 0;
  const x = (time) => 240 * (1 - (end - time) / KEPT_S);
  const top = Math.max(10, ...history.map((each) => each.rate)) * 1.1;
  const points = history.map((each) => `${x(each.time).toFixed(1)} ${(38 - (36 * each.rate) / top).toFixed(1)}`);
  const line = points.length > 1 ? `M${points.join("L")}` : "";
  const area = line && `${line}L240 40L${x(history[0].time).toFixed(1)} 40Z`;
  const seen = marks.filter((time) => time > end - KEPT_S && time <= end);
  const drawn = [["area", area], ["line", line], ["mark", seen.map((time) => `M${x(time).toFixed(1)} 0V40`).join("")]];
  svg.replaceChildren(...drawn.map(([name, path]) => {
    const element = document.createElementNS("http://www.w3.org/2000/svg", "path");
    element.setAttribute("class", name);
    element.setAttribute("d", path);
    return element;
  }));
}
