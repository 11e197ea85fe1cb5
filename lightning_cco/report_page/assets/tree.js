"use strict";
/* The tree of modules that the graph folds by. A node has an id, a label, children or a layer; long rows of children come in groups. */
{
  const MOST_CHILDREN = 40;

  const build = () => {
    const root = { id: "m:", label: "", path: "", children: [], first: 0 };
    const modules = new Map([["", root]]);
    const module = (path) => {
      let found = modules.get(path);
      if (!found) {
        const cut = path.lastIndexOf(".");
        const parent = module(cut < 0 ? "" : path.slice(0, cut));
        found = { id: `m:${path}`, label: path.slice(cut + 1), path, children: [] };
        modules.set(path, found);
        parent.children.push(found);
      }
      return found;
    };
    cco.layers.forEach((layer, index) => module(layer.path || "").children.push({ id: `l:${index}`, label: layer.name, layer: index }));
    return root;
  };

  const firstOf = (node) => (node.layer !== undefined ? node.layer : Math.min(...node.children.map(firstOf)));
  /** One module that is called again after others, such as the ReLU of a block: as a box of its own it would be before and behind them. */
  const calledInBetween = ({ children }) => children && children.every((child) => child.layer !== undefined)
    && children[children.length - 1].layer - children[0].layer >= children.length;
  /** A module of one layer is that layer; of one module, both in one. */
  const simplified = (node) => {
    if (node.layer !== undefined) return node;
    node.children = node.children.map(simplified).flatMap((child) => (calledInBetween(child) ? child.children : [child])).sort((a, b) => firstOf(a) - firstOf(b));
    if (node.id === "m:" || node.children.length !== 1) return node;
    const [only] = node.children;
    if (only.layer === undefined) only.label = `${node.label}.${only.label}`;
    return only;
  };

  const grouped = (node) => {
    if (node.layer !== undefined) return node;
    let children = node.children.map(grouped);
    while (children.length > MOST_CHILDREN) {
      const size = Math.ceil(children.length / Math.ceil(children.length / MOST_CHILDREN));
      const level = [];
      for (let start = 0; start < children.length; start += size) {
        const part = children.slice(start, start + size);
        level.push({ id: `g:${node.id}:${part[0].id}:${part.length}`, label: `${part[0].label} … ${part[part.length - 1].label}`, path: node.path, children: part });
      }
      children = level;
    }
    node.children = children;
    return node;
  };

  cco.nodes = new Map();
  const counted = (node, parent) => {
    node.parent = parent;
    cco.nodes.set(node.id, node);
    if (node.layer !== undefined) {
      const { runs } = cco.layers[node.layer];
      node.count = 1;
      node.paint = runs === "input" || runs === "output" ? "io" : runs === "int8" || runs === "packed" ? "int8" : "float";
      node.weighted = cco.layers[node.layer].weighted ? 1 : 0;
      node.int8 = runs === "int8" ? node.weighted : 0;
      node.green = node.paint === "int8" ? 1 : 0;
      node.first = node.layer;
      return node;
    }
    node.children.forEach((child) => counted(child, node));
    const sum = (of) => node.children.reduce((total, child) => total + of(child), 0);
    for (const key of ["count", "weighted", "int8"]) node[key] = sum((child) => child[key]);
    node.green = sum((child) => (child.weighted || !node.weighted ? child.green : 0));  // where there are weights, they count
    node.first = Math.min(...node.children.map((child) => child.first));
    node.paint = node.green === (node.weighted || node.count) ? "int8" : node.green === 0 ? "float" : "mixed";
    return node;
  };
  cco.tree = counted(grouped(simplified(build())), null);
  /** What is said of a module: of layers with weights, as everywhere. */
  cco.inside = (node) => (node.weighted ? `${node.int8} of ${node.weighted} with weights in INT8` : `${node.count} layers without weights`);
  cco.leaf = (index) => cco.nodes.get(`l:${index}`);

  /** The modules to unfold at the start: level by level, as long as no more than so many nodes are seen. */
  cco.startUnfolded = (most = 40) => {
    const unfolded = new Set([cco.tree.id]);
    let seen = cco.tree.children.length;
    for (let level = cco.tree.children.filter((node) => node.children); level.length;) {
      const inside = level.flatMap((node) => node.children);
      seen += inside.length - level.length;
      if (seen > most) break;
      level.forEach((node) => unfolded.add(node.id));
      level = inside.filter((node) => node.children);
    }
    return unfolded;
  };
  /** The node that stands for a layer: itself, or the outermost folded module around it. */
  cco.standsFor = (unfolded) => {
    const found = new Array(cco.layers.length);
    const visit = (node, by) => {
      const shownAs = by || (node.layer !== undefined || !unfolded.has(node.id) ? node : null);
      if (node.layer !== undefined) found[node.layer] = shownAs;
      else node.children.forEach((child) => visit(child, shownAs));
    };
    visit(cco.tree, null);
    return found;
  };
}
