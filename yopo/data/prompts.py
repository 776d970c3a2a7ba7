"""Pairs as padded model batches: chat template, image decoding, tokens, appended answers."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from yopo.data.pairs import Pair
from yopo.data.processing import placed, processed
from yopo.data.processor_settings import settle
from yopo.data.rows import without_placeholders
from yopo.models.hub import probe
from yopo.support.errors import DataError, ModelError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, ProcessorMixin

Answer = str | Sequence[int]
"""An answer's text, or its token ids (such as a generated continuation)."""


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass, left-padded.

    Attributes:
        inputs: ``input_ids`` and ``attention_mask`` (batch, length) int64, ``pixel_values``
            (images, channels, height, width) in the requested dtype, and other processor outputs.
        answer_mask: (batch, length) bool, true on the answers' tokens; None without answers.
        pairs: The pairs that it was made from, in row order.
    """

    inputs: dict[str, torch.Tensor]
    answer_mask: torch.Tensor | None
    pairs: tuple[Pair, ...]

    def __len__(self) -> int:
        return len(self.pairs)

    def to(self, device: torch.device) -> Batch:
        """This batch with its tensors on a device."""
        inputs = {name: each.to(device) for name, each in self.inputs.items()}
        mask = None if self.answer_mask is None else self.answer_mask.to(device)
        return Batch(inputs, mask, self.pairs)


def batches(pairs: Iterable[Pair], size: int) -> Iterator[tuple[Pair, ...]]:
    """Group pairs in order; the last group may be smaller than ``size``."""
    group: list[Pair] = []
    for pair in pairs:
        group.append(pair)
        if len(group) == size:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def load_processor(
    location: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> ProcessorMixin:
    """Load a model's processor, from the local cache if the hub is unreachable.

    Args:
        location: A local directory or a hub id.
        revision: Hub revision, or None.
        trust_remote_code: Whether code in the model's files may run.

    Raises:
        ModelError: It cannot be reached, needs a missing package or custom code, has no image
            half, or lacks settings that cannot be taken from the model (see ``settle``).
    """
    from transformers import AutoProcessor

    from yopo.models.processors import load_without_videos

    # False, not unset: unset would prompt on stdin whether to run the model's code.
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        options["revision"] = revision
    unreachable = None
    if not Path(location).is_dir():
        answer = probe(location, kind="model", revision=revision)
        if answer.reachable and answer.problem:
            raise ModelError(
                f"{location}: the processor cannot be loaded: {answer.problem}.",
                remedy="Check the name and log in with 'hf auth login'.",
            )
        unreachable = answer.problem
        options["local_files_only"] = unreachable is not None
    try:
        processor = AutoProcessor.from_pretrained(location, **options)
    except Exception as error:  # OSError, ValueError, KeyError, AttributeError and others
        processor = load_without_videos(location, **options)
        if processor is None:
            raise _not_loaded(location, unreachable, error) from error
    if not hasattr(processor, "image_processor") or not hasattr(processor, "tokenizer"):
        raise ModelError(
            f"{location}: found a {type(processor).__name__}, not a processor for images and text.",
            remedy="The directory needs processor_config.json or preprocessor_config.json with a "
            "processor class that this transformers version knows.",
        )
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    settle(processor, location, **options)
    return processor


def _not_loaded(location: str, unreachable: str | None, error: Exception) -> ModelError:
    if unreachable is not None:
        return ModelError(
            f"{location}: the hub is unreachable ({unreachable}) and the processor is not in the "
            "local cache.",
            remedy="Download the model on a machine with a network and give its directory.",
        )
    if "trust_remote_code" in str(error):
        return ModelError(
            f"{location}: its processor or tokenizer needs custom code, which is not run.",
            remedy="Read that code, then allow it with --trust-remote-code.",
        )
    if isinstance(error, ImportError):
        return ModelError(
            f"{location}: the processor needs a package that is missing: {_first_line(error)}.",
            remedy="Install it; torchvision must be of the same build as torch.",
        )
    return ModelError(
        f"{location}: the processor cannot be loaded: {_first_line(error)}.",
        remedy="The directory needs the processor's and the tokenizer's files next to config.json.",
    )


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__


def prompt_text(processor: ProcessorMixin, pair: Pair, *, answer: str | None = None) -> str:
    """Write a pair as the model's prompt, images first, one placeholder each.

    Args:
        processor: Its chat template is used; without one, LLaVA-1.5's format.
        pair: Literal ``<image>`` marks in its question are removed.
        answer: Appended to the prompt, after a space unless the prompt ends in white space.
    """
    image_token = getattr(processor, "image_token", None) or "<image>"
    question = without_placeholders(pair.question).replace(image_token, " ").strip()
    if getattr(processor, "chat_template", None):
        content: list[dict[str, str]] = [{"type": "image"} for _ in pair.images]
        content += [{"type": "video"} for _ in pair.videos]
        content.append({"type": "text", "text": question})
        turn: dict[str, Any] = {"role": "user", "content": content}
        prompt = processor.apply_chat_template([turn], add_generation_prompt=True)
    else:
        prompt = f"USER: {(image_token + chr(10)) * len(pair.images)}{question} ASSISTANT:"
    return prompt if answer is None else prompt + _separator(prompt) + answer


def _separator(prompt: str) -> str:
    return "" if prompt[-1:].isspace() else " "


def answer_ids(processor: ProcessorMixin, prompt: str, answer: str) -> list[int]:
    """Token ids of an answer as decoding would continue the prompt's token ids.

    They are the tokens after the prompt's when both are tokenized together, so that "ASSISTANT:"
    is continued by "▁Yes" or " Yes", whichever the vocabulary has. If the boundary merges into one
    token, which decoding could not produce, the answer is tokenized separately.
    """
    if not answer:
        return []
    tokenizer = processor.tokenizer
    head, both, alone = (
        tokenizer(text, add_special_tokens=False)["input_ids"]
        for text in (prompt, prompt + _separator(prompt) + answer, answer)
    )
    follows = both[: len(head)] == head and len(both) > len(head)
    return both[len(head) :] if follows else alone


def encode_for(
    model: PreTrainedModel,
    processor: ProcessorMixin,
    pairs: Sequence[Pair],
    answers: Sequence[Answer] | None = None,
) -> Batch:
    """:func:`encode` with a model's image token, device, precision and context.

    Raises:
        DataError: As for :func:`encode`, or a prompt is longer than the model's context.
    """
    from yopo.models.devices import device_of

    batch = encode(
        processor,
        pairs,
        image_token_id=model.config.image_token_id,
        video_token_id=getattr(model.config, "video_token_id", None),
        device=device_of(model),
        dtype=model.dtype,
        answers=answers,
    )
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context is not None and batch.inputs["input_ids"].shape[1] > context:
        lengths = batch.inputs["attention_mask"].sum(dim=1).tolist()
        pair, length = max(zip(pairs, lengths, strict=True), key=lambda each: each[1])
        raise DataError(
            f"{pair.where}: the prompt has {length:,} tokens, more than the model's context of "
            f"{context:,}.",
            remedy="Shorten the question, or remove the pair from the data.",
        )
    return batch


def encode(
    processor: ProcessorMixin,
    pairs: Sequence[Pair],
    *,
    image_token_id: int,
    device: torch.device | str,
    dtype: torch.dtype,
    answers: Sequence[Answer] | None = None,
    video_token_id: int | None = None,
) -> Batch:
    """Decode the images and videos and make one left-padded batch.

    Args:
        processor: From ``load_processor``.
        pairs: At least one.
        image_token_id: The model's ``config.image_token_id``.
        device: Device of the tensors.
        dtype: Type of pixels; token ids are int64, times of videos float32.
        answers: One per pair, appended to the prompts as token ids; no end token is added.
        video_token_id: The model's ``config.video_token_id``, if it has one.

    Raises:
        DataError: An image cannot be decoded, or a prompt has no visual token.
    """
    prompts = [prompt_text(processor, pair) for pair in pairs]
    try:
        inputs = processed(processor, prompts, pairs)
    except ValueError as error:
        raise DataError(
            f"{pairs[0].where}: the processor rejects the batch: {_first_line(error)}.",
            remedy="Check that the processor belongs to the model.",
        ) from error
    _check_visual_tokens(inputs["input_ids"], pairs, (image_token_id, video_token_id))
    answer_mask = None
    if answers is not None:
        ids = [
            answer_ids(processor, prompt, answer) if isinstance(answer, str) else list(answer)
            for prompt, answer in zip(prompts, answers, strict=True)
        ]
        inputs, answer_mask = _append(inputs, ids, processor.tokenizer.pad_token_id)
        answer_mask = answer_mask.to(device)
    return Batch(placed(inputs, device, dtype), answer_mask, tuple(pairs))


def _check_visual_tokens(
    input_ids: torch.Tensor, pairs: Sequence[Pair], visual_ids: Sequence[int | None]
) -> None:
    """Refuse prompts, (batch, length), in which the model would see no image."""
    for pair, ids in zip(pairs, input_ids.tolist(), strict=True):
        if not any(each in visual_ids for each in ids):
            listed = ", ".join(str(each) for each in visual_ids if each is not None)
            raise DataError(
                f"{pair.where}: the processor made a prompt without visual tokens (id {listed}).",
                remedy="Check that the processor and its chat template belong to the model.",
            )


def _append(
    inputs: dict[str, torch.Tensor], answers: list[list[int]], pad_id: int
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Append answers to left-padded prompts and pad again.

    Args:
        inputs: Those shaped like ``input_ids``, (batch, length), grow; the others are unchanged.
        answers: Token ids, one list per row; may be empty.
        pad_id: Padding of ``input_ids``; the other inputs are padded with 0.

    Returns:
        (inputs, answer mask (batch, new length) bool).
    """
    import torch

    shape = inputs["input_ids"].shape
    prompt_lengths = inputs["attention_mask"].sum(dim=1).tolist()
    lengths = [prompt + len(ids) for prompt, ids in zip(prompt_lengths, answers, strict=True)]
    width = max(lengths)
    answer_mask = torch.zeros(shape[0], width, dtype=torch.bool)
    grown = dict(inputs)
    for name, old in inputs.items():
        if old.shape != shape or old.is_floating_point():
            continue
        new = old.new_full((shape[0], width), pad_id if name == "input_ids" else 0)
        for row, ids in enumerate(answers):
            end = width - len(ids)
            new[row, width - lengths[row] : end] = old[row, shape[1] - prompt_lengths[row] :]
            answer_mask[row, end:] = True
            if name == "input_ids":
                new[row, end:] = torch.tensor(ids, dtype=new.dtype)
            elif name == "attention_mask":
                new[row, end:] = 1
        grown[name] = new
    return grown, answer_mask
