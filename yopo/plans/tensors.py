"""The tensors that belong to a plan: neuron orders, and what compensation adds or fits.

They live in a safetensors file beside ``plan.yaml``, which names it with its sha256. A plan that
goes to stdout leaves them in a content-addressed cache, so that a pipeline can still apply it.
"""

from __future__ import annotations

import hashlib
import math
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from yopo.plans.file import read_plan, to_yaml
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan, TensorsFile
from yopo.plans.tensors_file import (
    check_plan_writable,
    own_side_file,
    remove_unless_named,
    write_side_file,
)
from yopo.support.errors import PlanError
from yopo.support.files import write_file
from yopo.support.finite import is_finite
from yopo.support.reading import read_bytes

Refit = Mapping[str, torch.Tensor]
"""One layer's fitted weights for visual tokens, by name: see :func:`refit_sizes`."""

_DTYPES = {
    "neuron_order": torch.int32,
    "neuron_mean": torch.float32,
    "head_mean": torch.float32,
}


@dataclass(frozen=True)
class PlanTensors:
    """What a plan needs beside its numbers.

    Attributes:
        neuron_order: (layers, ffn) int64, each layer's neurons from most to least important;
            None if the checkpoint's neurons already stand in that order (baked).
        neuron_mean: (layers, ffn) float32, mean FFN activation over visual tokens in the
            checkpoint's own neuron order; None without ``mean`` compensation.
        head_mean: (layers, heads, head_dim) float32, mean attention output of every query head
            over visual tokens; None without ``mean`` compensation.
        refit: Layer -> its fitted weights; layers without any are left out, and all of them
            without ``refit`` compensation.
    """

    neuron_order: torch.Tensor | None = None
    neuron_mean: torch.Tensor | None = None
    head_mean: torch.Tensor | None = None
    refit: Mapping[int, Refit] = field(default_factory=dict)

    def to_bytes(self) -> bytes:
        """Serialise as safetensors; the same tensors give the same bytes."""
        stored = {}
        for name, kind in _DTYPES.items():
            tensor = getattr(self, name)
            if tensor is not None:
                stored[name] = tensor.detach().to("cpu", kind).contiguous()
        for layer, weights in self.refit.items():
            for name, tensor in weights.items():
                stored[f"refit.{layer}.{name}"] = tensor.detach().to("cpu").contiguous()
        return save(stored, metadata={"format": "pt"})

    @classmethod
    def from_bytes(cls, data: bytes) -> PlanTensors:
        """Inverse of ``to_bytes``.

        Raises:
            SafetensorError: Not safetensors, or tensors of a kind that torch or a plan lacks.
        """
        try:
            stored = load(data)
        except (KeyError, ValueError, RuntimeError, TypeError) as error:  # a dtype torch lacks, say
            raise SafetensorError(f"{type(error).__name__}: {error}") from error
        for name, tensor in stored.items():
            if tensor.is_complex() or tensor.is_floating_point() == (name == "neuron_order"):
                kind = str(tensor.dtype).removeprefix("torch.")
                raise SafetensorError(f"'{name}' holds values of type {kind}")
        order = stored.get("neuron_order")
        refit: dict[int, dict[str, torch.Tensor]] = {}
        for name, tensor in stored.items():
            kind, _, rest = name.partition(".")
            layer, _, weight = rest.partition(".")
            if kind == "refit" and layer.isdecimal() and len(layer) < 6:
                refit.setdefault(int(layer), {})[weight] = tensor
        return cls(
            neuron_order=None if order is None else order.long(),
            neuron_mean=stored.get("neuron_mean"),
            head_mean=stored.get("head_mean"),
            refit=dict(sorted(refit.items())),
        )

    def of_layers(self, indices: Sequence[int]) -> PlanTensors:
        """The tensors of some layers, numbered anew."""
        rows = list(indices)
        parts = {name: getattr(self, name) for name in _DTYPES}
        parts = {name: None if each is None else each[rows] for name, each in parts.items()}
        refit = {new: self.refit[old] for new, old in enumerate(rows) if old in self.refit}
        return PlanTensors(**parts, refit=refit)

    def for_plan(self, plan: PruningPlan) -> PlanTensors:
        """Those of the tensors that a plan uses."""
        means = plan.compensation == "mean"
        return PlanTensors(
            neuron_order=self.neuron_order if plan.needs_order else None,
            neuron_mean=self.neuron_mean if means else None,
            head_mean=self.head_mean if means else None,
            refit=self.refit if plan.compensation == "refit" else {},
        )


