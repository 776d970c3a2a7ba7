"""Read statistics that ``yopo calibrate --stats`` wrote, and refuse what is none or damaged."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from yopo.calibration.statistics import FORMAT, MAX_COUNT, Statistics, sum_sizes
from yopo.plans.extent import Extent, extent_problem
from yopo.plans.grid import Grid
from yopo.plans.schema import (
    ModelIdentity,
    ModelShape,
    Workload,
    model_path,
    reduction_problem,
    shape_problem,
    workload_problem,
)
from yopo.reduction.registry import read_method
from yopo.support.errors import DataError, PlanError


def load_statistics(path: str | Path) -> Statistics:
    """Read statistics that ``calibrate --stats`` wrote.

    Raises:
        DataError: Missing, not safetensors, not statistics of this version, damaged, or holding
            values that are not finite.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such statistics file.")
    try:
        with safe_open(path, framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("yopo", "{}"))
            is_ours = isinstance(about, dict) and about.get("format") == FORMAT
            tensors = {name: file.get_tensor(name) for name in file.keys()} if is_ours else {}
    except (SafetensorError, OSError) as error:
        raise DataError(f"{path}: is not a safetensors file: {error}.") from error
    except (ValueError, KeyError, RuntimeError, RecursionError) as error:
        raise _damaged(path, type(error).__name__) from error
    if not is_ours:
        raise DataError(
            f"{path}: holds no yopo statistics of this version.",
            remedy="Write them with `yopo calibrate --stats FILE`.",
        )
    try:
        found = from_parts(tensors, about, path.absolute().parent)
    except PlanError as error:
        raise _damaged(path, error.message.rstrip(".")) from error
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from error
    problem = _first_problem(found)
    if problem is not None:
        raise _damaged(path, problem)
    try:
        found.check_finite()
    except DataError as error:
        remedy = "The file is damaged, since such statistics are never written: calibrate again."
        raise DataError(f"{path}: {error.message}", remedy=remedy) from error
    return found


def from_parts(tensors: dict[str, torch.Tensor], about: dict[str, Any], folder: Path) -> Statistics:
    """Inverse of ``Statistics.parts``, by way of JSON; does not check what it is given.

    Args:
        tensors: By name.
        about: The plain values; used up.
        folder: From which a hint leads to the model.
    """
    del about["format"]
    identity, workload = about.pop("model"), about.pop("workload")
    if identity.get("path") is not None:
        identity["path"] = model_path(identity["path"], folder)
    shape = ModelShape(**identity.pop("shape"))
    grids = tuple(Grid(**grid) for grid in workload.pop("grids"))
    if "text_between" in workload:  # files of former versions have none
        workload["text_between"] = tuple(workload["text_between"])
    extent = about.pop("extent", None)  # statistics of former versions have none
    if extent is not None:
        smallest, largest = (Grid(**extent.pop(name)) for name in ("smallest", "largest"))
        about["extent"] = Extent(smallest, largest, **extent)
    if "reduction" in about:
        about["reduction"] = read_method(about["reduction"])
    if "key_square_sum" not in tensors:  # what older files lack
        size = sum_sizes(shape)["key_square_sum"]
        nothing = torch.zeros((), dtype=torch.float64).expand(size)  # its size is yet unchecked
        tensors = {**tensors, "key_square_sum": nothing}
    known: dict[str, Any] = {**tensors, **about}  # unknown or missing names raise a TypeError
    return Statistics(
        model=ModelIdentity(shape=shape, **identity),
        workload=Workload(grids=grids, **workload),
        **known,
    )


def _first_problem(found: Statistics) -> str | None:
    """The first problem of statistics from a file: a type, a size or a count."""
    model, workload = found.model, found.workload
    texts = (model.name, model.family, model.fingerprint)
    numbers = [*vars(model.shape).values(), workload.text, workload.text_before]
    numbers += [size for grid in workload.grids for size in (grid.rows, grid.cols)]
    numbers += [*workload.text_between, workload.row_ends]
    numbers += [found.visual_tokens, found.text_queries]
    if not all(isinstance(each, str) for each in texts) or not isinstance(found.provenance, dict):
        return "its model has no name, family or fingerprint"
    if found.extent is not None:
        ends = (found.extent.smallest, found.extent.largest)
        numbers += [size for grid in ends for size in (grid.rows, grid.cols)]
        numbers.append(found.extent.images)
    if not all(type(each) is int and 0 <= each <= MAX_COUNT for each in numbers):
        return "it holds an invalid size or count"
    wrong = shape_problem(model.shape) or workload_problem(workload)
    wrong = wrong or extent_problem(found.extent) or reduction_problem(found.reduction)
    if wrong is not None:
        return f"{'.'.join(wrong[0])} {wrong[1]}"
    shape = model.shape
    expected = {**sum_sizes(shape), "down_norm": (shape.layers, shape.ffn)}
    samples = found.rho.shape[:1]
    expected["rho"] = (max(1, *samples) if samples else 1, shape.layers, shape.heads)
    for name, size in expected.items():
        tensor = getattr(found, name)
        if tuple(tensor.shape) != size or not tensor.is_floating_point():
            return f"{name} has shape {tuple(tensor.shape)}, expected {size}"
    return None


def _damaged(path: Path, problem: str) -> DataError:
    return DataError(
        f"{path}: is damaged: {problem}.",
        remedy="Write it again with `yopo calibrate --stats FILE`.",
    )
