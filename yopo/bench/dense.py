"""The dense model in the runtime of pruned ones, where that differs from stock transformers.

On a GPU this runtime has norms of one kernel, and replays prefills from CUDA graphs. A plan must
not be credited with either, so the dense model that it is compared with gets both.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from transformers import PreTrainedModel

from yopo.plans.schema import PruningPlan, full_plan
from yopo.runtime.install import pruned


@contextmanager
def dense(model: PreTrainedModel, plan: PruningPlan) -> Iterator[None]:
    """Run a dense model in the runtime of pruned ones inside the block, every token as text.

    One stream through the model's own modules: what transformers computes, but for the features
    that DeepStack adds after the first layers.

    Args:
        model: Dense, in memory.
        plan: A plan for it.
    """
    with pruned(model, full_plan(plan.model, plan.workload), check=False):
        model.get_decoder().yopo.probe.token_ids = ()  # no token is a visual one
        yield
