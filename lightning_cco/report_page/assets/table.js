"use strict";
/* The table of layers: the graph's other form, and where several layers are changed. So many rows at a time, as a filter or a column orders them. */
{
  const PAGE = 100;
  const MOST_PRINTED = 1000;
  const { report } = cco;
  const table = document.getElementById("table"), body = table.querySelector("tbody");
  const filter = document.getElementById("filter"), only = document.getElementById("only"), more = document.getElementById("more");
  let count = PAGE, sort = null, rows = [];

  const qs = (layer) => (layer.sensitivity ? cco.number(layer.sensitivity.qs) : NaN);
  const rise = (layer) => (report.loss && report.loss.now[layer.name] !== undefined ? cco.number(report.loss.now[layer.name]) : NaN);
  const columns = [
    ["float", null], ["layer", (layer) => layer.name], ["module", (layer) => layer.path || ""], ["kind", (layer) => layer.kind], ["runs in", (layer) => layer.runs],
    ["weights' bits", (layer) => layer.weights_bits || 0], ["output's bits", (layer) => layer.output_bits || 0],
    ["weights", (layer) => (layer.weights ? layer.weights.elements || 0 : 0)], ["QS", qs], ...(report.loss ? [["loss rise", rise]] : []), ["why not in INT8", (layer) => layer.reason || ""],
  ];
  const NUMBERS = new Set(["weights' bits", "output's bits", "weights", "QS", "loss rise"]);

  const row = (layer) => {
    const { tick, weights, outputs, changed } = cco.whatIf.controls(layer);
    const cells = {
      float: tick || "", layer: cco.el("button", { type: "button", className: "link", onclick: () => { cco.graph.find(cco.byName.get(layer.name).index); document.getElementById("graph").scrollIntoView(); } }, layer.name),
      module: layer.path ? cco.path(layer.path) : "–", kind: layer.kind, "runs in": cco.badge(layer.runs), "weights' bits": weights || String(layer.weights_bits || "–"), "output's bits": outputs || String(layer.output_bits || "–"),
      weights: layer.weights && layer.weights.elements ? cco.figure(layer.weights.elements) : "–", QS: cco.figure(qs(layer)), "loss rise": cco.figure(rise(layer)), "why not in INT8": layer.reason || "",
    };
    return cco.el("tr", { className: changed ? "changed" : "", "data-row": layer.name }, ...columns.map(([title]) =>
      cco.el("td", { className: NUMBERS.has(title) ? "number" : title === "why not in INT8" || title === "module" ? "wide" : "" }, cells[title])));
  };

  const wanted = (layer) => {
    const text = filter.value.trim().toLowerCase();
    const kind = { "": true, weights: Boolean(layer.weighted), int8: layer.runs === "int8" || layer.runs === "packed", float: layer.runs === "float" || layer.runs === "weight-only",
      changed: cco.whatIf.changes.has(layer.name) }[only.value];
    return kind && (!text || [layer.name, layer.path, layer.kind, layer.reason].some((field) => (field || "").toLowerCase().includes(text)));
  };
  const show = () => {
    rows = cco.layers.filter(wanted);
    if (sort) {
      const [, value] = columns[sort.column];
      rows.sort((a, b) => {
        const [x, y] = [value(a), value(b)];
        if (typeof x === "number") return (Number.isNaN(x) - Number.isNaN(y)) || sort.sign * (x - y);
        return sort.sign * String(x).localeCompare(String(y));
      });
    }
    body.replaceChildren(...rows.slice(0, count).map(row));
    more.hidden = rows.length <= count;
    document.getElementById("shown").textContent = `${Math.min(count, rows.length)} of ${rows.length} layers`;
  };

  const head = () => table.querySelector("thead").replaceChildren(cco.el("tr", {}, ...columns.map(([title, value], column) => {
    const by = sort && sort.column === column;
    return cco.el("th", { scope: "col", ...(value ? { "data-title": title } : {}), className: NUMBERS.has(title) ? "number" : "", "aria-sort": by ? (sort.sign > 0 ? "ascending" : "descending") : "none" },
      value ? cco.el("button", { type: "button", onclick: () => {
        sort = { column, sign: by ? -sort.sign : NUMBERS.has(title) ? -1 : 1 };
        head();
        show();
        table.querySelectorAll("th button")[column - 1].focus();
      } }, `${title}${by ? (sort.sign > 0 ? " ▲" : " ▼") : ""}`) : title);
  })));

  let waits = 0;
  filter.addEventListener("input", () => { clearTimeout(waits); waits = setTimeout(() => { count = PAGE; show(); }, 120); });
  only.addEventListener("change", () => { count = PAGE; show(); });
  more.addEventListener("click", () => { count += PAGE; show(); });
  /* Paper has no button for more; the titles are those of `data-title`, since Chromium leaves buttons out of the heads that it repeats on each page. */
  let onScreen = PAGE;
  addEventListener("beforeprint", () => { onScreen = count; count = Math.max(count, MOST_PRINTED); show(); });
  addEventListener("afterprint", () => { count = onScreen; show(); });
  document.addEventListener("cco:changed", ({ detail }) => {
    cco.whatIf.show();
    const old = [...body.children].find((one) => one.dataset.row === detail.name);
    if (!old) return;
    const part = old.contains(document.activeElement) ? document.activeElement.dataset.part : null;
    const made = row(cco.byName.get(detail.name).layer);
    old.replaceWith(made);
    if (part) { const control = made.querySelector(`[data-part="${part}"]`); if (control) control.focus(); }
  });
  document.getElementById("copy-yaml").addEventListener("click", () => cco.copy(cco.whatIf.yaml(), document.getElementById("yaml")));
  document.getElementById("reset").addEventListener("click", cco.whatIf.reset);
  head();
  show();
  cco.whatIf.show();
}
