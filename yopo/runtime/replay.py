"""Prefills whose layer loop is replayed from a recording, where starting kernels takes the time.

On a GPU, Python and the driver take longer to start the kernels of a pruned prefill than the GPU
takes to run them. So the loop over the layers is recorded as a CUDA graph when a prefill of its
kind comes for the second time, and later ones are one call. Whatever differs between prefills of a
kind (states, positions, masks) is copied into the recording's inputs, and what it leaves (states,
keys, values, latents) is copied out, so nothing of a caller lies in its memory. Text is filled up
with tokens that nobody reads, so that prompts of about the same length are of one kind.

All else runs as it would without recordings: decode steps, later turns, training, layers that are
hooked, adapted, quantised or spread over devices, and large batches, where kernels take the time.
"""

from __future__ import annotations

import threading
import warnings
from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch

from yopo.models.baton import is_in_turns
from yopo.runtime.arena import Arena
from yopo.runtime.attention_masks import AttentionMasks
from yopo.runtime.cache import PrunedCacheLayer, new_layers, place_latents
from yopo.runtime.cuda_graphs import CudaGraphs
from yopo.runtime.layer_loop import Streams, pass_layers
from yopo.runtime.loop_masks import LoopMasks
from yopo.runtime.snapshot import Snapshot
from yopo.runtime.watching import watch
from yopo.support.errors import YopoWarning

if TYPE_CHECKING:
    from yopo.models.stock import ModuleListOf, StockDecoder
    from yopo.runtime.decoder import PrunedState
    from yopo.runtime.weights import VisualLayer

MOST = 16
"""Recordings that are kept. Each is some thousand kernels to the driver; memory is shared."""

MOST_TOKENS = 4096
"""Most tokens of a batch. At 5120 tokens of a 7B model on an H100 nothing is gained, and what a
recording holds, about as much as the cache, grows with them."""

TEXT_STEP = 32
"""Text is filled up to a multiple of so many tokens."""

MEMORY = 1024
"""After so many prefills, the counts of how often each kind came are halved."""


class Recorder(Protocol):
    """What records a function, and replays it."""

    def suits(self, states: torch.Tensor) -> bool:
        """Whether work on a tensor can be recorded now."""

    def in_turn(self, device: torch.device) -> AbstractContextManager[None]:
        """A block whose work on a device begins when that of earlier blocks is done."""

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Record a function that reads and writes the same memory in every call, and return what
        does the same again. Raises RuntimeError if it cannot be recorded."""

    def forget(self) -> None:
        """Wait for all that was recorded, which is then given up."""


@dataclass(frozen=True)
class _Given:
    """What one prefill gives to the layer loop.

    Attributes:
        streams: The input of the first layer, text filled up.
        masks: Of this prefill.
        tensors: What layers read of them, text filled up.
        surplus: How many tokens of text were filled in per row.
    """

    streams: Streams
    masks: AttentionMasks
    tensors: LoopMasks
    surplus: int

    @classmethod
    def of(
        cls,
        parts: ModuleListOf[VisualLayer],
        streams: Streams,
        masks: AttentionMasks,
        cache: Sequence[PrunedCacheLayer],
    ) -> _Given:
        surplus = -streams.text.shape[1] % TEXT_STEP
        reads = any(layer.split.reading_width for layer in cache)
        tensors = LoopMasks.of(masks, parts if streams.visual is not None else (), reads=reads)
        return cls(streams.lengthened(surplus), masks, tensors.lengthened(surplus), surplus)

    def all(self) -> list[torch.Tensor]:
        """All tensors that the loop reads, other than weights."""
        return self.streams.tensors() + self.tensors.tensors()

    def on(self, tensors: Sequence[torch.Tensor]) -> tuple[Streams, AttentionMasks]:
        """The same streams and masks in other tensors, such as ``all`` lists."""
        count = len(self.streams.tensors())
        fixed = self.tensors.on(iter(tensors[count:]))
        return self.streams.on(tensors[:count]), fixed.applied_to(self.masks)

    def kind(self, cache: Sequence[PrunedCacheLayer]) -> Hashable:
        """What all prefills have in common that may use one recording."""
        return (
            tuple((each.shape, each.dtype) for each in self.all()),
            self.tensors.structure(),
            self.masks.text_is_causal,
            self.streams.visual is None,
            id(cache[0].split),  # held by a recording's own cache layers
            _settings(),
        )


@dataclass(frozen=True)
class _Recording:
    """A recorded loop.

    Attributes:
        inputs: Where ``_Given.all`` is copied to before it is replayed.
        replay: Replays it.
        outputs: Afterwards, states of one or two streams and what ``layers`` hold.
        num_states: How many of them are states.
        layers: Cache layers as the loop leaves them.
    """

    inputs: list[torch.Tensor]
    replay: Callable[[], None]
    outputs: list[torch.Tensor]
    num_states: int
    layers: list[PrunedCacheLayer]

    def run(
        self, given: _Given, cache: Sequence[PrunedCacheLayer]
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As ``pass_layers``."""
        torch._foreach_copy_(self.inputs, given.all())
        self.replay()
        found = [torch.empty_like(each) for each in self.outputs]
        torch._foreach_copy_(found, self.outputs)
        text, *visual = found[: self.num_states]
        rest = iter(found[self.num_states :])
        for layer, recorded in zip(cache, self.layers, strict=True):
            layer.hold(recorded, rest, given.surplus)
        return text[:, : text.shape[1] - given.surplus], visual[0] if visual else None


