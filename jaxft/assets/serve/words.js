// Numbers, times and states in words.

import { h } from "./dom.js";

export const STATES = {
  validating_files: ["examining the rows", "M2 8a6 6 0 0 1 6-6M14 8a6 6 0 0 1-6 6", "busy"],
  queued: ["queued", "M8 2a6 6 0 1 0 .01 0zM8 5v3l2 2", "waits"],
  running: ["training", "M4 2l9 6-9 6z", "busy"],
  pausing: ["pausing", "M5 3v10M11 3v10", "waits"],
  paused: ["paused", "M5 3v10M11 3v10", "waits"],
  succeeded: ["succeeded", "M2 9l4 4 8-10", "good"],
  failed: ["failed", "M3 3l10 10M13 3L3 13", "bad"],
  cancelled: ["cancelled", "M8 2a6 6 0 1 0 .01 0zM4 12l8-8", "waits"],
};
export const ENDED = ["succeeded", "failed", "cancelled"];

export const waitsForStart = ({ status, jaxft }) => status === "paused" && !jaxft.start && !jaxft.progress;

export function stateOf(job) {
  if (waitsForStart(job)) return "waits for its start";
  return STATES[job.status]?.[0] ?? job.status;
}

// The state as a sign and a word.
export function sign(job) {
  const [, shape, kind] = STATES[job.status] ?? ["", "M8 8h.01", "waits"];
  const icon = h("svg", { viewBox: "0 0 16 16", width: 16, height: 16, "aria-hidden": "true" }, h("path", { d: shape }));
  return h("span", { class: `sign ${kind}` }, icon, stateOf(job));
}

export const nameOf = (job) => job.jaxft.suffix || `Job ${job.jaxft.number}`;
export const count = (n, one) => `${whole(n)} ${one}${n === 1 ? "" : "s"}`;
export const whole = (n) => Math.round(n).toLocaleString("en");
export const percent = (part, all) => (all ? `${((100 * part) / all).toFixed(1)}%` : "0%");

export function number(value) {
  if (value === null || value === undefined) return "–";
  if (Number.isInteger(value)) return whole(value);
  const size = Math.abs(value);
  return size >= 1000 ? whole(value) : size >= 0.001 || size === 0 ? value.toPrecision(4) : value.toExponential(2);
}

export const money = (value) => value.toLocaleString("en", { minimumFractionDigits: 2, maximumFractionDigits: 2 });

export function bytes(n) {
  const units = ["B", "kB", "MB", "GB", "TB"];
  let at = 0;
  for (; n >= 1000 && at < 4; at++) n /= 1000;
  return `${at ? n.toPrecision(3) : n} ${units[at]}`;
}

export function duration(seconds) {
  if (seconds < 60) return `${Math.max(0, Math.round(seconds))} s`;
  const minutes = Math.round(seconds / 60);
  if (minutes < 60) return `${minutes} min`;
  const hours = Math.floor(minutes / 60);
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} d ${hours % 24} h`;
}

export function moment(seconds) {
  const date = new Date(1000 * seconds);
  return h("time", { datetime: date.toISOString() }, date.toLocaleString("en-GB", { dateStyle: "medium", timeStyle: "short" }));
}

export function timeLeft(job) {
  if (job.estimated_finish === null) return null;
  return `about ${duration(job.estimated_finish - Date.now() / 1000)} left`;
}
