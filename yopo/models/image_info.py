"""What is passed to a model's encoding methods about images, kept until they are prefilled.

``generate`` encodes images before the first forward and drops the processor's information about
them, so the encoding methods are watched.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn
from transformers.utils import ModelOutput

from yopo.support.context import PerContext

ENCODERS = ("get_image_features", "get_video_features")

Info = dict[str, torch.Tensor]

_IMAGE_INFO: PerContext[nn.Module, tuple[type, Info]] = PerContext("yopo_image_info")
"""Information passed to a base model's encoding methods about the images encoded last, and the
key of the probe that recorded it."""

_NOTE = "_yopo_image_info"
"""Attribute of an encoding method's output with the same. Copies of the output (beams) lose it."""


def note(encoded: ModelOutput, info: Info) -> None:
    """Let encoded images carry information to the forwards that they are passed to."""
    setattr(encoded, _NOTE, getattr(encoded, _NOTE, {}) | info)


def image_info(arguments: dict[str, Any]) -> Info:
    """The arguments about images other than their pixels."""
    about = ("image_", "video_", "batch_num_images")
    return {
        name: value
        for name, value in arguments.items()
        if name.startswith(about) and isinstance(value, torch.Tensor)
    }


def known(module: nn.Module, key: type) -> Info:
    """Information about the images encoded last, if this probe recorded it."""
    of, info = _IMAGE_INFO.get(module) or (None, {})
    return info if of is key else {}


def carried(module: nn.Module, arguments: dict[str, Any]) -> Info:
    """Information carried by encoded images: a forward's arguments, or see :func:`encoded_as`."""
    info: Info = {}
    given = (vars(module).get(name) for name in ENCODERS)
    for output in (*given, *(arguments.get("mm_encoder_outputs") or {}).values()):
        info |= getattr(output, _NOTE, {})
    return info


@contextmanager
def encoded_as(module: nn.Module, encoded: ModelOutput) -> Iterator[None]:
    """Hand images to a base model that are encoded already, with what they carry.

    For the length of the block its ``get_image_features`` returns them, in place of its own or a
    probe's method. So forwards get them in every version of transformers, as long as they are
    passed some ``pixel_values``. Not for a model that another thread uses.
    """
    name = ENCODERS[0]
    before = vars(module).get(name)  # a probe's, or none: the class has it

    def encode(*args: Any, **kwargs: Any) -> ModelOutput:
        return encoded

    setattr(encode, _NOTE, getattr(encoded, _NOTE, {}))
    setattr(module, name, encode)
    try:
        yield
    finally:
        if before is None:
            delattr(module, name)
        else:
            setattr(module, name, before)


def watched(
    owner: type[nn.Module], name: str, key: type, found: Callable[[], Info]
) -> Callable[..., Any]:
    """The owner's encoding method, wrapped to record the information about its images.

    Args:
        owner: The base model's class.
        name: The method.
        key: Of the probe that records.
        found: What encoding found out about the images, once it is done.
    """
    original = getattr(owner, name)
    signature = inspect.signature(original)

    @wraps(original)
    def encode(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        passed = image_info(signature.bind_partial(module, *args, **kwargs).arguments)
        before = known(module, key)
        encoded = original(module, *args, **kwargs)
        passed |= found()
        # After the call: Qwen3-VL encodes videos as images, which must not count as such.
        _IMAGE_INFO.set(module, (key, before | passed))
        if isinstance(encoded, ModelOutput):
            setattr(encoded, _NOTE, passed)  # instead of what an inner encoding noted
        return encoded

    return encode
