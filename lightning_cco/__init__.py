"""Compress any LightningModule to INT8 or fewer bits while it trains: ``Trainer(callbacks=[CCOCallback(cfg)])``."""

from lightning_cco._recipes import shipped_configs_dir
from lightning_cco.budget.layer_times import LayerTimes, load_layer_times
from lightning_cco.callback import CCOCallback
from lightning_cco.drawing.draw import draw_graph
from lightning_cco.errors import CCOError, CCOWarning
from lightning_cco.graph.capture import capture_graph
from lightning_cco.layer_timing import measure_layer_times
from lightning_cco.loading import load_quantized
from lightning_cco.quantization.planner import plan_quantization
from lightning_cco.quantized_model import QuantizedModel, quantize
from lightning_cco.settings import LayerQuantizationSettings, Settings, generate_default_settings, load_settings
from lightning_cco.version import __version__ as __version__

__all__ = [
    "CCOCallback",
    "CCOError",
    "CCOWarning",
    "LayerQuantizationSettings",
    "LayerTimes",
    "QuantizedModel",
    "Settings",
    "capture_graph",
    "draw_graph",
    "generate_default_settings",
    "load_layer_times",
    "load_quantized",
    "load_settings",
    "measure_layer_times",
    "plan_quantization",
    "quantize",
    "shipped_configs_dir",
]
