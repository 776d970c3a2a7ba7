"""Which rows of a batch are visual.

vLLM lays all scheduled tokens of all requests in one row each: pieces of prompts, whole ones,
decode steps. Its runner marks the visual ones when it asks the model for embeddings, and then
calls the model; in between the mask waits here.
"""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

Index = slice | torch.Tensor
"""Rows: a slice where they follow one another, else int64 positions."""


@dataclass(frozen=True)
class Split:
    """The text and the visual rows of one batch."""

    text: Index
    visual: Index

    @classmethod
    def of(cls, mask: torch.Tensor, count: int, device: torch.device) -> Split | None:
        """Split by a mask; None if no row is visual.

        Args:
            mask: (tokens,) bool, true at visual tokens; on the CPU, so that nothing waits for an
                accelerator.
            count: Rows of the batch, padding at its end included.
            device: Of the batch.
        """
        marked = torch.zeros(count, dtype=torch.bool)
        marked[: len(mask)] = mask.to("cpu")
        visual = marked.nonzero().flatten()
        if not len(visual):
            return None
        text = (~marked).nonzero().flatten()
        return cls(_as_index(text, device), _as_index(visual, device))


def _as_index(rows: torch.Tensor, device: torch.device) -> Index:
    if not len(rows):
        return slice(0, 0)
    first, last = int(rows[0]), int(rows[-1])
    if last - first + 1 == len(rows):
        return slice(first, last + 1)
    return rows.to(device, non_blocking=True)


def take(tensor: torch.Tensor, rows: Index) -> torch.Tensor:
    """Some rows of a tensor: a view of a slice, else a copy."""
    return tensor[rows] if isinstance(rows, slice) else tensor.index_select(0, rows)


def put(target: torch.Tensor, rows: Index, values: torch.Tensor) -> None:
    """Write rows into a tensor, or into a part of its columns."""
    if isinstance(rows, slice):
        target[rows] = values
    else:
        target.index_copy_(0, rows, values)


class BatchRows:
    """The rows of the batch that a model is computing, shared by all of its layers."""

    def __init__(self) -> None:
        self.split: Split | None = None
        self._marked: torch.Tensor | None = None

    def mark(self, mask: torch.Tensor | None) -> None:
        """Remember which tokens of the next batch are visual."""
        self._marked = mask

    @contextmanager
    def of_batch(self, count: int, device: torch.device) -> Generator[None, None, None]:
        """Let the layers see the marked rows during one forward; then forget them.

        A forward without a mark (profiling, graph capture) has only text.
        """
        marked, self._marked = self._marked, None
        self.split = None if marked is None else Split.of(marked, count, device)
        try:
            yield
        finally:
            self.split = None
