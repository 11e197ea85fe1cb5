"""Where an export is written, and how a whole file takes the place of an older one."""

from __future__ import annotations

import os
import re
from pathlib import Path

from lightning_cco.export.engines import BY_ENDING
from lightning_cco.export.errors import ExportError
from lightning_cco.files import real_file
from lightning_cco.names import printable, shown


def announcement(path: str | Path) -> str:
    """What is said before a file is written.

    >>> announcement("model.onnx")
    'Writing model.onnx and checking it; a large model takes minutes.'
    """
    return f"Writing {path} and checking it; a large model takes minutes."


def export_target(path: str | Path, ending: str) -> Path:
    """The file that an export is to write, through symbolic links, and with ``~`` for the home directory.

    Args:
        path: What the user gave.
        ending: What it must end in.

    Raises:
        CCOError: It ends in something else, or what is there is no file.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise ExportError(f"expected a path, got {type(path).__name__}: {shown(path)}. Write 'model{ending}'.")
    path = os.path.expanduser(path)
    try:
        str(path).encode()
    except UnicodeEncodeError as error:
        raise ExportError(f"'{printable(str(path), 160)}' is no text that engines can open: {error}. Give a path in UTF-8.") from error
    if "://" in str(path) or re.match(r"\w\w+:/", str(path)):
        raise ExportError(f"'{path}' is not on a disk of this machine: expected a local path. Write the file there, and upload it.")
    if Path(path).suffix.lower() != ending:
        given = Path(path)
        is_folder = str(path).endswith(("/", os.sep)) or given.is_dir()
        instead = given / f"model{ending}" if is_folder or not given.name else _other_ending(given, ending)
        raise ExportError(
            "expected a path that ends in .onnx (a file for ONNX Runtime, OpenVINO and TensorRT, which build theirs from it), .pt2 (a torch.export "
            f"program), .pte (for ExecuTorch), .tflite (for LiteRT), .mlpackage (for Core ML) or .safetensors (for transformers), got '{path}'. "
            f"Write '{instead}'."
        )
    try:
        if ending == ".mlpackage" and Path(path, "Manifest.json").is_file():
            return Path(os.path.realpath(path))  # an older one, which is a folder
        return real_file(path)
    except OSError as error:
        raise ExportError(f"'{path}' can't be written: {error}. Give the path of a file in a folder that can be.") from error


def _other_ending(path: Path, ending: str) -> Path:
    """``m.engine`` as ``m.onnx``, and ``m.onnx.gz`` too."""
    return path.with_suffix("") if path.with_suffix("").suffix.lower() == ending else path.with_suffix(ending)


def size_of(path: Path) -> int:
    """Bytes of a file, and of the file with its large tensors (external data)."""
    return sum(part.stat().st_size for part in (path, path.with_name(f"{path.name}.data")) if part.exists())


def move(made: Path, target: Path) -> None:
    """Replace older files by a file and the one with its large tensors (external data), so that parts of two exports are never mixed."""
    data, old = made.with_name(f"{made.name}.data"), target.with_name(f"{target.name}.data")
    if data.exists() or old.exists():
        target.unlink(missing_ok=True)
        old.unlink(missing_ok=True)
    if data.exists():
        os.replace(data, old)
    if made.is_dir() and target.is_dir():
        os.replace(target, made.with_name(f"{made.name}.old"))  # goes with the folder that it is in
    os.replace(made, target)


def is_engine_file(path: str | Path) -> bool:
    """Whether `QuantizedModel.export` writes the file of an engine that reads programs, by its ending."""
    return _ending(path) in BY_ENDING


def holds_weights_alone(path: str | Path) -> bool:
    """Whether `QuantizedModel.export` writes the weights of a network alone, by the path's ending."""
    return _ending(path) == ".safetensors"


def is_program(path: str | Path) -> bool:
    """Whether `QuantizedModel.export` writes a `torch.export` program to a path, by its ending."""
    return str(path).endswith(".pt2")


def _ending(path: object) -> str:
    """A path's ending; what is no path at all is refused by `export_target`."""
    return os.path.splitext(str(path))[1].lower()
