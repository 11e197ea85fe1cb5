"use strict";
/* The report's data, and what the other scripts share: figures as people read them, elements, what a screen reader says. */
const cco = { report: JSON.parse(document.getElementById("report").textContent) };
cco.layers = cco.report.layers;
cco.byName = new Map(cco.layers.map((layer, index) => [layer.name, { layer, index }]));
cco.RUNS = { input: "input", output: "output", int8: "INT8", packed: "4-bit weights, float", "weight-only": "integer weights, float", float: "float" };

/** A number of the report: those that are not finite are texts there. */
cco.number = (value) => (value === null || value === undefined ? NaN : typeof value === "number" ? value
  : value === "inf" ? Infinity : value === "-inf" ? -Infinity : NaN);

/** A figure in at most four significant digits. */
cco.figure = (raw, digits = 4) => {
  const value = cco.number(raw);
  if (Number.isNaN(value)) return "–";
  if (!Number.isFinite(value)) return value > 0 ? "∞" : "−∞";
  const size = Math.abs(value);
  if (size !== 0 && (size < 1e-4 || size >= 1e15)) return value.toExponential(digits - 2);
  return size >= 10 ** digits ? Math.round(value).toLocaleString("en") : String(Number(value.toPrecision(digits)));
};
cco.bytes = (value) => (value >= 1e6 ? `${cco.figure(value / 1e6)} MB` : value >= 1e3 ? `${cco.figure(value / 1e3)} kB` : `${cco.figure(value)} bytes`);
/* A part of a whole as the log says it (`figures.per_cent`): all and nothing are never said of what is not quite that. */
cco.share = (value) => {
  const part = cco.number(value);
  if (!Number.isFinite(part)) return "–";
  if (part >= 0.995 && part < 1) return "over 99 %";
  return part > 0 && part < 0.005 ? "under 1 %" : `${Math.round(100 * part)} %`;
};
cco.percent = (value) => (Number.isFinite(cco.number(value)) ? `${cco.figure(100 * cco.number(value), 3)} %` : "–");

/** A name on one line: what does not print is written as an escape. */
cco.shown = (text) => String(text).replace(/[\p{C}\p{Zl}\p{Zp}]/gu, (sign) => `\\u${sign.codePointAt(0).toString(16).padStart(4, "0")}`);
cco.shapes = (shapes) => (shapes || []).map((shape) => shape.join("×") || "scalar").join(", ") || "–";
cco.bits = (layer) => [layer.weights_bits && `W${layer.weights_bits}`, layer.output_bits && `A${layer.output_bits}`].filter(Boolean).join("/");
cco.colour = (name) => getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();

/** An element; texts are text, never markup. Properties are set by name, `aria-…` and `role` as attributes, `on…` as listeners. */
cco.el = (tag, properties = {}, ...children) => {
  const made = document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (key.startsWith("on")) made.addEventListener(key.slice(2), value);
    else if (key.includes("-") || key === "role" || key === "scope") made.setAttribute(key, value);
    else made[key] = value;
  }
  made.append(...children.filter((child) => child !== null && child !== undefined).map((child) => (child instanceof Node ? child : cco.shown(child))));
  return made;
};
/** A module's path, which breaks after its dots where a line is too short for it. */
cco.path = (path) => cco.el("span", {}, ...path.split(".").flatMap((part, i, all) => (i < all.length - 1 ? [`${part}.`, document.createElement("wbr")] : [part])));
/** A table of rows of cells. */
cco.grid = (header, rows, right = []) => {
  const cell = (tag, content, place) => cco.el(tag, right.includes(place) ? { className: "number" } : {}, content);
  const head = cco.el("tr", {}, ...header.map((text, place) => { const made = cell("th", text, place); made.scope = "col"; return made; }));
  return cco.el("div", { className: "scroll" }, cco.el("table", {}, cco.el("thead", {}, head),
    cco.el("tbody", {}, ...rows.map((row) => cco.el("tr", {}, ...row.map((content, place) => cell("td", content, place)))))));
};
cco.list = (pairs) => cco.el("dl", {}, ...pairs.filter(([, value]) => value !== undefined && value !== "").flatMap(
  ([key, value]) => [cco.el("dt", {}, key), cco.el("dd", {}, value)]));
cco.say = (text) => { document.getElementById("say").textContent = cco.shown(text); };

/** Copies a text, also in a page that was opened from disk; where no clipboard can be had the text is selected. */
cco.copy = async (text, element) => {
  try {
    await navigator.clipboard.writeText(text);
  } catch {
    getSelection().selectAllChildren(element);
    if (!document.execCommand("copy")) { cco.say("Selected; press Ctrl+C to copy."); return; }
  }
  cco.copied = text;
  cco.say("Copied.");
};
