"use strict";
/* The search. */
{
  const search = document.getElementById("search"), found = document.getElementById("found");
  const matches = () => {
    const text = search.value.trim().toLowerCase();
    if (!text) return [];
    const rank = (layer) => (layer.name.toLowerCase() === text ? 0 : layer.name.toLowerCase().startsWith(text) ? 1 : layer.name.toLowerCase().includes(text) ? 2
      : (layer.path || "").toLowerCase().includes(text) ? 3 : layer.kind.includes(text) ? 4 : 9);
    return cco.layers.map((layer, index) => ({ layer, index, rank: rank(layer) })).filter((one) => one.rank < 9).sort((a, b) => a.rank - b.rank || a.index - b.index);
  };
  const show = () => {
    const all = matches();
    found.hidden = !search.value.trim();
    found.replaceChildren(...all.slice(0, 30).map(({ layer, index }) => cco.el("li", {},
      cco.el("button", { type: "button", className: "link", onclick: () => cco.graph.find(index) }, layer.name), cco.el("span", { className: "small" }, ` ${layer.path || ""} ${layer.kind}`))),
    ...(all.length ? (all.length > 30 ? [cco.el("li", { className: "small" }, `… and ${all.length - 30} more`)] : []) : [cco.el("li", { className: "small" }, "Nothing is named so.")]));
  };
  search.addEventListener("input", show);
  search.addEventListener("keydown", (event) => {
    if (event.key === "Enter") { const [first] = matches(); if (first) cco.graph.find(first.index); event.preventDefault(); }
    if (event.key === "Escape") { search.value = ""; show(); }
  });
  document.documentElement.dataset.ready = "true";
}
