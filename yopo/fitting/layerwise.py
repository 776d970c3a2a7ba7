"""Carry batches through a decoder layer by layer, in the dense and the pruned model.

Layers run one at a time, so only one layer's statistics are in memory and a fit sees, as in
SparseGPT and GPTQ, the inputs from the already pruned layers before it and the outputs of the dense
model.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from yopo.data.prompts import Batch
from yopo.fitting.states import OnDevice, Room
from yopo.models.devices import device_of, moved
from yopo.models.family import Backbone
from yopo.models.layout import LayoutProbe
from yopo.models.offloaded import at_hand
from yopo.models.registry import family_of
from yopo.models.shortened import shorten
from yopo.models.streams import Stream, TokenLayout
from yopo.models.tower_attention import attention_path
from yopo.reduction.method import Method
from yopo.runtime.sliced_linear import SlicedLinear
from yopo.runtime.weights import VisualLayer, check_plain
from yopo.support.errors import DataError


@dataclass
class DenseBatch:
    """One batch on its way through the dense decoder.

    Attributes:
        hidden: (batch, sequence, hidden) input of the next layer.
        layout: Where its visual tokens are.
        arguments: Keyword arguments of each stock layer, without the hidden states.
        positions: Position ids of the forward, or None.
        mask: (batch, sequence) attention mask.
        stack: DeepStack features, (visual tokens, hidden) each, added after the first layers.
        room: Where all of these wait between layers; the layout is with ``hidden``.
        is_shared: Whether other walks start from ``hidden`` as well.
    """

    hidden: torch.Tensor
    layout: TokenLayout
    arguments: list[dict[str, Any]]
    positions: torch.Tensor | None
    mask: torch.Tensor | None
    stack: tuple[torch.Tensor, ...]
    room: Room = field(default_factory=OnDevice)
    is_shared: bool = True

    def settle(self, hidden: torch.Tensor) -> None:
        """Let the input of the next layer wait."""
        self.hidden = self.room.put(hidden, None if self.is_shared else self.hidden)
        self.is_shared = False

    def put(self, states: DenseStates, over: DenseStates | None) -> DenseStates:
        """Let the states of a layer wait, in the place of those of another."""
        middle, after = (None, None) if over is None else (over.middle, over.after)
        return DenseStates(self.room.put(states.middle, middle), self.room.put(states.after, after))

    def visual(self, states: torch.Tensor) -> torch.Tensor:
        """(visual tokens of all rows, hidden) of (batch, sequence, hidden) states, no padding."""
        stream = moved(self.layout.visual, states.device)
        return real_rows(stream, stream.gather(states))


def real_rows(stream: Stream, states: torch.Tensor) -> torch.Tensor:
    """(tokens, width) of a stream's (batch, length, width) states, without its padding."""
    return states.flatten(0, 1) if stream.mask is None else states[stream.mask]


