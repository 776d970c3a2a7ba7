"""CUDA graphs of functions that read and write the same memory in every call."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

_CAPTURE = "thread_local"
"""What must not happen during a capture: in this thread only, as others may be running models."""

_CAPTURING = threading.Lock()
"""torch can make one capture at a time, whatever it is of."""


class CudaGraphs:
    """Records functions as graphs, whose temporaries share one pool of memory.

    Sharing is sound as long as no graph runs beside another, and none relies on what an earlier one
    left in the pool: see :meth:`in_turn`.
    """

    def __init__(self) -> None:
        self._pool: Any = None  # opaque
        self._side: torch.cuda.Stream | None = None
        self._done: torch.cuda.Event | None = None

    def suits(self, states: torch.Tensor) -> bool:
        """Whether work on a tensor can be recorded now."""
        return states.is_cuda and not torch.cuda.is_current_stream_capturing()

    @contextmanager
    def in_turn(self, device: torch.device) -> Iterator[None]:
        """A block whose work on a device begins when that of earlier blocks is done.

        Streams of other threads are other streams: nothing else puts their work in order.
        """
        with torch.cuda.device(device):
            if self._done is not None:
                self._done.wait()
            yield
            self._done = torch.cuda.Event()
            self._done.record()

    def record(self, function: Callable[[], None]) -> Callable[[], None]:
        """Call a function once on a side stream, as captures require, and capture it there.

        Returns:
            Runs what was captured, on the stream that is current then.

        Raises:
            RuntimeError: It does something that cannot be captured, or memory is used up.
        """
        if self._side is None:
            self._pool, self._side = torch.cuda.graph_pool_handle(), torch.cuda.Stream()
        graph, here = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
        self._side.wait_stream(here)
        with torch.cuda.stream(self._side):
            function()
        here.wait_stream(self._side)
        with _CAPTURING, torch.cuda.stream(here):  # a failed capture leaves its stream current
            with torch.cuda.graph(graph, self._pool, self._side, _CAPTURE):
                function()
        return graph.replay

    def forget(self) -> None:
        """Wait for all that was recorded, which is then given up along with its memory.

        torch refuses a pool whose last graph is gone, so the next graph gets another.
        """
        if self._side is not None:
            torch.cuda.synchronize(self._side.device)
        self._pool = self._side = self._done = None
