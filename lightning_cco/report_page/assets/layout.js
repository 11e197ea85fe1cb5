"use strict";
/* Where nodes stand and how edges run, by dagre: an edge that passes other nodes takes the way that dagre keeps free for it. */
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
    cy.edges().forEach((edge) => lead(edge, graph));
    cy.endBatch();
  };

  /** The points of an edge between its ends, as Cytoscape takes them: along the straight line (0 to 1), and aside of it. */
  const lead = (edge, graph) => {
    const from = graph.node(edge.data("source")), to = graph.node(edge.data("target"));
    const points = graph.edge(edge.data("source"), edge.data("target")).points.slice(1, -1);
    if (points.length < 2) return;  // to the next row: straight
    const x = to.x - from.x, y = to.y - from.y, length = Math.hypot(x, y);
    edge.data("along", points.map((point) => ((point.x - from.x) * x + (point.y - from.y) * y) / (length * length)));
    edge.data("aside", points.map((point) => ((point.y - from.y) * x - (point.x - from.x) * y) / length));
    edge.addClass("led");
  };
}
