"""Writing and reading plan.yaml: versioned, diffable, editable by hand.

Identical plans give identical bytes: no timestamps, no machine paths, fixed key order and rounding.
Tensors are kept in a safetensors file next to it, named with its sha256.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from yopo.plans.extent import Extent
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.layer_file import as_spelled, layer_to_dict, read_layers
from yopo.plans.schema import (
    Budget,
    InvalidPlan,
    Measured,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
    model_path,
    shape_problem,
)
from yopo.support import console
from yopo.support.documents import Document, Key, describe, dump, read_text
from yopo.support.errors import PlanError

FORMAT_VERSION = 1

BUDGET_DIGITS = 6
"""Decimals to which a visual budget is written."""


@dataclass(frozen=True)
class TensorsFile:
    """The side file with a plan's tensors: its name, in the plan's folder, and its sha256."""

    file: str
    sha256: str


_SHAPE_KEYS = ("layers", "hidden", "heads", "kv_heads", "head_dim", "ffn")
_WORKLOAD_KEYS = ("grids", "text", "text_before", "text_between", "row_ends")
_EXTENT_KEYS = ("smallest", "largest", "images")
_KEYS = (
    "yopo_plan",
    "model",
    "workload",
    "budget",
    "compensation",
    "bidirectional",
    "baked",
    "tensors",
    "layers",
    "measured",
    "calibrated",
    "provenance",
)


def to_yaml(
    plan: PruningPlan, tensors: TensorsFile | None = None, folder: Path | None = None
) -> str:
    """Serialize a plan, with a reference to its tensors' file; same plan, same bytes.

    Args:
        plan: The plan.
        tensors: Its tensors' file.
        folder: The folder of the plan's file, from which a hint leads to the model; None: no hint.
    """
    budget = {"asked": plan.budget.asked, "reached": round(plan.budget.reached, BUDGET_DIGITS)}
    data: dict[str, Any] = {
        "yopo_plan": FORMAT_VERSION,
        "model": plan.model.to_dict(folder),
        "workload": {
            "grids": [[grid.rows, grid.cols] for grid in plan.workload.grids],
            "text": plan.workload.text,
            "text_before": plan.workload.text_before,
            **_inner_text(plan.workload),
        },
        "budget": budget,
        "compensation": plan.compensation,
        "bidirectional": plan.bidirectional,
    }
    if plan.baked:
        data["baked"] = True
    if tensors is not None:
        data["tensors"] = asdict(tensors)
    data["layers"] = [layer_to_dict(layer, plan.model.shape) for layer in plan.layers]
    if plan.measured is not None:
        data["measured"] = {
            "rho": [[_short(value) for value in row] for row in plan.measured.rho],
            "cross_modal": [_short(value) for value in plan.measured.cross_modal],
            "concentration": [_short(value) for value in plan.measured.concentration],
            "locality": list(plan.measured.locality),
        }
    if plan.extent is not None:
        data["calibrated"] = _extent_to_dict(plan.extent)
    if plan.provenance:
        data["provenance"] = dict(plan.provenance)
    return dump(data)


def read_document(source: str | Path) -> tuple[PruningPlan, TensorsFile | None]:
    """Read and validate a plan from a file, or from stdin for ``-``, without its tensors.

    Returns:
        The plan, and the tensors file that it names.

    Raises:
        PlanError: Unreadable, not YAML, unknown key, wrong type or value; names line and key.
    """
    return parse_plan(*read_text(source), folder=folder_of(source))


def folder_of(source: str | Path) -> Path:
    """The folder that paths in a plan are relative to: the working directory for stdin."""
    return Path.cwd() if str(source) == "-" else Path(source).absolute().parent


def parse_plan(
    name: str, text: str, *, folder: Path | None = None
) -> tuple[PruningPlan, TensorsFile | None]:
    """Parse a plan's text like :func:`read_document`.

    Args:
        name: Its name in messages.
        text: YAML.
        folder: What the hint to the model is relative to; None ignores it.
    """
    document = Document(name, text)
    data = document.data
    if "yopo_plan" not in data:
        raise PlanError(
            f"{name}: is not a yopo plan (no key 'yopo_plan').",
            remedy="Make one with `yopo calibrate --model MODEL -o plan.yaml`.",
        )
    if document.typed(("yopo_plan",), data["yopo_plan"], int) != FORMAT_VERSION:
        found = f"{data['yopo_plan']!r}, this yopo reads version {FORMAT_VERSION}"
        raise document.error(("yopo_plan",), f"is {found}", remedy="Upgrade yopo.")
    document.check_keys((), data, _KEYS)
    for key in ("model", "workload", "layers"):
        if key not in data:
            raise document.error((), f"lacks the key '{key}'")
    model = _read_model(document, folder)
    try:
        plan = PruningPlan(
            model=model,
            workload=_read_workload(document),
            layers=read_layers(document, model.shape),
            budget=_read_budget(document),
            compensation=document.typed(("compensation",), data.get("compensation", "none"), str),
            bidirectional=document.typed(
                ("bidirectional",), data.get("bidirectional", False), bool
            ),
            baked=document.typed(("baked",), data.get("baked", False), bool),
            measured=_read_measured(document, model.shape),
            extent=_read_extent(document),
            provenance=document.typed(("provenance",), data.get("provenance") or {}, dict),
        )
    except InvalidPlan as invalid:
        raise document.error(as_spelled(document, invalid.path), invalid.problem) from None
    tensors = _read_tensors(document)
    if plan.needs_order and tensors is None and not plan.baked:
        raise document.error(
            ("tensors",), "must name the file with the neuron orders, because neurons are pruned"
        )
    return _with_true_budget(plan, data.get("budget") or {}, name), tensors


def _with_true_budget(plan: PruningPlan, said: dict[str, Any], name: str) -> PruningPlan:
    """The plan with the visual budget computed from its layers, whatever the file says.

    After editing layers by hand, the budget is easily forgotten, but commands select plans by it.
    """
    true = visual_budget(plan)
    if abs(true - plan.budget.reached) <= 10**-BUDGET_DIGITS:
        return plan
    if "reached" in said:
        console.note(
            f"{name}: states a visual budget of {plan.budget.reached:.4g}, but its layers come to "
            f"{true:.4g}; using the latter."
        )
    return replace(plan, budget=replace(plan.budget, reached=round(true, BUDGET_DIGITS)))


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _read_model(document: Document, folder: Path | None) -> ModelIdentity:
    path: tuple[Key, ...] = ("model",)
    data = document.check_keys(
        path, document.data["model"], ("name", "path", "family", "shape", "fingerprint")
    )
    hint = document.typed((*path, "path"), data.get("path"), (str, type(None)))
    place = model_path(hint, folder) if hint and folder is not None else None
    texts = {
        key: document.required(path, data, key, str) for key in ("name", "family", "fingerprint")
    }
    shape_path = (*path, "shape")
    shape = document.required(path, data, "shape", dict)
    document.check_keys(shape_path, shape, _SHAPE_KEYS)
    sizes = {key: document.required(shape_path, shape, key, int) for key in _SHAPE_KEYS}
    problem = shape_problem(ModelShape(**sizes))
    if problem is not None:  # check now: "heads: all" allocates as many heads as it says
        raise document.error(*problem)
    return ModelIdentity(shape=ModelShape(**sizes), path=place, **texts)


def _read_workload(document: Document) -> Workload:
    path: tuple[Key, ...] = ("workload",)
    data = document.check_keys(path, document.data["workload"], _WORKLOAD_KEYS)
    grids = []
    for index, pair in enumerate(document.required(path, data, "grids", list)):
        grids.append(_read_grid(document, (*path, "grids", index), pair))
    text = document.required(path, data, "text", int)
    before, ends = (
        document.typed((*path, key), data.get(key, 0), int) for key in ("text_before", "row_ends")
    )
    between = document.typed((*path, "text_between"), data.get("text_between", []), list)
    gaps = [
        document.typed((*path, "text_between", index), gap, int)
        for index, gap in enumerate(between)
    ]
    return Workload(tuple(grids), text, before, tuple(gaps), ends)


def _inner_text(workload: Workload) -> dict[str, Any]:
    """Text between and inside images, as far as there is any."""
    found: dict[str, Any] = {}
    if any(workload.text_between):
        found["text_between"] = list(workload.text_between)
    if workload.row_ends:
        found["row_ends"] = workload.row_ends
    return found


def _read_grid(document: Document, path: tuple[Key, ...], pair: Any) -> Grid:
    if not isinstance(pair, list) or len(pair) != 2:
        raise document.error(path, "must be [rows, columns]")
    return Grid(*(document.typed(path, size, int) for size in pair))


def _extent_to_dict(extent: Extent) -> dict[str, Any]:
    grids = {name: getattr(extent, name) for name in ("smallest", "largest")}
    sizes = {name: [grid.rows, grid.cols] for name, grid in grids.items()}
    return {**sizes, "images": extent.images}


def _read_extent(document: Document) -> Extent | None:
    path: tuple[Key, ...] = ("calibrated",)
    if document.data.get("calibrated") is None:
        return None
    data = document.check_keys(path, document.data["calibrated"], _EXTENT_KEYS)
    grids = {
        name: _read_grid(document, (*path, name), document.required(path, data, name, list))
        for name in ("smallest", "largest")
    }
    return Extent(**grids, images=document.required(path, data, "images", int))


def _read_budget(document: Document) -> Budget:
    data = document.check_keys(("budget",), document.data.get("budget") or {}, ("asked", "reached"))
    asked = document.typed(("budget", "asked"), data.get("asked"), (float, type(None)))
    return Budget(asked, document.typed(("budget", "reached"), data.get("reached", 1.0), float))


def _read_tensors(document: Document) -> TensorsFile | None:
    path: tuple[Key, ...] = ("tensors",)
    if document.data.get("tensors") is None:
        return None
    data = document.check_keys(path, document.data["tensors"], ("file", "sha256"))
    file, sha256 = (document.required(path, data, key, str) for key in ("file", "sha256"))
    if not _is_file_name(file):
        raise document.error(
            (*path, "file"), f"must be a file name in the plan's folder, found {describe(file)}"
        )
    if not re.fullmatch("[0-9a-f]{64}", sha256):
        raise document.error((*path, "sha256"), f"must be 64 hex digits, found {describe(sha256)}")
    return TensorsFile(file, sha256)


def _is_file_name(name: str) -> bool:
    is_special = name in ("", ".", "..") or len(name.encode()) > 255
    return not is_special and not re.search(r"[/\\\x00-\x1f]", name)


def _read_measured(document: Document, shape: ModelShape) -> Measured | None:
    path: tuple[Key, ...] = ("measured",)
    if document.data.get("measured") is None:
        return None
    keys = ("rho", "cross_modal", "concentration", "locality")
    data = document.check_keys(path, document.data["measured"], keys)
    rows = document.required(path, data, "rho", list)
    rho = []
    for index, row in enumerate(rows):
        here = (*path, "rho", index)
        values = document.typed(here, row, list)
        if len(values) != shape.heads:
            raise document.error(here, f"must have {shape.heads} values, found {len(values)}")
        rho.append(tuple(document.typed(here, value, float) for value in values))
    lists = {}
    for key, kind in (("cross_modal", float), ("concentration", float), ("locality", int)):
        values = document.required(path, data, key, list)
        lists[key] = tuple(document.typed((*path, key, i), v, kind) for i, v in enumerate(values))
    for key, values in (("rho", rho), *lists.items()):
        if len(values) != shape.layers:
            raise document.error(
                (*path, key), f"must have {shape.layers} entries, found {len(values)}"
            )
    return Measured(rho=tuple(rho), **lists)
