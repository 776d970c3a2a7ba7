"""Several processes that run one command, as ``torchrun`` starts them: who is who, who speaks.

The first process prints results, notes and progress. Of a failure one process speaks, whichever
fails first: the others only end because it did.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from contextlib import suppress
from typing import TYPE_CHECKING

from yopo.support.durable import SIGNALS
from yopo.support.errors import YopoError

if TYPE_CHECKING:
    from torch.distributed import Store

PATIENCE = 3.0
"""Seconds to look for the process that ended, after a connection to it broke."""

_store: Store | None = None


class ProcessLost(YopoError):
    """A connection to another process broke, because that has ended."""


def is_launched() -> bool:
    """Whether ``torchrun`` started this process (other tools set ``WORLD_SIZE``, too)."""
    return "TORCHELASTIC_RUN_ID" in os.environ and "WORLD_SIZE" in os.environ


def processes() -> int:
    """Number of processes; 1 without ``torchrun``."""
    return int(os.environ["WORLD_SIZE"]) if is_launched() else 1


def processes_here() -> int:
    """How many of them run on this machine and share its memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1")) if is_launched() else 1


def rank() -> int:
    """This process's number."""
    return int(os.environ.get("RANK", "0")) if is_launched() else 0


def local_rank() -> int:
    """Its number on this machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", "0")) if is_launched() else 0


def is_first() -> bool:
    """Whether this process writes and prints."""
    return rank() == 0


def hush() -> None:
    """Discard what this process writes to stdout, unless it is the first."""
    if not is_first():
        sys.stdout = open(os.devnull, "w", encoding="utf-8")


def present() -> None:
    """Tell the other processes where this one runs, so that they can see if it ends."""
    store().set(f"{prefix()}/{rank()}", f"{os.getpid()} {socket.gethostname()}")


def speaks() -> bool:
    """Whether this process is to say why all end: the first that asks; true without others.

    It ignores signals from then on: ``torchrun`` sends some when the first process has ended.
    """
    if processes() == 1:
        return True
    with suppress(ValueError):  # not the main thread
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)
    try:
        return store().add(f"{prefix()}/ended", 1) == 1
    except Exception:  # torchrun itself is gone
        return is_first()


def loss(*, is_sure: bool = False) -> str | None:
    """A sentence about a process that ended without a word (killed, say); None: there is none.

    Args:
        is_sure: Whether there must be one.
    """
    gone = _ended(PATIENCE if is_sure else 0.0)
    if gone is None and not is_sure:
        return None
    which = "another process" if gone is None else f"process {gone} of {processes()}"
    return f"{which} ended unexpectedly, and so does the command."


def _ended(patience: float) -> int | None:
    """The number of a process on this machine that has ended, or None."""
    if processes() == 1:
        return None
    until = time.monotonic() + patience
    with suppress(Exception):  # torchrun itself is gone
        peers = _peers()
        while True:
            gone = [number for number, pid in peers.items() if not _runs(pid)]
            if gone or time.monotonic() >= until:
                return gone[0] if gone else None
            time.sleep(0.05)
    return None


def _peers() -> dict[int, int]:
    """Process ids of the other processes on this machine, as far as they are known."""
    found, known = {}, store()
    for number in range(processes()):
        key = f"{prefix()}/{number}"
        if number != rank() and known.check([key]):
            pid, _, host = known.get(key).decode().partition(" ")
            if host == socket.gethostname():
                found[number] = int(pid)
    return found


def _runs(pid: int) -> bool:
    """Whether a process runs; one that has ended stays until its parent asks for its status."""
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            return file.read().rpartition(")")[2].split()[0] not in "ZX"
    except FileNotFoundError:
        if os.path.isdir("/proc/self"):
            return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def prefix() -> str:
    """Of this run's keys in the store."""
    return f"yopo/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"


def store() -> Store:
    """The key-value store that ``torchrun`` serves to its processes."""
    global _store
    if _store is None:
        from datetime import timedelta

        from torch.distributed import TCPStore

        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        _store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=30))
    return _store
