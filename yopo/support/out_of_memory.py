"""Out of memory, in whatever form a library reports it: the sentence that names a way out.

Needs no torch, so that the command line can ask as well.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager

from yopo.support.errors import YopoError

_PHRASES = (
    "out of memory",  # CUDA, MPS
    "can't allocate memory",  # torch on a CPU
    "cannot allocate memory",  # the system
    "not enough memory",
    "cublas_status_alloc_failed",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the host or of a device, could not be had."""
    if isinstance(error, YopoError):
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(each in text for each in _PHRASES)


@contextmanager
def memory_for(work: str, *options: str | None) -> Iterator[None]:
    """Say what ran out of memory, and which options need less of it.

    Args:
        work: What the block does: ``the dense model's answers, 8 pairs at a time``.
        options: What helps there, best first: ``a smaller --batch-size``; None is left out.

    Raises:
        YopoError: Memory ran out inside the block.
    """
    try:
        yield
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        raise YopoError(f"Out of memory in {work}.", remedy=use(*options)) from error


def use(*options: str | None) -> str | None:
    """The remedy that names options, in order; None for none."""
    given = [each for each in options if each]
    if not given:
        return None
    *first, last = given
    return f"Use {', '.join(first)}, or {last}." if first else f"Use {last}."


def smaller_batches(size: int) -> str | None:
    """The option for fewer pairs at a time; None if there is one already."""
    return "a smaller --batch-size" if size > 1 else None


def narrower(itemsize: int) -> str | None:
    """The option for numbers of 16 bits; None if the model's have no more bytes than that."""
    return "--dtype bfloat16" if itemsize > 2 else None
