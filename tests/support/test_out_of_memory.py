"""Out of memory is known in every form, and turned into a sentence with a way out."""

from __future__ import annotations

import errno

import pytest
import torch

from yopo.support.errors import DataError, YopoError
from yopo.support.out_of_memory import is_out_of_memory, memory_for, narrower, smaller_batches, use

FORMS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."),
    RuntimeError("MPS backend out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    MemoryError(),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", FORMS, ids=lambda each: str(each)[:20])
def test_every_form_is_known(error: Exception) -> None:
    assert is_out_of_memory(error)
    with pytest.raises(YopoError) as caught, memory_for("a test", "less", None, "fewer --tests"):
        raise error
    assert caught.value.message == "Out of memory in a test."
    assert caught.value.remedy == "Use less, or fewer --tests."
    assert caught.value.__cause__ is error


@pytest.mark.parametrize(
    "error",
    [RuntimeError("sizes differ"), OSError(errno.ENOSPC, "full"), DataError("out of memory")],
)
def test_nothing_else_is(error: Exception) -> None:
    assert not is_out_of_memory(error)
    with pytest.raises(type(error)) as caught, memory_for("a test", "less"):
        raise error
    assert caught.value is error


def test_an_allocation_that_cannot_be_made() -> None:
    with pytest.raises(YopoError, match="Out of memory in a test"), memory_for("a test"):
        torch.empty(1 << 50, dtype=torch.uint8)


def test_options_that_cannot_help_are_not_named() -> None:
    assert (smaller_batches(1), narrower(2)) == (None, None)
    assert use(None, None) is None and use("this", None) == "Use this."
    assert use(smaller_batches(8), narrower(4), "x") == (
        "Use a smaller --batch-size, --dtype bfloat16, or x."
    )
