"use strict";
/* Where nodes stand and how edges run, by dagre: an edge that passes other nodes takes the way that dagre keeps free for it. Titles stand where no edge runs. */
{
  const SPACING = { rankdir: "TB", nodesep: 20, ranksep: 36, edgesep: 8 };

  cco.layOut = (cy) => {
    const graph = new dagre.graphlib.Graph({ compound: true });
    graph.setGraph({ ...SPACING });
    graph.setDefaultEdgeLabel(() => ({}));
    cy.nodes().forEach((node) => graph.setNode(node.id(), { width: node.data("width"), height: node.data("height") }));
    cy.nodes().forEach((node) => { if (node.isChild()) graph.setParent(node.id(), node.parent().id()); });
    cy.edges().forEach((edge) => graph.setEdge(edge.data("source"), edge.data("target"), {}));
    dagre.layout(graph);
    cy.startBatch();
    cy.nodes().forEach((node) => { if (!node.isParent()) { const { x, y } = graph.node(node.id()); node.position({ x, y }); } });
    const ways = cy.edges().map((edge) => lead(edge, graph));
    cy.endBatch();
    const titles = cy.nodes(":parent").map((node) => [node, asideOf(node, ways)]);
    cy.startBatch();
    titles.forEach(([node, aside]) => node.data("aside", aside));
    cy.endBatch();
  };

  const TITLE = 16, FREE = 5;  // height of a title above its box; what is kept free beside it
  const pen = document.createElement("canvas").getContext("2d");
  /** How far aside of the middle of its box the title of an open module stands: as near to the left as no edge runs through it. */
  const asideOf = (node, ways) => {
    const { x, y } = node.position(), half = node.outerWidth() / 2;
    const box = { x1: x - half, x2: x + half, y1: y - node.outerHeight() / 2 };
    pen.font = "12px system-ui";
    const wide = pen.measureText(node.data("label")).width, top = box.y1 - TITLE, taken = [];
    for (const way of ways) {
      for (let i = 1; i < way.length; i += 1) {
        const [a, b] = way[i - 1].y < way[i].y ? [way[i - 1], way[i]] : [way[i], way[i - 1]];
        if (b.y < top || a.y > box.y1) continue;
        const at = (y) => (b.y === a.y ? a.x : a.x + ((b.x - a.x) * (Math.min(Math.max(y, a.y), b.y) - a.y)) / (b.y - a.y));
        const ends = b.y === a.y ? [a.x, b.x] : [at(top), at(box.y1)];
        taken.push([Math.min(...ends) - FREE, Math.max(...ends) + FREE]);
      }
    }
    let left = box.x1;
    for (const [from, to] of taken.sort((one, other) => one[0] - other[0])) if (from < left + wide && to > left) left = to;
    return left + wide / 2 - (box.x1 + box.x2) / 2;
  };

  /** Lead an edge through points between its ends, as Cytoscape takes them: along the straight line (0 to 1), and aside of it. Gives its way. */
  const lead = (edge, graph) => {
    const from = graph.node(edge.data("source")), to = graph.node(edge.data("target"));
    const points = graph.edge(edge.data("source"), edge.data("target")).points.slice(1, -1);
    if (points.length < 2) return [from, to];  // to the next row: straight
    const x = to.x - from.x, y = to.y - from.y, length = Math.hypot(x, y);
    edge.data("along", points.map((point) => ((point.x - from.x) * x + (point.y - from.y) * y) / (length * length)));
    edge.data("aside", points.map((point) => ((point.y - from.y) * x - (point.x - from.x) * y) / length));
    edge.addClass("led");
    return [from, ...points, to];
  };
}
