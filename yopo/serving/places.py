"""Where the parts of a model that is loaded go: device maps as accelerate takes them."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from yopo.support.documents import Document, read_text
from yopo.support.errors import ModelError

DeviceMap = str | dict[str, str | int]
"""A strategy of accelerate, or device by name of a module."""

STRATEGIES = ("auto", "balanced", "balanced_low_0", "sequential")

_ELSEWHERE = ("cpu", "disk")


def read_device_map(given: str | Mapping[str, str | int]) -> DeviceMap:
    """A device map from the command line: a strategy's name, or a YAML or JSON file.

    Args:
        given: ``auto``, ``balanced``, ``balanced_low_0``, ``sequential``; or the path of a file of
            module names and devices; or the map itself, which is only checked.

    Raises:
        PlanError: There is no such file, or a value in it is not a device.
        ModelError: A device is not there.
    """
    if isinstance(given, str) and given in STRATEGIES:
        return given
    if isinstance(given, str):
        document = Document(*read_text(given))
        found: dict[str, str | int] = {
            name: document.typed((name,), value, (str, int))
            for name, value in document.data.items()
        }
    else:
        found = dict(given)
    for place in dict.fromkeys(found.values()):
        if place not in _ELSEWHERE:
            _check(place)
    return found


def _check(place: str | int) -> None:
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0].partition(". ")[0].rstrip(".")
        raise ModelError(
            f"The device map names device {place!r}, which cannot be used: {reason[:100]}.",
            remedy="Name devices of this machine, cpu or disk; or use --device-map auto.",
        ) from error
