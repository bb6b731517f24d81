// The page: its key, its views by the fragment of the address, and what they share.

import { dropKey, hasKey, setKey, takeKey } from "./api.js";
import { h, render } from "./dom.js";
import { follow, stream, subscribe } from "./live.js";
import { changed, changesDraw } from "./pace.js";
import { announce, button, drawsWith, field } from "./widgets.js";
import { nameOf, stateOf } from "./words.js";
import * as job from "./view_job.js";
import * as jobs from "./view_jobs.js";
import * as models from "./view_models.js";
import * as fresh from "./view_new.js";
import * as playground from "./view_playground.js";
import * as system from "./view_system.js";

const VIEWS = { jobs, new: fresh, job, playground, models, system };
const MENU = [["jobs", "Jobs"], ["new", "New job"], ["playground", "Playground"], ["models", "Models"], ["system", "System"]];
const SCHEMES = ["system", "light", "dark"];
const STREAM = { begins: "", live: "connected", lost: "The server does not answer. It is asked again.", refused: "This key may not see jobs." };
const main = document.getElementById("main");
let current = null, name = "jobs", scheme = localStorage.getItem("jaxft-scheme") ?? "system", wrong = null;

function draw() {
  render(document.getElementById("header"), h("div", { class: "top" },
    h("p", { class: "brand" }, "jaxft"),
    hasKey() && h("nav", { "aria-label": "Views" }, h("ul", {}, MENU.map(([where, text]) =>
      h("li", {}, h("a", { href: `#/${where}`, "aria-current": name === where && "page" }, text))))),
    h("label", { class: "scheme" }, "Colours ", h("select", { value: scheme, onchange: (event) => choose(event.target.value) },
      SCHEMES.map((one) => h("option", { value: one, selected: one === scheme }, one))))));
  render(main, h("div", { key: hasKey() ? location.hash : "key", class: "view" }, hasKey() ? current?.view() : keyForm()));
  render(document.getElementById("state"), hasKey() && [h("span", {}, STREAM[stream.state] ?? ""), " ", button("Forget the key", forget)]);
  document.title = hasKey() && current ? `${current.title()} · jaxft` : "jaxft";
}

function keyForm() {
  const enter = (event) => {
    event.preventDefault();
    setKey(new FormData(event.target).get("key"));
    wrong = null;
    begin();
  };
  return [
    h("h1", { tabindex: -1 }, "Key"), wrong && h("p", { class: "alert", role: "alert" }, wrong),
    h("p", {}, "The server printed a key when it started for the first time. Its operator makes others with jaxft serve keys add."),
    h("form", { class: "form", onsubmit: enter },
      field("Key", "key", { type: "password", autocomplete: "off", required: true }, "It stays in this tab, until the tab is closed."),
      h("p", {}, h("button", { class: "main" }, "Enter"))),
  ];
}

function forget() {
  dropKey();
  location.replace("/");
}

function choose(wanted) {
  scheme = wanted;
  localStorage.setItem("jaxft-scheme", scheme);
  document.documentElement.dataset.scheme = scheme;
  draw();
}

function route(moved) {
  if (location.hash.startsWith("#key=")) {
    takeKey();
    return location.reload();
  }
  const [where, query] = (location.hash.startsWith("#/") ? location.hash.slice(2) : "jobs").split("?");
  const [first, ...rest] = where.split("/").map(decoded);
  current?.leave?.();
  name = first in VIEWS ? first : "jobs";
  current = VIEWS[name];
  if (hasKey()) current.enter?.(rest[0], new URLSearchParams(query));
  draw();
  if (moved) main.querySelector("h1")?.focus();
}

function decoded(text) {
  try {
    return decodeURIComponent(text);
  } catch {
    return text;
  }
}

function begin() {
  route(false);
  if (hasKey()) follow();
}

subscribe((what, value, before) => {
  if (what === "job" && before && before.status !== value.status) announce(`${nameOf(value)}: ${stateOf(value)}`);
  if (what === "stream" && value.state === "no key") {
    dropKey();
    wrong = "The server does not know this key.";
    return draw();
  }
  if (what === "stream" && value.state === "lost") announce(STREAM.lost);
  current?.heard?.(what, value, before);
  changed();
});
drawsWith(draw);
changesDraw(draw);
document.documentElement.dataset.scheme = scheme;
document.getElementById("skip").addEventListener("click", (event) => {
  event.preventDefault();
  main.focus();
});
addEventListener("hashchange", route);
addEventListener("resize", changed);
takeKey();
begin();
