"""Imports run one way: from the callback down to the errors, as docs/architecture.md has it."""

from __future__ import annotations

import ast
import functools
import re
from pathlib import Path

import networkx as nx

import lightning_cco

ROOT = Path(lightning_cco.__file__).parent
ARCHITECTURE = ROOT.parent / "docs" / "architecture.md"

LAYERS = [
    ["cli"],
    ["callback", "loading"],
    ["compression_run"],
    ["evaluations"],
    ["compression", "epoch_measurement"],
    ["run_export", "standalone_evaluation"],
    ["budget_run"],
    ["distillation", "early_check", "example_batches", "example_input", "export_dir", "initial_evaluation", "schedule"],
    [
        "automatic_skips",
        "batch_norms",
        "batches",
        "checkpoints",
        "layer_timing",
        "learned_training",
        "monitoring",
        "optimizer_steps",
        "progress",
        "weights_at_start",
    ],
    ["batch_prefetch", "quantized_model", "report_page", "strategies"],
    ["budget", "drawing", "export", "level_use", "loader_copy", "loss_measurement", "measurement", "prefetch_iterator", "suggestions"],
    ["data_settings", "loss_sensitivity", "sensitivity", "tensor_views"],
    ["quantization", "repeatable_data"],
    ["graph"],
    ["settings"],
    ["_parsing", "_recipes"],
    ["_yaml", "sections"],
    ["_combinations"],
    ["_values"],
    ["compat", "dataset_copy", "files"],
    ["errors"],
    ["names", "number_format", "random_numbers", "version"],
]
"""From top to bottom: modules and packages of lightning_cco. Each imports what is below it; packages also from within themselves."""


def modules() -> dict[str, Path]:
    """Path of each module of the package by its dotted name."""
    found = {}
    for path in sorted(ROOT.rglob("*.py")):
        parts = (ROOT.name, *path.relative_to(ROOT).with_suffix("").parts)
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


MODULES = modules()


def imported(node: ast.AST) -> list[str]:
    """Our own modules that a statement imports."""
    names: list[str] = []
    if isinstance(node, ast.Import):
        names = [alias.name for alias in node.names]
    elif isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not used here"
        names = [f"{node.module}.{alias.name}" if f"{node.module}.{alias.name}" in MODULES else str(node.module) for alias in node.names]
    return [name for name in names if name.partition(".")[0] == ROOT.name]


@functools.cache
def statements(module: str) -> tuple[list[ast.AST], list[ast.AST]]:
    """Imports of a module at its top, and those further in."""
    tree = ast.parse(MODULES[module].read_text(encoding="utf-8"))
    top = {id(node) for node in tree.body}
    found = [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]
    return [node for node in found if id(node) in top], [node for node in found if id(node) not in top]


def imports(module: str) -> list[str]:
    """Our own modules that a module imports, anywhere in it: also for its annotations alone."""
    return [name for nodes in statements(module) for node in nodes for name in imported(node)]


def unit(module: str) -> str:
    """The entry of `LAYERS` that a module belongs to; empty for the package itself."""
    return module.partition(".")[2].partition(".")[0]


LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def test_every_module_has_its_layer() -> None:
    assert {unit(module) for module in MODULES} - {""} == set(LEVEL)


def test_a_module_imports_what_is_below_it() -> None:
    wrong = [
        f"{module} imports {other}, which is not below it" if unit(other) else f"{module} imports the package, which imports everything"
        for module in MODULES
        if unit(module)  # the package itself offers names of all layers
        for other in imports(module)
        if not unit(other) or (unit(other) != unit(module) and LEVEL[unit(other)] <= LEVEL[unit(module)])
    ]
    assert wrong == []


def test_no_module_imports_itself_by_way_of_others() -> None:
    graph = nx.DiGraph([(module, other) for module in MODULES for other in imports(module)])
    assert list(nx.simple_cycles(graph)) == []


def test_no_module_of_ours_is_imported_inside_a_function() -> None:
    """Heavy packages of others may be, on first use; ours only at the top, where they are seen."""
    assert {module: names for module in MODULES if (names := [name for node in statements(module)[1] for name in imported(node)])} == {}


def test_a_file_is_read_in_one_go() -> None:
    """What exceeds 300 lines holds more than one concept."""
    lengths = {module: len(path.read_text(encoding="utf-8").splitlines()) for module, path in MODULES.items()}
    assert {module: length for module, length in lengths.items() if length > 300} == {}


def test_the_page_has_the_same_layers() -> None:
    listed = ARCHITECTURE.read_text(encoding="utf-8").partition("Imports run one way, from top to bottom:\n```\n")[2].partition("```")[0]
    assert [re.findall(r"[\w.]+", line) for line in listed.splitlines()] == LAYERS
