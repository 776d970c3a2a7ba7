"""The prompts that visual weights are fitted on, as far as they belong to this process."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from transformers import PreTrainedModel, ProcessorMixin

from yopo.data.pairs import Pair
from yopo.data.prompts import Batch, batches, encode_for
from yopo.data.sizes import by_size
from yopo.support.ranks import check_enough, mine


def encoded(
    model: PreTrainedModel, processor: ProcessorMixin, pairs: Iterable[Pair], batch_size: int
) -> Iterator[Batch]:
    """Encode this process's batches of pairs, all if there is one process, when they are needed.

    Raises:
        YopoError: There are more processes than batches.
    """
    groups = list(batches(by_size(pairs), batch_size))
    check_enough(len(groups), "batches of pairs to fit on")
    return (encode_for(model, processor, group) for _, group in mine(groups))
