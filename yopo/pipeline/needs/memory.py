"""Bytes that each stage of a command holds at its peak, beside the weights: arithmetic only.

What is held follows the code of each stage. Numbers that do not (how many copies of a matrix a
solve holds, which share of neurons a plan keeps) were measured: see scripts/README.md.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from yopo.calibration.batch_view import CHUNK
from yopo.fitting.fitter import TOGETHER
from yopo.models.turns import MOST_CALLS
from yopo.models.window import STATES, most_tokens
from yopo.pipeline.needs.job import Job, profile_sums

SINGLE, DOUBLE = 4, 8
"""Bytes of float32 and float64."""

PROFILE_COPIES = 3.7
"""Matrices in float64 that are held at the end of a layer's profile, over its sums."""

NEURONS = 3.0
"""Share of its neurons that a fitted layer keeps, at most, over the visual budget."""

FITTED = 0.4
"""Numbers of a plan's fitted weights over its visual budget of the layers' weights."""

LIBRARIES = 130_000_000
"""What libraries take on the host when they are first used."""

_SHORTER, _FEWER = ("fewer --max-new-tokens",), ("fewer --fit-pairs",)


@dataclass(frozen=True)
class Stage:
    """What a stage holds at its peak.

    Attributes:
        name: What is done.
        device, host: Bytes on the device, beside the weights, and in host memory.
        certain: Those of ``device`` that it holds in any case.
        options: That make it need less, beside those that concern all stages.
    """

    name: str
    device: float
    host: float = 0.0
    certain: float = 0.0
    options: tuple[str, ...] = ()


def stages(job: Job) -> list[Stage]:
    """All stages of a job, in order."""
    return [*_forwards(job), *_fits(job)]


def states_in_files(job: Job) -> float:
    """Bytes of states that wait in files of the work directory."""
    return _most_states(job) if job.is_offloaded and job.has_folder else 0.0


def kept_stages(job: Job) -> float:
    """Bytes of finished stages in the work directory."""
    if not job.has_folder:
        return 0.0
    return _answers(job) + (job.plans.together + 1) * _fitted_weights(job)


def _forwards(job: Job) -> Iterator[Stage]:
    """Loading, and the stages that run whole forwards."""
    yield Stage("loading the weights", 0, job.staged)
    forward = _activations(job, job.batch_size * job.prompts.longest)
    entry = _tower(job)
    if job.counts.statistics:
        waiting = _waiting(job, job.counts.statistics, keeps=False)
        yield Stage("measuring statistics", max(entry, forward + _observed(job)) + waiting)
    if not job.counts.comparison and not job.counts.holdout:
        return
    pairs, batch = job.counts.comparison + job.counts.holdout, job.batch_size
    per_answer = (job.new_tokens + 1) * job.vocabulary
    logits = batch * per_answer * (job.weights.itemsize + 3 * SINGLE)
    pixels = job.own(pairs) * job.prompts.pixels * job.weights.itemsize
    waiting = _waiting(job, pairs, keeps=True)
    keys = 0.0 if job.is_offloaded else _keys(job, batch)
    answering = max(entry, keys + forward, forward + logits) + waiting + pixels
    yield Stage("recording the dense model's answers", answering, _answers(job), 0, _SHORTER)
    if job.plans.compared:
        slices = job.plans.budget * job.weights.layers * job.weights.itemsize
        fitted = _fitted_weights(job) * (job.plans.fitted > 0)
        comparing = max(entry, forward + logits) + waiting + pixels + slices + fitted
        kept = _answers(job) + job.plans.together * fitted + fitted
        yield Stage("comparing plans", comparing, kept)


def _fits(job: Job) -> Iterator[Stage]:
    """The profile, and the fits of plans."""
    if not job.plans.fitted:
        return
    pairs, itemsize = job.own(job.counts.fit), job.weights.itemsize
    fitted = job.plans.together * _fitted_weights(job)
    kept = _answers(job) if job.plans.compared else 0.0
    records = job.own(job.counts.comparison) * job.prompts.pixels * itemsize
    waits_elsewhere = job.is_offloaded
    in_memory = not (job.is_offloaded and job.has_folder)
    forward = _activations(job, job.batch_size * job.prompts.longest)

    def stage(name: str, states: float, rest: float, host: float) -> Stage:
        on_device = 0.0 if waits_elsewhere else states
        on_host = states if waits_elsewhere and in_memory else 0.0
        certain = 0.0 if waits_elsewhere and not job.on_host else _entered(job) * in_memory
        return Stage(name, on_device + rest + records, on_host + host + kept, certain, _FEWER)

    pixels = pairs * job.prompts.pixels * itemsize
    yield stage("running prompts up to the first layer", _entered(job), pixels + _tower(job), 0)
    if job.plans.profiles:
        rest = forward + _rows(job, 2 * job.shape.hidden) + _profile_moments(job)
        yield stage("the profile", _entered(job) + _walking(job), rest, 0)
    neurons = _neurons(job)
    width = 2 * job.shape.hidden + neurons
    rest = forward + _rows(job, width) + _fit_moments(job, neurons)
    yield stage("the fit", _most_states(job), rest, fitted)


