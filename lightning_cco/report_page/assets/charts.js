"use strict";
/* Charts by Chart.js, in the colours of the page; each has its figures beside it as text, and is drawn when it comes into view. */
{
  const drawn = new Map();
  Chart.defaults.animation = false;
  Chart.defaults.font.family = getComputedStyle(document.body).fontFamily;

  const axis = (title, options = {}) => ({
    title: { display: Boolean(title), text: title, color: cco.colour("muted") },
    ticks: { color: cco.colour("muted"), maxTicksLimit: 8, callback: (value) => cco.figure(value, 3) },
    grid: { color: cco.colour("line") },
    ...options,
  });
  /** Ticks of a logarithmic axis whose labels don't overlap: powers of ten first, then 2 and 5 times them, then the others. */
  const apart = (scale) => {
    const [low, high] = [scale.min, scale.max].map(Math.log10), across = scale.isHorizontal();
    const room = across ? scale.chart.width - 80 : scale.chart.height - 90, needed = across ? 56 : 20;
    const place = (value) => ((Math.log10(value) - low) / (high - low || 1)) * room;
    const rank = (value) => { const first = Math.round(value / 10 ** Math.floor(Math.log10(value) + 1e-9)); return first === 1 || first === 10 ? 0 : first === 2 || first === 5 ? 1 : 2; };
    const kept = [], finest = high - low > 2 ? 0 : high - low > 1 ? 1 : 2;
    for (const tick of scale.ticks.filter(({ value }) => rank(value) <= finest).sort((a, b) => rank(a.value) - rank(b.value))) {
      if (kept.every((other) => Math.abs(place(other.value) - place(tick.value)) >= needed)) kept.push(tick);
    }
    scale.ticks = kept.sort((a, b) => a.value - b.value);
  };
  const logarithmic = (title) => {
    const made = axis(title, { type: "logarithmic", afterBuildTicks: apart });
    return { ...made, ticks: { ...made.ticks, autoSkip: false } };
  };
  const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
    if (entry.isIntersecting) draw(entry.target);
  }), { rootMargin: "200px" });

  const draw = (canvas) => {
    const make = drawn.get(canvas);
    if (!make || !canvas.isConnected) { drawn.delete(canvas); watcher.unobserve(canvas); return; }
    if (Chart.getChart(canvas)) Chart.getChart(canvas).destroy();
    watcher.unobserve(canvas);
    new Chart(canvas, make());
  };
  const redraw = () => [...drawn.keys()].forEach((canvas) => { if (!canvas.isConnected || Chart.getChart(canvas)) draw(canvas); });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
  addEventListener("beforeprint", () => [...drawn.keys()].forEach(draw));

  /** A figure with a chart; `text` says in words what it shows. */
  const chart = (title, text, make) => {
    const canvas = cco.el("canvas", { role: "img", "aria-label": `${title}. ${text}` });
    drawn.set(canvas, make);
    watcher.observe(canvas);
    return cco.el("figure", {}, cco.el("figcaption", {}, title), cco.el("div", { className: "plot" }, canvas), cco.el("p", { className: "small" }, text));
  };
  const series = (label, points, number, more = {}) => ({
    label: cco.shown(label), data: points, borderColor: cco.colour(`series-${number}`), backgroundColor: cco.colour(`series-${number}`),
    borderWidth: 2, pointRadius: 2.5, tension: 0, ...more,
  });
  const base = (datasets, x, y, legend) => ({
    data: { datasets },
    options: {
      maintainAspectRatio: false, responsive: true, parsing: false,
      scales: { x, y },
      plugins: { legend: { display: legend, position: "bottom", labels: { color: cco.colour("text"), boxWidth: 14 } } },
    },
  });

  /** Lines over epochs: by name an array of values, aligned with the epochs. */
  cco.lines = (title, epochs, values, options = {}) => {
    const names = Object.keys(values);
    const points = (name) => epochs.map((epoch, i) => ({ x: epoch, y: cco.number(values[name][i]) })).filter(({ y }) => Number.isFinite(y) && (!options.log || y > 0));
    const said = names.slice(0, 3).map((name) => {
      const found = points(name);
      const ends = found.length > 1 ? [found[0], found[found.length - 1]] : found;
      return ends.length ? `${cco.shown(name)}: ${ends.map(({ x, y }) => `${cco.figure(y)} in epoch ${x}`).join(", ")}` : "";
    }).filter(Boolean).join("; ");
    return chart(title, said || "Nothing was measured.", () => ({
      type: "line",
      ...base(names.map((name, i) => series(name, points(name), 1 + (i % 8))), axis("epoch", { type: "linear", ticks: { precision: 0, color: cco.colour("muted") } }),
        options.log ? logarithmic(options.unit || "") : axis(options.unit || "", { type: "linear" }), names.length > 1),
    }));
  };

  /** Lines at levels over a histogram; where they are too close for lines, the part between the first and the last is shaded. */
  const levelLines = (first, last, step) => ({
    id: "levels",
    beforeDatasetsDraw({ ctx, chartArea, scales }) {
      const at = (value) => Math.min(Math.max(scales.x.getPixelForValue(value), chartArea.left), chartArea.right);
      ctx.save();
      ctx.strokeStyle = cco.colour("series-2");
      ctx.fillStyle = cco.colour("series-2");
      const apart = scales.x.getPixelForValue(first + step) - scales.x.getPixelForValue(first);
      ctx.globalAlpha = 0.14;
      ctx.fillRect(at(first), chartArea.top, at(last) - at(first), chartArea.height);
      ctx.globalAlpha = 0.75;
      const count = Math.round((last - first) / step);
      for (let level = 0; level <= count; level += apart >= 6 ? 1 : count) {
        const value = first + level * step;
        if (value < scales.x.min || value > scales.x.max) continue;
        ctx.fillRect(scales.x.getPixelForValue(value) - 0.5, chartArea.top, 1, chartArea.height);
      }
      ctx.restore();
    },
  });

  /** A histogram with the levels over it. `levels` has the first and the last one, `step` is between two. */
  cco.histogram = (title, found, levels, step, unit) => {
    const [first, last] = levels.map(cco.number);
    const { low, high, counts } = found;
    const width = (high - low) / counts.length;
    const beyond = counts.reduce((sum, count, i) => { const x = low + (i + 0.5) * width; return sum + (x < first - step / 2 || x > last + step / 2 ? count : 0); }, 0);
    const total = counts.reduce((sum, count) => sum + count, 0);
    const text = `${Math.round((last - first) / step) + 1} levels from ${cco.figure(first)} to ${cco.figure(last)}; values from ${cco.figure(low)} to ${cco.figure(high)}, `
      + `about ${cco.percent(beyond / total)} beyond the levels.`;
    return chart(title, text, () => {
      const made = base([{ data: counts.map((count, i) => ({ x: low + (i + 0.5) * width, y: count })), backgroundColor: cco.colour("series-1"), barPercentage: 1, categoryPercentage: 1, grouped: false }],
        axis(unit, { type: "linear", min: Math.min(low, first), max: Math.max(high, last), offset: false }), axis("", { beginAtZero: true, ticks: { display: false } }), false);
      return { type: "bar", ...made, plugins: [levelLines(first, last, step)] };
    });
  };

  /** The trade-off: the curve as a line, the other plans as points. */
  cco.tradeOff = (title, unit, curve, points) => {
    const usable = ({ x, y }) => x > 0 && y > 0 && Number.isFinite(x) && Number.isFinite(y);
    const said = points.map(({ name, x, y }) => `${name}: ${cco.figure(x)} for a rise of ${cco.figure(y)}`).join("; ");
    return chart(title, said, () => ({
      type: "scatter",
      ...base([series("best plans", curve.filter(usable).sort((a, b) => a.x - b.x), 1, { showLine: true }),
        ...points.map((point, i) => series(point.name, [point].filter(usable), 2 + i, { pointRadius: 7, pointStyle: point.name === "chosen" ? "star" : "rect", borderWidth: 3 }))],
      logarithmic(unit), logarithmic("expected rise of the loss"), true),
    }));
  };
}
