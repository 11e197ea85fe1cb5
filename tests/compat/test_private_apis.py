"""What is private to PyTorch, Lightning and others is read in `compat` alone, is in its table, and is tried by a test."""

from __future__ import annotations

import ast
import importlib.metadata
from pathlib import Path

import compatibility
import pytest
import torch
from models import GuideCNN
from packaging.version import Version
from private_names import PACKAGE, own_names, private_names

from lightning_cco import CCOError, quantize
from lightning_cco.compat import autograd, resolve
from lightning_cco.compat.table import BY_NAME, TABLE, TESTED
from lightning_cco.quantization import gradient_holders

HERE = Path(__file__).resolve().parent
FILES = {path.relative_to(PACKAGE).as_posix(): path.read_text(encoding="utf-8") for path in sorted(PACKAGE.rglob("*.py"))}
OUTSIDE = {name: source for name, source in FILES.items() if not name.startswith("compat/")}
FOREIGN = {api.name.rpartition(".")[2] for api in TABLE}
OWN = set().union(*(own_names(ast.parse(source)) for source in OUTSIDE.values()))
PYTHONS_OWN = {
    (file, name) for file in ("data_settings.py", "dataset_copy.py", "repeatable_data.py") for name in ("__code__", "__closure__")
} | {(f"graph/{file}.py", "__code__") for file in ("global_state", "saved_caches", "snapshot")}
"""Attributes that Python documents, by which a function of the user is made anew, or looked into."""
IN_PLACE = {(file, api.name.rpartition(".")[2]) for api in TABLE for file in api.in_place}


def test_nothing_private_is_read_outside_of_compat() -> None:
    found = {(file, name): line for file, source in OUTSIDE.items() for line, name in private_names(source, OWN, FOREIGN)}
    assert [f"{file}:{line} reads {name}" for (file, name), line in found.items() if (file, name) not in IN_PLACE | PYTHONS_OWN] == []
    assert set(found) == IN_PLACE | PYTHONS_OWN, "rows of the table that nothing reads any more"


@pytest.mark.parametrize(
    "source",
    [
        "import torch\ntorch._C._len_torch_function_stack()",
        "from torch._dynamo import reset",
        "from torch.utils.checkpoint import _checkpoint_hook",
        "import torch._inductor",
        "trainer._results",
        "self.fetcher._combined_loader = 1",
        "getattr(module, '_parameters')",
        "Module.forward.__code__",
        "frame.f_locals['ctx']",
        "frame.f_locals.get('ctx')",
        "modules = ('torch._decomp',)",
        "class A(Base):\n    def f(self): return self._not_defined_here",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert list(private_names(source, {"_results"}, FOREIGN))


@pytest.mark.parametrize(
    "source", ["self._results = 1", "frames._main", "x.__dict__", "t._fields", '"""Of torch._C."""', "from lightning_cco._yaml import read"]
)
def test_the_search_leaves_our_own(source: str) -> None:
    assert not list(private_names(source, {"_results", "_main"}, FOREIGN))


def test_the_table_is_of_what_compat_reads() -> None:
    assert len(BY_NAME) == len(TABLE)
    for api in TABLE:
        last = api.name.removeprefix("torch.onnx.ONNXProgram.").rpartition(".")[2]
        for place in api.read_in.split(", "):
            source = FILES[place if "/" in place else f"compat/{place}.py"]
            assert last in source or api.name in source, api.name
    read = {
        call.args[0].value
        for name, source in FILES.items()
        if name.startswith("compat/")
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id in ("needed", "or_else", "find")
        if isinstance(call.args[0], ast.Constant)
    }
    assert read <= set(BY_NAME)


def test_each_row_has_a_canary() -> None:
    tried = set()
    for path in HERE.glob("test_canaries_*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "tries":
                tried |= {argument.value for argument in node.args if isinstance(argument, ast.Constant)}
    assert tried == set(BY_NAME)


def test_the_installed_versions_are_tested_ones() -> None:
    for package, versions in TESTED.items():
        assert [Version(version) for version in versions] == sorted(map(Version, versions))
        assert Version(importlib.metadata.version(package).partition("+")[0]) in map(Version, versions), (
            f"try tests/compat, then add it to TESTED[{package!r}]"
        )


def test_the_page_in_the_docs_shows_the_table() -> None:
    assert "\n".join(compatibility.private_apis()) in compatibility.PAGE.read_text(encoding="utf-8")


def test_compat_stands_at_the_bottom() -> None:
    for name, source in FILES.items():
        if name.startswith("compat/"):
            modules = [node.module or "" for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
            ours = [module for module in modules if module.startswith("lightning_cco")]
            assert all(module == "lightning_cco.errors" or module.startswith("lightning_cco.compat.") for module in ours), name


def test_what_is_needed_and_missing_is_said_before_a_model_is_hooked(monkeypatch: pytest.MonkeyPatch) -> None:
    missing: list[str] = []
    monkeypatch.setattr(resolve, "_missing", missing)
    row = BY_NAME["torch._C._current_graph_task_id"]
    monkeypatch.setitem(BY_NAME, "torch._C._gone", row)
    gone = resolve.needed("torch._C._gone")
    with pytest.raises(CCOError, match=r"expected torch\._C\._gone .*installed torch .*pip install 'torch=="):
        gone()
    model = GuideCNN()
    before = {name: len(module._forward_hooks) for name, module in model.named_modules()}
    with pytest.raises(CCOError, match=r"torch\._C\._gone"):
        quantize(model, None, [GuideCNN.example()])
    assert before == {name: len(module._forward_hooks) for name, module in model.named_modules()}


def test_what_stands_in_is_taken() -> None:
    def stand_in() -> None:
        return None

    assert resolve.or_else("torch._C._gone", stand_in) is stand_in
    assert resolve.or_else("torch._C._is_tracing", stand_in) is torch._C._is_tracing
    with pytest.raises(AttributeError):
        resolve.find("no_such_package.thing")


def test_without_counts_no_gradient_is_taken_for_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("storage_holders", "tensor_holders"):
        monkeypatch.setattr(gradient_holders, name, autograd._never_twice)
    for _ in range(2):
        monkeypatch.setattr(gradient_holders, "_found", {})
        known = gradient_holders.fewest_holders()
        assert gradient_holders.holders(torch.ones(2)) not in known