def _activations(job: Job, tokens: float) -> float:
    """Of one layer, for the tokens of a batch."""
    shape = job.shape
    return tokens * (5 * shape.hidden + 3 * shape.ffn) * job.weights.itemsize


def _tower(job: Job) -> float:
    """Of the vision tower, for the images of a batch; as if it kept the states of all layers."""
    tower, itemsize = job.tower, job.weights.itemsize
    states = (tower.layers + 5) * tower.width + 3 * tower.ffn
    batch = job.batch_size * job.prompts.most_patches * states * itemsize
    return batch + job.batch_size * job.prompts.most_pixels * (SINGLE + itemsize)


def _observed(job: Job) -> float:
    """What statistics add to a layer: the scores of some queries, in float32."""
    length, heads = job.prompts.longest, job.shape.heads
    scores = 4 * job.batch_size * heads * min(CHUNK, length) * length
    keys = 2 * job.batch_size * length * job.shape.kv_heads * job.shape.head_dim
    gram = heads * job.shape.head_dim**2
    return SINGLE * (scores + keys + gram)


def _keys(job: Job, pairs: float) -> float:
    """Keys and values of some pairs' prompts and answers, in all layers."""
    shape, length = job.shape, job.prompts.longest + job.new_tokens
    numbers = 2 * shape.layers * shape.kv_heads * shape.head_dim * length
    return pairs * numbers * job.weights.itemsize


def _waiting(job: Job, pairs: int, *, keeps: bool) -> float:
    """What forwards hold that wait at layers on disk (see ``yopo.models.window``)."""
    if not job.is_offloaded:
        return 0.0
    waiting: float = min(job.own(pairs), MOST_CALLS * job.batch_size)
    if not keeps:
        most = most_tokens("cpu" if job.on_host else "cuda")
        waiting = min(waiting, most / job.prompts.mean + job.batch_size)
    states = waiting * job.prompts.mean * STATES * job.shape.hidden * job.weights.itemsize
    return min(states + (_keys(job, waiting) if keeps else 0.0), job.window)


def _answers(job: Job) -> float:
    """Recorded predictions along the dense model's answers."""
    pairs = job.own(job.counts.comparison) + job.own(job.counts.holdout)
    return pairs * (job.new_tokens + 1) * job.vocabulary * SINGLE


def _fitted_weights(job: Job) -> float:
    """Of one plan."""
    return FITTED * job.plans.budget * job.weights.layers * job.weights.itemsize


def _entered(job: Job) -> float:
    """States, rotary positions and masks of the prompts to fit on, before the first layer."""
    pairs, prompts, itemsize = job.own(job.counts.fit), job.prompts, job.weights.itemsize
    states = prompts.mean * (job.shape.hidden + 2 * job.shape.head_dim) * itemsize
    mask = prompts.mean**2 if job.batch_size > 1 else 0.0
    return pairs * (states + mask)


def _walking(job: Job) -> float:
    """The states of a dense walk."""
    pairs, itemsize = job.own(job.counts.fit), job.weights.itemsize
    return pairs * job.prompts.mean * job.shape.hidden * itemsize


def _most_states(job: Job) -> float:
    """States in a fit: those of walks, dense and of several plans, and the dense ones within a
    layer. Where they stay in memory, new ones are made before old ones go."""
    if not job.plans.fitted:
        return 0.0
    pairs, itemsize, shape = job.own(job.counts.fit), job.weights.itemsize, job.shape
    plans, prompts = min(job.plans.fitted, TOGETHER), job.prompts
    reuses = job.is_offloaded and (job.has_folder or not job.on_host)
    dense = (3 if reuses else 6) * prompts.visual * shape.hidden
    pruned = (plans + (plans > 1)) * prompts.mean * shape.hidden + 2 * prompts.mean * shape.head_dim
    mixed = prompts.visual * shape.heads * shape.head_dim
    masks = pairs * prompts.mean**2 / 2
    return _entered(job) + _walking(job) + pairs * (dense + pruned + mixed) * itemsize + masks


def _rows(job: Job, width: int) -> float:
    """Rows of a batch on their way into moments: as they are, together, centred."""
    return 3 * SINGLE * job.batch_size * job.prompts.most_visual * width


def _profile_moments(job: Job) -> float:
    return DOUBLE * profile_sums(job.shape) * (PROFILE_COPIES + (job.processes > 1))


def _neurons(job: Job) -> int:
    return round(min(1.0, NEURONS * job.plans.budget) * job.shape.ffn)


def _fit_moments(job: Job, neurons: int) -> float:
    """Sums over a layer's neurons and inputs, their moments, and what solving takes."""
    hidden, inputs = job.shape.hidden, job.shape.hidden + neurons
    sums = inputs * (inputs + hidden)
    solving = 4 * inputs * inputs + 4 * inputs * hidden
    return DOUBLE * ((2 + (job.processes > 1)) * sums + solving)
