"""Says what a command needs before it starts, and refuses or warns where that is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from yopo.data.pairs import Pair, Pairs
from yopo.data.split import Split
from yopo.models.devices import free_memory
from yopo.models.family import shape_of
from yopo.models.window import free_for_states
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.needs.duration import seconds
from yopo.pipeline.needs.job import Counts, Job, PlanCounts, plans_for
from yopo.pipeline.needs.memory import (
    LIBRARIES,
    Stage,
    certain_states,
    finished,
    stages,
    states_in_files,
)
from yopo.pipeline.needs.probe import prompts_of, speed_on
from yopo.pipeline.needs.sentences import in_bytes, in_time, listed
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import PlanRequest
from yopo.plans.flops import visual_budget
from yopo.plans.schema import PruningPlan
from yopo.support.console import note, warn
from yopo.support.errors import YopoError
from yopo.support.launched import local_processes, processes
from yopo.support.memory import available_bytes, is_limited
from yopo.support.out_of_memory import narrower, smaller_batches, use
from yopo.support.ranks import of_first_object

CERTAIN = 0.9
"""Of the memory for states that are surely held, as it is known from a few prompts only."""

HOST = "of memory", "of host memory"
"""What the host's memory is called where there is no other, and where there is."""


@dataclass(frozen=True)
class Place:
    """A memory or a disk, and what one process may take of it.

    Attributes:
        where: As in ``of memory on cuda:0``.
        needed: Bytes at the peak, without weights that are there already.
        stage: Where the peak is.
        certain: Bytes without which the command cannot end.
        what: That takes these.
        free: Bytes that are free; None: not known.
        limit: What ``free`` is under, beside the size of the place; begins with a space.
        options: That make it need less.
    """

    where: str
    needed: float
    stage: str
    certain: float
    what: str
    free: float | None
    limit: str
    options: tuple[str | None, ...]

    def __str__(self) -> str:
        there = "" if self.free is None else f" ({in_bytes(self.free)} are free{self.limit})"
        return f"{in_bytes(self.needed)} {self.where}{there}"


def check_calibration(
    handle: ModelHandle,
    pairs: Pairs,
    split: Split,
    options: RunOptions,
    fit_options: FitOptions,
    requests: Sequence[PlanRequest],
) -> None:
    """Say what a calibration needs, before its model is loaded.

    Raises:
        YopoError: Memory or disk that it surely needs is not there.
    """
    counts = Counts(**split.summary)
    keep = 1.0 if fit_options.reduction is None else fit_options.reduction.keep
    job = _job(handle, pairs, options, counts, plans_for(requests, counts), keep)
    if job is None:
        return
    folder = None if fit_options.work_dir is None else Path(fit_options.work_dir)
    job = replace(job, has_folder=folder is not None)
    needs_folder = job.is_offloaded and folder is None and job.plans.fitted
    _check(handle, job, "--work-dir" if needs_folder else None, folder)


def check_evaluation(
    handle: ModelHandle,
    pairs: Pairs,
    plan: PruningPlan,
    options: RunOptions,
    timing_runs: int,
) -> None:
    """Say what an evaluation needs, before its model is loaded; raises likewise."""
    counts = Counts(comparison=pairs.total if pairs.total is not None else sum(1 for _ in pairs))
    timed = 2 * (timing_runs + 3) * bool(timing_runs)
    plans = PlanCounts(compared=1, answered=1, timed=timed, budget=visual_budget(plan))
    job = _job(handle, pairs, options, counts, plans)
    if job is not None:
        _check(handle, job, "fewer --samples", None)


def _job(
    handle: ModelHandle,
    pairs: Iterable[Pair],
    options: RunOptions,
    counts: Counts,
    plans: PlanCounts,
    keep: float = 1.0,
) -> Job | None:
    """A job with the real sizes of prompts; None if no prompt can be made."""
    config, device = handle.config, handle.device
    prompts = prompts_of(pairs, handle.processor, config, keep)
    if prompts is None:
        return None
    return Job(
        shape=shape_of(config),
        vocabulary=config.get_text_config().vocab_size,
        weights=handle.weight_sizes,
        prompts=prompts,
        counts=counts,
        plans=plans,
        batch_size=options.batch_size,
        new_tokens=options.max_new_tokens,
        is_offloaded=handle.is_offloaded,
        on_host=device.type == "cpu" and not _is_spread(handle),
        staged=_staged(handle),
        processes=processes(),
        window=free_for_states(device) if handle.is_offloaded else 0,
    )


def _check(handle: ModelHandle, job: Job, way: str | None, folder: Path | None) -> None:
    """Print the estimate, and compare it with what is there; the first process decides for all."""
    places = list(_places(handle, job, way, folder))
    each = f"Each of {job.processes} processes" if job.processes > 1 else "This"
    is_begun = folder is not None and folder.is_dir() and any(folder.iterdir())
    rest = f"; less, as far as {folder} holds finished stages" if is_begun else ""
    note(f"{each} takes about {listed([*map(str, places), _time(handle, job)])}{rest}.")
    problem = of_first_object(next(filter(None, map(_refusal, places)), None))
    if problem is not None:
        raise YopoError(problem[0], remedy=problem[1])
    for place in places:
        if place.free is not None and place.needed > place.free:
            free = f"{in_bytes(place.free)} {place.where} are free{place.limit}"
            peak = f"{place.stage} may take {in_bytes(place.needed)}"
            warn(f"{free}, and {peak}. {use(*place.options)}")


