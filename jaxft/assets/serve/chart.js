// Curves as SVG. A pixel shows the smallest and the largest value of its steps, so that no peak is lost.

import { h } from "./dom.js";
import { number, whole } from "./words.js";

const HEIGHT = 240;
const EDGE = { left: 52, right: 12, top: 10, bottom: 26 };

// [{x, first, low, high, last}] of points [step, value] in order of their steps: one for each pixel that has some.
export function columns(points, toX) {
  const out = [];
  for (const [step, value] of points) {
    const x = Math.round(toX(step));
    const now = out.at(-1);
    if (now?.x !== x) out.push({ x, first: value, low: value, high: value, last: value });
    else Object.assign(now, { low: Math.min(now.low, value), high: Math.max(now.high, value), last: value });
  }
  return out;
}

// The exponential moving average of points, without the bias of its start. weight: of what came before, below 1.
export function smoothed(points, weight) {
  let sum = 0, norm = 0;
  return points.map(([step, value]) => {
    sum = weight * sum + (1 - weight) * value;
    norm = weight * norm + (1 - weight);
    return [step, sum / norm];
  });
}

// Round numbers within a range, about n of them.
export function ticks(low, high, n) {
  const raw = (high - low) / n || 1;
  const unit = 10 ** Math.floor(Math.log10(raw));
  const step = unit * ([1, 2, 5, 10].find((one) => one * unit >= 0.7 * raw) ?? 10);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + 1e-9 * step; k++) out.push(k * step);
  return out;
}

// Round numbers on a logarithmic axis: powers of ten, with 2 and 5 between them where they are few.
export function logTicks(low, high) {
  const out = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++) {
    for (const digit of high / low < 1000 ? [1, 2, 5] : [1]) out.push(digit * 10 ** power);
  }
  const kept = out.filter((one) => one >= low * 0.999 && one <= high * 1.001);
  return kept.length > 1 ? kept : [low, high];
}

