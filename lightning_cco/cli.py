"""``lightning-cco``: the export of a checkpoint, and the summary of a run, from the command line.

lightning-cco export best.ckpt --module my_project.model:LitModel --out model.onnx --data my_project.data:MyDataModule
lightning-cco report lightning_logs/version_3
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import inspect
import os
import sys
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from typing import Any

import lightning.pytorch as pl
import torch
from torch import Tensor, nn

from lightning_cco._yaml import parse_yaml
from lightning_cco.batches import overrides_forward
from lightning_cco.errors import CCOError
from lightning_cco.export.destination import announcement, holds_weights_alone, is_program
from lightning_cco.export.engines import PROGRAMS
from lightning_cco.export.report import ExportReport
from lightning_cco.loading import calls_on, load_quantized
from lightning_cco.monitoring.run_report import run_report
from lightning_cco.names import nearest
from lightning_cco.quantized_model import QuantizedModel
from lightning_cco.version import __version__

_BATCHES = 2  # of --data, that a file is checked on unless --batches says otherwise


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Those of the command line; by default `sys.argv`'s.

    Returns:
        The exit status: 0, or 1 after an error, which is printed to standard error.
    """
    options = _parser().parse_args(arguments)
    sys.path.insert(0, os.getcwd())
    try:
        options.run(options)
    except CCOError as error:
        print(f"lightning-cco {options.command}: {error}", file=sys.stderr)
        return 1
    finally:
        sys.path.remove(os.getcwd())
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lightning-cco", description="Models that were compressed in training with CCOCallback.")
    parser.add_argument("--version", action="version", version=f"lightning-cco {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)

    export = commands.add_parser(
        "export",
        help="write a checkpoint as an INT8 file (.onnx, .pte, .tflite, .mlpackage, model.safetensors) or as a .pt2 program, and check it",
    )
    export.set_defaults(run=_export)
    export.add_argument("checkpoint", help="saved by a training with CCOCallback")
    export.add_argument(
        "--module",
        required=True,
        metavar="PKG.CLASS",
        help="the LightningModule's class: pkg.module.Class, pkg.module:Class or file.py:Class",
    )
    export.add_argument(
        "--out",
        default="model.onnx",
        metavar="FILE",
        help="what to write: .onnx, .pt2, .pte for ExecuTorch, .tflite for LiteRT, .mlpackage for Core ML, model.safetensors for transformers "
        "(default: model.onnx)",
    )
    export.add_argument(
        "--arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of the module's constructor, as YAML; may be repeated"
    )
    export.add_argument(
        "--data",
        metavar="PKG.CLASS",
        help="a LightningDataModule, or a function that returns an iterable of batches: examples, and what the file is checked on",
    )
    export.add_argument("--data-arg", action="append", default=[], metavar="NAME=VALUE", help="an argument of it, as YAML; may be repeated")
    export.add_argument(
        "--batches", type=_count, metavar="N", help=f"how many batches of --data the file is checked on (default: {_BATCHES})"
    )
    export.add_argument(
        "--example", metavar="FILE.pt", help="a tensor, a tuple or a mapping of tensors, saved with torch.save: the arguments of forward"
    )
    export.add_argument(
        "--dynamic-batch",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="whether the batch size varies; default: if it can",
    )
    export.add_argument("--trust", action="store_true", help="read checkpoints with objects of arbitrary classes, which can run code")

    report = commands.add_parser("report", help="summarize what a run has written")
    report.set_defaults(run=lambda options: print(run_report(options.folder, most=options.most)))
    report.add_argument("folder", help="the run's log folder, or the cco folder in it")
    report.add_argument("--most", type=_count, default=10, metavar="N", help="how many layers at most (default: 10)")
    return parser


def _export(options: argparse.Namespace) -> None:
    if "://" not in options.checkpoint and not os.path.exists(options.checkpoint):
        raise CCOError(f"the checkpoint '{options.checkpoint}' is not there.")
    _refuse_idle(options)
    module = _build(options)
    arguments: dict[str, Any] = {}
    batches: list[Any] = []
    if options.data is not None:
        batches = list(islice(_batches(options), options.batches or _BATCHES))
        if not batches:
            raise CCOError(f"--data {options.data}: expected at least one batch, got none.")
        arguments["batch"] = batches[0]
    elif options.example is not None:
        arguments["example_args"], arguments["example_kwargs"] = _example(options.example)
    elif isinstance(module, pl.LightningModule) and not overrides_forward(module):
        raise CCOError(
            f"{options.module} has no forward of its own: its step is run on a batch. Give --data PKG.CLASS, a data module or a function."
        )
    quantized = load_quantized(module, options.checkpoint, weights_only=not options.trust, **arguments)
    more: dict[str, Any] = {} if options.dynamic_batch is None else {"dynamic_batch": options.dynamic_batch}
    if _checks_batches(options.out, quantized):
        if len(batches) > 1:
            more["batches"] = calls_on(quantized, batches)
    elif options.batches is not None:
        raise CCOError(
            f"--batches {options.batches}: {options.out} is not checked on batches. Leave --batches out, or write an .onnx file."
        )
    print(announcement(options.out), file=sys.stderr)
    written = quantized.export(options.out, **more)
    if isinstance(written, ExportReport):
        written.save(written.beside)
    print(f"Wrote {options.out}." if is_program(options.out) else written)


def _refuse_idle(options: argparse.Namespace) -> None:
    """Refuse options that have no effect beside, or without, others.

    Raises:
        CCOError: There is one; it is named with what to write instead.
    """
    if options.data is not None and options.example is not None:
        raise CCOError("expected --data or --example; got both. Leave one out.")
    if options.data is None:
        for given, what in ((options.data_arg, "--data-arg"), (options.batches, "--batches")):
            if given:
                raise CCOError(
                    f"{what} {given if isinstance(given, int) else given[0]}: expected --data too, got none. Add it, or leave {what} out."
                )


def _checks_batches(path: str, quantized: QuantizedModel) -> bool:
    """Whether the check of what is written to a path runs batches."""
    if is_program(path):
        return quantized.settings.deployment_settings.target_framework in PROGRAMS  # else it is the model itself, as it was traced
    return not holds_weights_alone(path)


def _count(text: str) -> int:
    """A number of at least 1, as argparse wants it."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a number of at least 1, got '{text}'")
    return int(text)


def _build(options: argparse.Namespace) -> Any:
    """The module as it was built for the training: its hyperparameters are in the checkpoint, if it has saved any."""
    found = _find(options.module, "--module")
    if not (isinstance(found, type) and issubclass(found, nn.Module)):
        raise CCOError(f"--module {options.module}: expected a class of modules, got {type(found).__name__} {found!r:.80}.")
    given = _arguments(options.arg, "--arg")
    taken = inspect.signature(found.__init__).parameters
    unknown = [name for name in given if name not in taken and not any(p.kind is p.VAR_KEYWORD for p in taken.values())]
    if unknown:
        raise CCOError(f"--arg {unknown[0]}: the constructor of {options.module} does not take it.{nearest(unknown[0], list(taken)[1:])}")
    try:
        if issubclass(found, pl.LightningModule):
            return found.load_from_checkpoint(options.checkpoint, map_location="cpu", weights_only=not options.trust, **given)
        return found(**given)
    except Exception as error:
        signature = inspect.signature(found.__init__)
        required = [
            p.name
            for p in list(signature.parameters.values())[1:]
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        ]
        needs = (
            f" Its constructor requires {required}; what save_hyperparameters() has not kept is given with --arg NAME=VALUE."
            if required
            else ""
        )
        weights = isinstance(error, RuntimeError) and "size mismatch" in str(error)
        trust = "" if options.trust or weights else " If the checkpoint holds objects of classes of your own and you trust it, add --trust."
        raise CCOError(
            f"--module {options.module} can't be built from {options.checkpoint}: {type(error).__name__}: {error}.{needs}{trust}"
        ) from error


def _batches(options: argparse.Namespace) -> Iterable[Any]:
    """The batches of a data module's loaders, those that a deployment resembles most first; or of a function."""
    found = _find(options.data, "--data")
    try:
        given = _arguments(options.data_arg, "--data-arg")
        if given and not callable(found):
            raise CCOError(
                f"--data-arg {options.data_arg[0]}: {options.data} is no class or function, but {type(found).__name__}. Leave it out."
            )
        data = found(**given) if callable(found) else found
        if not isinstance(data, pl.LightningDataModule):
            found_batches: Iterable[Any] = iter(data)
            return found_batches
        data.prepare_data()
        return iter(_loader(data, options.data))
    except CCOError:
        raise
    except Exception as error:
        raise CCOError(f"--data {options.data}: {type(error).__name__}: {error}") from error


def _loader(data: pl.LightningDataModule, name: str) -> Iterable[Any]:
    for stage, method in (("validate", "val_dataloader"), ("test", "test_dataloader"), ("fit", "train_dataloader")):
        if getattr(type(data), method) is not getattr(pl.LightningDataModule, method):
            data.setup(stage)
            loader = getattr(data, method)()
            return loader[0] if isinstance(loader, (list, tuple)) else loader  # type: ignore[no-any-return]
    raise CCOError(f"--data {name}: expected a val_dataloader, test_dataloader or train_dataloader, found none.")


def _example(path: str) -> tuple[tuple[Any, ...], dict[str, Any] | None]:
    try:
        example = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CCOError(f"--example {path}: expected tensors that torch.save wrote; {type(error).__name__}: {error}") from error
    if isinstance(example, Tensor):
        return (example,), None
    if isinstance(example, dict):
        return (), example
    if isinstance(example, (tuple, list)):
        return tuple(example), None
    raise CCOError(f"--example {path}: expected a tensor, a tuple or a mapping of tensors, got {type(example).__name__}.")


def _arguments(given: Sequence[str], option: str) -> dict[str, Any]:
    """``NAME=VALUE`` pairs, with values as YAML reads them."""
    found = {}
    for pair in given:
        name, equals, value = pair.partition("=")
        if not equals or not name.isidentifier():
            raise CCOError(f"{option} {pair}: expected NAME=VALUE, such as {option} width=64.")
        found[name] = parse_yaml(value, f"{option} {name}")
    return found


def _find(name: str, option: str) -> Callable[..., Any]:
    """What a dotted name, or a file and a name, stands for."""
    place, colon, attribute = name.rpartition(":")
    if not colon:
        place, _, attribute = name.rpartition(".")
    if not place or not attribute:
        raise CCOError(f"{option} {name}: expected pkg.module.Class, pkg.module:Class or file.py:Class.")
    try:
        if place.endswith(".py"):
            specification = importlib.util.spec_from_file_location(os.path.basename(place)[:-3], place)
            assert specification is not None
            assert specification.loader is not None
            module = importlib.util.module_from_spec(specification)
            sys.modules[specification.name] = module
            specification.loader.exec_module(module)
        else:
            module = importlib.import_module(place)
    except Exception as error:
        raise CCOError(
            f"{option} {name}: '{place}' can't be imported: {type(error).__name__}: {error}. Run the command where your code can be imported from."
        ) from error
    if not hasattr(module, attribute):
        names = [known for known in vars(module) if not known.startswith("_")]
        raise CCOError(f"{option} {name}: '{place}' has no '{attribute}'.{nearest(attribute, names)}")
    return getattr(module, attribute)  # type: ignore[no-any-return]


if __name__ == "__main__":
    sys.exit(main())
