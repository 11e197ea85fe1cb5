"use strict";
/* What is known of one layer, or of one module, beside the graph. */
{
  const { report } = cco;
  const panel = document.getElementById("detail");

  const badge = (runs) => cco.el("span", { className: `badge ${runs === "input" || runs === "output" ? "io" : runs === "int8" || runs === "packed" ? "int8" : "float"}` }, cco.RUNS[runs]);
  cco.badge = badge;

  const measured = (layer) => {
    const found = layer.sensitivity;
    if (!found) return [];
    const above = report.thresholds.qs !== null && cco.number(found.qs) > report.thresholds.qs;
    return [["QS", above ? cco.el("span", { className: "bad" }, `${cco.figure(found.qs)} (above ${cco.figure(report.thresholds.qs)})`) : cco.figure(found.qs)],
      ["relative error", cco.percent(found.relative)], ["SQNR", `${cco.figure(found.sqnr_db, 3)} dB`],
      ["of what varies", Number.isNaN(cco.number(found.varying_sqnr_db)) ? "" : `${cco.figure(found.varying_sqnr_db, 3)} dB`],
      ["accumulated QS", Number.isNaN(cco.number(found.accumulated_qs)) ? "" : cco.figure(found.accumulated_qs)]];
  };
  const clipped = (layer) => {
    const { clipped_weights: weights, oscillating_weights: oscillating, clipped_activations: activations } = layer.levels || {};
    return [["weights clipped", weights], ["weights oscillating", oscillating], ["activations clipped", activations]]
      .filter(([, share]) => Number.isFinite(cco.number(share))).map(([title, share]) => [title, cco.percent(share)]);
  };

  const yamlOf = (layer) => {
    const change = cco.whatIf.changes.get(layer.name);
    const may = layer.choices || {};
    const parts = change ? cco.whatIf.ruleOf(layer.name, change)
      : may.float ? [["match", layer.yaml], ["skip_quantization", "true"]] : may.int8 ? [["match", layer.yaml], ["skip_quantization", "false"]] : null;
    return parts && `layer_settings:\n  - {${parts.map(([key, value]) => `${key}: ${value}`).join(", ")}}\n`;
  };

  const choices = (layer) => {
    const { tick, weights, outputs } = cco.whatIf.controls(layer);
    const text = yamlOf(layer);
    if (!text) return [cco.el("p", { className: "small" }, "A rule of the recipe can't change it.")];
    const shown = cco.el("pre", { tabIndex: 0, "aria-label": "YAML that changes this layer" }, "");
    shown.textContent = text;
    return [cco.el("h3", {}, "Change it"),
      ...[[tick, "leave in float"], [weights, "bits of the weights"], [outputs, "bits of the output"]].filter(([control]) => control)
        .map(([control, title]) => cco.el("p", {}, cco.el("label", {}, control, ` ${title}`))),
      shown, cco.el("button", { type: "button", className: "copy", onclick: () => cco.copy(text, shown) }, "Copy YAML"),
      cco.el("p", { className: "small" }, "This is the rule by itself; the recipe with all its rules and changes is below the graph.")];
  };

  const layerView = (layer) => {
    const { weights, output } = layer;
    const rows = [["module", layer.path || "–"], ["kind", layer.kind], ["runs in", badge(layer.runs)], ["why", layer.reason], ["bits", cco.bits(layer) || "–"],
      ["shapes", `${cco.shapes(layer.inputs)} → ${cco.shapes(layer.outputs)}`], ...Object.entries(layer.attributes || {}),
      ["multiplications", layer.multiplications ? cco.figure(layer.multiplications) : ""], ["parameters", (layer.parameters || []).join(", ")],
      ["weights", weights ? `${cco.figure(weights.elements)}${weights.low === undefined ? "" : `, from ${cco.figure(weights.low)} to ${cco.figure(weights.high)}`}` : ""],
      ["scales of the weights", weights && weights.smallest_scale !== undefined ? `${weights.channels}, from ${cco.figure(weights.smallest_scale)} to ${cco.figure(weights.largest_scale)}` : ""],
      ["range of the output", output ? `${cco.figure(output.low)} to ${cco.figure(output.high)}, scale ${cco.figure(output.scale)}, zero point ${cco.figure(output.zero_point)}` : ""],
      ...measured(layer), ...clipped(layer)];
    const loss = report.loss;
    if (loss && loss.now[layer.name] !== undefined) rows.push([`expected rise of the ${loss.of}`, cco.figure(loss.now[layer.name])]);
    const made = [cco.el("h3", {}, layer.name), cco.list(rows)];
    if (weights && weights.histogram && weights.histogram.counts.length) made.push(cco.histogram("Weights, in steps of their channel's scale", weights.histogram, weights.levels, 1, "steps"));
    if (output && output.histogram.counts.length) made.push(cco.histogram("Output, with its levels", output.histogram, output.levels, cco.number(output.scale), "value"));
    if (report.qs.values[layer.name]) made.push(cco.lines("QS over the epochs", report.qs.epochs, { QS: report.qs.values[layer.name] }));
    if (loss && loss.values[layer.name]) made.push(cco.lines(`Expected rise of the ${loss.of} over the epochs`, loss.epochs, { rise: loss.values[layer.name] }));
    made.push(...choices(layer));
    return made;
  };

  const moduleView = (node) => {
    const inside = [];
    const collect = (at) => (at.layer !== undefined ? inside.push(cco.layers[at.layer]) : at.children.forEach(collect));
    collect(node);
    const worst = inside.filter((layer) => layer.sensitivity).sort((a, b) => cco.number(b.sensitivity.qs) - cco.number(a.sensitivity.qs)).slice(0, 5);
    const open = cco.graph.isUnfolded(node.id);
    return [cco.el("h3", {}, node.path || node.label), cco.list([["layers", String(node.count)], ["with weights in INT8", `${node.int8} of ${node.weighted}`],
      ["weights", cco.figure(inside.reduce((sum, layer) => sum + (layer.weights ? layer.weights.elements || 0 : 0), 0))]]),
    cco.el("p", {}, cco.el("button", { type: "button", onclick: () => cco.graph.toggle(node.id) }, open ? "Fold" : "Unfold")),
    ...(worst.length ? [cco.el("h3", {}, "Most sensitive"), cco.el("ul", {}, ...worst.map((layer) => cco.el("li", {},
      cco.el("button", { type: "button", className: "link", onclick: () => cco.graph.find(cco.byName.get(layer.name).index) }, layer.name), ` QS ${cco.figure(layer.sensitivity.qs)}`)))] : [])];
  };

  let shown = null;
  const show = () => { if (shown) panel.replaceChildren(...(shown.layer === undefined ? moduleView(shown) : layerView(cco.layers[shown.layer]))); };
  document.addEventListener("cco:chosen", ({ detail }) => { shown = detail.node; setTimeout(show); });
  document.addEventListener("cco:changed", ({ detail }) => {
    if (!shown || shown.layer === undefined || cco.layers[shown.layer].name !== detail.name) return;
    const part = panel.contains(document.activeElement) ? document.activeElement.dataset.part : null;
    show();
    if (part) { const control = panel.querySelector(`[data-part="${part}"]`); if (control) control.focus(); }
  });
}