def _refusal(place: Place) -> tuple[str, str | None] | None:
    """Why a command cannot end, and what helps; None if it may."""
    if place.free is None or place.certain <= place.free:
        return None
    taken = f"{place.what} take {in_bytes(place.certain)} {place.where}"
    return f"{taken}, and {in_bytes(place.free)} are free{place.limit}.", use(*place.options)


def _places(handle: ModelHandle, job: Job, way: str | None, folder: Path | None) -> Iterator[Place]:
    """The memories that a job uses, the device's and the host's, and its disk."""
    pairs, certain = f"states of {job.counts.fit} pairs", CERTAIN * certain_states(job)
    what = " and the ".join(["weights"] * bool(_unloaded(handle)) + [pairs] * bool(certain))
    for where, amount, rest, surely, free in _memories(handle, job, certain):
        most = max(stages(job), key=amount)
        limit = " under its cgroup's limit" if where in HOST and is_limited() else ""
        ways = _options(handle, job, way, most.option)
        yield Place(where, amount(most) + rest, most.name, surely, f"The {what}", free, limit, ways)
    if folder is not None:
        states, free = states_in_files(job) * local_processes(), _free_disk(folder)
        ways = "a --work-dir on another disk", "fewer --fit-pairs", narrower(job.weights.itemsize)
        needed, stage = states + finished(job), "states and finished stages"
        yield Place(f"in {folder}", needed, stage, states, f"The {pairs}", free, "", ways)


def _memories(
    handle: ModelHandle, job: Job, certain: float
) -> Iterator[tuple[str, Callable[[Stage], float], float, float, float | None]]:
    """Where each memory is, what a stage takes of it, what all take, what surely is taken, and what
    is free."""
    base, is_one = _unloaded(handle), handle.is_on_one_device
    if job.on_host:
        is_mapped = job.weights.dtype == handle.stored_dtype
        # Under a device map, accelerate keeps on disk what is too much.
        surely = (certain + (0 if is_mapped else base)) * is_one
        rest = base + LIBRARIES
        yield HOST[0], lambda each: each.device + each.host, rest, surely, available_bytes()
    else:
        where, surely = f"of memory on {_name(handle)}", (base + certain) * is_one
        yield where, lambda each: each.device, base, surely, _free_on(handle)
        yield HOST[1], lambda each: each.host, LIBRARIES, 0.0, available_bytes()


def _unloaded(handle: ModelHandle) -> int:
    """Bytes of weights that will be in memory, and are not yet."""
    return 0 if handle.is_loaded else handle.resident_bytes


def _options(handle: ModelHandle, job: Job, *more: str | None) -> tuple[str | None, ...]:
    """Options that need less memory, best first, some that help one stage among them."""
    is_given = handle.is_loaded and handle.source is None  # no option decides where it is
    offers = not job.is_offloaded and handle.is_on_one_device and not is_given
    spreads = torch.cuda.device_count() > 1 and not job.on_host
    return (
        "--offload always" if offers else None,
        *more,
        smaller_batches(job.batch_size),
        narrower(job.weights.itemsize),
        "--device-map auto" if spreads else None,
    )


def _staged(handle: ModelHandle) -> int:
    """Bytes of weights that pass the host on their way: as they are stored, if they get another
    dtype, and all of them, if they go to another device."""
    sizes, stored = handle.weight_sizes, handle.stored_dtype
    if handle.is_loaded or handle.is_offloaded or not handle.is_on_one_device:
        return 0
    as_stored = sizes.total * stored.itemsize * (sizes.dtype != stored)
    return as_stored + sizes.num_bytes * (handle.device.type != "cpu")


def _is_spread(handle: ModelHandle) -> bool:
    return not handle.is_on_one_device and torch.cuda.is_available()


def _name(handle: ModelHandle) -> str:
    return f"{torch.cuda.device_count()} GPUs" if _is_spread(handle) else str(handle.device)


def _free_on(handle: ModelHandle) -> int | None:
    if not _is_spread(handle):
        return free_memory(handle.device)
    return sum(torch.cuda.mem_get_info(each)[0] for each in range(torch.cuda.device_count()))


def _free_disk(folder: Path) -> int:
    """Free bytes where a folder is, or will be."""
    there: Callable[[Path], bool] = Path.exists
    parent = next(filter(there, (folder.absolute(), *folder.absolute().parents)))
    return shutil.disk_usage(parent).free


def _time(handle: ModelHandle, job: Job) -> str:
    rows = round(job.batch_size * job.prompts.longest)
    speed = speed_on(handle.device, job.weights.dtype, job.shape, rows, job.batch_size)
    needed = in_time(seconds(job, speed))
    return f"at least {needed}, beside reading layers from disk" if job.is_offloaded else needed
