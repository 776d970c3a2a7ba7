"""Work that the processes of one command share, by ``torch.distributed``.

Item ``n`` of a sequence belongs to process ``n`` modulo their number. What processes find is put
back into the order of the items before it is added up or looked at, so a result does not depend on
their number. Without ``together`` there is one process, and nothing here costs anything.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from itertools import islice
from typing import TypeVar

import torch
import torch.distributed as distributed

from yopo.support import launched
from yopo.support.errors import YopoError
from yopo.support.launched import ProcessLost

Item = TypeVar("Item")
Result = TypeVar("Result")

PATIENCE = timedelta(days=1)
"""How long processes wait for each other: ``torchrun`` ends all when one ends, so this is only to
be longer than what one does alone."""

_is_together = False
_groups = 0


@contextmanager
def together(device: str) -> Iterator[None]:
    """Share the work of a block with the other processes that ``torchrun`` started, if it did.

    Args:
        device: Where this process computes. Tensors on CUDA are exchanged by NCCL, tensors on the
            CPU and Python values by gloo.

    Raises:
        ProcessLost: Another process has ended.
    """
    global _is_together, _groups
    if not launched.is_launched():
        yield
        return
    is_cuda = torch.device(device).type == "cuda"
    if is_cuda:
        torch.cuda.set_device(device)
    with _exchanging():
        backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
        _groups += 1
        launched.meet(f"group-{_groups}")
        store = launched.store()
        store.set_timeout(PATIENCE)
        distributed.init_process_group(
            backend,
            store=distributed.PrefixStore(f"{launched.prefix()}/{_groups}", store),
            rank=launched.rank(),
            world_size=launched.processes(),
            timeout=PATIENCE,
        )
        distributed.barrier()
    _is_together = True
    try:
        yield
        with _exchanging():
            distributed.barrier()
        distributed.destroy_process_group()
    finally:
        _is_together = False


def is_together() -> bool:
    """Whether work is shared."""
    return _is_together


def leads() -> bool:
    """Whether this process does what only one may do: the first, or the only one."""
    return _size_and_rank()[1] == 0


def own_device(name: str) -> str:
    """The device of this process, where ``cuda`` or ``auto`` is asked for.

    Raises:
        YopoError: There are more processes than GPUs, or all are to use one device.
    """
    if not launched.is_launched():
        return name
    kind, _, number = name.partition(":")
    there = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if name == "cpu" or (name == "auto" and not there):
        return "cpu"
    if kind == "mps" or (number and launched.processes() > 1):
        raise YopoError(
            f"--device {name}: processes that torchrun starts cannot share it.",
            remedy="Use --device auto: each process then takes a GPU of its own, if there are any.",
        )
    if name not in ("auto", "cuda") or not there:
        return name
    needed = launched.local_processes()
    if needed > there:  # NCCL refuses two processes on one GPU
        raise YopoError(
            f"{needed} processes on this machine, but it has {there} GPU{'s' * (there > 1)}: "
            "each needs its own.",
            remedy=f"Use torchrun --nproc-per-node {there}, or --device cpu.",
        )
    return f"cuda:{launched.local_rank()}"


def check_enough(count: int, what: str) -> None:
    """Refuse a division in which a process would have nothing.

    Raises:
        YopoError: There are more processes than items.
    """
    if _is_together and count < distributed.get_world_size():
        raise YopoError(
            f"{distributed.get_world_size()} processes cannot share {count} {what}.",
            remedy="Start fewer processes, use a smaller --batch-size, or more --samples.",
        )


def mine(items: Iterable[Item]) -> Iterator[tuple[int, Item]]:
    """The items that belong to this process, each with its number among all."""
    step, first = _size_and_rank()
    return islice(enumerate(items), first, None, step)


def shared(items: Iterable[Item], work: Callable[[Item], Result]) -> Iterator[Result]:
    """What ``work`` makes of each item, in order; in rounds in which each process does one."""
    step, first = _size_and_rank()
    rest = iter(items)
    while turn := list(islice(rest, step)):
        yield from gathered([work(each) for each in turn[first : first + 1]])


def gathered(own: Sequence[Item]) -> list[Item]:
    """One entry per item, from what each process has of its own, in the order of all items."""
    if not _is_together:
        return list(own)
    step, _ = _size_and_rank()
    parts: list[list[Item]] = [[] for _ in range(step)]
    with _exchanging():
        distributed.all_gather_object(parts, list(own))
    return [parts[each % step][each // step] for each in range(sum(map(len, parts)))]


def of_first(tensor: torch.Tensor) -> torch.Tensor:
    """The first process's tensor of this size and dtype."""
    if _is_together:
        tensor = tensor.contiguous()
        with _exchanging():
            _finish(distributed.broadcast(tensor, 0, async_op=True))
    return tensor


def of_first_object(value: Item) -> Item:
    """The first process's value."""
    if _is_together:
        values = [value]
        with _exchanging():
            distributed.broadcast_object_list(values, 0)
        return values[0]
    return value


def added(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of all processes' tensors, in place."""
    if _is_together:
        with _exchanging():
            _finish(distributed.all_reduce(tensor, async_op=True))
    return tensor


def least(value: int | None) -> int | None:
    """The least of all processes' values; None if one has none."""
    values = [each for each in gathered([value]) if each is not None]
    return min(values) if len(values) == _size_and_rank()[0] else None


def _finish(exchange: distributed.Work) -> None:
    """Wait for an exchange. NCCL may wait forever for a process that has ended: signals, such as
    ``torchrun`` sends then, are heard meanwhile."""
    while not exchange.is_completed():
        time.sleep(0.0002)
    exchange.wait()


def _size_and_rank() -> tuple[int, int]:
    if not _is_together:
        return 1, 0
    return distributed.get_world_size(), distributed.get_rank()


@contextmanager
def _exchanging() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of gloo and NCCL, in many words
        raise ProcessLost(
            "The exchange with the other processes failed.",
            remedy="-vv shows what torch.distributed says.",
        ) from error
