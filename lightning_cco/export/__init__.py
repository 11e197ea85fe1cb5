"""From a quantized model to a file that an engine runs in INT8."""

from lightning_cco.export.engine_file import export_engine_file
from lightning_cco.export.onnx_file import export_onnx
from lightning_cco.export.program import export_program
from lightning_cco.export.report import ExportReport
from lightning_cco.export.safetensors_file import WeightsReport, export_safetensors

__all__ = ["ExportReport", "WeightsReport", "export_engine_file", "export_onnx", "export_program", "export_safetensors"]
