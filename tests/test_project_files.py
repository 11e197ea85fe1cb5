"""What CONTRIBUTING, the changelog and the configuration name is there."""

from __future__ import annotations

import inspect
import re
import subprocess
from pathlib import Path

import pytest
import yaml

import lightning_cco

ROOT = Path(__file__).resolve().parent.parent
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")


def test_the_commands_of_contributing_are_targets() -> None:
    targets = set(re.findall(r"^([\w-]+):", MAKEFILE, flags=re.MULTILINE))
    named = set(re.findall(r"`make ([\w-]+)`", CONTRIBUTING))
    assert named <= targets
    assert {"test", "docs", "coverage", "lint"} <= named


def test_the_files_of_contributing_are_there() -> None:
    paths = re.findall(r"`((?:[\w-]+/)+[\w.-]*|[\w-]+\.(?:py|md|txt))`", CONTRIBUTING)
    assert len(paths) > 20
    missing = [path for path in paths if not any((ROOT / folder / path).exists() for folder in ("", "lightning_cco"))]
    assert set(missing) <= {"outputs/coverage/index.html", "site/"}  # made by the commands


def test_the_names_of_contributing_are_in_the_code() -> None:
    code = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "lightning_cco").rglob("*.py"))
    for name in (
        "int8_kinds",
        "weight_only_kinds",
        "int8_conditions",
        "TARGETS",
        "ENGINES",
        "TARGET_FRAMEWORKS",
        "RANGE_ESTIMATORS",
        "_GIVERS",
        "Payload",
    ):
        assert re.search(rf"\b{name}\b", code), name
        assert name in CONTRIBUTING


def test_the_changelog_knows_the_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert f"\n## {lightning_cco.__version__}" in changelog
    headings = set(re.findall(r"^### (.*)$", changelog, flags=re.MULTILINE))
    assert headings <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


@pytest.mark.parametrize("name", [".pre-commit-config.yaml", ".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"])
def test_the_forms_are_yaml(name: str) -> None:
    assert yaml.safe_load((ROOT / name).read_text(encoding="utf-8"))


def test_no_link_is_a_file_of_the_repository() -> None:
    """A link to an environment elsewhere, which the targets of the Makefile would take for one of their own."""
    listed = subprocess.run(["git", "ls-files", "--stage"], cwd=ROOT, capture_output=True, text=True, check=False)
    if listed.returncode:
        pytest.skip("not a checkout")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]


def test_every_public_docstring_has_an_example() -> None:
    public = {name: getattr(lightning_cco, name) for name in lightning_cco.__all__}
    described = {name: value for name, value in public.items() if inspect.isclass(value) or inspect.isfunction(value)}
    described |= {
        f"QuantizedModel.{name}": value
        for name, value in vars(lightning_cco.QuantizedModel).items()
        if inspect.isfunction(value) and name[0] != "_"
    }
    assert len(described) > 15
    assert [name for name, value in described.items() if ">>>" not in (inspect.getdoc(value) or "")] == []


def test_the_slow_tests_are_there() -> None:
    """A test that was renamed, and not in the list, would run in `make test`."""
    lines = [line for line in (ROOT / "tests/slow_tests.txt").read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    assert len(lines) == len(set(lines))
    sources: dict[str, str] = {}
    gone = []
    for line in lines:
        path, _, name = line.partition("::")
        source = sources.setdefault(path, (ROOT / path).read_text(encoding="utf-8") if (ROOT / path).is_file() else "")
        function = name.partition("[")[0]
        if not (f"def {function}(" in source or function.startswith("lightning_cco.")):
            gone.append(line)
    assert gone == []
