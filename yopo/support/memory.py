"""How much main memory there is to take."""

from __future__ import annotations

import os

from yopo.support.launched import local_processes


def available_bytes() -> int | None:
    """Available main memory: file caches count as free where the system reports it.

    Returns:
        Bytes for this process, if all that ``torchrun`` started on this machine take as many; None
        where the system does not say.
    """
    found = _available_bytes()
    return None if found is None else found // local_processes()


def _available_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            fields = dict(line.split(":", 1) for line in file)
        return int(fields["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        if not hasattr(os, "sysconf") or "SC_AVPHYS_PAGES" not in os.sysconf_names:
            return None
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
