"""What an export says when it fails: in which step, on what, with which versions; the model is blamed only where there is evidence."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import keyword
import re
from collections.abc import Iterable, Mapping, Sequence

import torch

from lightning_cco.export.engines import Engine
from lightning_cco.export.errors import BatchDoesNotVary, ExportError
from lightning_cco.graph.capture_coverage import is_scripted
from lightning_cco.graph.error_location import came_through, failing_line
from lightning_cco.graph.layer_graph import LayerGraph
from lightning_cco.graph.operands import SPARSE_NOTE
from lightning_cco.names import list_names, quote

_NEEDED = {"torch": "2.8", "onnx": "1.17", "onnxscript": "0.6", "onnxruntime": "1.20"}
"""The lowest versions that an ONNX file was written and checked with."""
_EVIDENCE = (
    ("GuardOnDataDependent", "data-dependent", "Could not guard on", ".item()", "aten._local_scalar_dense"),
    ("Constraints violated", "ConstraintViolation", "constraints violated", "marked as dynamic", "not all values of", "specialized"),
    ("differentiated Tensor", "does not require grad", "autograd.grad", "derivative for"),
    ("vmap", "Batching rule", "functorch", "GradTrackingTensor", "BatchedTensor"),
)
"""Words of errors that show that the model computes with values, that a size is fixed in its code, that it takes gradients or is transformed."""
_ON_A_SIZE = ("SymbolicTensor", "SymInt")
"""Words of errors of the exporter that show that what it wants as a number depends on a size."""
_PLAIN = (
    (
        ("torch.distributions", "not a known type"),
        "The program keeps what forward returns, and a distribution is none of its types. Let the forward that is exported return its parameters.",
    ),
    (
        ("fake tensor in the exported program",),
        "A part of its forward runs where a trace does not see it, such as another thread. Call it in the forward's own thread.",
    ),
)
"""Words of errors that say enough by themselves, and what to do."""
_PACKED = frozenset({"pack_padded_sequence", "pad_packed_sequence", "_pack_padded_sequence", "_pad_packed_sequence"})


def kind_of(failure: Exception) -> type[ExportError]:
    """`BatchDoesNotVary`, where an error of tracing or conversion shows that a size which was to vary is fixed."""
    said = f"{type(failure).__name__}: {failure}"
    shows = isinstance(failure, BatchDoesNotVary) or any(word in said for word in (*_EVIDENCE[1], *_ON_A_SIZE))
    return BatchDoesNotVary if shows else ExportError


def need_packages(names: tuple[str, ...] = ("torch", "onnx", "onnxscript", "onnxruntime")) -> None:
    """Check that what a file is written with is there, and new enough.

    Raises:
        CCOError: With the package's name, the version found and the one needed.
    """
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise ExportError(f"{', '.join(missing)} not installed. Write: pip install 'lightning-cco[export]'.")
    for name in names:
        found = _version(name)
        if _numbers(found) < _numbers(_NEEDED[name]):
            raise ExportError(
                f"{name} {found} is too old: expected {name}>={_NEEDED[name]}. Write: pip install -U '{name}>={_NEEDED[name]}'."
            )
    if "onnx" in names and not hasattr(getattr(torch.onnx, "ops", None), "symbolic"):
        raise ExportError(f"torch {_version('torch')} has no torch.onnx.ops.symbolic: expected torch>={_NEEDED['torch']}.")


def need_engine(engine: Engine) -> None:
    """Check that an engine is there without which its files can't be written, or not be checked.

    Raises:
        CCOError: With what to install.
    """
    if importlib.util.find_spec(engine.package) is None:
        does = f"in which files for {engine.title} are checked"
        if engine.start is not None:
            does = f"which writes {'' if engine.reads_alone else 'and runs '}{engine.ending} files"
        raise ExportError(f"{engine.package}, {does}, is not installed. Write: pip install 'lightning-cco[{engine.extra}]'.")


def need_writable_names(paths: Iterable[str]) -> None:
    """Check that modules are named so that the code in which PyTorch keeps a traced model can spell them.

    Args:
        paths: Dotted paths of modules and parameters.

    Raises:
        CCOError: With the first name that can't be, and why.
    """
    for path in paths:
        for part in path.split("."):
            why = "is a word of Python" if keyword.iskeyword(part) else "holds a quotation mark" if '"' in part else ""
            if re.search(r"[\n\r\0\ud800-\udfff]", part):
                why = "holds a line break, a NUL or a lone surrogate"
            if why:
                raise ExportError(
                    f"the module {quote(path)} can't be exported: its name {why}, which the code of a traced model can't spell. Rename it (letters, "
                    "digits and underscores always work); the keys of a checkpoint's state_dict are renamed likewise."
                )


def need_onnx_forms(model: torch.nn.Module, graph: LayerGraph) -> None:
    """Check that ONNX has an operator for each recurrent layer: its LSTM has no projection, and the exporter writes one all the same, wrongly.

    Raises:
        CCOError: With the layer's name and what to write instead.
    """
    modules = dict(model.named_modules())
    for layer in graph:
        size = getattr(modules.get(layer.path), "proj_size", 0) if layer.kind == "lstm" else 0
        if size:
            raise ExportError(
                f"layer '{layer.name}' (module '{layer.path}') is an LSTM with a projection (proj_size={size}), which ONNX has no operator for. Build "
                "it with proj_size=0 and train it so, with a Linear behind it where its result is to be smaller, or export a .pt2 file, which can hold any "
                "operation. With a translation of aten.lstm.input of your own, pass it as custom_translation_table."
            )


def untraceable(model: torch.nn.Module, where: str, error: Exception, graph: LayerGraph | None = None, inputs: Sequence[str] = ()) -> str:
    """A message for a forward that torch.export could not trace.

    Args:
        model: The model.
        where: The last layer that the trace came to, in words; empty if none.
        error: What torch.export raised.
        graph: The model's layers.
        inputs: Names of the tensors that were traced.
    """
    said = f"{type(error).__name__}: {error}"
    branches, fixed, gradients, transformed = (any(word in said for word in words) for words in _EVIDENCE)
    plain = next((advice for words, advice in _PLAIN if all(word in said for word in words)), "")
    scripted = _scripted(model) if "positional arguments" in said else []
    if came_through(error, "copy", "deepcopy"):
        advice = (
            "Its forward copies by copy.deepcopy, for which a trace has no memory. Write tensor.clone() for a tensor; make the copy of a module in __init__, "
            "or leave it out of the forward that is exported."
        )
    elif came_through(error, "torch.distributions.distribution", "__init__"):
        advice = (
            "A distribution of torch.distributions checks the values of its parameters, which a file can't. Make it with validate_args=False, or let the "
            "forward that is exported return the parameters."
        )
    elif plain:
        advice = plain
    elif scripted:
        advice = (
            f"What torch.jit.script has made can't be traced: {list_names(scripted)}. Put the Python module that was scripted in its place, or what "
            "torch.jit.trace makes of it."
        )
    elif transformed:
        advice = (
            "Its forward transforms functions (torch.vmap, torch.func), which a file can't hold around quantized layers. Write the batched computation itself "
            "(a product of more dimensions instead of a vmap over weights), or export the submodule that is transformed."
        )
    elif gradients or any(layer.kind == "grad" for layer in graph or ()):
        advice = (
            "Its forward takes gradients (torch.autograd.grad, as for forces out of an energy), and the rounding in a file has none. Export the submodule that "
            "computes what is differentiated, and take the gradients outside of the file."
        )
    elif any(layer.note == SPARSE_NOTE for layer in graph or ()):
        advice = (
            "Its forward computes with a sparse tensor, for which a file has no form. Hold it densely in the model that is exported (A.to_dense(), in a "
            "buffer), or write the product with a graph's matrix as index_add over its edges."
        )
    elif any(layer.kind in _PACKED for layer in graph or ()):
        advice = (
            "It packs sequences, by lengths that are numbers of Python while a file is written. Let the forward that is exported give the padded sequence to "
            "the recurrent layer, and choose by the lengths afterwards (a mask, gather)."
        )
    elif isinstance(error, BatchDoesNotVary):
        advice = "Pass dynamic_batch=False, which fixes the batch to the example's."
    elif fixed and "data-dependent" not in said:
        advice = (
            "A size is fixed in the model's code, or computed to a number (len(x), int(x.shape[0]), reshape to the example's size). Pass dynamic_batch=False, "
            "or dynamic_shapes={argument: {axis: Dim.DYNAMIC}} for the axes that may vary."
        )
    elif branches:
        advice = (
            "Control flow that depends on values can't be in a file: write it with torch.where or torch.cond. If a part of the model is not needed in "
            "deployment, export the submodule that is."
        )
    else:
        advice = f"Nothing shows that the model is at fault: it may be a limit of these versions ({versions()}), or of lightning_cco; please report it."
    return f"{type(model).__name__} can't be traced by torch.export{where}{failing_line(error)}: {_with_axes(first_paragraph(error), inputs)}. {advice}"


def _with_axes(said: str, inputs: Sequence[str]) -> str:
    """What torch.export says, with ``L['tensors'][0].size()[2]`` as the axis of the input that it is."""

    def axis(found: re.Match[str]) -> str:
        number = int(found[2]) if found[2] else None
        name = found[1] if number is None else inputs[number] if found[1] == "tensors" and number < len(inputs) else f"{found[1]}[{number}]"
        return f"axis {found[3]} of '{name}'"

    return re.sub(r"L\['(\w+)'\](?:\[(\d+)\])?\.size\(\)\[(\d+)\]", axis, said)


def _scripted(model: torch.nn.Module) -> list[str]:
    """The outermost modules that `torch.jit.script` has made; what `torch.jit.trace` makes can be traced once more."""
    found: list[str] = []
    for path, module in model.named_modules():
        if is_scripted(module) and not any(path.startswith(f"{other}.") for other in found):
            found.append(path)
    return found


def inexpressible(model: torch.nn.Module, error: Exception) -> str:
    """A message for a traced program that torch.onnx could not convert."""
    text = str(error)
    operators = re.findall(r"OpOverload\(op='([^']+)'", text) or re.findall(r"No ONNX function found for <?([^\s>]+)", text)
    name = type(model).__name__
    if operators and ("No ONNX function" in text or not operators[0].startswith(("aten.", "prims."))):
        return (
            f"{name} can't be converted to ONNX: it uses {', '.join(dict.fromkeys(operators))}, which ONNX has no operator for. Replace it by "
            "operations that ONNX has, pass custom_translation_table as in torch.onnx.export, or export a .pt2 file, which can hold any operation."
        )
    where = f" at {operators[0]}" if operators else ""
    if any(word in text for word in _ON_A_SIZE):
        return (
            f"the conversion of {name} to ONNX failed{where}: {first_paragraph(error)}. Something that ONNX wants as a number (the groups of a "
            "convolution, a stride) depends on the size of an input. Pass dynamic_batch=False, which fixes the batch to the example's, or compute it otherwise."
        )
    return (
        f"the conversion of {name} to ONNX failed{where}: {first_paragraph(error)}. Nothing shows that the model is at fault: it may be a limit of "
        f"these versions ({versions()}), or of lightning_cco; please report it. A .pt2 file can hold any operation."
    )


def does_not_run(layers: Mapping[str, str], error: Exception) -> str:
    """A message for a file that the engine refuses to run.

    Args:
        layers: The layer that each node of the file comes from.
        error: What the engine raised.
    """
    node = re.search(r"[Nn]ode(?:\. Name:| with name )'([^']*)'", str(error)) or re.search(r"in node \(([^)]*)\)", str(error))
    layer = layers.get(node[1], "") if node else ""
    where = f" at layer '{layer}'" if layer else ""
    return (
        f"the file does not run in ONNX Runtime{where}: {first_paragraph(error)}. These versions ({versions()}) make of "
        "this layer what they can't run. Compute it otherwise, or export a .pt2 file. No file was written."
    )


def failed(phase: str, error: Exception) -> str:
    """A message for any other step that failed."""
    return f"{phase} failed: {first_paragraph(error)}. It may be a limit of these versions ({versions()}), or of lightning_cco; please report it."


def versions() -> str:
    """The versions that an export depends on."""
    return ", ".join(f"{name} {_version(name)}" for name in _NEEDED if importlib.util.find_spec(name) is not None)


def first_paragraph(error: BaseException) -> str:
    """Type and first paragraph of an error, and of the one at its root, if that is another."""
    root: BaseException = error
    while root.__cause__ is not None:
        root = root.__cause__
    said = _paragraph(error)
    return said if root is error else f"{said} (from {_paragraph(root)})"


def _paragraph(error: BaseException) -> str:
    text = " ".join(re.sub(r"\x1b\[[0-9;]*m", "", str(error)).strip().split("\n\n")[0].split())[:400].rstrip(".")
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def _version(name: str) -> str:
    if name == "torch":
        return str(torch.__version__)
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:  # a build of another name, such as onnxruntime-gpu
        return str(getattr(importlib.import_module(name), "__version__", "0"))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:2])
