// Nodes made from data. Invariant: what comes from outside goes in as text, never as markup.

const SVG = "http://www.w3.org/2000/svg";

const find = (id) => document.getElementById(id);

/** An element with attributes (null and false: left out) and children, strings being text. */
function make(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

function drawn(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== null && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children);
  return node;
}

/** A table with a caption, heads, and rows of cells; the first cell of a row is its head. */
function table(caption, heads, rows) {
  const head = make("tr", {}, ...heads.map((text) => make("th", { scope: "col" }, text)));
  return make("table", {}, make("caption", {}, caption), make("thead", {}, head), make("tbody", {}, ...rows.map(row)));
}

function row(cells) {
  return make("tr", {}, ...cells.map((cell, i) => make(i ? "td" : "th", i ? {} : { scope: "row" }, cell)));
}

/** A box that scrolls sideways, by keyboard too. */
function scroller(name, ...children) {
  return make("div", { class: "scroller", role: "region", "aria-label": name, tabindex: "0" }, ...children);
}

/** Names and values; a value that is null is left out. */
function facts(pairs) {
  const told = Object.entries(pairs).filter(([, value]) => value !== null && value !== undefined && value !== "");
  return make("dl", {}, ...told.map(([name, value]) => make("div", {}, make("dt", {}, name), make("dd", {}, value))));
}
