"use strict";
/* The sections below the table: metrics, sensitivity, trade-off, exported file. A section without anything to show says so or is left out. */
{
  const { report } = cco;
  const section = (id) => document.getElementById(id);
  const reveal = (id) => { section(id).hidden = false; document.querySelector(`nav a[href="#${id}"]`).hidden = false; };
  const value = (figure) => (figure === null || figure === undefined ? "–" : cco.figure(figure));

  const metrics = () => {
    const names = Object.keys(report.metrics.names);
    if (!names.length) { section("metrics").append(cco.el("p", { className: "small" }, "Nothing was logged yet.")); return; }
    const best = ({ direction, lowest, highest }) => {
      const end = direction === "min" ? lowest : direction === "max" ? highest : null;
      return end ? `${value(end[0])} (epoch ${end[1]})` : lowest ? `${value(lowest[0])} to ${value(highest[0])} (range)` : "–";
    };
    section("metrics").append(cco.grid(["metric", "original", "calibrated", "now", "best"],
      names.map((name) => { const entry = report.metrics.names[name]; return [name, value(entry.original), value(entry.calibrated), value(entry.now), best(entry)]; }), [1, 2, 3, 4]));
    const measured = names.filter((name) => report.metrics.values[name]);
    section("metrics").append(cco.el("div", { className: "charts" }, ...measured.slice(0, 24).map((name) => cco.lines(cco.shown(name), report.metrics.epochs, { [name]: report.metrics.values[name] }))));
  };

  const sensitivity = () => {
    const here = section("sensitivity");
    const worst = cco.layers.filter((layer) => layer.sensitivity).sort((a, b) => cco.number(b.sensitivity.qs) - cco.number(a.sensitivity.qs));
    if (!worst.length) { here.append(cco.el("p", { className: "small" }, "No epoch was measured yet.")); return; }
    const top = worst.slice(0, 8).map((layer) => layer.name).filter((name) => report.qs.values[name]);
    const charts = [cco.lines("QS of the most sensitive layers", report.qs.epochs, Object.fromEntries(top.map((name) => [name, report.qs.values[name]])), { log: true })];
    if (report.loss) {
      const costly = Object.keys(report.loss.now).sort((a, b) => cco.number(report.loss.now[b]) - cco.number(report.loss.now[a])).slice(0, 8).filter((name) => report.loss.values[name]);
      charts.push(cco.lines(`Expected rise of the ${report.loss.of} by the most costly layers`, report.loss.epochs, Object.fromEntries(costly.map((name) => [name, report.loss.values[name]])), { log: true }));
    }
    here.append(cco.el("div", { className: "charts" }, ...charts));
    here.append(cco.el("h3", {}, "Suggested skips"));
    here.append(report.suggestions.length
      ? cco.grid(["layer", "why", "QS", "less loss", "larger by"], report.suggestions.map((one) => [
        cco.el("button", { type: "button", className: "link", onclick: () => cco.graph.find(cco.byName.get(one.name).index) }, one.name), one.reason, value(one.qs), value(one.wins), cco.percent(one.costs)]), [2, 3, 4])
      : cco.el("p", { className: "small" }, "None: nothing is above the thresholds."));
  };

  const budget = () => {
    const plan = report.budget;
    if (!plan) return;
    reveal("budget");
    const titles = { size: "size of the file, as a part of that in float", average_bits: "bits per weight, on average", bops: "bit operations, as a part of those in float", speed: "predicted speed, as a multiple of that in float" };
    const points = [...plan.uniform, { ...plan.chosen, name: "chosen" }];
    const chart = (by, curve) => {
      const point = (one) => ({ name: one.name, x: cco.number(one[by]), y: cco.number(one.rise) });
      return cco.tradeOff(`Expected rise of the ${plan.loss} against ${titles[by]}`, titles[by], curve.map(point), points.map(point));
    };
    const timed = Number.isFinite(cco.number(plan.seconds));
    const by = plan.goal in titles && plan.goal !== "speed" ? plan.goal : "size";
    const charts = [chart(by, plan.size_curve.length ? plan.size_curve : plan.curve), ...(timed ? [chart("speed", plan.speed_curve)] : [])];
    section("budget").append(
      cco.el("p", {}, `Goal: ${plan.goal} ${value(plan.limit)}. The file takes ${cco.bytes(plan.size_bytes)} ${plan.measured ? "as exported" : "as estimated"}, ${cco.bytes(plan.float_bytes)} in float.`,
        timed ? ` One run of it is predicted to take ${cco.figure(1e3 * plan.seconds, 3)} ms, ${cco.figure(1e3 * plan.float_seconds, 3)} ms in float.` : ""),
      cco.el("div", { className: "charts" }, ...charts),
      cco.grid(["plan", "size", "bits per weight", "bit operations", "speed", `expected rise of the ${plan.loss}`],
        points.map((one) => [one.name, value(one.size), value(one.average_bits), value(one.bops), value(one.speed), value(one.rise)]), [1, 2, 3, 4, 5]),
      cco.el("details", {}, cco.el("summary", {}, `What was chosen for ${plan.layers.length} layers, and why`),
        cco.grid(["layer", "form", "weights", "reads", "bytes", "µs", "loss rise", "why"], plan.layers.slice(0, 1000).map((one) => [one.layer, one.form, String(one.weights),
          one.activations === 32 ? "–" : String(one.activations), value(one.bytes), value(1e6 * cco.number(one.seconds)), value(one.rise), one.reason]), [2, 3, 4, 5, 6])));
  };

  const exported = () => {
    const found = report.export;
    if (!found) return;
    reveal("export");
    const counts = (nodes) => Object.entries(nodes).map(([kind, count]) => `${count} ${kind}`).join(", ") || "nothing";
    const rows = [["file", found.path], ["size", `${cco.bytes(found.size_bytes)}, ${value(found.size_ratio)} of the float parameters`], ["made for", report.target]];
    if (found.batches) {
      rows.push(["agreement", Number.isFinite(cco.number(found.agreement)) ? `${cco.percent(found.agreement)} the same arg-max` : ""],
        ["against training", `SQNR ${value(found.sqnr_db)} dB, outputs differ by ${value(found.largest_difference)} at most`], ["checked on", `${found.batches} ${found.batches_from || "batches"}`],
        ["runs in INT8", counts(found.integer_nodes)], ["runs in float", `${counts(found.float_nodes)}; ${found.conversions} conversions between them`]);
      if (found.target) rows.push([`in ${found.target}`, `SQNR ${value(found.target_sqnr_db)} dB, in INT8: ${counts(found.target_nodes)}`]);
    } else rows.push(["check", "it was not checked"]);
    section("export").append(cco.list(rows), ...found.notes.map((note) => cco.el("p", { className: "small" }, note)));
    if (found.float_islands.length) {
      section("export").append(cco.el("h3", {}, "Float islands"),
        cco.grid(["operator", "layers", "why"], found.float_islands.slice(0, 500).map((island) => [island.operator, island.layers.join(", "), island.reason])));
    }
  };

  metrics();
  sensitivity();
  budget();
  exported();
}
