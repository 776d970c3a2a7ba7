"""Bytes that each stage of a command holds at its peak, beside the weights: arithmetic only.

What is held follows the code of each stage. Numbers that do not (how many copies of a matrix a
solve holds, which share of neurons a plan keeps) were measured: see scripts/README.md.
"""

from __future__ import annotations

from dataclasses import dataclass

from yopo.calibration.batch_view import CHUNK
from yopo.fitting.fitter import TOGETHER
from yopo.models.turns import MOST_CALLS
from yopo.models.window import STATES, most_tokens
from yopo.pipeline.needs.job import Job

SINGLE, DOUBLE = 4, 8
"""Bytes of float32 and float64."""

NEURONS = 3.0
"""Share of its neurons that a fitted layer keeps, at most, over the visual budget."""

WITHIN = 5
"""States of all pairs that are held within a layer of a fit."""

FITTED = 0.4
"""Numbers of a plan's fitted weights over its visual budget of the layers' weights."""

HEAPED, HEAPS = 32 << 20, 4
"""Bytes under which the C library keeps what is freed for a while (see ``GivingBack``), and what
that adds up to, over what a batch takes in a layer."""

LIBRARIES = 110_000_000
"""What libraries take on the host when they are first used."""


@dataclass(frozen=True)
class Stage:
    """What a stage holds at its peak.

    Attributes:
        name: What is done.
        device, host: Bytes on the device, beside the weights, and in host memory.
        option: That makes it need less, beside those that concern all stages.
    """

    name: str
    device: float
    host: float
    option: str | None = None


def stages(job: Job) -> list[Stage]:
    """Those of a job's stages that may be its peak: a profile holds less than the fits after it."""
    found = [Stage("loading the weights", 0.0, job.staged)]
    if job.counts.statistics:
        found.append(_statistics(job))
    if job.counts.judged:
        found.append(_comparison(job))
    if job.plans.fitted:
        found.append(_fit(job))
    return found


def states_in_files(job: Job) -> float:
    """Bytes of states that wait in files of the work directory."""
    return _states(job) if job.is_offloaded and job.has_folder else 0.0


def certain_states(job: Job) -> float:
    """Bytes of states that surely are on the device."""
    is_elsewhere = job.is_offloaded and (job.has_folder or not job.on_host)
    return 0.0 if is_elsewhere or not job.plans.fitted else _once(job)


def finished(job: Job) -> float:
    """Bytes of finished stages: recorded predictions, and the weights of fitted plans."""
    answers = job.own(job.counts.judged) * (job.new_tokens + 1) * job.vocabulary * SINGLE
    return answers + (job.plans.kept + bool(job.plans.fitted)) * _weights(job, FITTED)


def _statistics(job: Job) -> Stage:
    """The scores of some queries, and keys, in float32."""
    length, heads = job.prompts.longest, job.shape.heads
    scores = 4 * heads * min(CHUNK, length) + 2 * job.shape.kv_heads * job.shape.head_dim
    observed = SINGLE * job.batch_size * length * scores
    held = _activations(job) + observed + _waiting(job, job.counts.statistics, 0.0)
    return Stage("measuring statistics", held, 0.0)


def _comparison(job: Job) -> Stage:
    """Answers of the dense model, and each plan's predictions along them."""
    batch, itemsize = job.batch_size, job.weights.itemsize
    logits = batch * (job.new_tokens + 1) * job.vocabulary * (itemsize + 3 * SINGLE)
    cached = 2 * job.shape.layers * job.shape.kv_heads * job.shape.head_dim
    keys = (job.prompts.longest + job.new_tokens) * cached * itemsize  # of one pair
    held = _activations(job) + max(logits, 0.0 if job.is_offloaded else batch * keys)
    held += _waiting(job, job.counts.judged, keys)
    held += _weights(job, (1 + FITTED) * bool(job.plans.compared))
    name = "comparing plans with the dense model"
    return Stage(name, held, finished(job), "fewer --max-new-tokens")


def _fit(job: Job) -> Stage:
    """States of all pairs, a batch on its way into moments, and what is solved with them."""
    hidden, neurons = job.shape.hidden, min(1.0, NEURONS * job.plans.budget) * job.shape.ffn
    inputs = hidden + neurons
    rows = 3 * SINGLE * job.batch_size * job.prompts.longest * (inputs + hidden)
    solving = 4 * inputs * (inputs + hidden)
    moments = (2 + (job.processes > 1)) * inputs * (inputs + hidden)
    held = _activations(job) + rows + DOUBLE * (moments + solving)
    states, host = _states(job), finished(job)
    if not job.is_offloaded:
        held += states
    else:  # what was freed in the heap is there for states, if they do not wait in files
        host += _freed(job) if job.has_folder else states
    return Stage("the fit", held, host, "fewer --fit-pairs")


def _activations(job: Job) -> float:
    """Of one layer, for the tokens of a batch; the vision tower takes about as much, before."""
    each = 5 * job.shape.hidden + 3 * job.shape.ffn
    return job.batch_size * job.prompts.longest * each * job.weights.itemsize


def _freed(job: Job) -> float:
    """What batches on the host leave in its heap."""
    largest = job.batch_size * job.prompts.longest * job.shape.ffn * job.weights.itemsize
    return HEAPS * _activations(job) if job.on_host and largest < HEAPED else 0.0


def _waiting(job: Job, pairs: int, keys: float) -> float:
    """What forwards hold that wait at layers on disk (see ``yopo.models.window``).

    Args:
        job: The job.
        pairs: Those that pass the model.
        keys: Bytes of one pair's keys and values; 0: they generate nothing.
    """
    if not job.is_offloaded:
        return 0.0
    waiting: float = min(job.own(pairs), MOST_CALLS * job.batch_size)
    if not keys:
        most = most_tokens("cpu" if job.on_host else "cuda")
        waiting = min(waiting, most / job.prompts.mean + job.batch_size)
    states = job.prompts.mean * STATES * job.shape.hidden * job.weights.itemsize
    return min(waiting * (states + keys), job.window)


def _weights(job: Job, share: float) -> float:
    """A share of what a plan keeps of the layers' weights."""
    return share * job.plans.budget * job.weights.layers * job.weights.itemsize


def _once(job: Job) -> float:
    """States of the pairs to fit on."""
    return job.own(job.counts.fit) * job.prompts.mean * job.shape.hidden * job.weights.itemsize


def _states(job: Job) -> float:
    """States in a fit: those before the first layer, those of walks, dense and of several plans,
    which begin in common, and those within a layer."""
    plans = min(job.plans.fitted, TOGETHER)
    return _once(job) * (2 + plans + (plans > 1) + WITHIN)
