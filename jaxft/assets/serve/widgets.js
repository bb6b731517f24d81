// Parts that several views have: dialogs, bars, code to copy, and the examination of rows.

import { save } from "./api.js";
import { h } from "./dom.js";
import { bytes, count, number, percent, whole } from "./words.js";

let draw = () => {};
export const drawsWith = (function_) => (draw = function_);
export const redraw = () => draw();
export const announce = (text) => (document.getElementById("live").textContent = text);

// A question in a dialog; true if it is answered with `action`. The focus returns to where it was.
export function ask({ title, text, action, danger = false }) {
  return new Promise((resolve) => {
    const dialog = make("dialog", { "aria-labelledby": "ask-title", "aria-describedby": "ask-text" }, [
      make("h2", { id: "ask-title" }, [title]),
      make("p", { id: "ask-text" }, [text]),
    ]);
    const buttons = make("div", { class: "row" }, []);
    for (const [name, kind, answer] of [[action, danger ? "danger" : "main", "yes"], ["Back", "", "no"]]) {
      const button = make("button", { type: "button", class: kind }, [name]);
      button.addEventListener("click", () => dialog.close(answer));
      buttons.append(button);
    }
    dialog.append(buttons);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(dialog.returnValue === "yes");
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

function make(tag, attributes, children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
}

export const button = (name, onclick, props = {}) => h("button", { type: "button", onclick, ...props }, name);
export const alert = (error) => error && h("p", { class: "alert", role: "alert" }, error.message ?? String(error));

export function bar(value, most, label) {
  return h("progress", { max: Math.max(1, most), value: Math.min(value, most), "aria-label": label });
}

// Names and values.
export function facts(pairs) {
  const shown = pairs.filter(([, value]) => value !== null && value !== undefined && value !== "");
  return h("dl", { class: "facts" }, shown.map(([name, value]) => h("div", {}, h("dt", {}, name), h("dd", {}, value))));
}

// A field of a form with its label. hint: said with it.
export function field(label, id, props, hint, tag = "input", children = []) {
  const hints = hint ? { "aria-describedby": `${id}-hint` } : {};
  return h(
    "div", { class: "field", key: id },
    h("label", { for: id }, label),
    h(tag, { id, name: id, ...hints, ...props }, children),
    hint && h("p", { id: `${id}-hint`, class: "hint" }, hint),
  );
}

export function code(title, text) {
  const copy = async () => {
    await navigator.clipboard.writeText(text);
    announce(`${title} copied`);
  };
  return h(
    "figure", { class: "code" },
    h("figcaption", {}, title, navigator.clipboard && button("Copy", copy, { "aria-label": `Copy ${title}` })),
    h("pre", { tabindex: 0, role: "region", "aria-label": title }, text),
  );
}

const downloads = new Map(); // state by path

// A button that saves what a path answers, and says how far it is.
export function download(label, where, name) {
  const now = downloads.get(where);
  const start = async () => {
    downloads.set(where, "begins");
    redraw();
    try {
      await save(where, name, (size) => (downloads.set(where, bytes(size)), redraw()));
      downloads.delete(where);
      announce(`${name} is saved`);
    } catch (error) {
      downloads.set(where, `failed: ${error.message}`);
    }
    redraw();
  };
  const busy = now !== undefined && !now.startsWith("failed");
  const props = { "aria-label": `${label} ${name}`, "aria-disabled": busy && "true" };
  return [button(label, busy ? () => {} : start, props), now && h("span", { class: "hint" }, now)];
}

const MARKS = { "messages": "chat messages" };

// What was found in the rows: counts, lengths, warnings, and the first rows with what is trained on.
export function examination(job) {
  const found = job.jaxft.examination;
  if (!found) return null;
  const kinds = Object.entries({ ...found.formats, ...found.holds }).map(([name, n]) => `${whole(n)} ${MARKS[name] ?? name}`);
  return h(
    "section", { "aria-labelledby": "examination" },
    h("h2", { id: "examination" }, "Examination of the rows"),
    facts([
      ["rows", found.rows !== undefined && whole(found.rows)],
      ["tokens", found.tokens && whole(found.tokens)],
      ["trained on", found.tokens && `${whole(found.trained_tokens)} tokens, ${percent(found.trained_tokens, found.tokens)}`],
      ["sequences", found.sequences && `${whole(found.sequences)} of ${whole(found.max_length)} tokens, ${percent(found.fill, 1)} full`],
      ["longer than a sequence", (found.truncated || found.dropped) && `${whole(found.truncated)} cut, ${whole(found.dropped)} dropped`],
      ["held-out", found.validation && `${count(found.validation.rows, "row")}, ${count(found.validation.tokens, "token")}`],
      ["rows are", kinds.join(", ")],
    ]),
    notes("Warnings", job.jaxft.warnings),
    notes("Left out", found.bad_rows),
    found.histogram && histogram(found),
    (found.first_rows ?? []).map(firstRow),
  );
}

function notes(title, texts) {
  if (!texts?.length) return null;
  return h("div", { class: "warnings" }, h("h3", {}, title), h("ul", {}, texts.map((text) => h("li", {}, text))));
}

function histogram({ histogram: bins, quantiles }) {
  const most = Math.max(1, ...bins.map((one) => one[2]));
  return h(
    "table", { class: "histogram" },
    h("caption", {}, `Lengths in tokens: median ${number(quantiles?.p50)}, longest ${number(quantiles?.p100)}`),
    h("thead", {}, h("tr", {}, ["tokens", "examples"].map((name) => h("th", { scope: "col" }, name)))),
    h("tbody", {}, bins.map(([from, to, n]) => h(
      "tr", {}, h("th", { scope: "row" }, from === to ? whole(from) : `${whole(from)} to ${whole(to)}`),
      h("td", {}, h("meter", { max: most, value: n, "aria-hidden": "true" }), whole(n)),
    ))),
  );
}

function firstRow(pieces, n) {
  const title = `Row ${n + 1}, with what is trained on marked`;
  return h(
    "figure", { class: "sample" }, h("figcaption", {}, title),
    h("pre", { tabindex: 0, role: "region", "aria-label": title },
      pieces.map(({ text, trained }) => (trained ? h("mark", {}, text) : h("span", {}, text)))),
  );
}
