// All models: bases, and what jobs have made of them.

import { call, path } from "./api.js";
import { h } from "./dom.js";
import { jobs } from "./live.js";
import { alert, announce, ask, button, download, redraw } from "./widgets.js";
import { moment, nameOf, whole } from "./words.js";

let models = [], error = null, loaded = false, late = null;

export const title = () => "Models";

export async function enter() {
  try {
    models = (await call("GET", "/models")).data;
    error = null;
  } catch (refused) {
    error = refused;
  }
  loaded = true;
  redraw();
}

export const leave = () => ((late = clearTimeout(late)), undefined);

export function heard(what, value) {
  if (what === "event" && value.data?.model && !late) late = setTimeout(() => ((late = null), enter()), 500);
  if (what === "stream" && value.state === "live") enter();
}

async function remove(model) {
  const text = `The weights of ${model.id} are deleted from the server, and no other model gets its name.`;
  if (!(await ask({ title: "Delete this model?", text, action: "Delete", danger: true }))) return;
  try {
    await call("DELETE", path("models", model.id));
    announce("The model is deleted");
  } catch (refused) {
    error = refused;
  }
  await enter();
}

export function view() {
  return [
    h("h1", { tabindex: -1 }, "Models"), alert(error), !loaded && h("p", {}, "The models are being asked for."),
    h("ul", { class: "cards" }, models.map(card)),
  ];
}

function card({ id, created, jaxft: { base, job_id: job, step, kind } }) {
  const kinds = { base: "base model, named by the operator", adapter: `adapter of ${base}`, full: `all weights, from ${base}` };
  return h(
    "li", { key: id, class: "card" }, h("h2", { class: "name" }, id),
    h("p", {}, kinds[kind] ?? kind),
    job && h("p", { class: "hint" }, "Made by ", h("a", { href: `#${path("job", job)}` }, jobs.has(job) ? nameOf(jobs.get(job)) : job),
      ` at step ${whole(step)}, `, moment(created)),
    h("p", { class: "row" }, h("a", { class: "button", href: `#/playground?b=${encodeURIComponent(id)}&a=${encodeURIComponent(base)}`, "aria-label": `Try ${id}` }, "Try"),
      job && [download("Download", path("jaxft", "jobs", job, "artifacts", `step-${step}.tar`), `step-${step}.tar`),
        button("Delete", () => remove({ id }), { class: "danger", "aria-label": `Delete ${id}` })]),
  );
}
