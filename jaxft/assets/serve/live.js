// What the page knows of jobs, kept up to date by one stream.

import { ApiError, events, request } from "./api.js";

const SILENCE_MS = 35_000; // the server gives a sign every 10 s
const WAIT_MS = [500, 4_000];

export const jobs = new Map(); // by id
export const messages = new Map(); // by job, each a Map of events by id, oldest first
export const stream = { state: "begins", error: null };
const listeners = new Set();
let last = null;

// listen(what, value): what is "job" with the job and its earlier state, "event" with an event, or "stream".
export function subscribe(listen) {
  listeners.add(listen);
  return () => listeners.delete(listen);
}

function tell(what, value, before) {
  for (const listen of listeners) listen(what, value, before);
}

export function takeJob(job) {
  const before = jobs.get(job.id);
  jobs.set(job.id, job);
  tell("job", job, before);
}

// Events of a job as the server lists them, newest first. What the stream has brought meanwhile is newer.
export function takeEvents(job, listed) {
  const all = new Map([...listed].reverse().map((one) => [one.id, one]));
  for (const [id, one] of messages.get(job) ?? []) if (!all.has(id)) all.set(id, one);
  messages.set(job, all);
}

// Newest first.
export function jobList() {
  return [...jobs.values()].sort((a, b) => b.jaxft.number - a.jaxft.number);
}

function take({ id, event, data }) {
  if (id !== null) last = id;
  if (event === "job") takeJob(JSON.parse(data));
  if (event === "job.event") {
    const one = JSON.parse(data);
    if (one.type === "message") messages.get(one.job_id)?.set(one.id, one);
    tell("event", one);
  }
}

function state(name, error = null) {
  if (stream.state === name) return;
  Object.assign(stream, { state: name, error });
  tell("stream", stream);
}

// Reads the stream until the key is refused. A server that is gone is asked again, and sends what was missed.
export async function follow() {
  let wait = WAIT_MS[0];
  for (;;) {
    const control = new AbortController();
    let watch = null;
    const alive = () => {
      clearTimeout(watch);
      watch = setTimeout(() => control.abort(), SILENCE_MS);
    };
    try {
      alive();
      const headers = last === null ? {} : { "Last-Event-ID": last };
      const response = await request("GET", "/jaxft/stream", { headers, signal: control.signal });
      wait = WAIT_MS[0];
      state("live");
      for await (const event of events(response)) {
        alive();
        take(event);
      }
    } catch (error) {
      if (error instanceof ApiError && (error.status === 401 || error.status === 403)) {
        state(error.status === 401 ? "no key" : "refused", error);
        return;
      }
    } finally {
      clearTimeout(watch);
    }
    state("lost");
    await new Promise((resolve) => setTimeout(resolve, wait));
    wait = Math.min(2 * wait, WAIT_MS[1]);
  }
}