// series: [{name, points, kind}], where kind is the class of a line. log: whether values are on a logarithmic axis.
// smoothing: of lines of the kind train, 0 for none. at: the step of the crosshair, or null; onAt: is told another. width: in pixels.
export function chart({ title, series, log, smoothing, at, onAt, width }) {
  const shown = series
    .map((one) => ({ ...one, points: log ? one.points.filter(([, value]) => value > 0) : one.points }))
    .filter((one) => one.points.length);
  if (!shown.length) return h("figure", { class: "chart" }, h("figcaption", {}, `${title}: nothing yet`));
  const axes = scales(shown, log, width);
  const steps = [...new Set(shown.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
  const here = at === null ? null : nearest(steps, at);
  const words = here === null ? "" : readout(shown, here);
  const move = (event) => onAt(nearest(steps, axes.toStep(event.offsetX)));
  const slider = {
    role: "slider", tabindex: 0, "aria-label": `${title} by step`, "aria-valuemin": steps[0],
    "aria-valuemax": steps.at(-1), "aria-valuenow": here ?? steps[0], "aria-valuetext": words || "no step is chosen",
  };
  return h(
    "figure", { class: "chart" },
    h("figcaption", {}, h("strong", {}, title), legend(shown), h("span", { class: "readout" }, words)),
    h(
      "svg",
      { width, height: HEIGHT, viewBox: `0 0 ${width} ${HEIGHT}`, onpointermove: move, onpointerdown: move,
        onpointerleave: (event) => event.target === document.activeElement || onAt(null), onkeydown: (event) => byKey(event, steps, here, onAt), ...slider },
      grid(axes, width), shown.map((one) => lines(one, axes, smoothing)),
      here !== null && cross(shown, axes, here),
    ),
  );
}

function scales(shown, log, width) {
  const all = shown.flatMap((one) => one.points);
  const [first, last] = range(all.map(([step]) => step));
  let [low, high] = range(all.map(([, value]) => value));
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - 0.5, high + 0.5];
  const [from, to] = log ? [Math.log(low), Math.log(high)] : [low, high];
  const inner = width - EDGE.left - EDGE.right, tall = HEIGHT - EDGE.top - EDGE.bottom, span = last - first || 1;
  return {
    first, last, low, high, log,
    toX: (step) => EDGE.left + ((step - first) / span) * inner,
    toStep: (x) => first + ((x - EDGE.left) / inner) * span,
    toY: (value) => EDGE.top + (1 - ((log ? Math.log(value) : value) - from) / (to - from)) * tall,
  };
}

function range(values) {
  let low = Infinity, high = -Infinity;
  for (const value of values) {
    low = Math.min(low, value);
    high = Math.max(high, value);
  }
  return [low, high];
}

function grid({ first, last, low, high, log, toX, toY }, width) {
  const rows = log ? logTicks(low, high) : ticks(low, high, 4);
  const marks = ticks(first, last, width < 500 ? 3 : 8).filter(Number.isInteger);
  return [
    rows.map((value) => h("g", { class: "grid" },
      h("line", { x1: EDGE.left, x2: width - EDGE.right, y1: toY(value), y2: toY(value) }),
      h("text", { x: EDGE.left - 6, y: toY(value) + 4, "text-anchor": "end" }, Number(value.toPrecision(4)).toString()))),
    marks.map((step) => h("text", { class: "grid", x: toX(step), y: HEIGHT - 8, "text-anchor": "middle" }, whole(step))),
  ];
}

function lines({ kind, points }, { toX, toY }, smoothing) {
  const y = (value) => toY(value).toFixed(1);
  const raw = columns(points, toX).map(({ x, first, low, high, last }) =>
    low === high ? `${x},${y(low)}` : `${x},${y(first)} ${x},${y(low)} ${x},${y(high)} ${x},${y(last)}`);
  const smooth = smoothing && kind === "train" ? smoothed(points, smoothing).map(([step, value]) => `${toX(step).toFixed(1)},${y(value)}`) : null;
  const few = points.length <= 40;
  return h(
    "g", { class: `line ${kind}` },
    h("path", { class: smooth ? "faint" : null, d: `M${raw.join(" ")}` }),
    smooth && h("path", { d: `M${smooth.join(" ")}` }),
    few && points.map(([step, value]) => h("circle", { cx: toX(step).toFixed(1), cy: y(value), r: 2.5 })),
  );
}

function legend(shown) {
  return shown.map(({ name, kind }) => h(
    "span", { class: "legend" },
    h("svg", { width: 26, height: 10, "aria-hidden": "true", class: `line ${kind}` }, h("path", { d: "M1,5 25,5" })), name,
  ));
}

function cross(shown, { toX, toY }, here) {
  const dots = shown.flatMap(({ points }) => points.filter(([step]) => step === here));
  return h(
    "g", { class: "cross" }, h("line", { x1: toX(here), x2: toX(here), y1: EDGE.top, y2: HEIGHT - EDGE.bottom }),
    dots.map(([, value]) => h("circle", { cx: toX(here), cy: toY(value), r: 4 })),
  );
}

function readout(shown, here) {
  const values = shown.map(({ name, points }) => [name, points.find(([step]) => step === here)]);
  return `step ${whole(here)}: ` + values.filter(([, point]) => point).map(([name, [, value]]) => `${name} ${number(value)}`).join(", ");
}

// The number of a sorted list that is nearest to one.
export function nearest(steps, wanted) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= wanted) low = middle;
    else high = middle;
  }
  return wanted - steps[low] <= steps[high] - wanted ? steps[low] : steps[high];
}

function byKey(event, steps, here, onAt) {
  const at = here === null ? -1 : steps.indexOf(here), end = steps.length - 1;
  const to = { ArrowRight: at + 1, ArrowUp: at + 1, ArrowLeft: at - 1, ArrowDown: at - 1, PageUp: at + 10,
    PageDown: at - 10, Home: 0, End: end }[event.key];
  if (event.key === "Escape") onAt(null);
  if (to === undefined) return;
  event.preventDefault();
  onAt(steps[Math.min(Math.max(to, 0), end)]);
}

// The same numbers as a table of at most `most` rows, evenly chosen.
export function table(title, series, most = 100) {
  const steps = [...new Set(series.flatMap((one) => one.points.map(([step]) => step)))].sort((a, b) => a - b);
  const every = Math.max(1, Math.ceil(steps.length / most));
  const byStep = series.map((one) => new Map(one.points));
  const kept = steps.filter((_, n) => n % every === 0 || n === steps.length - 1);
  const caption = every === 1 ? title : `${title}; one step of ${every} is shown`;
  return h(
    "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title },
    h("table", {}, h("caption", {}, caption),
      h("thead", {}, h("tr", {}, ["step", ...series.map((one) => one.name)].map((name) => h("th", { scope: "col" }, name)))),
      h("tbody", {}, kept.map((step) => h("tr", {}, h("th", { scope: "row" }, whole(step)),
        byStep.map((one) => h("td", {}, number(one.get(step)))))))),
  );
}
