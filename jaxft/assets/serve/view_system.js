// The machine and the server: devices, memory, queue, versions.

import { call, path } from "./api.js";
import { h } from "./dom.js";
import { jobs } from "./live.js";
import { alert, bar, facts, redraw } from "./widgets.js";
import { bytes, duration, money, nameOf, whole } from "./words.js";

const LOOK_MS = 5000;
let now = null, error = null, timer = null;

export const title = () => "System";

export async function enter() {
  clearTimeout(timer);
  timer = setTimeout(() => enter(), LOOK_MS);
  if (document.hidden) return;
  try {
    now = await call("GET", "/jaxft/system");
    error = null;
  } catch (refused) {
    error = refused;
  }
  redraw();
}

export const leave = () => clearTimeout(timer);

export function view() {
  return [h("h1", { tabindex: -1 }, "System"), alert(error), now && [
    facts([
      ["Server", now.status], ["Runs for", duration(now.uptime_seconds)], ["Devices", devices(now.devices)],
      ["Base models", now.models.join(", ")], ["Load", `${now.load.map((one) => one.toFixed(2)).join(", ")} on ${whole(now.cpus)} CPUs`],
      ["Memory of the server", bytes(now.server_bytes)], ["Price of an hour", now.price_per_hour && money(now.price_per_hour)],
      ...Object.entries(now.versions).map(([name, version]) => [name, version]),
    ]),
    share("Memory", now.memory.total, now.memory.available), share("Disk", now.disk.total, now.disk.free),
    now.engines?.length > 0 && h("section", { "aria-labelledby": "engines" }, h("h2", { id: "engines" }, "Engines of answers"),
      now.engines.map((one) => facts(Object.entries(one).map(([name, value]) => [name, typeof value === "object" ? devices(value) : String(value)])))),
    h("section", { "aria-labelledby": "queue" }, h("h2", { id: "queue" }, "Queue"),
      now.jobs.length ? h("ol", {}, now.jobs.map(({ id, status, phase }) => h("li", { key: id },
        h("a", { href: `#${path("job", id)}` }, jobs.has(id) ? nameOf(jobs.get(id)) : id), ` ${status} ${phase}`)))
        : h("p", {}, "Nothing waits.")),
  ]];
}

function devices(one) {
  if (!one) return "not known before the first job";
  return typeof one.kind === "string" ? `${whole(one.count)} ${one.kind} (${one.platform})` : `${whole(one.count)} ${one.platform}`;
}

function share(name, total, free) {
  if (!total) return null;
  return h("p", { class: "row" }, h("span", { class: "label" }, name), bar(total - free, total, `${name} in use`), `${bytes(free)} of ${bytes(total)} free`);
}