class Recordings:
    """The recorded layer loops of one pruned decoder.

    Threads may share it: while one uses it, the others run their layers as usual.

    Args:
        recorder: What records; None: CUDA graphs.

    Attributes:
        replays: How many prefills were replayed.
    """

    def __init__(self, recorder: Recorder | None = None):
        self.replays = 0
        self._recorder = recorder or CudaGraphs()
        self._lock = threading.Lock()
        self._is_off = False
        self._snapshot: Snapshot | None = None
        self.clear()

    def __reduce__(self) -> tuple[Any, ...]:
        return Recordings, ()  # a copy of a model has weights of its own

    def clear(self) -> None:
        """Forget all recordings."""
        self._recorder.forget()
        self._recordings: dict[Hashable, _Recording] = {}
        self._counts: Counter[Hashable] = Counter()
        self._arena = Arena()

    def replayed(
        self,
        decoder: StockDecoder,
        state: PrunedState,
        streams: Streams,
        masks: AttentionMasks,
        cache: Sequence[PrunedCacheLayer],
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Carry both streams through the layers by a recording.

        Args:
            decoder: The stock decoder's modules.
            state: The plan and the visual parts of the layers.
            streams: The input of the first layer; left unchanged.
            masks: Positions and masks of this forward.
            cache: One cache layer per decoder layer; filled here.

        Returns:
            As ``pass_layers``; None: there is no recording, and nothing was done.
        """
        if torch.compiler.is_compiling() or self._is_off or not self._may_serve(streams, masks):
            return None
        if not self._lock.acquire(blocking=False):
            return None
        try:
            if self._snapshot is None or not self._snapshot.is_current():
                self.clear()
                self._snapshot = Snapshot(decoder.layers, state.visual, streams.text.device)
            if not self._snapshot.is_plain:
                return None
            given = _Given.of(state.visual, streams, masks, cache)
            with self._recorder.in_turn(streams.text.device):
                recording = self._find(decoder, state, given, cache)
                if recording is None:
                    return None
                self.replays += 1
                return recording.run(given, cache)
        finally:
            self._lock.release()

    def _may_serve(self, streams: Streams, masks: AttentionMasks) -> bool:
        text, visual = streams.text, streams.visual
        length = text.shape[1] + (0 if visual is None else visual.shape[1])
        return (
            self._recorder.suits(text)
            and not masks.past
            and 1 < length <= MOST_TOKENS // text.shape[0]
            and text.shape[1] > 0
            and not torch.is_grad_enabled()
            and not torch.is_autocast_enabled(text.device.type)
            and not torch._C._len_torch_dispatch_stack()  # a counter of FLOPs, a fake tensor mode
            and not is_in_turns()
            and watch() is None
        )

    def _find(
        self,
        decoder: StockDecoder,
        state: PrunedState,
        given: _Given,
        cache: Sequence[PrunedCacheLayer],
    ) -> _Recording | None:
        """The recording for a prefill, made now if its kind came often enough."""
        kind = given.kind(cache)
        self._counts[kind] += 1
        if self._counts.total() >= MEMORY:
            self._counts = Counter({each: n // 2 for each, n in self._counts.items() if n > 1})
        if kind in self._recordings or not self._is_due(kind):
            return self._recordings.get(kind)
        try:
            with torch.inference_mode(False), torch.no_grad():
                self._recordings[kind] = self._record(decoder, state, given, cache)
        except RuntimeError as error:
            self._give_up(error)
            return None
        while len(self._recordings) > MOST:
            del self._recordings[self._rarest]
        return self._recordings[kind]

    def _is_due(self, kind: Hashable) -> bool:
        """Whether a kind came for the second time, and much more often than one that would go."""
        count = self._counts[kind]
        is_full = len(self._recordings) >= MOST
        return count > 1 and not (is_full and count < 2 * self._counts[self._rarest])

    @property
    def _rarest(self) -> Hashable:
        return min(self._recordings, key=self._counts.__getitem__)

    def _record(
        self,
        decoder: StockDecoder,
        state: PrunedState,
        given: _Given,
        cache: Sequence[PrunedCacheLayer],
    ) -> _Recording:
        splits = [layer.split for layer in cache]
        self._arena.reuse()
        inputs = [self._arena.like(each) for each in given.all()]
        torch._foreach_copy_(inputs, given.all())
        outputs: list[torch.Tensor] = []
        layers: list[PrunedCacheLayer] = []
        is_visual_last = state.plan.visual_depth == len(decoder.layers)
        num_states = 2 if given.streams.visual is not None and is_visual_last else 1

        def loop() -> None:
            own = new_layers(splits)
            # Masks anew in every call: what is made of them is part of the recording.
            streams, masks = given.on(inputs)
            if streams.visual is not None:
                place_latents(own, streams.visual_rotary)
            states = pass_layers(decoder.layers, state.names, state.visual, streams, masks, own)
            found = [each for each in states if each is not None]
            found += (each for layer in own for each in layer.tensors())
            if not outputs:
                outputs.extend(self._arena.like(each) for each in found)
                layers.extend(_held(own, iter(outputs[num_states:])))
            torch._foreach_copy_(outputs, found)

        return _Recording(inputs, self._recorder.record(loop), outputs, num_states, layers)

    def _give_up(self, error: RuntimeError) -> None:
        self._is_off = True
        self.clear()
        reason = str(error).partition("\n")[0]
        warnings.warn(
            f"The layers of the pruned decoder could not be recorded as a CUDA graph ({reason}). "
            "Prefills run without, which is slower. This is said once.",
            YopoWarning,
            stacklevel=2,
        )


def _held(
    layers: Sequence[PrunedCacheLayer], tensors: Iterator[torch.Tensor]
) -> Iterator[PrunedCacheLayer]:
    """Layers that hold the same as others, in tensors of their own."""
    for layer in layers:
        other = layer.empty()
        other.hold(layer, tensors, 0)
        yield other


def _settings() -> Hashable:
    """torch's settings that decide which kernels run."""
    kernels = torch.backends.cuda
    return (
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        kernels.flash_sdp_enabled(),
        kernels.mem_efficient_sdp_enabled(),
        kernels.math_sdp_enabled(),
        kernels.cudnn_sdp_enabled(),
    )
