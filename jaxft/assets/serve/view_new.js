// A new job: rows, numbers, an examination before anything is trained, and its start.

import { call, path, upload } from "./api.js";
import { h } from "./dom.js";
import { jobs, takeJob } from "./live.js";
import { alert, announce, bar, button, examination, facts, field, redraw } from "./widgets.js";
import { count, duration, money, nameOf, number, sign, whole } from "./words.js";

const NUMBERS = { n_epochs: "Epochs", batch_size: "Rows of a batch", learning_rate_multiplier: "Learning-rate multiplier" };
const files = {}; // by field: {file, share, object, stop}
let bases = [], price = null, draft = null, error = null, busy = false, dragged = false;

export const title = () => "New job";

export async function enter() {
  try {
    const [models, system] = await Promise.all([call("GET", "/models"), call("GET", "/jaxft/system")]);
    bases = models.data.filter((one) => one.jaxft.kind === "base").map((one) => one.id);
    price = system.price_per_hour;
  } catch (refused) {
    error = refused;
  }
  redraw();
}

export function view() {
  const job = draft && jobs.get(draft);
  return [
    h("h1", { tabindex: -1 }, "New job"),
    h("form", { key: "form", onsubmit: submit, class: "form" },
      drop("training_file", "Rows to train on"), drop("validation_file", "Held-out rows, if you have some"),
      field("Base model", "model", {}, null, "select", bases.map((name) => h("option", { key: name, value: name }, name))),
      field("Suffix of the model's name", "suffix", { pattern: "[A-Za-z0-9._\\-]{1,64}", autocomplete: "off" }, "Letters, digits, dot, dash and underscore."),
      h("div", { key: "numbers", class: "grid-form" }, Object.entries(NUMBERS).map(([name, label]) =>
        field(label, name, { placeholder: "auto", inputmode: "decimal", autocomplete: "off" }))),
      h("details", { key: "more" }, h("summary", {}, "Further settings"),
        field("Seed", "seed", { inputmode: "numeric", autocomplete: "off" }, "Drawn if it is empty."),
        field("Settings of the run", "config", { rows: 4, spellcheck: "false" }, "One a line, such as adapter.r=32", "textarea")),
      alert(error),
      h("p", { class: "row" }, h("button", { class: "main", "aria-disabled": busy && "true" }, job ? "Examine again" : "Upload and examine")),
    ),
    job && result(job),
  ];
}

function drop(name, label) {
  const now = files[name];
  const take = (file) => {
    now?.stop?.();
    files[name] = file ? { file, share: 0 } : undefined;
    redraw();
  };
  return h(
    "div", { key: name, class: `drop${dragged === name ? " over" : ""}`,
      ondragover: (event) => { event.preventDefault(); if (dragged !== name) (dragged = name), redraw(); },
      ondragleave: () => { dragged = false; redraw(); },
      ondrop: (event) => { event.preventDefault(); dragged = false; take(event.dataTransfer.files[0]); } },
    h("label", { for: name }, label),
    h("input", { id: name, type: "file", accept: ".jsonl,.json", "aria-describedby": `${name}-hint`, onchange: (event) => take(event.target.files[0]) }),
    h("p", { id: `${name}-hint`, class: "hint" }, now ? now.file.name : "Drop a file with a JSON object a line, or choose one."),
    now?.stop && h("p", { class: "row" }, bar(now.share, 1, `Upload of ${now.file.name}`), `${Math.floor(100 * now.share)}%`,
      button("Give up", now.stop)),
  );
}

// The id of a file, which is sent unless it is there already.
async function sent(name) {
  const now = files[name];
  if (!now) return undefined;
  if (!now.object) {
    const [sending, stop] = upload(now.file, (share) => ((now.share = share), redraw()));
    now.stop = stop;
    try {
      now.object = await sending;
    } finally {
      now.stop = null;
    }
  }
  return now.object.id;
}

async function submit(event) {
  event.preventDefault();
  if (busy) return;
  const form = new FormData(event.target);
  busy = true;
  error = null;
  redraw();
  try {
    if (!files.training_file) throw new Error("Choose a file of rows first.");
    const body = requested(form);
    body.training_file = await sent("training_file");
    body.validation_file = await sent("validation_file");
    await discard();
    const job = await call("POST", "/fine_tuning/jobs", body);
    takeJob(job);
    draft = job.id;
    announce("The rows are being examined");
  } catch (refused) {
    error = refused;
  }
  busy = false;
  redraw();
}

function requested(form) {
  const text = (name) => form.get(name).trim();
  const hyperparameters = {};
  for (const name of Object.keys(NUMBERS)) {
    if (text(name) && text(name) !== "auto") hyperparameters[name] = value(text(name));
  }
  const config = {};
  for (const line of text("config").split("\n").map((one) => one.trim()).filter(Boolean)) {
    const at = line.indexOf("=");
    if (at < 1) throw new Error(`The setting ${line} must be name=value.`);
    config[line.slice(0, at).trim()] = value(line.slice(at + 1).trim());
  }
  return {
    model: text("model"), suffix: text("suffix") || undefined, seed: text("seed") ? value(text("seed")) : undefined,
    method: { type: "supervised", supervised: { hyperparameters } }, jaxft: { start: false, config },
  };
}

function value(text) {
  if (/^(true|false|null|none)$/i.test(text)) return { true: true, false: false }[text.toLowerCase()] ?? null;
  try {
    return JSON.parse(text);
  } catch {
    return text;
  }
}

// Cancels the job that was examined before, unless it was started meanwhile.
async function discard() {
  const job = draft && jobs.get(draft);
  draft = null;
  if (job && (job.status === "paused" || job.status === "validating_files")) {
    takeJob(await call("POST", path("fine_tuning", "jobs", job.id, "cancel")));
  }
}

async function start(job) {
  try {
    takeJob(await call("POST", path("fine_tuning", "jobs", job.id, "resume")));
    draft = null;
    files.training_file = files.validation_file = undefined;
    location.hash = path("job", job.id);
  } catch (refused) {
    error = refused;
    redraw();
  }
}

function result(job) {
  const waits = job.status === "paused";
  return h(
    "section", { key: "result", "aria-labelledby": "result" },
    h("h2", { id: "result" }, nameOf(job)), h("p", {}, sign(job)),
    job.error && h("pre", { class: "alert", role: "alert" }, job.error.message),
    job.jaxft.plan && plan(job, price),
    waits && h("p", { class: "row" }, button("Start", () => start(job), { class: "main" }),
      button("Discard", async () => { await discard(); redraw(); })),
    examination(job),
  );
}

// What a job will do, with its numbers, its time and its money.
export function plan(job, hourly) {
  const { plan: planned, estimate } = job.jaxft;
  const numbers = Object.entries(job.hyperparameters).map(([name, n]) => [NUMBERS[name] ?? name, typeof n === "number" ? number(n) : n]);
  const price = estimate && hourly ? `: ${money((estimate.seconds / 3600) * hourly)} at ${money(hourly)} an hour` : "";
  return facts([
    ...numbers,
    ["Steps", planned.steps && whole(planned.steps)],
    ["Sequences of a batch", planned.batch_sequences && `${whole(planned.batch_sequences)} of ${count(planned.max_length, "token")}`],
    ["Tokens in all", planned.trained_tokens && whole(planned.trained_tokens)],
    ["Time", estimate ? `about ${duration(estimate.seconds)}, at the rate of an earlier job${price}` : "known after two steps"],
  ]);
}
