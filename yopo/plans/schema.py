"""The pruning plan: what visual tokens stop doing, layer by layer. Frozen, validated, no torch.

For every layer a plan says which query heads may read visual keys (``read_heads``), in which of
them visual tokens run attention as queries (``attend_heads``), how far they see (``radius``) and
how many FFN neurons they use (``neurons``, a prefix of the layer's importance order). The paper's
method (arXiv 2410.06169) is the case where the same heads read and attend and layers after a cut
are empty; visual token withdrawal, frozen visual tokens and vision-only cross-attention are others.

Text keeps the original weights, so visual tokens may get separate small ones, fitted on the
calibration pairs: projections through a bottleneck (``qkv_rank``), and a low-rank linear map that
replaces what the layer no longer computes for them (``map_rank``).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from yopo.plans.extent import Extent, extent_problem
from yopo.plans.layer_plan import LEVERS, LayerPlan, Lever, ModelShape, full_layer, layer_problem
from yopo.plans.tensors import PlanTensors
from yopo.plans.workload import Workload, workload_problem
from yopo.reduction.method import Method
from yopo.support.errors import PlanError

COMPENSATIONS = ("none", "mean", "refit")

LARGEST_SHAPE = {
    "layers": 512,
    "hidden": 1 << 17,
    "heads": 1024,
    "kv_heads": 1024,
    "head_dim": 1 << 13,
    "ffn": 1 << 20,
}
"""Several times the largest published decoders; anything larger is damaged or malicious."""


class InvalidPlan(PlanError):
    """A plan whose parts are inconsistent; ``path`` leads to the offending key."""

    def __init__(self, path: tuple[str | int, ...], problem: str):
        self.path, self.problem = path, problem
        label = "".join(f"[{key}]" if isinstance(key, int) else f".{key}" for key in path)
        super().__init__(f"plan: {label.lstrip('.')} {problem}.")


@dataclass(frozen=True)
class ModelIdentity:
    """The model that a plan was made for.

    Attributes:
        name: Alias, hub id or directory name as the user gave it; never a machine path.
        family: Name in the family registry.
        shape: Decoder dimensions.
        fingerprint: Digest of sampled decoder weights (see ``models.fingerprint``).
        path: Its directory on this machine, as a hint where to look; files have it relative to
            themselves. None: the name says enough.
    """

    name: str
    family: str
    shape: ModelShape
    fingerprint: str
    path: Path | None = field(default=None, compare=False)

    def to_dict(self, folder: Path | None = None) -> dict[str, Any]:
        """As plain values for a file.

        Args:
            folder: The file's folder, from which the path leads to the model; None: no path.
        """
        values = asdict(self)
        del values["path"]
        if self.path is None or folder is None:
            return values
        relative = os.path.relpath(self.path.resolve(), folder.resolve())
        return {"name": values.pop("name"), "path": Path(relative).as_posix(), **values}


def model_path(hint: str, folder: Path) -> Path:
    """The path of a model from the hint in a file.

    Args:
        hint: What ``ModelIdentity.to_dict`` wrote.
        folder: The file's folder.
    """
    return folder.absolute() / hint


@dataclass(frozen=True)
class Budget:
    """Visual FLOPs over dense visual FLOPs: requested (None without a budget) and reached."""

    asked: float | None
    reached: float


BEYOND_IMAGE = 65
"""In place of a radius where no radius in one image (or tile) holds as much attention."""


@dataclass(frozen=True)
class Measured:
    """Per-layer calibration results for reports; the runtime never reads them.

    Attributes:
        rho: Mean head activity, (layers, heads).
        cross_modal: Mean visual mass of the text queries after the image, (layers,).
        concentration: Share of the FFN neurons that carry 90 % of the importance, (layers,).
        locality: Radius that holds 90 % of the visual-to-visual attention mass, (layers,);
            ``BEYOND_IMAGE`` where only other images complete it.
    """

    rho: tuple[tuple[float, ...], ...]
    cross_modal: tuple[float, ...]
    concentration: tuple[float, ...]
    locality: tuple[int, ...]


@dataclass(frozen=True)
class PruningPlan:
    """A complete pruning plan. Construction validates it; a valid plan is never mutated.

    Example:
        >>> from dataclasses import replace
        >>> first = plan.layers[0]
        >>> less = replace(first, attend_heads=(), radius=None)
        >>> edited = plan.with_layers([less, *plan.layers[1:]])
        >>> edited.layers[0].attend_heads
        ()

    Attributes:
        model: The model that it was made for.
        workload: The prompt that its FLOPs and bytes are quoted for.
        layers: One entry per decoder layer.
        budget: Visual FLOPs requested and reached.
        compensation: ``mean`` adds to visual tokens, as a bias, what their pruned neurons and
            heads contributed on average; ``refit`` gives them separate output and down
            projections, fitted to the dense model; ``none`` does neither.
        bidirectional: Whether visual tokens also attend later neighbors, as in the paper's
            fine-tuned checkpoints; training-free plans are causal.
        baked: Whether the checkpoint's heads and neurons are already in order of importance.
        tensors: Neuron orders, means and fitted weights. Not checked here: a plan under
            construction, or read from its file without them, has none.
        measured: Per-layer calibration results.
        extent: Image grids of the calibration; None in plans that do not record them.
        reduction: How visual tokens get fewer before the first layer; None: all enter it.
        provenance: Where the plan comes from: pairs, samples, seed, version, candidates.

    Raises:
        InvalidPlan: A layer count, head, neuron count or radius does not fit the model's shape.
    """

    model: ModelIdentity
    workload: Workload
    layers: tuple[LayerPlan, ...]
    budget: Budget
    compensation: str = "none"
    bidirectional: bool = False
    baked: bool = False
    tensors: PlanTensors = field(default_factory=PlanTensors)
    measured: Measured | None = None
    extent: Extent | None = None
    reduction: Method | None = None
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        problem = first_problem(self)
        if problem is not None:
            raise InvalidPlan(*problem)

    @property
    def visual_depth(self) -> int:
        """Number of layers after which visual tokens are gone."""
        depths = (index + 1 for index, layer in enumerate(self.layers) if not layer.is_empty)
        return max(depths, default=0)

    @property
    def seen(self) -> Workload:
        """The prompt as the layers see it: what the reduction leaves of each image, in a column."""
        return self.workload.after(self.reduction)

    @property
    def needs_order(self) -> bool:
        """Whether any layer keeps only some of its neurons, so that their order matters."""
        return any(0 < layer.neurons < self.model.shape.ffn for layer in self.layers)

    @property
    def needs_key_scale(self) -> bool:
        """Whether some layer stores visual keys in few bits."""
        return any(layer.key_bits is not None for layer in self.layers)

    @property
    def needed_tensors(self) -> PlanTensors:
        """The tensors that the plan uses."""
        tensors, has_means = self.tensors, self.compensation == "mean"
        return PlanTensors(
            neuron_order=tensors.neuron_order if self.needs_order else None,
            neuron_mean=tensors.neuron_mean if has_means else None,
            head_mean=tensors.head_mean if has_means else None,
            refit=tensors.refit if self.compensation == "refit" else {},
            key_scale=tensors.key_scale if self.needs_key_scale else None,
        )

    def without_tensors(self) -> PruningPlan:
        """The same plan with no tensors."""
        return replace(self, tensors=PlanTensors())

    def with_layers(self, layers: Sequence[LayerPlan]) -> PruningPlan:
        """The same plan with other layers; the caller must update the budget."""
        return replace(self, layers=tuple(layers))


def used_levers(plan: PruningPlan) -> list[Lever]:
    """The levers that any layer of a plan uses."""
    return [
        each
        for each in LEVERS
        if any(getattr(layer, each.name) != each.default for layer in plan.layers)
    ]


def full_plan(model: ModelIdentity, workload: Workload) -> PruningPlan:
    """The plan that prunes nothing: the dense model.

    Raises:
        InvalidPlan: The model or the workload has impossible sizes.
    """
    problem = shape_problem(model.shape)
    if problem is not None:  # check now: the layers are as large as the shape says
        raise InvalidPlan(*problem)
    layers = (full_layer(model.shape),) * model.shape.layers
    return PruningPlan(model, workload, layers, Budget(None, 1.0))


def first_problem(plan: PruningPlan) -> tuple[tuple[str | int, ...], str] | None:
    """The first problem of a plan.

    Returns:
        (path of keys from the document's root, the problem as the rest of a sentence), or None.
    """
    shape = plan.model.shape
    problem = shape_problem(shape) or workload_problem(plan.workload)
    problem = problem or extent_problem(plan.extent)
    if problem is not None:
        return problem
    if plan.compensation not in COMPENSATIONS:
        return ("compensation",), f"must be one of {', '.join(COMPENSATIONS)}"
    if plan.budget.asked is not None and not 0 < plan.budget.asked <= 1:
        return ("budget", "asked"), f"must lie in (0, 1], found {plan.budget.asked}"
    problem = reduction_problem(plan.reduction)
    if problem is not None:
        return problem
    if len(plan.layers) != shape.layers:
        return ("layers",), f"must have {shape.layers} entries, found {len(plan.layers)}"
    for index, layer in enumerate(plan.layers):
        wrong = layer_problem(layer, shape)
        if wrong is not None:
            key, what = wrong
            return ("layers", index, key), what
        if layer.radius is not None and plan.reduction is not None:
            return ("layers", index, "radius"), "must be null: a reduction leaves no neighborhoods"
        if layer.is_fitted and plan.compensation != "refit":
            key = "map_rank" if layer.qkv_rank is None else "qkv_rank"
            return ("layers", index, key), "needs 'compensation: refit', whose weights it uses"
    return None


def reduction_problem(reduction: Method | None) -> tuple[tuple[str, ...], str] | None:
    """The first problem of a reduction, as for :func:`first_problem`."""
    if reduction is None:
        return None
    wrong = reduction.problem()
    return None if wrong is None else (("reduction", wrong[0]), wrong[1])


def shape_problem(shape: ModelShape) -> tuple[tuple[str, ...], str] | None:
    """The first problem of a decoder's dimensions, as for :func:`first_problem`.

    Call it before allocating anything of their size: they may come from a file.
    """
    path = ("model", "shape")
    sizes = vars(shape)
    if min(sizes.values()) < 1:
        return path, "must hold positive dimensions"
    for name, largest in LARGEST_SHAPE.items():
        if sizes[name] > largest:
            return (*path, name), f"must be at most {largest}, found {sizes[name]}"
    if shape.heads % shape.kv_heads:
        return (*path, "kv_heads"), f"must divide the {shape.heads} query heads"
    return None
