// One prompt, answered by two models beside each other, as the tokens come.

import { call, events, request } from "./api.js";
import { h } from "./dom.js";
import { changed } from "./pace.js";
import { alert, announce, button, field, redraw } from "./widgets.js";
import { count } from "./words.js";

const SIDES = ["a", "b"];
const SAMPLING = [
  ["temperature", "Temperature", "0 to 2", 1], ["top_p", "Top p", "0 to 1", 1],
  ["max_completion_tokens", "Tokens at most", "", 256], ["seed", "Seed", "empty: drawn", ""],
];
// Shares from which a token is likely, fairly likely, and so on: each has a colour and a line of its own.
const BINS = [[0.9, "above 90%"], [0.6, "60 to 90%"], [0.3, "30 to 60%"], [0.1, "10 to 30%"], [0, "below 10%"]];
const chosen = { a: null, b: null };
const answers = { a: null, b: null };
let models = [], error = null, coloured = true;

export const title = () => "Playground";

export async function enter(_, query) {
  for (const side of SIDES) if (query.get(side)) chosen[side] = query.get(side);
  try {
    models = (await call("GET", "/models")).data.map((one) => one.id);
    error = null;
    chosen.a ??= models[0];
    chosen.b ??= models[1] ?? models[0];
  } catch (refused) {
    error = refused;
  }
  redraw();
}

export const leave = () => SIDES.forEach(stop);

export function view() {
  const busy = SIDES.some((side) => answers[side]?.control);
  return [
    h("h1", { tabindex: -1 }, "Playground"),
    alert(error),
    h("form", { key: "form", class: "form", onsubmit: submit },
      field("System message, if you want one", "system", { rows: 1 }, null, "textarea"),
      field("Prompt", "prompt", { rows: 4, required: true }, "Ctrl and Enter send it.", "textarea"),
      h("details", { key: "sampling" }, h("summary", {}, "Sampling"), h("div", { class: "grid-form" },
        SAMPLING.map(([name, label, hint, value]) => field(label, name, { value, inputmode: "decimal", autocomplete: "off" }, hint)))),
      h("p", { class: "row" }, h("button", { class: "main" }, "Send to both"),
        busy && button("Stop", () => SIDES.forEach(stop)),
        h("label", {}, h("input", { type: "checkbox", checked: coloured, onchange: (event) => ((coloured = event.target.checked), redraw()) }), " mark tokens by their probability"))),
    coloured && h("p", { class: "bins", role: "note" }, "Probability: ", BINS.map(([, name], n) => h("span", { class: `p${n}` }, name))),
    h("div", { class: "columns" }, SIDES.map(column)),
  ];
}

function column(side) {
  const name = `Model ${side.toUpperCase()}`, known = [...new Set([...models, chosen[side]].filter(Boolean))];
  return h(
    "section", { key: side, "aria-labelledby": `title-${side}` },
    h("h2", { id: `title-${side}` }, name),
    h("label", { for: `model-${side}`, class: "unseen" }, `${name}, its name`),
    h("select", { id: `model-${side}`, value: chosen[side], onchange: (event) => (chosen[side] = event.target.value) },
      known.map((one) => h("option", { key: one, value: one, selected: one === chosen[side] }, one))),
    answers[side] && answer(side, answers[side]),
  );
}

function answer(side, { text, thoughts, calls, tokens, failed, ...rest }) {
  const marked = coloured && tokens.length;
  return [
    alert(failed),
    thoughts && h("details", {}, h("summary", {}, "Thoughts"), h("p", { class: "answer" }, thoughts)),
    h("p", { class: "answer", id: `answer-${side}` },
      marked ? tokens.map(({ token, logprob }) => h("span", { class: `p${bin(logprob)}`, title: share(logprob) }, token)) : text),
    calls && h("pre", { tabindex: 0, role: "region", "aria-label": "Calls of tools" }, calls),
    h("p", { class: "hint" }, counts({ tokens, ...rest })),
    tokens.length > 0 && h("details", {}, h("summary", {}, "Tokens as a table"), h(
      "div", { class: "scroll", tabindex: 0, role: "region", "aria-label": "Tokens and their probabilities" },
      h("table", {}, h("thead", {}, h("tr", {}, ["token", "probability"].map((one) => h("th", { scope: "col" }, one)))),
        h("tbody", {}, tokens.map(({ token, logprob }) => h("tr", {}, h("td", { class: "name" }, JSON.stringify(token)), h("td", {}, share(logprob)))))))),
  ];
}

const bin = (logprob) => BINS.findIndex(([from]) => Math.exp(logprob) >= from);
const share = (logprob) => `${(100 * Math.exp(logprob)).toFixed(1)}%`;

function counts({ tokens, usage, begun, first, last, reason, control }) {
  const n = usage?.completion_tokens ?? tokens.length, seconds = (last - first) / 1000;
  return [
    control && "answers", reason && `ended by ${reason}`, usage && count(usage.prompt_tokens, "prompt token"),
    n > 0 && count(n, "token"), first && `first after ${((first - begun) / 1000).toFixed(2)} s`,
    n > 1 && seconds > 0 && `${((n - 1) / seconds).toFixed(1)} tokens a second`,
  ].filter(Boolean).join(", ");
}

document.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) event.target.closest?.("form")?.requestSubmit();
});

async function submit(event) {
  event.preventDefault();
  SIDES.forEach(stop);
  const form = new FormData(event.target), text = (name) => form.get(name).trim();
  const messages = [];
  if (text("system")) messages.push({ role: "system", content: text("system") });
  messages.push({ role: "user", content: form.get("prompt") });
  const body = { messages, stream: true, stream_options: { include_usage: true }, logprobs: true };
  for (const [name] of SAMPLING) if (text(name)) body[name] = Number(text(name));
  await Promise.all(SIDES.map((side) => ask(side, { model: chosen[side], ...body })));
  announce("Both models have answered");
}

function stop(side) {
  answers[side]?.control?.abort();
}

async function ask(side, body) {
  const control = new AbortController();
  const now = { text: "", thoughts: "", calls: "", tokens: [], begun: performance.now(), control };
  answers[side] = now;
  redraw();
  try {
    const response = await request("POST", "/chat/completions", { body, signal: control.signal });
    for await (const { data } of events(response)) {
      if (data === null) continue;
      if (data === "[DONE]") break;
      take(now, JSON.parse(data));
      changed();
    }
  } catch (refused) {
    if (control.signal.aborted) now.reason = "you";
    else now.failed = refused;
  }
  now.control = null;
  redraw();
}

function take(now, chunk) {
  if (chunk.error) throw new Error(chunk.error.message);
  now.usage = chunk.usage ?? now.usage;
  const choice = chunk.choices?.[0];
  if (!choice) return;
  const { content, reasoning_content: thoughts, tool_calls: calls } = choice.delta ?? {};
  now.text += content ?? "";
  now.thoughts += thoughts ?? "";
  for (const one of calls ?? []) now.calls += (one.function?.name ? `${one.function.name} ` : "") + (one.function?.arguments ?? "");
  now.tokens.push(...(choice.logprobs?.content ?? []).map(({ token, logprob }) => ({ token, logprob })));
  now.reason = choice.finish_reason ?? now.reason;
  if (content || thoughts || calls) {
    now.first ??= performance.now();
    now.last = performance.now();
  }
}
