"use strict";
/* What if: changes of layers, what is expected of them, and the recipe that makes them. */
{
  const { report } = cco;
  /** By layer: `form` (float or int8), `weights` and `outputs` (bits), each only where it differs from the plan. */
  const changes = new Map();
  const number = cco.number;

  const formNow = (layer) => (layer.runs === "int8" || layer.runs === "packed" ? "int8" : layer.runs === "weight-only" ? "weight-only" : "float");
  const formOf = (layer) => (changes.get(layer.name) || {}).form || formNow(layer);
  const weightsOf = (layer) => (changes.get(layer.name) || {}).weights || layer.weights_bits || report.defaults.weights_bits;
  const outputsOf = (layer) => (changes.get(layer.name) || {}).outputs || layer.output_bits;

  /** The rise at so many bits: as measured, or between two measured ones and beyond them by a factor of four a bit. */
  const riseAt = (measured, bits) => {
    const known = Object.entries(measured || {}).map(([b, rise]) => [Number(b), number(rise)]).filter(([, rise]) => Number.isFinite(rise));
    const exact = known.find(([b]) => b === bits);
    if (exact) return Math.max(0, exact[1]);
    const usable = known.filter(([, rise]) => rise > 0).sort((a, b) => Math.abs(a[0] - bits) - Math.abs(b[0] - bits));
    if (!usable.length) return NaN;
    const below = usable.find(([b]) => b < bits), above = usable.find(([b]) => b > bits);
    if (below && above) return Math.exp(Math.log(below[1]) + (bits - below[0]) / (above[0] - below[0]) * (Math.log(above[1]) - Math.log(below[1])));
    return usable[0][1] * 4 ** (usable[0][0] - bits);
  };

  const rise = () => {
    let sum = 0, unknown = 0;
    for (const layer of cco.layers) {
      if (!layer.weights || formOf(layer) === "float") continue;
      const found = riseAt(report.loss.weights[layer.name], weightsOf(layer));
      if (Number.isNaN(found)) unknown += 1; else sum += found;
    }
    for (const tensor of report.tensors) {
      const { layer } = cco.byName.get(tensor.layer);
      const stays = !tensor.users.length || tensor.users.some((name) => formOf(cco.byName.get(name).layer) === "int8");
      if (!stays) continue;
      const found = riseAt(report.loss.activations[tensor.name], tensor.follows ? outputsOf(layer) : tensor.bits);
      if (Number.isNaN(found)) unknown += 1; else sum += found;
    }
    return { sum, unknown };
  };

  /** Without loss sensitivities: the sum of the QS, which halves with each bit and goes where a layer is left in float. */
  const noise = () => {
    let sum = 0, unknown = 0;
    for (const layer of cco.layers) {
      const form = formOf(layer), qs = number((layer.sensitivity || {}).qs);
      if (form === "float" && !layer.sensitivity) continue;
      if (!layer.sensitivity) { if (form !== formNow(layer)) unknown += 1; continue; }
      if (form === "float" && formNow(layer) !== "float") continue;
      const bits = (layer.weights_bits ? layer.weights_bits - weightsOf(layer) : 0) || (layer.output_bits ? layer.output_bits - outputsOf(layer) : 0);
      if (Number.isFinite(qs)) sum += qs * 2 ** bits;
    }
    return { sum, unknown };
  };

  const weightBytes = () => {
    const stores = new Map();
    let own = 0;
    for (const layer of cco.layers) {
      const { weights } = layer;
      if (!weights || weights.store === undefined) continue;
      if (!stores.has(weights.store)) { stores.set(weights.store, new Map()); own += 4 * weights.elements; }
      const bits = weightsOf(layer), form = formOf(layer);
      const each = form === "float" ? 4 : (report.size.packed || layer.group_size) && bits <= 4 ? 0.5 : 1;
      stores.get(weights.store).set(each, weights.elements * each + (form === "float" ? 0 : 5 * weights.channels));
    }
    let sum = Math.max(0, report.size.float_bytes - own);
    stores.forEach((forms) => forms.forEach((bytes) => { sum += bytes; }));
    return sum;
  };

  const share = () => {
    let all = 0, integers = 0;
    for (const layer of cco.layers) {
      const count = layer.multiplications || 0;
      all += count;
      if (formOf(layer) === "int8" && !(report.size.packed && layer.weights && weightsOf(layer) <= 4)) integers += count;
    }
    return all ? integers / all : NaN;
  };

  /** What a file holds beside the weights, where one was written: its bytes less those that are estimated for the plan. */
  const written = report.export ? report.export.size_bytes : report.budget && report.budget.measured ? report.budget.size_bytes : null;
  const beside = written && report.size.float_bytes ? written - weightBytes() : 0;

  /** What one run takes with the changes, by the table of layer times: as `SpeedModel` of the budget computes; NaN where a form was not measured. */
  const seconds = () => {
    const model = report.speed;
    if (!model) return NaN;
    const own = (unit) => cco.byName.get(unit.layer);
    const form = (unit) => formOf(own(unit).layer);
    const planned = model.units.map((unit) => (unit.chosen ? form(unit) === "int8" : unit.integer));
    const readers = model.units.map(() => []);
    model.tensors.forEach((tensor) => readers[tensor.maker].push(...tensor.readers.filter((one) => one !== null)));
    for (let moved = true; moved;) {
      moved = false;
      model.units.forEach((unit, i) => {
        if (!unit.follows || planned[i] || (changes.get(unit.layer) || {}).form === "float") return;
        const behind = unit.sources.length && unit.sources.every((one) => one !== null && planned[one]);
        const touches = unit.touching === null || unit.touching.some((one) => planned[one]);
        if (behind || (touches && !unit.only_behind && readers[i].some((one) => planned[one]))) { planned[i] = true; moved = true; }
      });
    }
    const forms = model.units.map((unit, i) => {
      if (!unit.chosen) return planned[i] ? "INT8" : "float";
      const is = form(unit);
      return is === "float" ? "float" : report.size.packed && weightsOf(own(unit).layer) <= 4 ? "4 bits" : is === "int8" ? "INT8" : "weight-only";
    });
    const integer = forms.map((one) => one === "INT8");
    let sum = 0;
    model.units.forEach((unit, i) => {
      const known = unit.times[forms[i]];
      sum += known !== undefined ? known : unit.chosen ? NaN : Object.values(unit.times)[0] || 0;
    });
    for (const tensor of model.tensors) {
      const reading = tensor.readers.filter((one) => one !== null);
      if (!reading.some((one) => planned[one]) && !(planned[tensor.maker] && !tensor.float_output)) continue;
      if (!integer[tensor.maker]) sum += tensor.entering;
      const inFloat = tensor.readers.some((one) => one === null || !integer[one]);
      if (reading.some((one) => planned[one] && !integer[one]) || (inFloat && !tensor.at_readers)) sum += tensor.leaving;
    }
    return sum;
  };

  const expected = () => {
    const found = { size: report.size.float_bytes ? weightBytes() + beside : NaN, share: share(), seconds: seconds() };
    return report.loss ? { ...found, ...rise(), by: "loss" } : { ...found, ...noise(), by: "qs" };
  };
  const planned = expected();

  /** Text of the recipe's rules with the changes: of rules with a changed layer's own name what contradicts is left out. */
  const yaml = () => {
    const rule = (parts) => `  - {${parts.map(([key, value]) => `${key}: ${value}`).join(", ")}}`;
    const lines = [`# What if: ${changes.size} layer${changes.size === 1 ? "" : "s"} changed. Merge over the recipe as it is.`, ...report.sections, "layer_settings:"];
    const named = new Map();
    changes.forEach((change, name) => { const { layer } = cco.byName.get(name); named.set(layer.yaml, [layer, change]); });
    for (const known of report.rules) {
      const parts = { ...known };
      const [layer, change] = named.get(known.match) || [];
      if (change) {
        if (change.form) { delete parts.weight_only; if (!(change.form === "float" && parts.skip_quantization === "true")) delete parts.skip_quantization; }
        if (change.form === "float" || change.weights) delete parts.weights_num_bits;
        if (change.outputs) delete parts.activations_num_bits;
      }
      if (Object.keys(parts).length > 1) lines.push(rule(Object.entries(parts)));
    }
    changes.forEach((change, name) => lines.push(rule(ruleOf(name, change))));
    if (lines[lines.length - 1] === "layer_settings:") lines[lines.length - 1] = "layer_settings: []";
    return `${lines.join("\n")}\n`;
  };

  const ruleOf = (name, change) => {
    const { layer } = cco.byName.get(name);
    const parts = [["match", layer.yaml]];
    if (change.form) parts.push(["skip_quantization", String(change.form === "float")]);
    if (change.weights && change.form !== "float") parts.push(["weights_num_bits", String(change.weights)]);
    if (change.outputs) parts.push(["activations_num_bits", String(change.outputs)]);
    return parts;
  };

  /** Change one layer: `form`, `weights` or `outputs`; what equals the plan is no change. */
  const change = (name, part, value) => {
    const { layer } = cco.byName.get(name);
    const now = { form: formNow(layer), weights: layer.weights_bits, outputs: layer.output_bits }[part];
    const entry = { ...(changes.get(name) || {}) };
    if (value === now || value === null) delete entry[part]; else entry[part] = value;
    if (entry.form === "float") delete entry.weights;
    if (Object.keys(entry).length) changes.set(name, entry); else changes.delete(name);
    document.dispatchEvent(new CustomEvent("cco:changed", { detail: { name } }));
  };
  const reset = () => {
    const names = [...changes.keys()];
    changes.clear();
    names.forEach((name) => document.dispatchEvent(new CustomEvent("cco:changed", { detail: { name } })));
  };

  const show = () => {
    const now = expected();
    const size = report.size.float_bytes;
    const part = (title, value, difference) => cco.el("span", {}, `${title}: `, cco.el("b", {}, value), difference ? ` (${difference})` : null);
    const signed = (value) => (Math.abs(value) < 1e-12 ? "no change" : `${value > 0 ? "+" : "−"}${cco.figure(Math.abs(value), 3)}`);
    const what = now.by === "loss" ? `expected rise of the ${report.loss.of}` : "sum of the QS";
    document.getElementById("what-if").replaceChildren(
      part("layers changed", String(changes.size)),
      part(what, cco.figure(now.sum), signed(now.sum - planned.sum)),
      ...(size ? [part(written ? "the file takes" : "weights take", cco.bytes(now.size), `${cco.percent(now.size / size)} of float; ${now.size === planned.size ? "no change" : `${now.size > planned.size ? "+" : "−"}${cco.bytes(Math.abs(now.size - planned.size))}`}`)] : []),
      ...(report.speed ? [part("predicted speed", Number.isFinite(now.seconds) ? `${cco.figure(report.speed.float_seconds / now.seconds, 3)} × float` : "not measured in this form",
        Number.isFinite(now.seconds) ? `${cco.figure(1e3 * now.seconds, 3)} ms; ${signed(1e3 * (now.seconds - planned.seconds))}` : "")] : []),
      part("multiplications in INT8", cco.share(now.share), ""),
      now.unknown > planned.unknown ? cco.el("span", { className: "bad" }, `${now.unknown - planned.unknown} of the changes were not measured`) : "");
    document.getElementById("yaml").textContent = yaml();
  };

  /** The controls of one layer: whether it is in float, bits of its weights, bits of its output; `null` where there is nothing to choose. */
  const controls = (layer) => {
    const may = layer.choices || {}, entry = changes.get(layer.name) || {}, form = formOf(layer), name = cco.shown(layer.name);
    const tick = may.float || may.int8
      ? cco.el("input", { type: "checkbox", checked: form === "float", "aria-label": `${name}: leave in float`, "data-layer": layer.name, "data-part": "form",
        onchange: (event) => change(layer.name, "form", event.target.checked ? "float" : formNow(layer) === "float" ? "int8" : formNow(layer)) }) : null;
    const select = (part, options, value, label) => cco.el("select", { "aria-label": `${name}: ${label}`, "data-layer": layer.name, "data-part": part,
      onchange: (event) => change(layer.name, part, Number(event.target.value)) },
    ...options.map((bits) => cco.el("option", { value: bits, selected: bits === value }, String(bits))));
    const weights = may.weights && form !== "float" ? select("weights", may.weights, weightsOf(layer), "bits of the weights") : null;
    const outputs = may.outputs ? select("outputs", [2, 3, 4, 5, 6, 7, 8], outputsOf(layer), "bits of the output") : null;
    return { tick, weights, outputs, changed: Object.keys(entry).length > 0 };
  };

  cco.whatIf = { changes, change, reset, yaml, expected, planned, show, controls, formOf, ruleOf };
}
