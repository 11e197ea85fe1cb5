"""The picture of a layer graph: nodes, colours, folded blocks, and the files that Graphviz makes of it."""

from lightning_cco.drawing.draw import draw_graph
from lightning_cco.drawing.render import render_png_bytes, save_pictures

__all__ = ["draw_graph", "render_png_bytes", "save_pictures"]
