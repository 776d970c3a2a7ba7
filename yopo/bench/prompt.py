"""The prompt that is timed: already encoded images between text tokens.

Images are encoded before anything is timed: the vision encoder is the same in both models and would
only dilute the ratio. The rest is what the model's own forward does with a prompt: embedding,
merging image features, (pruned) finding the layout, the text decoder. Every version of transformers
takes features from the model's own encoding method, but not every one takes them as an argument, so
for the time of a forward that method returns them.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from transformers import PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPast, BaseModelOutputWithPooling

from yopo.models.devices import device_of
from yopo.models.image_info import Info, encoded_as, note
from yopo.models.registry import family_of
from yopo.models.tower_attention import ATTENTION, record, recorded
from yopo.plans.schema import PruningPlan, Workload
from yopo.support.errors import ModelError, PlanError

Encode = Callable[..., BaseModelOutputWithPooling]
"""A model's ``get_image_features``."""


@dataclass(frozen=True)
class Prompt:
    """A batch of equal prompts.

    Attributes:
        inputs: Arguments of the base model's forward, without pixels.
        encoded: Encoded images, as the model's ``get_image_features`` returns them.
        batch: Number of prompts.
        next_token: An ordinary text token for decode steps.
    """

    inputs: dict[str, Any]
    encoded: BaseModelOutputWithPooling
    batch: int
    next_token: int

    @property
    def length(self) -> int:
        """Tokens of one prompt."""
        return self.inputs["input_ids"].shape[1]

    def prefill(self, model: PreTrainedModel, **more: Any) -> BaseModelOutputWithPast:
        """Run the base model's forward, dense or pruned; ``more`` are further arguments of it."""
        base = model.base_model
        pixels = torch.empty(1, device=device_of(model))  # says that there are images; nobody looks
        with encoded_as(base, self.encoded):
            return base(**self.inputs, pixel_values=pixels, **more)

    def lengthened(self, length: int) -> Prompt:
        """The prompt followed by ordinary text, up to a length.

        Raises:
            PlanError: It is already longer.
        """
        if length < self.length:
            raise PlanError(
                f"A context of {length} tokens is too short for the prompt of {self.length}.",
                remedy=f"Use --context {self.length} or more.",
            )
        fill = {"input_ids": self.next_token, "attention_mask": 1, "mm_token_type_ids": 0}
        grown = {
            name: torch.cat([old, old.new_full((len(old), length - self.length), fill[name])], 1)
            for name, old in self.inputs.items()
            if name in fill
        }
        return replace(self, inputs={**self.inputs, **grown})


def made_up_prompt(model: PreTrainedModel, plan: PruningPlan, batch: int) -> Prompt:
    """The plan's prompt with random image features for any grids, without the vision tower."""
    workload = plan.workload
    generator = torch.Generator().manual_seed(0)
    ids, words = _token_ids(model, workload, workload.visual, batch)
    place = torch.empty(0, device=device_of(model), dtype=model.dtype)
    features = [
        torch.randn(grid.tokens, plan.model.shape.hidden, generator=generator).mul_(0.02).to(place)
        for _ in range(batch)
        for grid in workload.grids
    ]
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    encoded = BaseModelOutputWithPooling(
        pooler_output=features  # type: ignore[arg-type]  # the models put one tensor per image there
    )
    attention = torch.rand(batch, workload.visual, generator=generator).to(model.device)
    note(encoded, {ATTENTION: attention / workload.visual})
    return Prompt(inputs, encoded, batch, words[0])


@torch.no_grad()
def noise_prompt(
    model: PreTrainedModel, plan: PruningPlan, batch: int, *, visual: int | None = None
) -> tuple[Prompt, PruningPlan]:
    """A prompt of noise images through the model's own encoder.

    Args:
        model: Any supported model.
        plan: Its workload determines the text tokens, and about how many visual ones.
        batch: Number of equal prompts.
        visual: Exact number of visual tokens; None: images until there are as many as in the plan.

    Returns:
        (the prompt, the plan with the grids of the model's images).

    Raises:
        ModelError: The model's images do not add up to ``visual``.
    """
    config, family, workload = model.config, family_of(model.config), plan.workload
    generator = torch.Generator().manual_seed(0)
    counts: list[int] = []
    images: list[dict[str, torch.Tensor]] = []
    while sum(counts) < (visual or workload.visual):
        grid = workload.grids[len(counts) % len(workload.grids)]
        count, image = family.noise(config, grid, generator)
        counts.append(count)
        images.append(image)
    about = {
        name: torch.cat([each[name] for each in images] * batch).to(device_of(model))
        for name in images[0]
    }
    encode = cast(Encode, model.base_model.get_image_features)
    accepted = inspect.signature(encode).parameters
    arguments = {
        name: value.to(model.dtype) if value.is_floating_point() else value
        for name, value in about.items()
        if name in accepted
    }
    with _recording(model) as attention:
        encoded = encode(**arguments, return_dict=True)
    note(encoded, attention)
    assert encoded.pooler_output is not None, "every family's encoder gives features"
    found = sum(each.numel() for each in encoded.pooler_output)
    found //= batch * plan.model.shape.hidden
    if visual is not None and not visual == found == sum(counts):
        raise ModelError(
            f"{visual} visual tokens were requested, but {len(counts)} of the model's images have "
            f"{found}.",
            remedy=f"Use --visual-tokens {found // len(counts)}, or a multiple of it.",
        )
    ids, words = _token_ids(model, workload, found, batch)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if "mm_token_type_ids" in inspect.signature(model.base_model.forward).parameters:
        inputs["mm_token_type_ids"] = (ids == config.image_token_id).int()
    inputs |= {name: value for name, value in about.items() if not name.startswith("pixel")}
    runs = [[(config.image_token_id, found)]]
    once = {name: value[: len(value) // batch] for name, value in about.items()}
    grids = family.grids_of(config, runs, once)[0]
    moved = replace(plan, workload=workload.moved(grids=grids))
    return Prompt(inputs, encoded, batch, words[0]), moved


@contextmanager
def _recording(model: PreTrainedModel) -> Iterator[Info]:
    """Collect the tower's attention on images encoded in the block, where it can be recorded."""
    path = family_of(model.config).class_attention(model.config)
    found: Info = {}
    if path is None:
        yield found
        return
    tower = model.base_model.get_submodule(path)
    handle = record(tower)
    try:
        yield found
        attention = recorded(tower)
        if attention is not None:
            found[ATTENTION] = attention
    finally:
        handle.remove()


def _token_ids(
    model: PreTrainedModel, workload: Workload, visual: int, batch: int
) -> tuple[torch.Tensor, list[int]]:
    """((batch, sequence) int64 ids of equal prompts, the text tokens among them)."""
    config, text = model.config, model.config.get_text_config()
    generator = torch.Generator().manual_seed(0)
    special = {*family_of(config).token_ids(config), text.pad_token_id}
    count = max(workload.text, 1)
    drawn = torch.randint(text.vocab_size, (64 + 4 * count,), generator=generator).tolist()
    words = [word for word in drawn if word not in special][:count]
    before, after = words[: workload.text_before], words[workload.text_before : workload.text]
    row = [*before, *[config.image_token_id] * visual, *after]
    return torch.tensor([row] * batch, device=device_of(model)), words