def own_matrix(part: VisualLayer, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Weight and bias (or None) of a visual layer's projection that is sliced from the model's."""
    projection = getattr(part, name)
    assert isinstance(projection, SlicedLinear), f"{name} is already fitted"
    return projection.matrix()


@dataclass(frozen=True)
class DenseStates:
    """Dense visual states of one batch within and after a layer, (tokens, hidden) each."""

    middle: torch.Tensor
    after: torch.Tensor


class DenseWalk:
    """The dense decoder, one layer per step, over batches that are kept in memory.

    Args:
        model: A dense multimodal model in memory.
        batches: What :func:`enter` returns; a walk leaves it as it is, so that several walks
            may start from one.

    Attributes:
        batches: The state of each batch before the next layer.

    Raises:
        ModelError: A layer's weights cannot be read (see ``check_plain``).
    """

    def __init__(self, model: PreTrainedModel, batches: Sequence[DenseBatch]):
        self.decoder = model.get_decoder()
        self.names: Backbone = family_of(model.config).backbone(model.config)
        check_plain(self.decoder, len(self.decoder.layers), self.names)
        self.batches = [replace(batch) for batch in batches]
        self._held: list[DenseStates | None] = [None] * len(self.batches)

    def step(self, number: int) -> list[DenseStates]:
        """Run layer ``number`` on all batches.

        Returns:
            What a fit aims at, batch by batch; until the next step, which takes its place.
        """
        for place, (_, states) in enumerate(self.steps(number)):
            self._held[place] = self.batches[place].put(states, self._held[place])
        return cast("list[DenseStates]", self._held)

    def skip(self, number: int) -> None:
        """Run layer ``number`` on all batches, for the input of the next one alone."""
        for _ in self.steps(number):
            pass

    @torch.no_grad()
    def steps(self, number: int) -> Iterator[tuple[torch.Tensor, DenseStates]]:
        """Run layer ``number`` on one batch after the other.

        Yields:
            Its visual states before the layer, (tokens, hidden), and those that follow, on the
            layer's device.
        """
        with at_hand(self.decoder.layers[number]):
            for batch in self.batches:
                yield self._step(number, batch)

    def _step(self, number: int, batch: DenseBatch) -> tuple[torch.Tensor, DenseStates]:
        layer, middle = self.decoder.layers[number], []
        place = device_of(layer)
        hidden = batch.hidden.to(place)
        arguments = {name: moved(each, place) for name, each in batch.arguments[number].items()}
        norm = getattr(layer, self.names.ffn_norm)
        handle = norm.register_forward_pre_hook(lambda module, args: middle.append(args[0]))
        try:
            output = layer(hidden, **arguments)
        finally:
            handle.remove()
        output = output[0] if isinstance(output, tuple) else output
        before = batch.visual(hidden)
        states = DenseStates(batch.visual(middle[0]), batch.visual(output))
        batch.settle(add_stack(output, batch, number))
        return before, states


def add_stack(hidden: torch.Tensor, batch: DenseBatch, number: int) -> torch.Tensor:
    """Add a layer's DeepStack features to (batch, sequence, hidden) states."""
    if number >= len(batch.stack):
        return hidden
    hidden, stream = hidden.clone(), moved(batch.layout.visual, hidden.device)
    added = stream.gather(hidden) + stream.unflatten(batch.stack[number].to(hidden))
    stream.scatter(hidden, added)
    return hidden


def enter(
    model: PreTrainedModel,
    batches: Iterable[Batch],
    reduction: Method | None = None,
    room: Room | None = None,
) -> list[DenseBatch]:
    """Run prompts through everything before the decoder's first layer: tower, projector, masks.

    Args:
        model: A dense multimodal model in memory.
        batches: Encoded prompts; those without an image are left out.
        reduction: Drops visual tokens before the first layer; the rest is what the walks see.
        room: Where the states of batches wait; None: on the decoder's device.

    Raises:
        DataError: No batch holds an image.
    """
    entered = (_enter(model, each, reduction) for each in batches)
    place = OnDevice() if room is None else room
    found = [_settled(batch, place) for batch in entered if batch is not None]
    if not found:
        raise DataError("No calibration pair holds an image to fit visual weights on.")
    return found


def _settled(batch: DenseBatch, room: Room) -> DenseBatch:
    """The batch with its states, and all else that layers are given, in a room."""
    put: dict[int, torch.Tensor] = {}  # layers share tensors

    def stored(value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(map(stored, value))
        if not isinstance(value, torch.Tensor):
            return value
        if id(value) not in put:
            put[id(value)] = room.put(value)
        return put[id(value)]

    hidden = stored(batch.hidden)
    return DenseBatch(
        hidden=hidden,
        layout=moved(batch.layout, hidden.device),
        arguments=[
            {name: stored(value) for name, value in each.items()} for each in batch.arguments
        ],
        positions=stored(batch.positions),
        mask=stored(batch.mask),
        stack=stored(batch.stack),
        room=room,
    )


class _Entered(Exception):
    """Stops a forward at the decoder's entry."""


@contextmanager
def _skipping(layers: Iterable[torch.nn.Module]) -> Iterator[list[tuple[torch.Tensor, dict]]]:
    """Make layers return the states they get; yields what each was given, in order."""
    given: list[tuple[torch.Tensor, dict[str, Any]]] = []

    def skip(hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        given.append((hidden_states, kwargs))
        return hidden_states

    changed = list(layers)
    before = [vars(layer).get("forward") for layer in changed]  # as accelerate's hooks leave it
    try:
        for layer in changed:
            layer.forward = skip
        yield given
    finally:
        for layer, forward in zip(changed, before, strict=True):
            del layer.forward
            if forward is not None:
                layer.forward = forward


@torch.no_grad()
def _enter(model: PreTrainedModel, batch: Batch, reduction: Method | None) -> DenseBatch | None:
    """Run a prompt up to the decoder and note what it and its layers are given."""
    family, decoder = family_of(model.config), model.get_decoder()
    tokens = family.token_ids(model.config)
    attention = attention_path(reduction, family, model.config)
    probe = LayoutProbe(model.base_model, family.grids_of, tokens, attention)
    given: dict[str, Any] = {}

    names = family.backbone(model.config)

    def at_decoder(
        module: torch.nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> tuple[tuple, dict[str, Any]]:
        if probe.layout is None:
            raise _Entered
        shortened = shorten(reduction, probe, names, kwargs)
        given.update(kwargs if shortened is None else shortened.arguments, layout=probe.layout)
        given.update(mask=batch.inputs.get("attention_mask"))
        if shortened is None:
            return args, kwargs
        given.update(mask=shortened.mask)
        return args, shortened.arguments

    handle = decoder.register_forward_pre_hook(at_decoder, with_kwargs=True)
    try:
        with _skipping(decoder.layers) as seen:
            model.base_model(**batch.inputs, use_cache=False)
    except _Entered:
        return None
    finally:
        probe.remove()
        handle.remove()
    return DenseBatch(
        hidden=seen[0][0],
        layout=given["layout"].to(seen[0][0].device),
        arguments=[kwargs for _, kwargs in seen],
        positions=given.get("position_ids"),
        mask=given["mask"],
        stack=names.added_features(given),
    )
