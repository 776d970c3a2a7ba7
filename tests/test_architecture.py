"""The layout that DESIGN section 4 draws: imports go down only, and everything stays small."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import yopo

ROOT = Path(yopo.__file__).parent
MODULES = sorted(ROOT.rglob("*.py"))
MAX_MODULE_LINES = 350
MAX_FUNCTION_LINES = 70

LEVELS: tuple[tuple[str, ...], ...] = (
    ("support",),
    ("plans",),
    ("models",),
    ("demo", "strategies"),
    ("data",),
    ("calibration", "checkpoint", "runtime"),  # siblings: none imports another
    ("baselines", "conversion", "fitting"),
    ("planning",),
    ("evaluation", "serving"),
    ("bench",),
    ("pipeline",),
    ("report",),
    ("cli",),
)
"""Low to high; an entry is a module of ``yopo`` or a package with all that is inside it."""

LEVEL_OF = {unit: level for level, units in enumerate(LEVELS) for unit in units}

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
    "yopo.plans.schema",
    "yopo.plans.side_file",
    "yopo.plans.tensors",
    "yopo.models.registry",
    "yopo.baselines.baseline",
    "yopo.baselines.registry",
    "yopo.planning.request",
    "yopo.report.json",
    "yopo.report.summary",
    "yopo.cli.main",
    "yopo.cli.options",
)


def name_of(path: Path) -> str:
    parts = path.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


def unit_of(module: str) -> str:
    """What has a level: the first name inside ``yopo`` (empty for the root, which has none)."""
    return module.split(".")[1] if "." in module else ""


def tree_of(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"), str(path))


NAMES = {name_of(path) for path in MODULES}


def imports(path: Path) -> Iterator[tuple[int, str]]:
    """(line, module of yopo) of every import, those inside functions and relative ones included."""
    package = name_of(path) if path.name == "__init__.py" else name_of(path).rpartition(".")[0]
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            joined = [f"{base}.{alias.name}" for alias in node.names]
            found = [name if name in NAMES else base for name in joined]
        else:
            continue
        for name in found:
            if name.split(".")[0] == "yopo":
                yield node.lineno, name


def test_the_package_was_found() -> None:
    assert {"yopo", "yopo.plans.schema", "yopo.runtime.install"} <= NAMES


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_every_module_has_a_level_and_imports_lower_ones_only(path: Path) -> None:
    unit = unit_of(name_of(path))
    if unit:
        assert unit in LEVEL_OF, f"{unit} has no level: add it to LEVELS, or move it"
    for line, name in imports(path):
        other = unit_of(name)
        if other in ("", unit):
            continue
        assert other in LEVEL_OF, f"{path}:{line} imports {name}, which has no level"
        assert unit, f"{path}:{line}: the root package imports nothing when it is imported"
        assert LEVEL_OF[other] < LEVEL_OF[unit], f"{path}:{line}: {unit} may not import {name}"


def test_evaluation_knows_no_baselines() -> None:
    """A plan is measured the same way as what it has to beat, and without it."""
    found = [
        (name_of(path), name)
        for path in MODULES
        if unit_of(name_of(path)) == "evaluation"
        for _, name in imports(path)
        if unit_of(name) == "baselines"
    ]
    assert found == []


def test_no_level_names_what_does_not_exist() -> None:
    assert set(LEVEL_OF) == {unit_of(name) for name in NAMES} - {""}


def test_there_are_no_cycles() -> None:
    """Inside a package, where levels say nothing; importing a package imports its ``__init__``."""
    graph = {
        name_of(path): {name for _, name in imports(path)} - {name_of(path)} for path in MODULES
    }
    done: set[str] = set()

    def visit(name: str, trail: tuple[str, ...]) -> None:
        assert name not in trail, f"cycle: {' -> '.join((*trail, name))}"
        if name not in done:
            for other in graph.get(name, ()):
                visit(other, (*trail, name))
            done.add(name)

    for name in graph:
        visit(name, ())


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_modules_and_functions_are_short(path: Path) -> None:
    lines = len(path.read_text(encoding="utf-8").splitlines())
    assert lines <= MAX_MODULE_LINES, f"{path} has {lines} lines"
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            size = node.end_lineno - node.lineno + 1
            assert size <= MAX_FUNCTION_LINES, f"{path}:{node.lineno}: {node.name}, {size} lines"


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_light_modules_import_neither_torch_nor_transformers(module: str) -> None:
    assert module in NAMES
    code = (
        f"import sys, {module}\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imports {sorted(heavy)}' if heavy else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_public_name_can_be_had() -> None:
    for name in yopo.__all__:
        assert getattr(yopo, name) is not None
    assert set(yopo.__all__) <= set(dir(yopo))


def test_an_unknown_public_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'prune'"):
        _ = yopo.prune