def refit_sizes(layer: LayerPlan, shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Names and sizes of the weights that ``refit`` compensation fits in one layer.

    ``reduce`` (rank, hidden) takes normed visual states into the bottleneck; ``query``, ``key``
    and ``value`` (rows, rank) with their biases lead out of it, for the heads of ``attend`` and
    for the kept KV heads, ascending. ``output`` (hidden, columns) replaces the output projection
    where a part of the heads attends, ``down`` (hidden, neurons) the down projection where a part
    of the neurons is used, in order of importance. ``map_out @ map_in`` is the linear map;
    ``ffn_bias`` goes with ``down`` or the map.
    """
    hidden, sizes = shape.hidden, {}
    queries = len(layer.attend) * shape.head_dim
    keys = len(layer.kept_kv(shape)) * shape.head_dim
    if layer.rank is not None:
        sizes["reduce"] = (layer.rank, hidden)
        for name, rows in (("query", queries), ("key", keys), ("value", keys)):
            if rows:
                sizes |= {name: (rows, layer.rank), f"{name}_bias": (rows,)}
    if 0 < len(layer.attend) < shape.heads:
        sizes |= {"output": (hidden, queries), "output_bias": (hidden,)}
    if 0 < layer.neurons < shape.ffn:
        sizes["down"] = (hidden, layer.neurons)
    if layer.linear:
        sizes |= {"map_in": (layer.linear, hidden), "map_out": (hidden, layer.linear)}
    if "down" in sizes or "map_in" in sizes:
        sizes["ffn_bias"] = (hidden,)
    return sizes


def cache_directory() -> Path:
    """Where tensors of plans on stdout are kept: ``$YOPO_CACHE`` or ``~/.cache/yopo``."""
    return Path(os.environ.get("YOPO_CACHE") or Path.home() / ".cache" / "yopo")


def write_plan(
    plan: PruningPlan, tensors: PlanTensors | None, target: str, *, force: bool
) -> PruningPlan:
    """Write ``plan.yaml`` and its side file, or the plan to stdout for ``-``.

    The side file has its hash in its name, ``plan.1a2b3c4d.safetensors``, so that it never takes
    the place of the one that an older plan names: a plan and its tensors are a pair at every
    moment. The replaced plan's own tensors go last.

    Args:
        plan: The plan; its ``tensors`` entry is set here.
        tensors: Its tensors, or None if it needs none.
        target: Path of the YAML file, or ``-``.
        force: Whether an existing plan may be replaced.

    Returns:
        The plan as written.

    Raises:
        OutputError: A file exists (without ``force``), is no plan, or cannot be written.
    """
    data = tensors.to_bytes() if tensors is not None else None
    path = Path(target)
    if data is not None:
        sha256 = hashlib.sha256(data).hexdigest()
        side = sha256 if target == "-" else f"{path.stem}.{sha256[:8]}"
        plan = replace(plan, tensors=TensorsFile(f"{side}.safetensors", sha256))
    if target == "-":
        if data is not None:
            write_side_file(cache_directory() / plan.tensors.file, data)
        sys.stdout.write(to_yaml(plan))
        sys.stdout.flush()
        return plan
    check_plan_writable(path, force=force)
    former = _former_side_file(path)
    if data is not None:
        write_side_file(path.with_name(plan.tensors.file), data)
    write_file(path, to_yaml(plan).encode())
    if former is not None and (plan.tensors is None or former.name != plan.tensors.file):
        remove_unless_named(former)
    return plan


def _former_side_file(path: Path) -> Path | None:
    try:
        named = read_plan(path).tensors if path.exists() else None
    except PlanError:  # edited, and wrong now: what it named stays
        return None
    return None if named is None else own_side_file(path, named)


def read_plan_with_tensors(source: str | Path) -> tuple[PruningPlan, PlanTensors | None]:
    """Read a plan and the tensors that it names, from beside it or from the cache.

    Raises:
        PlanError: The plan is invalid, or its side file is missing, altered or misshapen.
    """
    plan = read_plan(source)
    if plan.tensors is None:
        return plan, None
    folder = Path.cwd() if str(source) == "-" else Path(source).absolute().parent
    return plan, read_tensors(plan, folder)


def read_tensors(plan: PruningPlan, folder: Path) -> PlanTensors:
    """Read and check a plan's side file from ``folder``, or else from the cache."""
    named = plan.tensors
    candidates = [folder / named.file, cache_directory() / f"{named.sha256}.safetensors"]
    path = next((each for each in candidates if os.path.lexists(each)), None)
    if path is None or not path.exists():
        raise PlanError(
            f"{candidates[0]}: the plan's tensors are missing.",
            remedy="Keep the .safetensors file beside the plan, or calibrate again.",
        )
    _check_inside(path)
    data = read_bytes(path, limit=_most_bytes(plan), error=PlanError)
    found = hashlib.sha256(data).hexdigest()
    if found != named.sha256:
        raise PlanError(
            f"{path}: is not the file that the plan names (sha256 {found[:12]}..., "
            f"expected {named.sha256[:12]}...).",
            remedy="The plan and its tensors come from different runs; calibrate again.",
        )
    try:
        tensors = PlanTensors.from_bytes(data)
    except SafetensorError as error:
        raise PlanError(f"{path}: is not a safetensors file: {error}.") from error
    check_tensors(plan, tensors, str(path))
    return tensors


def _check_inside(path: Path) -> None:
    """Refuse a link that leads out of its folder, other than into the hub's cache of blobs."""
    folder, real = path.parent.resolve(), path.resolve()
    blobs = [each.parent / "blobs" for each in folder.parents if each.name == "snapshots"]
    blobs += [folder.parent / "blobs"] if folder.name == "snapshots" else []
    if real.parent not in (folder, *blobs):
        raise PlanError(
            f"{path}: is a link that leads out of its folder.",
            remedy="Put the file itself beside the plan.",
        )


def _most_bytes(plan: PruningPlan) -> int:
    """What a side file of this plan may hold at most: 8 bytes a value, and some for its header."""
    shape = plan.model.shape
    values = shape.layers * (2 * shape.ffn + shape.heads * shape.head_dim)
    for layer in plan.layers:
        values += sum(math.prod(size) for size in refit_sizes(layer, shape).values())
    return 8 * values + (1 << 20)


def check_tensors(plan: PruningPlan, tensors: PlanTensors, where: str) -> None:
    """Check that tensors are all that a plan needs, and of its model's shape.

    Args:
        plan: The plan.
        tensors: Its tensors.
        where: What messages call them: the side file's path, or the plan's name in memory.

    Raises:
        PlanError: One is missing, misshapen or not finite, or an order is no permutation.
    """
    shape = plan.model.shape
    expected = {
        "neuron_order": (shape.layers, shape.ffn),
        "neuron_mean": (shape.layers, shape.ffn),
        "head_mean": (shape.layers, shape.heads, shape.head_dim),
    }
    for name, size in expected.items():
        tensor = getattr(tensors, name)
        if tensor is not None and tuple(tensor.shape) != size:
            raise PlanError(f"{where}: {name} has shape {tuple(tensor.shape)}, expected {size}.")
    order = tensors.neuron_order
    if order is None and plan.needs_order and not plan.baked:
        raise PlanError(f"{where}: lacks neuron_order, which the plan needs.")
    if order is not None and not torch.equal(
        order.sort(dim=1).values, torch.arange(shape.ffn).expand_as(order)
    ):
        raise PlanError(f"{where}: neuron_order is not a permutation of the neurons.")
    if plan.compensation == "mean" and (tensors.neuron_mean is None or tensors.head_mean is None):
        raise PlanError(f"{where}: lacks the means that 'compensation: mean' needs.")
    if plan.compensation == "refit":
        _check_refit(plan, tensors.refit, where)
    for name, tensor in _floats(tensors):
        if not is_finite(tensor):
            raise PlanError(
                f"{where}: {name} holds values that are not finite.", remedy="Calibrate again."
            )


def _floats(tensors: PlanTensors) -> Iterator[tuple[str, torch.Tensor]]:
    """(what messages call it, tensor) of all that is not an order."""
    for name in ("neuron_mean", "head_mean"):
        if getattr(tensors, name) is not None:
            yield name, getattr(tensors, name)
    for layer, weights in tensors.refit.items():
        for name, tensor in weights.items():
            yield f"layer {layer}'s fitted '{name}'", tensor


def _check_refit(plan: PruningPlan, refit: Mapping[int, Refit], where: str) -> None:
    for index, layer in enumerate(plan.layers[: plan.visual_depth]):
        found = {name: tuple(tensor.shape) for name, tensor in refit.get(index, {}).items()}
        expected = refit_sizes(layer, plan.model.shape)
        for name in sorted({*found, *expected}):
            if found.get(name) != expected.get(name):
                raise PlanError(
                    f"{where}: layer {index}'s fitted '{name}' has shape {found.get(name)}, "
                    f"expected {expected.get(name)}.",
                    remedy="Fitted weights belong to one plan: calibrate again instead of editing.",
                )
