// Requests to the server, which all carry the key as a header. The key is in the storage of this tab alone.

const STORED = "jaxft-key";
const BASE = "/v1";

export class ApiError extends Error {
  constructor(status, message, code) {
    super(message);
    this.status = status;
    this.code = code;
  }
}

// Takes the key from the fragment of the address, and removes it from there and from the history of the tab.
export function takeKey() {
  const given = /^#key=(.+)$/.exec(location.hash);
  if (!given) return;
  setKey(given[1]);
  history.replaceState(null, "", "/#/jobs");
}

export const hasKey = () => sessionStorage.getItem(STORED) !== null;
export const setKey = (key) => sessionStorage.setItem(STORED, key.trim());
export const dropKey = () => sessionStorage.removeItem(STORED);
const authorization = () => `Bearer ${sessionStorage.getItem(STORED)}`;
export const path = (...parts) => "/" + parts.map(encodeURIComponent).join("/");

// The response to a request. Throws ApiError for one that is refused, and TypeError if there is no server.
export async function request(method, where, { body, headers, signal } = {}) {
  const own = { Authorization: authorization(), ...headers };
  if (body !== undefined) own["Content-Type"] = "application/json";
  const text = body === undefined ? undefined : JSON.stringify(body);
  const response = await fetch(BASE + where, { method, headers: own, body: text, signal, credentials: "omit" });
  if (!response.ok) throw refusal(response.status, await response.text());
  return response;
}

export async function call(method, where, body) {
  return (await request(method, where, { body })).json();
}

function refusal(status, text) {
  try {
    const { message, code } = JSON.parse(text).error;
    return new ApiError(status, String(message), code);
  } catch {
    return new ApiError(status, `The server answered ${status}.`, null);
  }
}

// The server-sent events of a response: id, event and data, which are null where they are absent.
export async function* events(response) {
  let id = null, event = null, data = null, rest = "";
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const lines = (rest + value).split("\n");
    rest = lines.pop();
    for (const line of lines) {
      const at = line.indexOf(":");
      const name = at < 0 ? line : line.slice(0, at);
      const text = at < 0 ? "" : line.slice(at + 1).replace(/^ /, "").replace(/\r$/, "");
      if (line === "" || line === "\r") {
        if (id !== null || data !== null) yield { id, event, data };
        id = event = data = null;
      } else if (name === "id") id = text;
      else if (name === "event") event = text;
      else if (name === "data") data = data === null ? text : `${data}\n${text}`;
      else if (name === "") yield { id: null, event: "beat", data: null };
    }
  }
}

// Sends a file. said: is told the share that was sent. Returns the file's object, and a function that gives it up.
export function upload(file, said) {
  const form = new FormData();
  form.append("purpose", "fine-tune");
  form.append("file", file, file.name);
  const sender = new XMLHttpRequest();
  const sent = new Promise((resolve, reject) => {
    sender.open("POST", `${BASE}/files`);
    sender.setRequestHeader("Authorization", authorization());
    sender.upload.onprogress = (event) => said(event.total ? event.loaded / event.total : 0);
    sender.onload = () => {
      if (sender.status === 200) resolve(JSON.parse(sender.responseText));
      else reject(refusal(sender.status, sender.responseText));
    };
    sender.onerror = () => reject(new ApiError(0, "The upload was cut off.", null));
    sender.onabort = () => reject(new ApiError(0, "The upload was given up.", "given_up"));
    sender.send(form);
  });
  return [sent, () => sender.abort()];
}

// Saves what a path answers as a file. said: is told how many bytes have come.
export async function save(where, name, said) {
  const response = await request("GET", where);
  const pieces = [];
  let size = 0;
  for (const reader = response.body.getReader(); ;) {
    const { value, done } = await reader.read();
    if (done) break;
    pieces.push(value);
    said((size += value.length));
  }
  const address = URL.createObjectURL(new Blob(pieces, { type: "application/octet-stream" }));
  const link = document.createElement("a");
  link.href = address;
  link.download = name;
  link.click();
  setTimeout(() => URL.revokeObjectURL(address), 60_000);
}
