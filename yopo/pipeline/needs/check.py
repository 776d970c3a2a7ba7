"""Says what a command needs before it starts, and refuses or warns where that is not there."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from yopo.data.pairs import Pair, Pairs
from yopo.data.split import Split
from yopo.models.devices import free_memory
from yopo.models.family import shape_of
from yopo.models.window import free_for_states
from yopo.pipeline.model_handle import ModelHandle
from yopo.pipeline.needs.duration import Speed, seconds
from yopo.pipeline.needs.job import Counts, Job, PlanCounts, plans_for
from yopo.pipeline.needs.memory import LIBRARIES, Stage, kept_stages, stages, states_in_files
from yopo.pipeline.needs.probe import prompts_of, speed_on, tower_of
from yopo.pipeline.needs.sentences import in_bytes, in_time, listed
from yopo.pipeline.options import FitOptions, RunOptions
from yopo.planning.request import PlanRequest
from yopo.plans.flops import visual_budget
from yopo.plans.schema import PruningPlan
from yopo.support.console import note, warn
from yopo.support.errors import YopoError
from yopo.support.launched import local_processes, processes
from yopo.support.memory import available_bytes
from yopo.support.out_of_memory import narrower, smaller_batches, use
from yopo.support.ranks import of_first_object

CERTAIN = 0.9
"""Of the memory for states that are surely held, as it is known from a few prompts only."""


@dataclass(frozen=True)
class Place:
    """A memory, and what one process may take of it.

    Attributes:
        name: As in ``memory on cuda:0``.
        needed: Bytes at the peak.
        certain: Bytes without which the command cannot end.
        free: Bytes that are free, those that it has taken already included; None: not known.
        stage: Where the peak is.
    """

    name: str
    needed: float
    certain: float
    free: float | None
    stage: Stage


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
    plans = plans_for(requests, counts)
    job = _job(handle, pairs, options, counts, plans)
    if job is None:
        return
    keep = 1.0 if fit_options.reduction is None else fit_options.reduction.keep
    folder = fit_options.work_dir
    job = replace(job, prompts=job.prompts.reduced(keep), has_folder=folder is not None)
    offers = not job.is_offloaded and handle.is_on_one_device and not _is_given(handle)
    ways = ["--offload always"] if offers else []
    if job.is_offloaded and not job.has_folder and plans.fitted:
        ways = ["--work-dir"]
    _check(handle, job, ways, None if folder is None else Path(folder))


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
        _check(handle, job, ["fewer --samples"], None)


def _is_given(handle: ModelHandle) -> bool:
    """Whether the model was in memory before, so that no option decides where it is."""
    return handle.is_loaded and handle.source is None


def _job(
    handle: ModelHandle,
    pairs: Iterable[Pair],
    options: RunOptions,
    counts: Counts,
    plans: PlanCounts,
) -> Job | None:
    """A job with the real sizes of prompts; None if no prompt can be made."""
    config, device = handle.config, handle.device
    prompts = prompts_of(pairs, handle.processor, config)
    if prompts is None:
        return None
    is_offloaded = handle.is_offloaded
    return Job(
        shape=shape_of(config),
        vocabulary=config.get_text_config().vocab_size,
        weights=handle.weight_sizes,
        tower=tower_of(config),
        prompts=prompts,
        counts=counts,
        plans=plans,
        batch_size=options.batch_size,
        new_tokens=options.max_new_tokens,
        is_offloaded=is_offloaded,
        on_host=device.type == "cpu" and not _is_spread(handle),
        staged=_staged(handle),
        processes=processes(),
        window=free_for_states(device) if is_offloaded else 0,
    )


def _check(handle: ModelHandle, job: Job, ways: list[str], folder: Path | None) -> None:
    """Print the estimate, and compare it with what is there; the first process decides for all."""
    places = _places(handle, job)
    needed = {place.name: in_bytes(place.needed) for place in places}
    said = [f"{needed[each.name]} of {each.name}{_there(each.free)}" for each in places]
    states = states_in_files(job) * local_processes()
    disk, room = states + kept_stages(job), _free_disk(folder)
    if folder is not None:
        said.append(f"{in_bytes(disk)} in {folder}{_there(room)}")
    speed = speed_on(handle.device, job.weights.dtype, job.shape, *_rows(job))
    said.append(_time(job, speed))
    each = f"Each of {job.processes} processes" if job.processes > 1 else "This"
    rest = f"; less, as far as {folder} holds finished stages" if _is_begun(folder) else ""
    note(f"{each} takes about {listed(said)}{rest}.")
    problem = next(filter(None, (_impossible(job, each, ways) for each in places)), None)
    if folder is not None and room is not None and states > room:
        problem = (
            f"The states of {job.counts.fit} pairs take about {in_bytes(states)} in {folder}, "
            f"where {in_bytes(room)} are free.",
            use(
                "a --work-dir on another disk", "fewer --fit-pairs", narrower(job.weights.itemsize)
            ),
        )
    problem = of_first_object(problem)
    if problem is not None:
        raise YopoError(problem[0], remedy=problem[1])
    for place in places:
        if place.free is not None and place.needed > place.free:
            warn(_scarce(job, place, ways))


def _places(handle: ModelHandle, job: Job) -> list[Place]:
    """The memories that a job uses: the host's, and a device's if there is one."""
    sizes, found = job.weights, stages(job)
    base = handle.resident_bytes
    taken = base if handle.is_loaded else 0
    keeps_dtype = sizes.dtype == handle.stored_dtype
    is_mapped = job.on_host and keeps_dtype and not handle.is_loaded
    surely = CERTAIN * max(each.certain for each in found)
    if job.on_host:
        most = max(found, key=lambda each: each.device + each.host)
        peak = base + most.device + most.host + LIBRARIES
        certain = surely + (0 if is_mapped else base)
        certain *= handle.is_on_one_device  # elsewhere accelerate keeps on disk what is too much
        free = available_bytes()
        return [Place("memory", peak, certain, None if free is None else free + taken, most)]
    most = max(found, key=lambda each: each.device)
    free = _free_on(handle)
    on_device = Place(
        f"memory on {_name(handle)}",
        base + most.device,
        base + surely if handle.is_on_one_device else 0.0,
        None if free is None else free + taken,
        most,
    )
    most = max(found, key=lambda each: each.host)
    host = Place("host memory", most.host + LIBRARIES, 0.0, available_bytes(), most)
    return [on_device, host]


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


def _impossible(job: Job, place: Place, ways: list[str]) -> tuple[str, str | None] | None:
    """Why a job cannot end, and what helps; None if it may."""
    if place.free is None or place.certain <= place.free:
        return None
    return (
        f"The weights and the states of {job.counts.fit} pairs take {in_bytes(place.certain)} of "
        f"{place.name}, and {in_bytes(place.free)} are free.",
        _remedy(job, place, ways),
    )


def _scarce(job: Job, place: Place, ways: list[str]) -> str:
    assert place.free is not None, "what is not known is not compared"
    return (
        f"{in_bytes(place.free)} of {place.name} are free, and {place.stage.name} may take "
        f"{in_bytes(place.needed)}. {_remedy(job, place, ways)}"
    )


def _remedy(job: Job, place: Place, ways: list[str]) -> str | None:
    spread = "--device-map auto" if torch.cuda.device_count() > 1 and not job.on_host else None
    narrow, fewer = narrower(job.weights.itemsize), smaller_batches(job.batch_size)
    return use(*ways, *place.stage.options, fewer, narrow, spread)


def _rows(job: Job) -> tuple[int, int]:
    return job.batch_size * job.prompts.longest, job.batch_size


def _time(job: Job, speed: Speed) -> str:
    needed = in_time(seconds(job, speed))
    return f"at least {needed}, beside reading layers from disk" if job.is_offloaded else needed


def _there(free: float | None) -> str:
    return "" if free is None else f" ({in_bytes(free)} are free)"


def _free_disk(folder: Path | None) -> int | None:
    """Free bytes where a folder is, or will be."""
    if folder is None:
        return None
    there: Callable[[Path], bool] = Path.exists
    parent = next(filter(there, (folder.absolute(), *folder.absolute().parents)))
    return shutil.disk_usage(parent).free


def _is_begun(folder: Path | None) -> bool:
    return folder is not None and folder.is_dir() and any(folder.iterdir())
