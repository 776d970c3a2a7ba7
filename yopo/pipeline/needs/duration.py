"""How long a command takes: FLOPs over measured rates, and what does not follow FLOPs."""

from __future__ import annotations

from dataclasses import dataclass

from yopo.fitting.least_squares import WIDE
from yopo.pipeline.needs.job import TOLERANCE_STEPS, Job

START, READ = 2.0, 1e9
"""Seconds to check a model and its pairs; bytes of weights per second that are loaded."""

PROFILE = 2
"""Fits that take as long as a profile."""

NEURONS = 0.5
"""Share of its neurons that a fitted layer keeps on average, over the visual budget."""

SOLVED, NARROW = 28, 24
"""FLOPs of a layer's solves over the cube of its width, and what narrow layers have in addition,
where singular values are computed as a whole."""

PRUNED, MEASURED = 4, 15
"""What takes time beside FLOPs, in calls of a decoder's layer and in addition to the call itself: a
batch in a pruned layer, or in one that is observed or solved for."""


@dataclass(frozen=True)
class Speed:
    """What a device computes.

    Attributes:
        products: FLOPs per second of a layer's products, in the model's dtype.
        moments: Those of products in float32.
        solves: Those of solves in float64.
        per_weight: Seconds per weight where few rows pass it.
        per_layer: Seconds that a layer's call takes, however little it computes.
    """

    products: float
    moments: float
    solves: float
    per_weight: float
    per_layer: float


def seconds(job: Job, speed: Speed) -> float:
    """Seconds of a whole job, without those to read layers on disk."""
    clock = _Clock(job, speed)
    counts, plans = job.counts, job.plans
    judged = counts.judged
    encoded = counts.statistics + counts.fit * (plans.fitted > 0) + 2 * judged
    total = START + job.own(encoded) * job.prompts.seconds
    if not job.is_offloaded:
        total += job.weights.num_bytes / READ
    total += clock.forward(counts.statistics) + clock.observing(counts.statistics)
    total += 2 * clock.forward(judged) + clock.decoding(judged)
    total += plans.compared * clock.forward(counts.comparison, plans.budget)
    total += TOLERANCE_STEPS * clock.forward(counts.holdout, plans.budget)
    total += plans.answered * (clock.forward(judged, plans.budget) + clock.decoding(judged))
    total += plans.timed * clock.forward(min(judged, job.batch_size))
    if plans.fitted:
        walks, fits = plans.walks + plans.profiles, plans.fitted + PROFILE * plans.profiles
        total += clock.tower(counts.fit) + walks * clock.decoder(counts.fit)
        total += fits * (clock.decoder(counts.fit, plans.budget) + clock.fitting(counts.fit))
    return total


class _Clock:
    """Seconds of the parts of a job, for one of its processes; pairs are those of all."""

    def __init__(self, job: Job, speed: Speed):
        self.job, self.speed, self.shape = job, speed, job.shape

    def tower(self, pairs: int) -> float:
        """Images up to the decoder."""
        job = self.job
        return 2 * job.own(pairs) * job.prompts.patches * job.weights.tower / self.speed.products

    def decoder(self, pairs: int, budget: float = 1.0) -> float:
        """Prompts through the decoder, dense or at a visual budget."""
        prompts = self.job.prompts
        tokens = prompts.mean - (1 - budget) * prompts.visual
        scores = 4 * self._of_heads(tokens)
        flops = self.job.own(pairs) * (2 * self.job.weights.layers * tokens + scores)
        return flops / self.speed.products + self._calls(pairs, 1 + PRUNED * (budget < 1))

    def forward(self, pairs: int, budget: float = 1.0) -> float:
        """Prompts through the model."""
        return self.tower(pairs) + self.decoder(pairs, budget)

    def observing(self, pairs: int) -> float:
        """Scores of all visual queries, in float32."""
        flops = 6 * self.job.own(pairs) * self._of_heads(self.job.prompts.mean)
        return flops / self.speed.moments + self._calls(pairs, MEASURED)

    def decoding(self, pairs: int) -> float:
        """Answers, token by token."""
        weights = self.job.weights
        step = (weights.total - weights.tower) * self.speed.per_weight
        return self.job.new_tokens * (self._batches(pairs) * step + self._calls(pairs, 1))

    def fitting(self, pairs: int) -> float:
        """One plan's moments and solves."""
        hidden, rows = self.shape.hidden, self.job.own(pairs) * self.job.prompts.visual
        inputs = hidden + NEURONS * self.job.plans.budget * self.shape.ffn
        moments = 2 * rows * (inputs * (inputs + hidden) + hidden**2) / self.speed.moments
        solves = (SOLVED + NARROW * (hidden < WIDE)) * hidden**3 / self.speed.solves
        return self.shape.layers * (moments + solves + MEASURED * self.speed.per_layer)

    def _of_heads(self, tokens: float) -> float:
        """Products of all pairs of tokens, in all heads and layers."""
        return tokens**2 * self.shape.heads * self.shape.head_dim * self.shape.layers

    def _calls(self, pairs: int, each: float) -> float:
        """What batches of pairs take in all layers beside FLOPs."""
        return self._batches(pairs) * self.shape.layers * each * self.speed.per_layer

    def _batches(self, pairs: int) -> int:
        return -(-self.job.own(pairs) // self.job.batch_size)
