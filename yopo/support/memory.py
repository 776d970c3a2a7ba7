"""How much main memory there is to take."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Callable
from functools import cache

from yopo.support.cgroups import free_in_groups
from yopo.support.launched import local_processes


def available_bytes() -> int | None:
    """Available main memory, under the limits of containers (control groups) as well.

    File caches count as free where the system reports them.

    Returns:
        Bytes for this process, if all that ``torchrun`` started on this machine take as many; None
        where the system does not say.
    """
    found = [each for each in (_of_system(), free_in_groups()) if each is not None]
    return min(found) // local_processes() if found else None


def is_limited() -> bool:
    """Whether a control group leaves less memory than the system has."""
    system, group = _of_system(), free_in_groups()
    return group is not None and (system is None or group < system)


def _of_system() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


PERIOD = 2.0
"""Least seconds between two calls that give memory back: each takes some milliseconds."""


class GivingBack:
    """Gives freed memory back to the system, which the C library may keep.

    glibc keeps what is freed below a block that is in use, which adds up while forwards wait.
    """

    def __init__(self) -> None:
        self._last = time.monotonic()

    def __call__(self) -> None:
        """Give back what is free, if the last time is a while ago."""
        if time.monotonic() - self._last >= PERIOD and (trim := _trim()) is not None:
            trim(0)
            self._last = time.monotonic()


give_back = GivingBack()
"""The one of this process."""


@cache
def _trim() -> Callable[[int], int] | None:
    """glibc's ``malloc_trim``; None in other C libraries."""
    try:
        found: Callable[[int], int] = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):
        return None
    return found
