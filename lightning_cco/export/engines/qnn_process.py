"""QNN's HTP (the NPU of Qualcomm's chips) by ONNX Runtime, in a separate process; on other processors the library simulates it.

`engine_process` loads it; it imports nothing of lightning_cco.
"""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

_PROVIDER = "QNNExecutionProvider"
_CHIP, _ARCHITECTURE = "43", "73"
"""Snapdragon 8 Gen 2. The chip that is taken otherwise has no floats of 16 bits, and all that stays in float fails there for want of memory."""
_TYPES = {0x0408: "u8", 0x0308: "i8", 0x0416: "u16", 0x0316: "i16", 0x0232: "f32", 0x0216: "f16"}
"""QNN's numbers of the types that results of operators have."""
_ERRORS, _ALL = 3, 0
"""Levels of ONNX Runtime's log; at the lower one it says which nodes an engine refuses."""
_MOST_SHOWN = 3
_MOVES = frozenset(
    {
        *(
            "Quantize",
            "Dequantize",
            "Convert",
            "Cast",
            "Transpose",
            "Reshape",
            "Split",
            "StridedSlice",
            "Gather",
            "GatherElements",
            "GatherNd",
        ),
        *("ExpandDims", "Squeeze", "Tile", "Pad", "Pack", "UnPack", "DepthToSpace", "SpaceToDepth", "BatchToSpace", "SpaceToBatch"),
    }
)


_loaded: dict[str, Any] = {}


def load(path: str) -> None:
    """Compile a file for HTP alone; what is asked later is about it."""
    _loaded["session"], _loaded["executed"] = _compiled(path)


def run(feeds: dict[str, Any]) -> list[Any]:
    """The outputs, in the file's order, of arrays by the names of inputs."""
    return _loaded["session"].run(None, feeds)  # type: ignore[no-any-return]


def executed() -> list[tuple[str, str, bool, tuple[str, ...]]]:
    """Operator, precision, whether it computes (or only moves or converts values), and names of each node."""
    return _loaded["executed"]  # type: ignore[no-any-return]


def _compiled(path: str) -> tuple[Any, list[tuple[str, str, bool, tuple[str, ...]]]]:
    """A session in which no node runs on the CPU, and what QNN's graph executes.

    Raises:
        RuntimeError: HTP has no kernel for some nodes; the message has their operators and names, and QNN's reasons.
    """
    import onnxruntime
    import onnxruntime_qnn

    onnxruntime.register_execution_provider_library(_PROVIDER, onnxruntime_qnn.get_library_path())
    devices = [device for device in onnxruntime.get_ep_devices() if device.ep_name == _PROVIDER]
    if not devices:
        raise RuntimeError("onnxruntime-qnn has found no device, nor its simulator")
    with tempfile.TemporaryDirectory() as folder:
        options = {
            "backend_path": onnxruntime_qnn.get_qnn_htp_path(),
            "offload_graph_io_quantization": "0",  # what rounds inputs and outputs is a part of it, too
            "htp_arch": _ARCHITECTURE,
            "soc_model": _CHIP,
            "dump_json_qnn_graph": "1",
            "json_qnn_graph_dir": folder,
        }

        def session(severity: int) -> Any:
            settings = onnxruntime.SessionOptions()
            settings.log_severity_level = severity
            settings.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
            settings.add_provider_for_devices(devices[:1], options)
            return onnxruntime.InferenceSession(path, settings)

        try:
            return session(_ERRORS), _executed(Path(folder))
        except Exception as error:
            refused = _refused(_printed(lambda: session(_ALL)))
            if refused:
                raise RuntimeError(f"HTP has no kernel for {refused}") from error
            raise


def _printed(fails: Callable[[], Any]) -> str:
    """What libraries print to standard error in a call that fails once more."""
    kept = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            fails()
        except Exception:  # as before
            pass
        finally:
            os.dup2(kept, 2)
            os.close(kept)
        file.seek(0)
        return file.read().decode(errors="replace")


def _refused(log: str) -> str:
    """The nodes that QNN refuses, each with its reason, from ONNX Runtime's log; empty if it names none."""
    found = dict.fromkeys(
        f"{kind} '{name}' ({reason.strip()})" if reason else f"{kind} '{name}'"
        for section in re.findall(r"Validation FAILED for .*?\n((?:\t.*\n)+)", log)
        for kind, name in re.findall(r"Operator type: (\S+) Node name: (\S+)", section)
        for reason in [next(iter(re.findall(r"REASON : (.*)", section)), "")]
    )
    shown = list(found)[:_MOST_SHOWN]
    return "; ".join(shown) + (f"; and {len(found) - len(shown)} more" if len(found) > len(shown) else "")


def _executed(folder: Path) -> list[tuple[str, str, bool, tuple[str, ...]]]:
    """Operator, precision, whether it computes (or only moves or converts values), and names of each node."""
    found = []
    for file in sorted(folder.glob("*.json")):
        graph = json.loads(file.read_text(encoding="utf-8")).get("graph", {})
        tensors = graph.get("tensors", {})
        for name, node in graph.get("nodes", {}).items():
            outputs = [output for output in node["output_names"] if output in tensors]
            types = {_TYPES.get(tensors[output]["data_type"], "other") for output in outputs}
            precision = types.pop() if len(types) == 1 else "other"
            found.append((str(node["type"]), precision, node["type"] not in _MOVES, (name, *outputs)))
    return found
