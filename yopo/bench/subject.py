"""What is timed: a model, a plan and a prompt, and every way to run them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from statistics import median

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from yopo.baselines.baseline import Baseline
from yopo.baselines.install import baseline
from yopo.bench.dense import dense
from yopo.bench.memory import peak_bytes
from yopo.bench.plans import with_prompt
from yopo.bench.prompt import Prompt
from yopo.bench.result import DENSE, PRUNED, STOCK
from yopo.bench.rounds import Sample
from yopo.bench.visual_kv import all_bytes, visual_bytes
from yopo.evaluation.timing import now
from yopo.models.devices import device_of, devices_of
from yopo.models.family import GridsOf
from yopo.plans.schema import PruningPlan
from yopo.runtime.gemm import fast_gemm, same_gemm
from yopo.runtime.install import pruned

UNTIMED = 2
"""Prefills before a timed one where it may be replayed: one as usual, and one that is recorded."""


@dataclass(frozen=True)
class Bench:
    """A model, a plan and a prompt, to be measured.

    Attributes:
        model: Dense, in memory.
        plan: The plan for this model and this prompt.
        prompt: The prompt that is prefilled.
        grids_of: Locates images instead of the model's own rule (made-up features).
        baselines: Baselines that are also measured, by name.
    """

    model: PreTrainedModel
    plan: PruningPlan
    prompt: Prompt
    grids_of: GridsOf | None = None
    baselines: Mapping[str, Baseline] = field(default_factory=dict)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of everything timed, in the order of the first round."""
        stock = (STOCK,) if self.has_other_kernels else ()
        return (DENSE, PRUNED, *self.baselines, *stock)

    @property
    def may_replay(self) -> bool:
        """Whether a pruned prefill is replayed from a CUDA graph once it was recorded."""
        return [each.type for each in devices_of(self.model)] == ["cuda"]

    @property
    @torch.no_grad()
    def has_other_kernels(self) -> bool:
        """Whether a pruned prefill of this prompt uses other kernels than the stock model's."""
        if self.may_replay:
            return True
        rows = self.prompt.inputs["input_ids"].shape
        weight = self.model.get_input_embeddings().weight
        assert isinstance(weight, torch.Tensor)
        hidden = weight[:1].expand(*rows, -1)
        context = fast_gemm(self.model.get_decoder().layers, hidden)
        return not isinstance(context, nullcontext)

    @contextmanager
    def switch(self, name: str) -> Iterator[None]:
        """The context in which one of the ``names`` runs."""
        model, plan, where = self.model, self.plan, self.grids_of
        with ExitStack() as stack:
            if name == PRUNED:
                stack.enter_context(pruned(model, plan, grids_of=where, check=False))
            elif name == DENSE and self.may_replay:
                stack.enter_context(dense(model, plan))
            elif name != STOCK:
                if name != DENSE:
                    method = self.baselines[name]
                    stack.enter_context(baseline(model, method, plan, grids_of=where))
                stack.enter_context(same_gemm(model.get_decoder()))
            yield

    @torch.no_grad()
    def prefill(self) -> Cache:
        """Prefill with the model in its current state; returns the cache."""
        cache = self.prompt.prefill(self.model, use_cache=True).past_key_values
        assert cache is not None, "one was requested"
        return cache

    def prefill_untimed(self) -> None:
        """Prefill as often as it takes until prefills are as they are timed."""
        for _ in range(UNTIMED if self.may_replay else 0):
            self.prefill()

    def measure(self, name: str, decode_steps: int) -> Sample:
        """One prefill and its decode steps with one of the ``names``."""
        with self.switch(name):
            devices = devices_of(self.model)
            self.prefill_untimed()
            started, replays = now(*devices), self._replays
            cache = self.prefill()
            prefill_ms = now(*devices) - started
            is_replayed = self._replays > replays
            return Sample(prefill_ms, self._decode(cache, decode_steps), is_replayed)

    @property
    def _replays(self) -> int:
        state = getattr(self.model.get_decoder(), "yopo", None)
        return 0 if state is None else state.recordings.replays

    @torch.no_grad()
    def _decode(self, cache: Cache, steps: int) -> float | None:
        """Median ms per step, or None without steps."""
        prompt, times, devices = self.prompt, [], devices_of(self.model)
        place = device_of(self.model)
        ids = torch.full((prompt.batch, 1), prompt.next_token, device=place)
        for _ in range(steps):
            started = now(*devices)
            self.model.base_model(input_ids=ids, past_key_values=cache, use_cache=True)
            times.append(now(*devices) - started)
        return median(times) if times else None

    def peak(self, name: str) -> int | None:
        """Peak bytes of a prefill above what was allocated before."""
        with self.switch(name):
            return peak_bytes(self._prefills, *devices_of(self.model))

    def _prefills(self) -> Cache:
        self.prefill_untimed()
        return self.prefill()

    def visual_kv(self, name: str) -> int:
        """Bytes of visual keys and values in the cache of a prefill."""
        with self.switch(STOCK if name == DENSE else name):
            layers = self.prefill().layers
        if name != DENSE:
            return sum(visual_bytes(layer) for layer in layers)
        held = sum(all_bytes(layer) for layer in layers)
        return held * self.plan.workload.visual // self.prompt.length

    def lengthened(self, context: int) -> Bench:
        """The bench with the prompt extended by text to a number of tokens.

        Raises:
            PlanError: The prompt is already longer.
        """
        prompt = self.prompt.lengthened(context)
        plan = with_prompt(self.plan, text=context - self.plan.workload.visual)
        methods = {name: each for name, each in self.baselines.items() if not each.needs_plan}
        return replace(self, plan=plan, prompt=prompt, baselines=methods)
