"""The class that lmms-eval evaluates a baked checkpoint with."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn, cast

import torch
from lmms_eval.api.model import lmms
from lmms_eval.protocol import ChatMessages
from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.processing import padded, placed
from yopo.data.prompts import load_processor
from yopo.models.registry import family_of, resolve
from yopo.serving.loading import load, load_dense, torch_device, torch_dtype
from yopo.support.console import track
from yopo.support.errors import DataError, ModelError

DENSE = "dense"
"""The ``budget`` that evaluates the dense model, for comparison under the same conditions."""

MAX_NEW_TOKENS = 1024
"""Longest answer if a task does not say, as in most classes of lmms-eval."""


@dataclass(frozen=True)
class _Request:
    """What a task asks: a prompt with its images, and how to answer it."""

    prompt: str
    images: Sequence[Any]
    options: Mapping[str, Any]

    def goes_with(self, other: _Request) -> bool:
        """Whether both fit into one batch."""
        return self.options == other.options and bool(self.images) == bool(other.images)


class PrunedForEvaluation(lmms):
    """A baked checkpoint under lmms-eval; a chat model.

    Args:
        pretrained: A directory that ``yopo apply`` wrote, or the hub id of one.
        budget: As for ``yopo.load``; or ``dense``, for the dense model of the same checkpoint.
        dtype: As for ``from_pretrained``, by name.
        device: By name; None or ``auto``: a GPU if there is one.
        batch_size: Prompts per batch.
        max_batch_size: Accepted, as lmms-eval always passes it; not used.

    Raises:
        ModelError: An argument is wrong, there are several processes, or as for ``yopo.load``.
        CheckpointError: As for ``yopo.load``.
    """

    is_simple = False

    def __init__(
        self,
        pretrained: str,
        budget: float | str | None = None,
        dtype: str = "auto",
        device: str | None = None,
        batch_size: int | str = 1,
        max_batch_size: int | None = None,
        **unknown: Any,
    ):
        super().__init__()
        _check(batch_size, unknown)
        place = torch_device(device or "auto")
        options: dict[str, Any] = {"dtype": torch_dtype(dtype), "device_map": place}
        source = resolve(pretrained)
        self._model: PreTrainedModel = (
            load_dense(source, **options)
            if budget == DENSE
            else load(pretrained, budget=_number(budget), **options)
        )
        self.processor: ProcessorMixin = load_processor(source.location, source.revision)
        self.batch_size = int(batch_size)

    @property
    def model(self) -> PreTrainedModel:
        """The model, as other classes of lmms-eval name it."""
        return self._model

    @property
    def tokenizer(self) -> Any:
        """Its tokenizer, as other classes of lmms-eval name it."""
        return self.processor.tokenizer

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """Answer the requests of a task, in their order.

        Raises:
            DataError: A request has video or audio.
        """
        seen = track(requests, label="answers", total=len(requests), unit="requests")
        asked = (self._read(request.args) for request in seen)
        return [text for batch in _batches(asked, self.batch_size) for text in self._answer(batch)]

    def _read(self, arguments: tuple[Any, ...]) -> _Request:
        _, doc_to_messages, options, number, task, split = arguments
        messages = ChatMessages(messages=doc_to_messages(self.task_dict[task][split][number]))
        images, videos, audios = messages.extract_media()
        if videos or audios:
            raise DataError(
                f"{task}, document {number}: found video or audio, expected images and text.",
                remedy="Pruned models take images only; choose another task.",
            )
        text = self.processor.apply_chat_template(
            messages.to_hf_messages(), add_generation_prompt=True, tokenize=False
        )
        return _Request(text, images, dict(options))

    @torch.no_grad()
    def _answer(self, batch: Sequence[_Request]) -> Iterator[str]:
        model, prompts = self._model, [request.prompt for request in batch]
        images = [[each.convert("RGB") for each in request.images] for request in batch]
        inputs = padded(self.processor, prompts, {"images": images} if images[0] else {})
        found = cast(Any, model).generate(
            **placed(inputs, model.device, model.dtype),
            **_generation(batch[0].options),
            suppress_tokens=list(family_of(model.config).token_ids(model.config)),
        )
        length = inputs["input_ids"].shape[1]
        texts = self.tokenizer.batch_decode(found[:, length:], skip_special_tokens=True)
        for request, text in zip(batch, texts, strict=True):
            answer = _until(text, request.options.get("until"))
            self.cache_hook.add_partial("generate_until", (request.prompt, request.options), answer)
            yield answer

    def loglikelihood(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse tasks that score given answers.

        Raises:
            ModelError: Always.
        """
        raise _unsupported("tasks that score given answers (loglikelihood)")

    def generate_until_multi_round(self, requests: Sequence[Any]) -> NoReturn:
        """Refuse tasks of several rounds.

        Raises:
            ModelError: Always.
        """
        raise _unsupported("tasks of several rounds")


def _unsupported(what: str) -> ModelError:
    return ModelError(
        f"The model 'yopo' does not run {what}.", remedy="Choose a task that generates answers."
    )


def _check(batch_size: int | str, unknown: Mapping[str, Any]) -> None:
    if unknown:
        raise ModelError(
            f"--model_args: found {', '.join(sorted(unknown))}, expected pretrained, budget, dtype "
            "and device."
        )
    if not str(batch_size).isdigit() or int(batch_size) < 1:
        raise ModelError(f"--batch_size is {batch_size!r}, expected a number such as 8.")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ModelError(
            "The model 'yopo' runs in one process, found several.",
            remedy="Start lmms-eval without accelerate launch or torchrun.",
        )


def _number(budget: float | str | None) -> float | None:
    try:
        return None if budget is None else float(budget)
    except ValueError as error:
        raise ModelError(
            f"--model_args: budget is {budget!r}, expected a visual budget such as 0.12, or dense."
        ) from error


def _batches(requests: Iterator[_Request], size: int) -> Iterator[list[_Request]]:
    """Group requests in order, at most ``size`` that go together."""
    group: list[_Request] = []
    for request in requests:
        if group and (len(group) == size or not request.goes_with(group[0])):
            yield group
            group = []
        group.append(request)
    if group:
        yield group


def _generation(options: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments of ``generate`` for the options of a task."""
    found: dict[str, Any] = {
        "max_new_tokens": int(options.get("max_new_tokens", MAX_NEW_TOKENS)),
        "num_beams": int(options.get("num_beams", 1)),
        "do_sample": float(options.get("temperature") or 0) > 0,
    }
    if found["do_sample"]:
        found |= {name: options[name] for name in ("temperature", "top_p") if options.get(name)}
    return found


def _until(text: str, stops: str | Sequence[str] | None) -> str:
    """Text before the first of the strings at which a task wants an answer to end."""
    for stop in [stops] if isinstance(stops, str) else stops or ():
        text = text.partition(stop)[0] if stop else text
    return text.strip()
