"use strict";
/* The head of the page; before the graph, whose place it decides. */
{
  const { report } = cco;
  const figure = (title, value) => cco.el("li", {}, cco.el("b", {}, value), title);
  document.getElementById("title").textContent = `${cco.shown(report.title || "lightning_cco")}: compression report`;
  document.getElementById("lead").textContent = report.epoch === null ? "Before the first epoch."
    : `After epoch ${report.epoch} (step ${cco.figure(report.step)})${report.finished ? "; the training has ended" : "; the training goes on"}.`;
  const { counts } = report;
  const planned = cco.whatIf.planned;
  document.getElementById("figures").append(
    figure("layers with weights in INT8", `${counts.weighted_in_int8} of ${counts.weighted}`),
    figure("of the multiplications in INT8", cco.share(counts.share_of_multiplications)),
    ...(report.export ? [figure("exported file", `${cco.bytes(report.export.size_bytes)}`)]
      : report.size.float_bytes ? [figure(`weights, of ${cco.bytes(report.size.float_bytes)} in float`, cco.bytes(planned.size))] : []),
    figure("engine", report.target),
    figure("suggested skips", String(report.suggestions.length)));
  document.getElementById("made").textContent = `Made by ${report.made_by}; report.json version ${report.version}.`;
}
