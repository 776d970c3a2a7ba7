"""Where a device prefers few calls, a pruned model computes the same in fewer of them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import tiny
import torch
from test_generation import ONE, generate, specified
from test_prefill import GRIDS, PROMPTS, check_plan
from tiny import PICTURE, Subject
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2RMSNorm

from yopo.plans import grid
from yopo.runtime import few_calls
from yopo.runtime.install import pruned
from yopo.runtime.norms import is_rms, norm_for

TWO_TURNS = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]]
CPU = torch.device("cpu")


class Calls(TorchDispatchMode):
    """Counts operations."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def few(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The CPU behaves as devices do that prefer few calls, with two blocks per image or so."""
    monkeypatch.setattr(few_calls, "preferred_on", lambda device: True)
    monkeypatch.setattr("yopo.runtime.attention_masks.TOKENS_PER_LARGE_BLOCK", 8)
    yield


@pytest.mark.parametrize("name", PROMPTS)
def test_a_pruned_model_matches_the_specification(subject: Subject, few: None, name: str) -> None:
    for seed in range(3):
        check_plan(subject, seed, tiny.batch(PROMPTS[name]))


@pytest.mark.parametrize("name", GRIDS)
def test_other_grids_match_the_specification(subject: Subject, few: None, name: str) -> None:
    rows, grids_of = GRIDS[name]
    for seed in range(3):
        check_plan(subject, seed, tiny.batch(rows), grids_of)


@pytest.mark.parametrize("rows", [ONE, TWO_TURNS], ids=["one", "padded"])
def test_generate_gives_the_specified_tokens(subject: Subject, few: None, rows: list) -> None:
    inputs, plan = tiny.batch(rows), subject.random_plan(41)
    expected = specified(subject, plan, inputs)
    with pruned(subject.oracle, plan):
        assert torch.equal(generate(subject.oracle, inputs), expected)


def test_it_takes_fewer_calls(mha: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fewer than with row blocks, and not many more than twice the stock model's."""
    inputs, plan = tiny.batch(ONE), mha.random_plan(0)
    monkeypatch.setattr(grid, "ROWS_PER_BLOCK", 1)
    monkeypatch.setattr(grid, "TOKENS_PER_BLOCK", 1)
    counts = {}
    for is_few in (False, True):
        monkeypatch.setattr(few_calls, "preferred_on", lambda device, found=is_few: found)
        with pruned(mha.model, plan), torch.no_grad(), Calls() as calls:
            tiny.logits(mha.model, inputs)
        counts[is_few] = calls.count
    assert counts[True] < 0.75 * counts[False]


@pytest.mark.parametrize("kind", [LlamaRMSNorm, Qwen2RMSNorm])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_kernel_equals_the_norm(few: None, kind: type[nn.Module], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    norm = kind(64, eps=1e-3).to(dtype)
    nn.init.normal_(norm.weight)
    states = torch.randn(3, 5, 64).to(dtype)
    found = norm_for(norm, CPU)
    assert found is not norm
    torch.testing.assert_close(found(states), norm(states))


def test_other_norms_stay_what_they_are(few: None) -> None:
    """Another formula, a hook, an adapter's forward: the module itself runs."""
    hooked, wrapped = LlamaRMSNorm(8), LlamaRMSNorm(8)
    hooked.register_forward_hook(lambda *_: None)
    wrapped.forward = lambda states: states
    for norm in (GemmaRMSNorm(8), nn.LayerNorm(8), hooked, wrapped):
        assert norm_for(norm, CPU) is norm
    assert not is_rms(GemmaRMSNorm)


def test_a_cpu_runs_the_modules() -> None:
    norm = LlamaRMSNorm(8)
    assert norm_for(norm, CPU) is norm
