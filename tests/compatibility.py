"""Runs all tests and writes `docs/compatibility.md` from their results: ``make compatibility``; with ``--private-apis`` only the table of these."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
import time
from collections.abc import Iterable
from pathlib import Path

import pytest

from lightning_cco.compat.table import as_markdown

TESTS = Path(__file__).resolve().parent
PAGE = TESTS.parent / "docs" / "compatibility.md"

ROWS = {
    "compile": "`torch.compile`, one graph",
    "bf16": "bf16-mixed",
    "ddp": "DDP on 2 processes",
    "checkpointing": "activation checkpointing",
    "ema": "EMA of the weights",
    "resume": "resume from a checkpoint",
    "test": "`test(ckpt_path=...)`",
    "partial_batch": "partial last batch",
    "configure_model": "built in `configure_model`",
    "pairs": "each two of these, but the compiler and DDP",
    "slow_pairs": "the compiler or DDP with each other one, the models in turn",
    "all": "all nine at once",
}
COLUMNS = ["CNN", "ViT", "Hugging Face", "LSTM"]
PROPERTIES = {
    "test_both_modes_give_the_same_quantized_layers": "captured alike in both modes",
    "test_a_step_trains_what_it_trains_in_float_and_nothing_is_silent": "trains, nothing silent",
    "test_sensitivity_is_measured_and_drawn": "QS measured, drawn",
    "test_saved_and_loaded_it_computes_the_same": "saved and loaded",
    "test_removed_it_is_the_float_model_again": "removed: bit-identical",
    "test_each_quantizer_sees_its_own_tensor": "right by value",
    "test_fit_resume_and_test": "fit, resume, test",
}
TRAINING = {
    "`torch.compile` of a submodule, also after code was compiled before the hooks came": "test_training_features.py::test_a_compiled_submodule",
    "`torch.compile` of the LightningModule": "test_training_features.py::test_a_compiled_lightning_module",
    "bf16-mixed, bf16-true, 64-true": "test_training_features.py::test_precision",
    "16-mixed (on CPUs Lightning makes bf16-mixed of it)": "test_training_features.py::test_16_mixed",
    "gradient accumulation": "test_training_features.py::test_accumulated",
    "gradient clipping": "test_training_features.py::test_gradients_are_clipped",
    "activation checkpointing, reentrant or not": "test_training_features.py::test_activation_checkpointing",
    "activation checkpointing of closures, of modules called several times, nested, compiled": "test_recomputation.py::",
    "DDP: equal ranges and sensitivities on all ranks": "test_strategies.py::test_ranges",
    "DDP: accumulation, smaller last batch": "test_strategies.py::test_accumulated",
    "DDP: unused parameters": "test_strategies.py::test_a_part",
    "DDP: static graph; `fully_shard` under ModelParallelStrategy": "test_strategies.py::test_it_trains",
    "`ddp_spawn`": "test_strategies.py::test_spawned",
    "FSDPStrategy, DeepSpeedStrategy, tensor parallelism: refused at setup with the reason": "test_strategies.py::REFUSED",
    "EMA, WeightAveraging, SWA, in either order": "test_other_callbacks.py::test_averaged",
    "ModelCheckpoint and EarlyStopping on our logged values": "test_other_callbacks.py::test_every_logged",
    "learning-rate finder, batch-size finder": "test_other_callbacks.py::test_tuner",
    "`limit_*_batches`, `overfit_batches`, `fast_dev_run` and other switches": "test_training_features.py::test_limits",
    "`barebones`": "test_training_features.py::test_barebones",
    "manual optimization": "test_training_features.py::test_manual",
    "several optimizers": "test_training_features.py::test_several_optimizers",
    "several dataloaders": "test_training_data.py::test_several",
    "IterableDataset without length": "test_training_data.py::test_a_stream",
    "partial last batch": "test_training_data.py::test_a_last_batch",
    "changing image sizes": "test_training_data.py::test_changing_image",
    "changing sequence lengths": "test_training_data.py::test_changing_sequence",
    "`inference_mode` on and off": "test_training_data.py::test_inference_mode",
    "deepcopy and pickle of the module": "test_training_data.py::test_copies",
    "`Trainer(logger=False)`": "test_training_data.py::test_without_a_logger",
    "LightningCLI": "test_recipes.py::test_lightning_cli",
    "Hydra multirun": "test_other_callbacks.py::test_hydra",
    "`trainer.fit` twice": "test_callback.py::test_a_second_fit",
    "Ctrl-C, SIGTERM and kill -9 in the middle of an epoch, then resume": "test_interruptions.py::",
}


class Collector:
    """Keeps what became of each test."""

    def __init__(self) -> None:
        self.cells: dict[tuple[str, str], list[bool]] = {}
        self.tests: dict[str, bool] = {}

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when != "call" and report.passed:
            return
        name = report.nodeid.rpartition("tests/")[2]
        self.tests[name] = self.tests.get(name, True) and report.passed
        for key, value in report.user_properties:
            if key == "cell":
                self.cells.setdefault(tuple(value), []).append(report.passed)


def mark(outcomes: Iterable[bool]) -> str:
    found = list(outcomes)
    return "" if not found else "✓" if all(found) else "✗"


def table(header: list[str], rows: Iterable[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (header, ["---"] * len(header), *rows)]


def read_table(page: Path) -> dict[tuple[str, str], str]:
    """The cells of the combinations on the page."""
    names = {text: row for row, text in ROWS.items()}
    found = {}
    for line in page.read_text(encoding="utf-8").splitlines():
        first, *cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if first in names and len(cells) == len(COLUMNS):
            found |= {(names[first], model): cell for model, cell in zip(COLUMNS, cells, strict=True)}
    return found


def belongs(name: str, place: str) -> bool:
    """Whether a test is one of those at a place: a file, a beginning of names in it, or those that refuse something."""
    if place.endswith("::REFUSED"):
        return name.startswith(place.removesuffix("REFUSED")) and "refused" in name
    return name.startswith(place)


def private_apis() -> list[str]:
    """The section of the page on what is private to others."""
    return ["## Private APIs", *as_markdown()]


def page(collector: Collector, seconds: float) -> str:
    models = sorted({name.partition("[")[2].rstrip("]") for name in collector.tests if name.startswith("test_models_matrix.py")})
    of_tests = {text: mark(ok for name, ok in collector.tests.items() if belongs(name, place)) for text, place in TRAINING.items()}
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in ("torch", "lightning", "transformers"))
    lines = [
        "# Compatibility",
        "",
        "What the tests cover, and their results. `make compatibility` generates this page from the results; don't edit it.",
        "",
        f"Last written with Python {platform.python_version()}, {versions}, on {os.cpu_count()} CPUs. "
        f"All tests (`make test-all`) took {round(seconds / 60)} minutes.",
        "",
        "With other versions (`make test-floors`), seen once, before the last changes: with Python 3.13.0 and the pinned packages 3,896 of the fast tests",
        "passed and 26 failed, 23 of them by a warning of PyTorch about Python 3.13.0 itself; 25 of these passed when run again. With Python 3.10.13 and the",
        "lowest packages 3,709 passed and 170 failed, among them those of Triton's interpreter and of the solver, which pass since. Some exports with PyTorch",
        "2.8, ONNX 1.17 and ONNX Runtime 1.20 fail: take newer ones.",
        "",
        "## Ways of training × kinds of models",
        "Each cell is a training with the callback (`tests/test_combination.py`). ✓: every quantizer ran in the training step; all calls were those of the",
        "capture; the losses are those of the same training in float up to the quantization error and, if the feature does not change the step, those of the",
        "quantized training without it to four digits; ranges are equal on all ranks; a tested checkpoint gives the metric logged when it was written.",
        "",
        *table(["", *COLUMNS], [[text, *(mark(collector.cells.get((row, model), [])) for model in COLUMNS)] for row, text in ROWS.items()]),
        "",
        "The compiler takes an LSTM into its graph with `torch._dynamo.config.allow_rnn = True`, as here; without it the whole forward runs eagerly,",
        "and is quantized too.",
        "",
        "## Training features",
        *table(["", ""], [[text, outcome] for text, outcome in of_tests.items()]),
        "",
        "## Models",
        "Small models, written for the tests (`tests/matrix_*.py`) or from transformers' configurations with random weights (`hf_`). *Right by value*: each",
        "quantizer gets, in calibration, evaluation and training, the tensor that an independent recording of the float model has there.",
        "",
        *table(
            ["", *PROPERTIES.values()],
            [
                [model, *(mark(ok for name, ok in collector.tests.items() if name.endswith(f"::{test}[{model}]")) for test in PROPERTIES)]
                for model in models
            ],
        ),
        "",
        *private_apis(),
        "",
    ]
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    if arguments == ["--private-apis"]:  # the table is written by hand, and needs no run of the tests
        kept = PAGE.read_text(encoding="utf-8").partition("\n## Private APIs\n")[0].rstrip("\n")
        PAGE.write_text("\n".join([kept, "", *private_apis(), ""]), encoding="utf-8")
        return 0
    collector, start = Collector(), time.monotonic()
    os.chdir(TESTS.parent)
    deselected = "tests/test_combination.py::test_the_table_in_the_docs_has_every_cell_and_none_that_failed"
    status = pytest.main(["-q", "-p", "no:cacheprovider", f"--deselect={deselected}", *arguments], plugins=[collector])
    text = page(collector, time.monotonic() - start)
    PAGE.write_text(text, encoding="utf-8")
    print(f"{PAGE.relative_to(TESTS.parent)}: {text.count('✓')} ✓, {text.count('✗')} ✗")
    return int(status != 0 or "✗" in text or "|  |" in "".join(line for line in text.splitlines() if "✓" in line))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
