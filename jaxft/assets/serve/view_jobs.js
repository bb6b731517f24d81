// All jobs, newest first.

import { call, path } from "./api.js";
import { h } from "./dom.js";
import { jobList, jobs, takeJob } from "./live.js";
import { alert, bar, button, redraw } from "./widgets.js";
import { moment, nameOf, number, sign, timeLeft, whole } from "./words.js";

let more = false, loaded = false, error = null, oldest = null;

async function load(after) {
  try {
    const page = await call("GET", "/fine_tuning/jobs?limit=50" + (after ? `&after=${encodeURIComponent(after)}` : ""));
    page.data.filter((job) => after || !jobs.has(job.id)).forEach(takeJob);
    oldest = page.last_id ?? oldest;
    more = page.has_more;
    error = null;
  } catch (refused) {
    error = refused;
  }
  loaded = true;
  redraw();
}

export const title = () => "Jobs";
export const enter = () => void (loaded || load());

export function view() {
  const shown = jobList();
  return [
    h("h1", { tabindex: -1 }, "Jobs"),
    h("p", {}, h("a", { class: "button main", href: "#/new" }, "New job")),
    alert(error),
    loaded && !shown.length && !error && h("p", {}, "There are no jobs yet."),
    h("ul", { class: "cards" }, shown.map(card)),
    more && button("Show older jobs", () => load(oldest)),
  ];
}

function card(job) {
  const now = job.jaxft.progress, phase = job.jaxft.phase;
  return h(
    "li", { key: job.id, class: "card" },
    h("h2", {}, h("a", { href: `#${path("job", job.id)}` }, nameOf(job))),
    h("p", {}, sign(job), " ", phase && h("span", { class: "hint" }, phase)),
    now && h("p", { class: "row" }, bar(now.step, now.total_steps, `Progress of ${nameOf(job)}`),
      h("span", {}, `step ${whole(now.step)} of ${whole(now.total_steps)}, loss ${number(now.train_loss)}`)),
    job.error && h("p", { class: "bad" }, job.error.message),
    h("p", { class: "hint" }, job.model, " · ", moment(job.created_at), timeLeft(job) && ` · ${timeLeft(job)}`),
  );
}
