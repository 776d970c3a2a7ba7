"""How long a command takes: FLOPs over measured rates, and what does not follow FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.fitting.least_squares import WIDE
from yopo.pipeline.needs.job import Job, profile_sums

START, READ = 2.0, 1e9
"""Seconds to check a model and its pairs; bytes of weights per second that are loaded."""

FIT_NEURONS = 0.5
"""Share of its neurons that a fitted layer keeps on average, over the visual budget."""

TOWER, PRUNED, FIT, OBSERVED, PROFILED, SOLVED = 0.5, 3, 5, 15, 8, 10
"""What takes time beside FLOPs, in calls of a decoder's layer: a tower's layer; a batch in a pruned
layer, in one that is fitted, in one whose attention is observed, in one that is profiled, each in
addition to the call itself; a layer's solves."""


@dataclass(frozen=True)
class Speed:
    """What a device computes.

    Attributes:
        products: FLOPs per second of a layer's products, in the model's dtype.
        single, double: Those of products in float32 and float64.
        per_weight: Seconds per number of a layer's weights where few rows pass it.
        per_layer: Seconds that a layer's call takes, however little it computes.
        behind: Time of a solve over that of its FLOPs in products of square matrices.
    """

    products: float
    single: float
    double: float
    per_weight: float
    per_layer: float
    behind: float


def seconds(job: Job, speed: Speed) -> float:
    """Seconds of a whole job, without those to read layers on disk."""
    clock = _Clock(job, speed)
    counts, plans = job.counts, job.plans
    judged = counts.comparison + counts.holdout
    encoded = counts.statistics + counts.fit * (plans.fitted > 0) + 2 * judged
    total = START + job.own(encoded) * job.prompts.seconds
    if not job.is_offloaded:
        total += job.weights.num_bytes / READ
    total += clock.forward(counts.statistics) + clock.observing(counts.statistics)
    total += 2 * clock.forward(judged) + clock.decoding(judged)
    total += plans.compared * clock.pruned(counts.comparison, is_whole=True)
    total += plans.held_out * clock.pruned(counts.holdout, is_whole=True)
    total += plans.answered * (clock.pruned(judged, is_whole=True) + clock.decoding(judged))
    total += plans.timed * clock.forward(min(judged, job.batch_size))
    if plans.fitted:
        total += clock.tower(counts.fit)
        walks = plans.walks + plans.profiles
        total += walks * clock.dense(counts.fit) + plans.profiles * clock.profiling(counts.fit)
        total += plans.fitted * (clock.pruned(counts.fit) + clock.fitting(counts.fit))
    return total


class _Clock:
    """Seconds of the parts of a job, for one of its processes."""

    def __init__(self, job: Job, speed: Speed):
        self.job, self.speed, self.shape = job, speed, job.shape
        self.heads = job.shape.heads * job.shape.head_dim

    def tower(self, pairs: int) -> float:
        """Images up to the decoder."""
        job, pairs = self.job, self.job.own(pairs)
        flops = 2 * pairs * job.prompts.patches * job.weights.tower
        calls = self._batches(pairs) * job.tower.layers * TOWER
        return flops / self.speed.products + calls * self.speed.per_layer

    def dense(self, pairs: int) -> float:
        """Prompts through the decoder."""
        return self._through(self.job.own(pairs), self.job.prompts.mean)

    def forward(self, pairs: int) -> float:
        """Prompts through the model."""
        return self.tower(pairs) + self.dense(pairs)

    def pruned(self, pairs: int, *, is_whole: bool = False) -> float:
        """Prompts through the pruned decoder, or model."""
        prompts, own = self.job.prompts, self.job.own(pairs)
        text = prompts.mean - prompts.visual
        through = self._through(own, text) + self.job.plans.budget * self._through(
            own, prompts.visual
        )
        through += self._calls(own, PRUNED if is_whole else FIT)
        return through + (self.tower(pairs) + self._head(own) if is_whole else 0.0)

    def observing(self, pairs: int) -> float:
        """Scores of all visual queries, in float32."""
        flops = 6 * self.job.own(pairs) * self.job.prompts.mean**2 * self.heads * self.shape.layers
        return flops / self.speed.single + self._calls(self.job.own(pairs), OBSERVED)

    def decoding(self, pairs: int) -> float:
        """Answers, token by token, and the dense model's predictions along them."""
        job, own = self.job, self.job.own(pairs)
        step = job.weights.layers * self.speed.per_weight
        step += self.shape.layers * self.speed.per_layer
        return self._batches(own) * job.new_tokens * step + self._head(own)

    def profiling(self, pairs: int) -> float:
        """Moments of all layers, and what is solved with them."""
        hidden = self.shape.hidden
        moments = 2 * self._rows(pairs) * profile_sums(self.shape) / self.speed.single
        whole = 4 * _cholesky(hidden) + 3 * 3 * hidden**3 + 6 * hidden**3 + 7 * hidden**3
        solves = self.speed.behind * whole / self.speed.double + 20 * hidden**3 / self.speed.single
        solves += SOLVED * self.speed.per_layer
        return self.shape.layers * (moments + solves) + self._calls(self.job.own(pairs), PROFILED)

    def fitting(self, pairs: int) -> float:
        """The same for one plan's weights."""
        hidden, rows = self.shape.hidden, self._rows(pairs)
        neurons = FIT_NEURONS * self.job.plans.budget * self.shape.ffn
        inputs = hidden + neurons
        moments = 2 * rows * (inputs * (inputs + hidden) + hidden**2) / self.speed.single
        leading = (3 if hidden >= WIDE else 15) * hidden**3
        whole = _cholesky(inputs) + 3 * inputs**2 * hidden + 2 * _cholesky(hidden)
        whole += 4 * hidden**3 + 2 * leading + _cholesky(neurons) + 3 * neurons**2 * hidden
        solves = self.speed.behind * (
            whole / self.speed.double + 12 * hidden**3 / self.speed.single
        )
        return self.shape.layers * (moments + solves + SOLVED * self.speed.per_layer)

    def _through(self, pairs: int, tokens: float) -> float:
        layers, shape = self.job.weights.layers, self.shape
        flops = 2 * layers * tokens + 4 * shape.layers * tokens**2 * self.heads
        return pairs * flops / self.speed.products + self._calls(pairs, 1)

    def _calls(self, pairs: int, each: float) -> float:
        """What batches of pairs take in all layers beside FLOPs."""
        return self._batches(pairs) * self.shape.layers * each * self.speed.per_layer

    def _head(self, pairs: int) -> float:
        """Predictions along answers."""
        job = self.job
        flops = 2 * pairs * (job.new_tokens + 1) * self.shape.hidden * job.vocabulary
        return flops / self.speed.products

    def _rows(self, pairs: int) -> float:
        return self.job.own(pairs) * self.job.prompts.visual

    def _batches(self, pairs: int) -> int:
        return -(-pairs // self.job.batch_size)


def _cholesky(width: float) -> float:
    """FLOPs of a product that takes as long as factoring a matrix."""
    return 1.5 * width**3
