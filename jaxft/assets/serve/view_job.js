// One job: its state, curves, events, rows, checkpoints, and the request that makes another like it.

import { call, path } from "./api.js";
import { chart, table } from "./chart.js";
import { h } from "./dom.js";
import { jobs, messages, takeEvents, takeJob } from "./live.js";
import { curl, python } from "./requests.js";
import { plan } from "./view_new.js";
import { alert, ask, bar, button, code, download, examination, facts, redraw } from "./widgets.js";
import { bytes, ENDED, moment, nameOf, number, sign, timeLeft, waitsForStart, whole } from "./words.js";

const LOOK_MS = 1000;
const VERBS = {
  pause: ["Pause", "The job saves where it is and stops. Resume lets it go on with the same result.", ["queued", "running"]],
  resume: ["Resume", "The job goes into the queue, and on from where it was saved.", ["paused"]],
  cancel: ["Cancel", "The job ends for good. Checkpoints that it has made stay.", ["validating_files", "queued", "running", "pausing", "paused"]],
};
let id = null, error = null, rows = new Map(), checkpoints = [], inputs = {}, results = [], price = null;
let smoothing = 0, log = false, at = null, isTable = false, late = null, shownEvents = 20, before = -1;

export const title = () => (jobs.has(id) ? nameOf(jobs.get(id)) : "Job");

export async function enter(wanted) {
  [id, error, rows, checkpoints, inputs, results, at, before] = [wanted, null, new Map(), [], {}, [], null, -1];
  await tried(async () => {
    takeJob(await call("GET", path("fine_tuning", "jobs", wanted)));
    if (wanted !== id) return; // another job was opened meanwhile
    await Promise.all([loadEvents(), loadRows(), loadCheckpoints(), loadInputs(), loadPrice()]);
  });
}

export const leave = () => clearTimeout(late);

async function tried(act) {
  const mine = id;
  try {
    await act();
  } catch (refused) {
    if (mine === id) error = refused;
  }
  redraw();
}

async function loadEvents() {
  const mine = id;
  if (!messages.has(mine)) messages.set(mine, new Map());
  takeEvents(mine, (await call("GET", path("fine_tuning", "jobs", mine, "events") + "?limit=1000&type=message")).data);
}

// The rows of the curves: all of them at first, then from the last step on, which may have got an evaluation since.
async function loadRows() {
  const mine = id;
  for (let more = true; more; ) {
    const page = await call("GET", path("jaxft", "jobs", mine, "metrics") + (before >= 0 ? `?after=${before}` : ""));
    if (mine !== id) return;
    for (const row of page.data) rows.set(`${row.step} ${"eval_loss" in row}`, row);
    if (page.data.length) before = page.data.at(-1).step - (page.has_more ? 0 : 1);
    more = page.has_more;
  }
}

async function loadCheckpoints() {
  const mine = id;
  const page = await call("GET", path("fine_tuning", "jobs", mine, "checkpoints"));
  if (mine === id) checkpoints = page.data;
}

async function loadPrice() {
  price = (await call("GET", "/jaxft/system")).price_per_hour;
}

// The labels of the files of the job: those that are deleted have none.
async function loadInputs() {
  const mine = id, job = jobs.get(id);
  const look = async (file) => (await call("GET", path("files", file)).catch(() => null));
  const [training_file, validation_file, ...made] = await Promise.all(
    [job.training_file, job.validation_file, ...job.result_files].map((one) => one && look(one)));
  if (mine === id) [inputs, results] = [{ training_file, validation_file }, made.filter(Boolean)];
}

// What the stream says of this job.
export function heard(what, value, earlier) {
  if (what === "event" && value.job_id === id && !late) {
    late = setTimeout(() => ((late = null), tried(() => Promise.all([loadRows(), loadCheckpoints()]))), LOOK_MS);
  }
  if (what === "job" && value.id === id && earlier && earlier.status !== value.status) tried(loadInputs);
  if (what === "stream" && value.state === "live" && jobs.has(id)) tried(() => Promise.all([loadEvents(), loadRows(), loadCheckpoints()]));
}

const labelOf = (verb, job) => (verb === "resume" && waitsForStart(job) ? "Start" : VERBS[verb][0]);

async function change(verb) {
  const job = jobs.get(id), action = labelOf(verb, job), text = VERBS[verb][1];
  if (!(await ask({ title: `${action} ${nameOf(job)}?`, text, action, danger: verb === "cancel" }))) return;
  error = null;
  await tried(async () => takeJob(await call("POST", path("fine_tuning", "jobs", id, verb))));
}

export function view() {
  const job = jobs.get(id);
  if (!job) return [h("h1", { tabindex: -1 }, "Job"), alert(error)];
  const verbs = Object.keys(VERBS).filter((verb) => VERBS[verb][2].includes(job.status));
  return [
    h("h1", { tabindex: -1 }, nameOf(job)),
    alert(error),
    h("p", {}, sign(job), " ", h("span", { class: "hint" }, job.jaxft.phase)),
    progress(job),
    job.error && h("pre", { class: "alert" }, job.error.message),
    h("p", { class: "row" }, verbs.map((verb) => button(labelOf(verb, job), () => change(verb), { key: verb, class: verb === "cancel" ? "danger" : "" }))),
    curves(),
    models(job),
    events(),
    h("section", { "aria-labelledby": "config" }, h("h2", { id: "config" }, "Config"), config(job)),
    examination(job),
    h("section", { "aria-labelledby": "again" }, h("h2", { id: "again" }, "The same job from a program"),
      code("Python", python(job, location.origin)), code("curl", curl(job, location.origin))),
  ];
}

