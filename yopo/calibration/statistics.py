"""Statistics of a calibration pass: mergeable sums, small enough to keep for all later plans.

Vocabulary and formulas follow yopo/README.md: visual mass ``A_v(q)`` is the share of a query's
softmax attention on visual keys; head activity ``rho = sum_q A_v / sum_q A_t`` per sample (the
paper's Eq. 6); neuron importance ``||W_down[:, j]||^2 E[a_j^2]`` over visual tokens, the exact
output error of removing only neuron j; cross-modal attention is the mean visual mass of the text
queries after the image; locality distributes visual-to-visual attention over the Chebyshev
distance.

Head effect is ours: the change in the layer's output when the visual keys are hidden from a single
head, ``E ||W_o^h (o_h - o_h^text)||^2`` over the text queries after the image, where ``o_h^text``
is the head's output with its softmax over text keys only; relative to the squared norm of the
residual stream. On the demo model, keeping half of all heads for reading (everything else frozen)
costs a logit KL of 0.18 when chosen by effect and 0.35 when chosen by rho: a head may look at the
image a lot and contribute little.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from yopo.models.fingerprint import is_same
from yopo.plans.extent import Extent
from yopo.plans.schema import (
    BEYOND_IMAGE,
    Measured,
    ModelIdentity,
    ModelShape,
    Workload,
)
from yopo.plans.tensors import PlanTensors
from yopo.reduction.method import Method
from yopo.support.errors import DataError
from yopo.support.finite import first_layer_not_finite

FORMAT = "yopo-statistics-2"

MAX_COUNT = 1 << 53
"""Maximum tokens or queries in a sum: all integers up to here are exact as floats."""

LEAST_SCALE = 1e-3
"""Of a key's channel, over its head's: a silent channel must not set the step of its group."""

MAX_DISTANCE = BEYOND_IMAGE - 1
"""Largest Chebyshev distance that is distinguished (farther ones count as 64)."""


def _sum(*sizes: str | int) -> dict[str, Any]:
    """Metadata of a field that is a sum over samples, (layers, *sizes) float64.

    The observer accumulates it from zero, merging adds it, and its size in files is checked: a new
    score takes a field here, a property that reads it, and a line in ``calibration.observers``.

    Args:
        *sizes: Numbers, or names of decoder dimensions.
    """
    return {"sizes": sizes}


@dataclass(frozen=True)
class Statistics:
    """Sums over calibration samples. L layers, H query heads, D head width, m neurons.

    Attributes:
        model: The dense model that was measured.
        workload: Image grids of a typical pair, and its mean number of text tokens.
        rho: (samples, L, H) float32, head activity per sample.
        neuron_square: (L, m) float64, sum over visual tokens of a_j^2.
        neuron_sum: (L, m) float64, sum over visual tokens of a_j.
        head_sum: (L, H, D) float64, sum over visual tokens of each head's attention output.
        head_effect_sum: (L, H) float64, sum over text queries after the image of the squared
            output change when the head's visual keys are hidden.
        text_norm_sum: (L,) float64, sum over the same queries of the squared norm of the layer's
            input.
        cross_modal_sum: (L,) float64, sum over the same queries of the visual mass averaged over
            heads.
        locality_sum: (L, MAX_DISTANCE + 2) float64, visual-to-visual attention mass per Chebyshev
            distance, averaged over heads; the last column is for other images.
        key_square_sum: (L, KV heads, D) float64, sum over visual tokens of the squared keys, RoPE
            applied; zero in older files, which lack it.
        down_norm: (L, m) float64, squared column norms of the FFN's down projection.
        visual_tokens: Visual tokens counted in the neuron and head sums.
        text_queries: Queries counted in ``cross_modal_sum``.
        provenance: Pairs, number of samples, seed, queries mode, yopo version, ...
        extent: Image grids that were seen; None in statistics of former versions.
        reduction: What dropped visual tokens before the first layer, so that only the others were
            measured; plans made from the statistics have it too. None: all were.
    """

    model: ModelIdentity
    workload: Workload
    rho: torch.Tensor
    neuron_square: torch.Tensor = field(metadata=_sum("ffn"))
    neuron_sum: torch.Tensor = field(metadata=_sum("ffn"))
    head_sum: torch.Tensor = field(metadata=_sum("heads", "head_dim"))
    head_effect_sum: torch.Tensor = field(metadata=_sum("heads"))
    text_norm_sum: torch.Tensor = field(metadata=_sum())
    cross_modal_sum: torch.Tensor = field(metadata=_sum())
    locality_sum: torch.Tensor = field(metadata=_sum(MAX_DISTANCE + 2))
    key_square_sum: torch.Tensor = field(metadata=_sum("kv_heads", "head_dim"))
    down_norm: torch.Tensor
    visual_tokens: int
    text_queries: int
    provenance: Mapping[str, Any]
    extent: Extent | None = None
    reduction: Method | None = None

    @cached_property
    def importance(self) -> torch.Tensor:
        """(L, m) float64 neuron importance."""
        return self.down_norm * self.neuron_square / self._tokens()

    @property
    def neuron_mean(self) -> torch.Tensor:
        """(L, m) float64 mean activation over visual tokens."""
        return self.neuron_sum / self._tokens()

    @property
    def head_mean(self) -> torch.Tensor:
        """(L, H, D) float64 mean attention output over visual tokens."""
        return self.head_sum / self._tokens()

    @property
    def head_effect(self) -> torch.Tensor:
        """(L, H) float64 relative effect of reading the image in each head."""
        return self.head_effect_sum / self.text_norm_sum.clamp(min=1e-30)[:, None]

    @property
    def reading(self) -> torch.Tensor:
        """(L, H) float64 value of reading in each head: its effect relative to the text's residual
        stream after the layer, at most 1.

        That is the input of the next layer; after the last one, its input and all effects.
        """
        last = self.text_norm_sum[-1:] + self.head_effect_sum[-1:].sum()
        after = torch.cat([self.text_norm_sum[1:], last]).clamp(min=1e-30)
        return (self.head_effect_sum / after[:, None]).clamp(max=1.0)

    @property
    def cross_modal(self) -> torch.Tensor:
        """(L,) float64 mean visual mass of the text queries after the image."""
        if not self.text_queries:
            raise DataError("No text query after an image was measured.")
        return self.cross_modal_sum / self.text_queries

    @property
    def locality(self) -> torch.Tensor:
        """(L, MAX_DISTANCE + 2) float64: cumulative share of the mass within each distance."""
        total = self.locality_sum.sum(dim=1, keepdim=True).clamp(min=1e-30)
        return (self.locality_sum / total).cumsum(dim=1)

    @property
    def key_scale(self) -> torch.Tensor | None:
        """(L, KV heads, D) float32 root mean squares of visual keys' channels, in every head over
        that of all its channels; at least ``LEAST_SCALE``. None if keys were not measured."""
        if not bool(self.key_square_sum.any()):
            return None
        mean = self.key_square_sum.mean(dim=2, keepdim=True)
        relative = torch.where(mean > 0, self.key_square_sum / mean.clamp(min=1e-300), 1.0)
        return relative.sqrt().clamp(min=LEAST_SCALE).float()

    def _tokens(self) -> int:
        if not self.visual_tokens:
            raise DataError("No visual token was measured.")
        return self.visual_tokens

    def check_finite(self) -> None:
        """Refuse statistics with a NaN or an infinity in them.

        Raises:
            DataError: A sum is not finite; names the layer.
        """
        by_layer = [getattr(self, name) for name in (*SUMS, "down_norm")]
        refuse_not_finite([*by_layer, self.rho.transpose(0, 1)])

    def merge(self, other: Statistics) -> Statistics:
        """Add another pass over the same model (other samples, another machine).

        Raises:
            DataError: The other pass measured another model, or after another reduction.
        """
        if not is_same(other.model.fingerprint, self.model.fingerprint):
            raise DataError(
                f"Statistics of {self.model.name} and {other.model.name} cannot be merged: "
                "the models' fingerprints differ."
            )
        if other.reduction != self.reduction:
            raise DataError(
                "Statistics of different reductions cannot be merged: other tokens were measured."
            )
        sums = {name: getattr(self, name) + getattr(other, name) for name in SUMS}
        samples = len(self.rho) + len(other.rho)
        return replace(
            self,
            rho=torch.cat([self.rho, other.rho]),
            visual_tokens=self.visual_tokens + other.visual_tokens,
            text_queries=self.text_queries + other.text_queries,
            provenance={**self.provenance, "samples": samples},
            extent=_merged(self.extent, other.extent),
            **sums,
        )

    def plan_tensors(self) -> PlanTensors:
        """Neuron orders by importance, and the means for compensation."""
        order = torch.argsort(self.importance, dim=1, descending=True, stable=True)
        return PlanTensors(order, self.neuron_mean.float(), self.head_mean.float())

    @cached_property
    def measured(self) -> Measured:
        """The summary that plans carry for reports."""
        sorted_share = self.importance.sort(dim=1, descending=True).values.cumsum(dim=1)
        enough = sorted_share >= 0.9 * sorted_share[:, -1:]
        needed = enough.to(torch.uint8).argmax(dim=1) + 1
        radius = (self.locality >= 0.9).to(torch.uint8).argmax(dim=1)
        return Measured(
            rho=tuple(tuple(row) for row in self.rho.mean(dim=0).tolist()),
            cross_modal=tuple(self.cross_modal.tolist()),
            concentration=tuple((needed / self.importance.shape[1]).tolist()),
            locality=tuple(radius.tolist()),
        )

    def parts(self, folder: Path | None = None) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
        """The tensors by name, and plain values: identity, provenance and what else there is.

        Args:
            folder: As for :meth:`to_bytes`.
        """
        tensors = {
            each.name: getattr(self, each.name).contiguous()
            for each in fields(self)
            if isinstance(getattr(self, each.name), torch.Tensor)
        }
        about = {
            "format": FORMAT,
            "model": self.model.to_dict(folder),
            "workload": asdict(self.workload),
            "visual_tokens": self.visual_tokens,
            "text_queries": self.text_queries,
            "provenance": dict(self.provenance),
        }
        if self.extent is not None:
            about["extent"] = asdict(self.extent)
        if self.reduction is not None:
            about["reduction"] = self.reduction.to_dict()
        return tensors, about

    def to_bytes(self, folder: Path | None = None) -> bytes:
        """Serialize as safetensors; the plain values are in the header.

        Args:
            folder: The file's folder, from which a hint leads to the model; None: no hint.
        """
        tensors, about = self.parts(folder)
        # A single entry: safetensors writes several in random order; bytes must be reproducible.
        return save(tensors, metadata={"yopo": json.dumps(about)})


SUMS: dict[str, tuple[str | int, ...]] = {
    each.name: each.metadata["sizes"] for each in fields(Statistics) if "sizes" in each.metadata
}
"""The sums over samples, by name, and their sizes after the layer axis."""


def sum_sizes(shape: ModelShape) -> dict[str, tuple[int, ...]]:
    """Sizes of the sums for a decoder, layers first."""
    dimensions = asdict(shape)
    return {
        name: (
            shape.layers,
            *(each if isinstance(each, int) else dimensions[each] for each in sizes),
        )
        for name, sizes in SUMS.items()
    }


def refuse_not_finite(sums: Iterable[torch.Tensor]) -> None:
    """Refuse (layers, ...) sums with a NaN or an infinity.

    Raises:
        DataError: Names the first layer that has one.
    """
    layer = first_layer_not_finite(sums)
    if layer is not None:
        raise DataError(
            f"The measurements of layer {layer} are not finite (NaN or infinity).",
            remedy="The model's activations overflow the dtype: try --dtype bfloat16 or float32.",
        )


def _merged(one: Extent | None, other: Extent | None) -> Extent | None:
    return one.merge(other) if one and other else None
