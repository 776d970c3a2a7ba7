"""Fit a plan's visual weights to the dense model, layer by layer.

Text keeps the original weights, so the weights of visual tokens can be fitted freely. Layer by
layer, on the visual states that the preceding pruned layers actually produce:

1. projections: queries, keys and values of the kept heads through one bottleneck, the best of its
   rank for these inputs (a singular value decomposition in the metric of their covariance). Its
   output has unit variance in every direction, and a mean of zero if it is to be cached;
2. output projection over the attending heads, by least squares to the dense model's visual states
   after attention: it compensates for pruned heads as far as the kept ones predict them, and for
   errors of the preceding layers;
3. down projection over the kept neurons and the linear map, by least squares to the dense model's
   visual states after the FFN. Where no visual token attends the map replaces attention, too.

Sources: FLAP (mean compensation as the special case without a refit), SlimGPT and FASP (least
squares), Olica (a low-rank map of the residual), ReplaceMe (a linear map instead of blocks),
SparseGPT (sequential inputs); formulas in their centred form, on visual tokens only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import PreTrainedModel

from yopo.fitting.layerwise import (
    DenseBatch,
    DenseStates,
    DenseWalk,
    own_matrix,
)
from yopo.fitting.least_squares import (
    Gram,
    Moments,
    Projections,
    low_rank,
    reduced_rank,
    ridge,
)
from yopo.fitting.pruned_batch import PrunedBatch, pruned_batches
from yopo.models.devices import device_of, moved
from yopo.models.family import Backbone
from yopo.models.offloaded import at_hand
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan
from yopo.plans.tensors import refit_sizes
from yopo.runtime.weights import Extras, VisualLayer
from yopo.support.work_dir import NoWork, Stage, Work

Weights = dict[str, torch.Tensor]


@torch.no_grad()
def refit(
    model: PreTrainedModel,
    batches: Sequence[DenseBatch],
    plans: Sequence[PruningPlan],
    work: Work | None = None,
) -> list[dict[int, Weights]]:
    """Fit the weights that plans with ``compensation: refit`` need, in one dense walk for all.

    Plans that agree in their first layers are one until they part: states, moments and solutions
    are computed once. The states of as many plans as differ are in memory at a time.

    Args:
        model: The dense model, in memory.
        batches: Prompts with images, as ``enter`` returns them.
        plans: The plans, all with the same neuron order; without one, neurons count in the model's
            own order. All attend causally or all bidirectionally.
        work: Keeps the weights of fitted layers; those that it holds are not fitted again.

    Returns:
        For each plan: layer -> its weights (see ``refit_sizes``), in the model's dtype, on the CPU.
    """
    first, work = plans[0], work or NoWork()
    order, depth = first.tensors.neuron_order, max(plan.visual_depth for plan in plans)
    if any(
        plan.tensors.neuron_order is not order or plan.bidirectional != first.bidirectional
        for plan in plans
    ):
        raise ValueError("plans with different neuron orders or directions cannot share a walk")
    walk = DenseWalk(model, batches)
    fitted: list[dict[int, Weights]] = [{} for _ in plans]
    branches = [_Branch(tuple(range(len(plans))), pruned_batches(walk, first))]
    for number in range(depth):
        branches = [part for each in branches for part in each.parted(plans, number)]
        with at_hand(walk.decoder.layers[number]):
            dense = walk.step(number)
            for branch in branches:
                weights = _fit_layer(walk, plans[branch.members[0]], number, branch, dense, work)
                for member in branch.members if weights else ():
                    fitted[member][number] = weights
    return fitted


def _fit_layer(
    walk: DenseWalk,
    plan: PruningPlan,
    number: int,
    branch: _Branch,
    dense: list[DenseStates],
    work: Work,
) -> Weights:
    """Fit one layer of the plans of a branch, which pass it; its weights, on the CPU."""
    fit = LayerFit(walk, plan.layers[number], plan.model.shape, number, _extras(plan, number))
    kept = work.load(stage_of(plan, number)) if fit.sizes else None
    weights = fit.run(branch.states, dense, {} if kept is None else kept.tensors)
    kind = next(walk.decoder.layers[number].parameters()).dtype
    weights = {name: each.to("cpu", kind) for name, each in weights.items()}
    if weights and kept is None:
        work.save(stage_of(plan, number), Stage(weights))
    return weights


def stage_of(plan: PruningPlan, number: int) -> str:
    """The name of a fitted layer among finished stages: its weights depend on the layers up to it,
    besides what is the same in all of one command's plans."""
    above = repr((plan.bidirectional, plan.layers[: number + 1]))
    return f"layer-{number:03}-{hashlib.sha256(above.encode()).hexdigest()[:32]}"


