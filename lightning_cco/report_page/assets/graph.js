"use strict";
/* The graph, by Cytoscape.js: laid out by dagre, folded by module, operated by mouse and by keyboard. */
{
  const MOST_SEEN = 300;
  const container = document.getElementById("canvas");
  const calm = matchMedia("(prefers-reduced-motion: reduce)");
  const pen = document.createElement("canvas").getContext("2d");
  let unfolded = cco.startUnfolded();
  let standsFor = [];
  let chosen = null;

  const style = () => {
    const font = { "font-family": getComputedStyle(document.body).fontFamily, color: cco.colour("text") };
    const paints = ["io", "int8", "float", "mixed"].map((paint) => ({
      selector: `node[paint = "${paint}"]`, style: { "background-color": cco.colour(paint), "border-color": cco.colour(`${paint}-line`) } }));
    return [
      { selector: "node", style: { ...font, shape: "round-rectangle", label: "data(label)", "text-wrap": "wrap", "text-valign": "center", "font-size": 13, "line-height": 1.2,
        width: "data(width)", height: "data(height)", "border-width": 1.5 } },
      ...paints,
      { selector: "node.module", style: { "border-width": 3, "border-style": "double" } },
      { selector: "node:parent", style: { "background-color": cco.colour("box"), "background-opacity": 0.6, "text-valign": "top", "text-margin-x": "data(aside)", "font-size": 12, color: cco.colour("muted"),
        "border-width": 1, "border-style": "solid", "border-color": cco.colour("line"), padding: 12 } },
      { selector: "node.chosen", style: { "border-width": 4, "border-color": cco.colour("accent") } },
      { selector: "node.changed", style: { "border-style": "dashed" } },
      { selector: "edge", style: { width: 1.5, "line-color": cco.colour("muted"), "target-arrow-color": cco.colour("muted"), "target-arrow-shape": "triangle",
        "arrow-scale": 0.9, "curve-style": "bezier", opacity: 0.75 } },
      { selector: "edge.led", style: { "curve-style": "round-segments", "segment-weights": "data(along)", "segment-distances": "data(aside)", "segment-radii": 12,
        "edge-distances": "node-position" } },
    ];
  };

  const cy = cytoscape({ container, style: style(), minZoom: 0.02, maxZoom: 4, boxSelectionEnabled: false, autoungrabify: true });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => cy.style(style()));
  new ResizeObserver(() => cy.resize()).observe(document.body);  // what opens above it moves it: Cytoscape keeps its place

  const short = (text, most = 42) => (text.length > most ? `${text.slice(0, most / 2)}…${text.slice(-most / 2 + 1)}` : text);
  const labelOf = (node) => {
    if (node.layer === undefined) return `${short(cco.shown(node.label))}\n${cco.inside(node)}`;
    const layer = cco.layers[node.layer];
    const second = [cco.bits(layer), layer.sensitivity ? `QS ${cco.figure(layer.sensitivity.qs, 3)}` : "", !cco.bits(layer) && !layer.sensitivity ? layer.kind : ""];
    return `${short(cco.shown(node.label))}\n${second.filter(Boolean).join("  ")}`;
  };
  const element = (node) => {
    const label = labelOf(node);
    pen.font = "13px system-ui";
    const width = Math.max(70, ...label.split("\n").map((line) => pen.measureText(line).width + 24));
    const inside = node.parent && node.parent !== cco.tree && unfolded.has(node.parent.id) ? node.parent.id : undefined;
    const open = node.layer === undefined && unfolded.has(node.id);
    return { group: "nodes", classes: node.layer === undefined ? "module" : "",
      data: { id: node.id, parent: inside, paint: node.paint, width, height: 44, aside: 0, label: open ? short(cco.shown(node.label), 60) : label } };
  };

  const elements = () => {
    standsFor = cco.standsFor(unfolded);
    const seen = new Set(standsFor);
    const made = [];
    const add = (node) => {
      if (node !== cco.tree) made.push(element(node));
      if (node.children && unfolded.has(node.id)) node.children.filter((child) => seen.has(child) || (child.children && unfolded.has(child.id))).forEach(add);
    };
    add(cco.tree);
    const pairs = new Set();
    for (const [from, to] of cco.report.edges) {
      const a = standsFor[from], b = standsFor[to];
      const id = `${a.id} → ${b.id}`;
      if (a !== b && !pairs.has(id)) { pairs.add(id); made.push({ group: "edges", data: { id: `e:${id}`, source: a.id, target: b.id } }); }
    }
    return made;
  };

  const draw = (focus) => {
    cy.startBatch();
    cy.elements().remove();
    cy.add(elements());
    cy.endBatch();
    cco.layOut(cy);
    mark();
    const target = focus ? cy.getElementById(focus) : cy.collection();
    show(target.nonempty() ? target.union(target.children()) : cy.elements());
  };
  const show = (what) => {
    if (!container.clientWidth) return;
    cy.fit(what, 24);
    if (cy.zoom() > 1.15) { cy.zoom(1.15); cy.center(what); }
    if (cy.zoom() < 0.45 && what.length === cy.elements().length && cy.nodes().nonempty()) {  // a tall graph: readable, from its top on
      cy.zoom(0.6);
      const box = what.boundingBox();
      cy.pan({ x: container.clientWidth / 2 - 0.6 * (box.x1 + box.x2) / 2, y: 24 - 0.6 * box.y1 });
    }
  };
  const mark = () => {
    cy.nodes().removeClass("chosen changed");
    if (chosen) cy.getElementById(chosen).addClass("chosen");
    cco.whatIf.changes.forEach((_, name) => { const node = standsFor[cco.byName.get(name).index]; if (node) cy.getElementById(node.id).addClass("changed"); });
  };

  const seenCount = () => new Set(standsFor).size;
  const refold = (node) => {
    const inside = (other) => { for (let at = other; at; at = at.parent) if (at === node) return true; return false; };
    [...unfolded].forEach((id) => { if (id !== cco.tree.id && inside(cco.nodes.get(id))) unfolded.delete(id); });
  };
  /** Unfold or fold a module; where too much would be seen, the others are folded first. */
  const toggle = (id) => {
    const node = cco.nodes.get(id);
    if (!node || !node.children) return;
    if (unfolded.has(id)) refold(node); else reveal(node, true);
    choose(id, false);
    draw(id);
    cco.say(`${node.label}: ${unfolded.has(id) ? `unfolded, ${node.children.length} inside` : "folded"}`);
  };
  const reveal = (node, itself) => {
    if (seenCount() + (node.children || []).length > MOST_SEEN) unfolded = cco.startUnfolded(12);
    for (let at = itself ? node : node.parent; at; at = at.parent) unfolded.add(at.id);
  };

  const choose = (id, tell = true) => {
    chosen = id;
    mark();
    const node = cco.nodes.get(id);
    document.dispatchEvent(new CustomEvent("cco:chosen", { detail: { node, tell } }));
    const layer = node.layer === undefined ? null : cco.layers[node.layer];
    cco.say(layer ? `${layer.name}, ${layer.kind}, ${cco.RUNS[layer.runs]} ${cco.bits(layer)}` : `module ${node.path}, ${cco.inside(node)}`);
  };
  /** Show a layer wherever it is: its modules are unfolded. */
  const find = (index) => {
    const node = cco.leaf(index);
    if (standsFor[index] !== node) { reveal(node, false); chosen = node.id; draw(node.id); }
    const target = cy.getElementById(node.id);
    if (!calm.matches && cy.zoom() > 0.35) cy.animate({ center: { eles: target } }, { duration: 150 }); else { cy.zoom(Math.max(cy.zoom(), 0.9)); cy.center(target); }
    choose(node.id);
  };

  cy.on("tap", "node", (event) => {
    const id = event.target.id(), node = cco.nodes.get(id);
    if (node.children && !unfolded.has(id)) toggle(id); else choose(id);
  });
  cy.on("mouseover", "node", (event) => { const node = cco.nodes.get(event.target.id()); container.title = cco.shown(node.layer === undefined ? node.path : cco.layers[node.layer].path || node.label); });
  cy.on("mouseout", "node", () => { container.title = ""; });

  const near = (direction) => {
    const at = chosen ? cy.getElementById(chosen) : cy.collection();
    const plain = () => cy.nodes().filter((node) => !node.isParent());
    if (at.empty()) return plain().first();
    if (direction === "down") return (at.isParent() ? at.children() : at.outgoers("node")).first();
    if (direction === "up") return at.incomers("node").nonempty() ? at.incomers("node").first() : at.parent();
    const row = plain().filter((node) => Math.abs(node.position("y") - at.position("y")) < 30).sort((a, b) => a.position("x") - b.position("x"));
    const place = row.toArray().findIndex((node) => node.id() === at.id());
    return row[place + (direction === "right" ? 1 : -1)] || cy.collection();
  };
  container.addEventListener("keydown", (event) => {
    const arrows = { ArrowDown: "down", ArrowUp: "up", ArrowLeft: "left", ArrowRight: "right" };
    const direction = arrows[event.key];
    if (direction && event.shiftKey) cy.panBy({ x: direction === "left" ? 60 : direction === "right" ? -60 : 0, y: direction === "up" ? 60 : direction === "down" ? -60 : 0 });
    else if (direction) { const next = near(direction); if (next.nonempty()) { choose(next.id()); cy.center(next); } }
    else if (event.key === "Enter" || event.key === " ") {
      const node = cco.nodes.get(chosen);
      if (node && node.children) toggle(chosen); else if (node) document.getElementById("detail").focus();
    } else if (event.key === "+" || event.key === "=") zoom(1.25);
    else if (event.key === "-") zoom(0.8);
    else if (event.key === "0") cy.fit(undefined, 24);
    else return;
    event.preventDefault();
  });
  const zoom = (factor) => cy.zoom({ level: cy.zoom() * factor, renderedPosition: { x: container.clientWidth / 2, y: container.clientHeight / 2 } });

  const on = (id, act) => document.getElementById(id).addEventListener("click", act);
  on("fit", () => cy.fit(undefined, 24));
  on("nearer", () => zoom(1.25));
  on("farther", () => zoom(0.8));
  on("fold", () => { unfolded = new Set([cco.tree.id]); draw(); cco.say("Folded."); });
  on("unfold", () => {
    const folded = [...new Set(standsFor)].filter((node) => node.children).sort((a, b) => a.children.length - b.children.length);
    let seen = seenCount(), count = 0;
    for (const node of folded) {
      if (seen + node.children.length > MOST_SEEN) break;
      unfolded.add(node.id);
      seen += node.children.length - 1;
      count += 1;
    }
    draw();
    cco.say(count ? `${count} modules unfolded` : folded.length ? "More than can be seen at once: unfold a module by itself." : "All is unfolded.");
  });

  document.addEventListener("cco:changed", mark);
  draw();
  cco.graph = { cy, find, choose, toggle, seen: seenCount, isUnfolded: (id) => unfolded.has(id) };
}
