"""Plans on disk and in pipelines: ``plan.yaml`` and, next to it, a safetensors file of tensors.

The YAML names the side file with its sha256. The tensors of a plan on stdout are kept in a
content-addressed cache, so that a pipeline can still apply it.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from yopo.plans.checks import check_tensors
from yopo.plans.file import TensorsFile, folder_of, read_document, to_yaml
from yopo.plans.schema import PruningPlan
from yopo.plans.side_file import (
    check_plan_writable,
    own_side_file,
    remove_unless_named,
    write_side_file,
)
from yopo.plans.tensors import PlanTensors, refit_sizes
from yopo.support.errors import PlanError
from yopo.support.files import write_file
from yopo.support.reading import read_bytes

_DTYPES = {
    "neuron_order": torch.int32,
    "neuron_mean": torch.float32,
    "head_mean": torch.float32,
    "key_scale": torch.float32,
}


def to_bytes(tensors: PlanTensors) -> bytes:
    """Serialize as safetensors; the same tensors give the same bytes."""
    stored = {
        name: tensor.detach().to("cpu", _DTYPES.get(name, tensor.dtype)).contiguous()
        for name, tensor in tensors.named()
    }
    return save(stored, metadata={"format": "pt"})


def from_bytes(data: bytes) -> PlanTensors:
    """Inverse of :func:`to_bytes`.

    Raises:
        SafetensorError: Not safetensors, or a dtype that torch or a plan does not support.
    """
    try:
        stored = load(data)
    except (KeyError, ValueError, RuntimeError, TypeError) as error:  # such as an unknown dtype
        raise SafetensorError(f"{type(error).__name__}: {error}") from error
    for name, tensor in stored.items():
        if tensor.is_complex() or tensor.is_floating_point() == (name == "neuron_order"):
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise SafetensorError(f"'{name}' holds values of type {dtype}")
    order = stored.get("neuron_order")
    refit: dict[int, dict[str, torch.Tensor]] = {}
    for name, tensor in stored.items():
        kind, _, rest = name.partition(".")
        layer, _, weight = rest.partition(".")
        if kind == "refit" and layer.isdecimal() and len(layer) < 6:
            refit.setdefault(int(layer), {})[weight] = tensor
    return PlanTensors(
        neuron_order=None if order is None else order.long(),
        neuron_mean=stored.get("neuron_mean"),
        head_mean=stored.get("head_mean"),
        refit=dict(sorted(refit.items())),
        key_scale=stored.get("key_scale"),
    )


def cache_directory() -> Path:
    """Directory for the tensors of plans on stdout: ``$YOPO_CACHE`` or ``~/.cache/yopo``."""
    return Path(os.environ.get("YOPO_CACHE") or Path.home() / ".cache" / "yopo")


def plan_files(
    plan: PruningPlan, name: str, tensors_name: str, folder: Path | None = None
) -> Mapping[str, bytes]:
    """A plan as file contents by name: its tensors, if it has any, and last the YAML.

    Args:
        plan: The plan.
        name: Name of the YAML file.
        tensors_name: Name of the tensors file; ``{sha256}`` is replaced by its digest.
        folder: As for ``to_yaml``.
    """
    files, named = {}, None
    if plan.tensors.num_bytes:
        data = to_bytes(plan.tensors)
        sha256 = hashlib.sha256(data).hexdigest()
        named = TensorsFile(tensors_name.format(sha256=sha256), sha256)
        files[named.file] = data
    return {**files, name: to_yaml(plan, named, folder).encode()}


def write_plan(plan: PruningPlan, target: str | Path, *, force: bool = False) -> None:
    """Write ``plan.yaml`` and its side file, or the plan to stdout for ``-``.

    The side file has its hash in its name, ``plan.1a2b3c4d.safetensors``, so that it never replaces
    the one that an older plan names: a plan and its tensors always match. The replaced plan's own
    tensors are removed last.

    Example:
        >>> yopo.write_plan(found.plan, "other.yaml")

    Args:
        plan: The plan.
        target: Path of the YAML file, or ``-``.
        force: Whether an existing plan may be replaced.

    Raises:
        OutputError: A file exists (without ``force``), is not a plan, or cannot be written.
        PlanError: The plan lacks tensors that it needs.
    """
    check_tensors(plan)
    target = str(target)
    if target == "-":
        files = plan_files(plan, target, "{sha256}.safetensors", folder_of(target))
        for name, content in files.items():
            if name != target:
                write_side_file(cache_directory() / name, content)
        sys.stdout.write(files[target].decode())
        sys.stdout.flush()
        return
    path = Path(target)
    check_plan_writable(path, force=force)
    former = _former_side_file(path)
    escaped = path.stem.replace("{", "{{").replace("}", "}}")
    side_name = escaped + ".{sha256:.8}.safetensors"
    files = plan_files(plan, path.name, side_name, folder_of(path))
    for name, content in files.items():
        if name != path.name:
            write_side_file(path.with_name(name), content)
    write_file(path, files[path.name])
    if former is not None and former.name not in files:
        remove_unless_named(former)


def _former_side_file(path: Path) -> Path | None:
    try:
        named = read_document(path)[1] if path.exists() else None
    except PlanError:  # edited and now invalid: keep the file that it named
        return None
    return None if named is None else own_side_file(path, named)


def read_plan(source: str | Path) -> PruningPlan:
    """Read a plan from a file, or from stdin for ``-``, together with its tensors.

    Example:
        >>> plan = yopo.read_plan("plan.yaml")
        >>> plan.budget.reached < 0.26
        True

    Raises:
        PlanError: Unreadable, not YAML, unknown key, wrong type or value (names line and key); or
            the side file is missing, altered or misshapen.
    """
    plan, named = read_document(source)
    if named is None:
        return plan
    candidates = [folder_of(source) / named.file, cache_directory() / f"{named.sha256}.safetensors"]
    path = next((each for each in candidates if os.path.lexists(each)), None)
    if path is None or not path.exists():
        raise PlanError(
            f"{candidates[0]}: the plan's tensors are missing.",
            remedy="Keep the .safetensors file next to the plan, or calibrate again.",
        )
    plan = replace(plan, tensors=_read_tensors(path, named, plan))
    check_tensors(plan, str(path))
    return plan


def _read_tensors(path: Path, named: TensorsFile, plan: PruningPlan) -> PlanTensors:
    _check_inside(path)
    data = read_bytes(path, limit=_max_bytes(plan), error=PlanError)
    found = hashlib.sha256(data).hexdigest()
    if found != named.sha256:
        raise PlanError(
            f"{path}: is not the file that the plan names (sha256 {found[:12]}..., "
            f"expected {named.sha256[:12]}...).",
            remedy="The plan and its tensors are from different runs; calibrate again.",
        )
    try:
        return from_bytes(data)
    except SafetensorError as error:
        raise PlanError(f"{path}: is not a safetensors file: {error}.") from error


def _check_inside(path: Path) -> None:
    """Refuse a link that leads out of its folder, except into the hub cache's blobs."""
    folder, real = path.parent.resolve(), path.resolve()
    blobs = [each.parent / "blobs" for each in folder.parents if each.name == "snapshots"]
    blobs += [folder.parent / "blobs"] if folder.name == "snapshots" else []
    if real.parent not in (folder, *blobs):
        raise PlanError(
            f"{path}: is a link that leads out of its folder.",
            remedy="Put the file itself next to the plan.",
        )


def _max_bytes(plan: PruningPlan) -> int:
    """Maximum size of this plan's side file: 8 bytes per value, plus some for its header."""
    shape = plan.model.shape
    values = shape.layers * (2 * shape.ffn + 2 * shape.heads * shape.head_dim)
    for layer in plan.layers:
        values += sum(math.prod(size) for size in refit_sizes(layer, shape).values())
    return 8 * values + (1 << 20)