def _extras(plan: PruningPlan, number: int) -> Extras:
    order, scale = plan.tensors.neuron_order, plan.tensors.key_scale
    return Extras(
        None if order is None else order[number],
        key_scale=None if scale is None else scale[number],
    )


@dataclass
class _Branch:
    """Plans, by their place in the list, that are the same up to where a walk is."""

    members: tuple[int, ...]
    states: list[PrunedBatch]

    def parted(self, plans: Sequence[PruningPlan], number: int) -> list[_Branch]:
        """Branches that agree in the next layer as well; plans that end before it are left out."""
        groups: dict[LayerPlan, list[int]] = {}
        for member in self.members:
            if number < plans[member].visual_depth:
                groups.setdefault(plans[member].layers[number], []).append(member)
        if len(groups) <= 1:
            return [_Branch(tuple(group), self.states) for group in groups.values()]
        return [
            _Branch(tuple(group), [each.copy() for each in self.states])
            for group in groups.values()
        ]


class LayerFit:
    """The fit of one layer.

    Args:
        walk: The dense decoder.
        layer: The layer's plan.
        shape: The decoder's dimensions.
        number: The layer's index.
        extras: Its neuron order and key scale.
    """

    def __init__(
        self, walk: DenseWalk, layer: LayerPlan, shape: ModelShape, number: int, extras: Extras
    ):
        self.walk, self.layer, self.shape = walk, layer, shape
        self.number, self.extras = number, extras
        self.sizes = refit_sizes(layer, shape)
        self.module = walk.decoder.layers[number]
        self.names: Backbone = walk.names
        self.weights: Weights = {}

    def run(
        self, batches: list[PrunedBatch], dense: list[DenseStates], kept: Mapping[str, torch.Tensor]
    ) -> Weights:
        """Fit, and advance the batches through the fitted layer.

        Args:
            batches: The states before the layer in the pruned model.
            dense: Those in the dense model.
            kept: The layer's weights, if they are known; empty: they are to be fitted.
        """
        self.weights, place = dict(kept), self.place
        if "reduce" in self.missing:
            self.weights |= self.projections(batches)
        part, mixed = self.part(), []
        for batch in batches:
            here = batch.on(place)
            run = here.run(self.walk, self.number, part)
            text, gathered = run.attend(here.text, here.text_rotary, here.given(part))
            batch.settle(text, None)
            mixed.append(None if gathered is None else batch.dense.room.put(gathered))
        if "output" in self.missing:
            self.weights |= self.output(batches, mixed, dense)
            part = self.part()
        for batch, gathered in zip(batches, mixed, strict=True):
            here = batch.on(place)
            run = here.run(self.walk, self.number, part)
            batch.settle(None, run.add_attention(here.visual, part, moved(gathered, place)))
        if "ffn_bias" in self.missing:
            self.weights |= self.ffn(batches, dense, part)
            part = self.part()
        for batch in batches:
            self._feed(batch, part)
        return self.weights

    def _feed(self, batch: PrunedBatch, part: VisualLayer) -> None:
        """Advance a batch past the FFN and what is added after it."""
        here = batch.on(self.place)
        run = here.run(self.walk, self.number, part)
        text, visual = run.feed_text(here.text), run.feed_visual(here.visual, part)
        if self.number < len(batch.dense.stack):
            stream = moved(batch.dense.layout, self.place).visual
            visual = visual + stream.unflatten(batch.dense.stack[self.number].to(visual))
        batch.settle(text, visual)

    @property
    def place(self) -> torch.device:
        """The layer's device."""
        return device_of(self.module)

    @property
    def missing(self) -> set[str]:
        """Names of the weights that are not fitted yet."""
        return self.sizes.keys() - self.weights.keys()

    def part(self) -> VisualLayer:
        """The visual layer with the weights fitted so far; the layer's own weights elsewhere."""
        extras = replace(self.extras, refit=self.weights)
        return VisualLayer(self.module, self.layer, self.shape, self.names, extras)

    def projections(self, batches: list[PrunedBatch]) -> Weights:
        """Fit queries, keys and values through the bottleneck."""
        stock = VisualLayer(
            self.module,
            replace(self.layer, qkv_rank=None, key_bits=None, value_bits=None, latent_bits=None),
            self.shape,
            self.names,
            Extras(),
        )
        norm = getattr(self.module, self.names.attention_norm)
        moments = self._moments(0)
        for batch in batches:
            moments.add(batch.real(norm(batch.visual.to(self.place))))
        names = [name for name in ("query", "key", "value") if name in self.sizes]
        parts = [own_matrix(stock, name) for name in names]
        projections = Projections(moments.gram(), [weight for weight, _ in parts])
        rank = self.layer.qkv_rank
        assert rank is not None, "only a layer with a bottleneck has projections to fit"
        best = projections.at_rank(rank, [bias for _, bias in parts])
        weights = {"reduce": best.reduce}
        if "reduce_bias" in self.sizes:
            best = best.centred(projections.mean)
            weights["reduce_bias"] = best.shift
        for name, expand, bias in zip(names, best.expand, best.bias, strict=True):
            weights |= {name: expand, f"{name}_bias": bias}
        return weights

    def output(
        self,
        batches: list[PrunedBatch],
        mixed: list[torch.Tensor | None],
        dense: list[DenseStates],
    ) -> Weights:
        """Fit the output projection over the attending heads."""
        own, _ = own_matrix(self.part(), "output")
        moments = Moments(own.shape[1], self.shape.hidden, own.device)
        for batch, gathered, states in zip(batches, mixed, dense, strict=True):
            assert gathered is not None, "in a layer without attending heads no output is fitted"
            inputs, visual, middle = moved((gathered, batch.visual, states.middle), self.place)
            moments.add(batch.real(inputs), middle - batch.real(visual))
        weight, bias = ridge(moments.gram(), toward=own)
        return {"output": weight, "output_bias": bias}

    def ffn(
        self, batches: list[PrunedBatch], dense: list[DenseStates], part: VisualLayer
    ) -> Weights:
        """Fit the down projection over the kept neurons, and the linear map.

        With both, the map is the low-rank part of their joint fit, and the down projection is
        refitted to the map's residual.
        """
        neurons = self.layer.neurons
        moments = self._moments(self.shape.hidden, neurons)
        norm = getattr(self.module, self.names.ffn_norm)
        for batch, states in zip(batches, dense, strict=True):
            visual, after = moved((batch.visual, states.after), self.place)
            normed = norm(visual)
            inputs = batch.real(normed)
            if neurons:
                inputs = torch.cat([batch.real(part.activations(normed)), inputs], dim=1)
            moments.add(inputs, after - batch.real(visual))
        if not neurons:
            out, inner, bias = reduced_rank(moments.gram(), self.layer.map_rank)
            return {"map_out": out, "map_in": inner, "ffn_bias": bias}
        own, _ = own_matrix(part, "down")
        return neurons_and_map(moments.gram(), own, self.layer.map_rank)

    def _moments(self, targets: int, more: int = 0) -> Moments:
        return Moments(self.shape.hidden + more, targets, self.place)


def neurons_and_map(gram: Gram, own: torch.Tensor, rank: int) -> Weights:
    """Fit a down projection and a low-rank map of the FFN's input together.

    Args:
        gram: Moments of (activations of the kept neurons, normed input) and the target.
        own: (hidden, neurons) down projection to stay close to.
        rank: Rank of the map; 0: none.
    """
    neurons = own.shape[1]
    if not rank:
        weight, bias = ridge(gram.first(neurons), toward=own)
        return {"down": weight, "ffn_bias": bias}
    rest = len(gram.covariance) - neurons
    joint, _ = ridge(gram, toward=torch.cat([own, own.new_zeros(len(own), rest)], dim=1))
    root = torch.linalg.cholesky(gram.damped[neurons:, neurons:])
    out, inner = low_rank(joint[:, neurons:], root, rank)
    weight, bias = ridge(gram.without(neurons, out @ inner), toward=own)
    return {"down": weight, "map_out": out, "map_in": inner, "ffn_bias": bias}
