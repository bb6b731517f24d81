// Elements as plain objects, and the fewest changes that make a part of the document equal to them.
// Text gets into the document as text nodes and attributes alone.

const SVG = "http://www.w3.org/2000/svg";
const SVG_TAGS = new Set(["svg", "g", "path", "line", "circle", "rect", "text", "title"]);

// An element. props: attributes; `key` names it among its siblings, `on...` are handlers of events, `value`, `checked`
// and `open` are set when they change and otherwise left to the user, `ref` gets the node once.
export function h(tag, props, ...children) {
  return { tag, props: props ?? {}, children: flat(children) };
}

function flat(children) {
  return children.flat(Infinity).filter((one) => one !== null && one !== undefined && typeof one !== "boolean");
}

export function render(parent, ...children) {
  change(parent, flat(children));
}

function change(parent, wanted) {
  const keyed = new Map();
  for (const node of parent.childNodes) if (node.key !== undefined) keyed.set(node.key, node);
  let at = parent.firstChild;
  for (const one of wanted) {
    const key = one.props?.key;
    let node = key === undefined ? at : keyed.get(key);
    if (!node || !fits(node, one)) node = create(one, parent);
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
    update(node, one);
  }
  while (at) {
    const next = at.nextSibling;
    at.remove();
    at = next;
  }
}

function fits(node, one) {
  if (typeof one !== "object") return node.nodeType === Node.TEXT_NODE;
  return node.tag === one.tag && node.key === one.props.key;
}

function create(one, parent) {
  if (typeof one !== "object") return document.createTextNode(String(one));
  const inSvg = one.tag === "svg" || (SVG_TAGS.has(one.tag) && parent.namespaceURI === SVG);
  const node = inSvg ? document.createElementNS(SVG, one.tag) : document.createElement(one.tag);
  node.tag = one.tag;
  node.key = one.props.key;
  node.handlers = {};
  node.before = {};
  return node;
}

function update(node, one) {
  if (typeof one !== "object") {
    if (node.data !== String(one)) node.data = String(one);
    return;
  }
  const before = node.before;
  for (const name of Object.keys(before)) if (!(name in one.props)) set(node, name, null);
  node.before = one.props;
  change(node, one.children);
  for (const [name, value] of Object.entries(one.props)) if (before[name] !== value) set(node, name, value);
  if (!node.met) {
    node.met = true;
    one.props.ref?.(node);
  }
}

function set(node, name, value) {
  if (name === "key" || name === "ref") return;
  if (name.startsWith("on")) {
    if (!(name in node.handlers)) node.addEventListener(name.slice(2), (event) => node.handlers[name]?.(event));
    node.handlers[name] = value;
  } else if (name === "value" || name === "checked" || name === "open") {
    node[name] = value ?? (name === "value" ? "" : false);
  } else if (value === null || value === undefined || value === false) {
    node.removeAttribute(name);
  } else {
    node.setAttribute(name, value === true ? "" : String(value));
  }
}
