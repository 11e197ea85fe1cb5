"use strict";
/* The graph on paper. Chromium prints the canvas as it is; a picture of the whole graph is printed instead, a tall one in columns, so that it can be read. */
{
  const WIDTH = 700, HEIGHT = 600, GAP = 12;  // of a page, in CSS pixels: what is left of A4 and of Letter with the page's head above it
  const SHARP = 2;  // pixels of the picture for one on the page
  const LARGEST = 16000, AREA = 6e7;  // pixels of a canvas that browsers draw
  const container = document.getElementById("canvas");
  const { cy } = cco.graph;

  /** Where the columns begin and end, at most `most` high each; between nodes, if that leaves a column half full at least. */
  const columns = (top, bottom, most) => {
    const boxes = cy.nodes().filter((node) => !node.isParent()).map((node) => node.boundingBox()).sort((a, b) => b.y1 - a.y1);
    const found = [];
    for (let from = top; from < bottom;) {
      let to = Math.min(from + most, bottom);
      if (to < bottom) for (const { y1, y2 } of boxes) if (y1 < to && to < y2 && y1 - 4 > from + most / 2) to = y1 - 4;
      found.push([from, to]);
      from = to;
    }
    return found;
  };
  /** The largest scale, up to that of the screen, at which all columns are on one page. */
  const fitted = ({ x1, y1, y2, w, h }) => {
    const whole = Math.min(WIDTH / w, HEIGHT / h, 1);
    for (let scale = 1; scale > whole; scale *= 0.95) {
      const parts = columns(y1, y2, HEIGHT / scale);
      if (parts.length * w * scale + (parts.length - 1) * GAP <= WIDTH) return [scale, parts];
    }
    return [whole, [[y1, y2]]];
  };
  let picture = null;
  addEventListener("beforeprint", () => {
    const box = cy.elements().boundingBox();
    if (picture || !(box.w > 0 && box.h > 0)) return;
    const [scale, parts] = fitted(box);
    const src = cy.png({ full: true, scale: Math.min(scale * SHARP, LARGEST / Math.max(box.w, box.h), Math.sqrt(AREA / (box.w * box.h))), bg: "#ffffff" });
    picture = cco.el("div", { id: "picture", role: "img", "aria-label": "Graph of the layers" }, ...parts.map(([from, to]) => {
      const image = cco.el("img", { src, alt: "" });
      image.style.cssText = `width:${box.w * scale}px;max-width:none;margin-top:${(box.y1 - from) * scale}px`;
      const part = cco.el("div", {}, image);
      part.style.cssText = `overflow:hidden;height:${(to - from) * scale}px`;
      return part;
    }));
    container.after(picture);
    container.hidden = true;
  });
  addEventListener("afterprint", () => { if (picture) picture.remove(); picture = null; container.hidden = false; });
}
