"""Modules are short and light; import-linter keeps the rooms apart (pyproject.toml)."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

import yopo

MODULES = sorted(Path(yopo.__file__).parent.rglob("*.py"))
TESTS = Path(__file__).parent
MAX_MODULE_LINES = 350

WITHOUT_TORCH = (
    "yopo",
    "yopo.support.console",
    "yopo.support.documents",
    "yopo.support.errors",
    "yopo.support.files",
    "yopo.support.reading",
    "yopo.plans.file",
    "yopo.plans.flops",
    "yopo.plans.grid",
    "yopo.plans.layer_file",
    "yopo.plans.layer_plan",
    "yopo.plans.places",
    "yopo.plans.quality",
    "yopo.plans.schema",
    "yopo.plans.servable",
    "yopo.plans.side_file",
    "yopo.plans.tensors",
    "yopo.models.registry",
    "yopo.baselines.baseline",
    "yopo.baselines.registry",
    "yopo.planning.request",
    "yopo.reduction.registry",
    "yopo.report.compare",
    "yopo.report.json",
    "yopo.report.summary",
    "yopo.cli.main",
    "yopo.cli.options",
)


@pytest.mark.parametrize("path", MODULES, ids=lambda path: "/".join(path.parts[-2:]))
def test_modules_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES, f"{path} has {lines} lines"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    assert importlib.util.find_spec(module) is not None
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_imported() -> None:
    for name in yopo.__all__:
        assert getattr(yopo, name) is not None
    assert set(yopo.__all__) <= set(dir(yopo))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = yopo.prune


def skipped_without(path: Path) -> set[str]:
    """Top-level names of the packages without which tests of the file are skipped."""
    return {
        str(name).partition(".")[0]
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("importorskip")
        for name in [ast.literal_eval(node.args[0])]
    }


def test_no_folder_of_tests_is_taken_for_a_package() -> None:
    """Folders of tests are on sys.path: one beside them would be found where a package is not."""
    packages = set().union(*(skipped_without(path) for path in TESTS.rglob("*.py")))
    assert "vllm" in packages
    assert not packages & {path.name for path in TESTS.rglob("*") if path.is_dir()}