function progress(job) {
  const now = job.jaxft.progress;
  if (!now) return null;
  const texts = [`step ${whole(now.step)} of ${whole(now.total_steps)}`, `loss ${number(now.train_loss)}`,
    now.tokens_per_second && `${whole(now.tokens_per_second)} tokens a second`, timeLeft(job)];
  return h("p", { class: "row" }, bar(now.step, now.total_steps, "Progress"), texts.filter(Boolean).join(", "));
}

function points(key) {
  return [...rows.values()].filter((row) => key in row).map((row) => [row.step, row[key]]).sort((a, b) => a[0] - b[0]);
}

function curves() {
  const pairs = [["Loss", "loss"], ["Accuracy of tokens", "mean_token_accuracy"]].map(([name, key]) => [name, [
    { name: "training", kind: "train", points: points(key) }, { name: "held-out", kind: "held", points: points(`eval_${key}`) },
  ]]);
  const width = Math.max(240, document.getElementById("main").clientWidth - 32);
  const onAt = (step) => ((at = step), redraw());
  return h(
    "section", { "aria-labelledby": "curves" }, h("h2", { id: "curves" }, "Curves"),
    h("div", { class: "row" },
      h("label", {}, "Smoothing ", h("input", { type: "range", min: 0, max: 0.98, step: 0.02, value: smoothing, oninput: (event) => ((smoothing = Number(event.target.value)), redraw()) })),
      h("label", {}, h("input", { type: "checkbox", checked: log, onchange: (event) => ((log = event.target.checked), redraw()) }), " logarithmic loss")),
    pairs.map(([name, series]) => chart({ title: name, series, log: log && name === "Loss", smoothing, at, onAt, width })),
    h("details", { ontoggle: (event) => ((isTable = event.target.open), redraw()) }, h("summary", {}, "The curves as a table"),
      isTable && table("Loss and accuracy by step", pairs.flatMap(([name, series]) =>
        series.filter((one) => one.points.length).map((one) => ({ ...one, name: `${name}, ${one.name}` }))))),
  );
}

function models(job) {
  const saved = [...results.map((file) => [path("files", file.id, "content"), file.filename]),
    ...job.jaxft.artifacts.filter((name) => name.endsWith(".log")).map((name) => [path("jaxft", "jobs", job.id, "artifacts", name), name])];
  return h(
    "section", { "aria-labelledby": "checkpoints" }, h("h2", { id: "checkpoints" }, "Checkpoints and files"),
    !checkpoints.length && h("p", {}, "There are no checkpoints yet."),
    h("ul", { class: "cards" }, checkpoints.map((one) => checkpoint(job, one))),
    h("p", { class: "row" }, saved.map(([where, name]) => h("span", { key: where }, download("Download", where, name), " ", h("span", { class: "hint" }, name)))),
  );
}

function checkpoint(job, one) {
  const { full_valid_loss: held, train_loss: loss } = one.metrics, name = one.fine_tuned_model_checkpoint;
  const tar = `step-${one.step_number}.tar`;
  return h(
    "li", { key: one.id, class: "card" },
    h("h3", {}, `Step ${whole(one.step_number)}`), h("p", { class: "name" }, name),
    h("p", { class: "hint" }, `training loss ${number(loss)}`, held !== undefined && `, held-out loss ${number(held)}`),
    h("p", { class: "row" },
      h("a", { class: "button", href: `#/playground?b=${encodeURIComponent(name)}&a=${encodeURIComponent(job.model)}`, "aria-label": `Try step ${one.step_number}` }, "Try"),
      download("Download", path("jaxft", "jobs", job.id, "artifacts", tar), tar)),
  );
}

function events() {
  const all = [...(messages.get(id)?.values() ?? [])].reverse();
  return h(
    "section", { "aria-labelledby": "events" }, h("h2", { id: "events" }, "Events"),
    h("ol", { class: "events" }, all.slice(0, shownEvents).map((one) => h(
      "li", { key: one.id, class: one.level }, moment(one.created_at), " ",
      one.level !== "info" && h("strong", {}, one.level === "warn" ? "warning: " : "error: "), one.message))),
    all.length > shownEvents && button("Show all events", () => ((shownEvents = Infinity), redraw())),
  );
}

function config(job) {
  const label = (name) => job[name] && (inputs[name] ? `${inputs[name].filename} (${bytes(inputs[name].bytes)})` : job[name]);
  return [
    facts([
      ["Id", job.id], ["Base", job.model], ["Model", job.fine_tuned_model], ["Rows", label("training_file")],
      ["Held-out rows", label("validation_file")], ["Seed", String(job.seed)], ["Created", moment(job.created_at)],
      ["Ended", job.finished_at && moment(job.finished_at)], ["Tokens trained", job.trained_tokens && whole(job.trained_tokens)],
      ["Deaths of workers", job.jaxft.deaths || null],
    ]),
    job.jaxft.plan && (ENDED.includes(job.status) || job.jaxft.progress
      ? facts(Object.entries({ ...job.hyperparameters, steps: job.jaxft.plan.steps }).map(([name, n]) => [name, String(n)]))
      : plan(job, price)),
    facts(Object.entries(job.jaxft.config).map(([name, value]) => [name, JSON.stringify(value)])),
  ];
}
