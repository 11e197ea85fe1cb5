"""The picture of a layer graph: nodes, colours, folded blocks, and the files that Graphviz makes of it."""

from lightning_cco.drawing.draw import draw_graph
from lightning_cco.drawing.overview import draw_overview
from lightning_cco.drawing.render import render_png_bytes, save_overview, save_pictures

__all__ = ["draw_graph", "draw_overview", "render_png_bytes", "save_overview", "save_pictures"]
