"""Only matrix products that gain use the other kernel, with equal results up to rounding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext

import pytest
import tiny
import torch
from test_prefill import check_plan
from tiny import PICTURE, Subject
from torch import nn
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from yopo.runtime import gemm
from yopo.runtime.gemm import fast_gemm
from yopo.runtime.install import pruned

needs_kernel = pytest.mark.skipif(
    gemm._kernel() is None, reason="this torch has no oneDNN product on plain weights"
)

INPUTS: dict[str, Callable[[], torch.Tensor]] = {
    "2-D": lambda: torch.randn(33, 96),
    "3-D": lambda: torch.randn(2, 33, 96),
    "transposed": lambda: torch.randn(33, 2, 96).transpose(0, 1),
    "every other column": lambda: torch.randn(2, 33, 192)[..., ::2],
    "left half": lambda: torch.randn(2, 33, 192)[..., :96],
    "expanded": lambda: torch.randn(33, 96).expand(2, 33, 96),
}


@pytest.fixture(autouse=True)
def without_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets tiny weights use the other kernel too, copied 17 rows at a time."""
    monkeypatch.setattr(gemm, "MIN_WEIGHT", 1)
    monkeypatch.setattr(gemm, "MIN_ROWS_TO_COPY", 1)
    monkeypatch.setattr(gemm, "COPY_BYTES", 17 * 96 * 4)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, ...]]:
    """Collects the shapes of weights that use the other kernel."""
    kernel, seen = gemm._kernel(), []

    def spy(inputs, weight, *rest):
        seen.append(tuple(weight.shape))
        return kernel(inputs, weight, *rest)

    monkeypatch.setattr(gemm, "_kernel", lambda: spy)
    return seen


def layers(width: int = 96, dtype: torch.dtype = torch.float32) -> nn.ModuleList:
    return nn.ModuleList([nn.Linear(width, 40).to(dtype)])


@needs_kernel
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("weight", ["whole", "rows", "columns"])
@pytest.mark.parametrize("name", INPUTS)
def test_the_other_kernel_equals_linear(
    small: None, calls: list[tuple[int, ...]], name: str, weight: str, has_bias: bool
) -> None:
    torch.manual_seed(0)
    inputs, full, bias = INPUTS[name](), torch.randn(60, 96), torch.randn(40)
    rows = full[10:50] if weight == "rows" else full[:40].clone()
    if weight == "columns":
        rows = torch.randn(40, 131)[:, 10:106]
    bias = bias if has_bias else None
    exact = linear(inputs.double(), rows.double(), None if bias is None else bias.double())
    usual = linear(inputs, rows, bias)
    with fast_gemm(layers(), torch.randn(1, 33, 96)):
        found = linear(inputs, rows, bias)
    in_parts = [(17, 96), (17, 96), (6, 96)]
    assert calls == (in_parts if weight == "columns" else [(40, 96)])
    assert found.shape == usual.shape
    rounding = (usual - exact).abs().max()
    assert (found - exact).abs().max() <= tiny.ROUNDING_FACTOR * rounding


@needs_kernel
def test_only_products_that_gain_use_the_other_kernel(
    calls: list[tuple[int, ...]], monkeypatch
) -> None:
    monkeypatch.setattr(gemm, "MIN_WEIGHT", 96 * 40)
    weight, inputs = torch.randn(40, 96), torch.randn(1, 33, 96)
    with fast_gemm(layers(), inputs):
        linear(inputs, weight)
        linear(input=inputs, weight=weight)  # no module calls it so
        linear(inputs[:, :1], weight)
        linear(inputs, weight[:39])
        linear(inputs, torch.randn(40, 97)[:, :96])  # too few rows to copy it for
        linear(torch.randn(1, 300, 96), torch.randn(40, 192)[:, ::2])
        linear(inputs.double(), weight.double())
    assert calls == [(40, 96)]
    linear(inputs, weight)
    assert len(calls) == 1


def autocast() -> AbstractContextManager[object]:
    return torch.autocast("cpu", dtype=torch.bfloat16)


@pytest.mark.parametrize("around", [torch.enable_grad, FlopCounterMode, autocast])
def test_the_other_kernel_is_off_if_others_observe_products(small: None, around: Callable) -> None:
    context = around(display=False) if around is FlopCounterMode else around()
    with context:
        assert isinstance(fast_gemm(layers(), torch.randn(1, 33, 96)), nullcontext)


@pytest.mark.parametrize(
    "hidden",
    [
        torch.randn(1, 1, 96),
        torch.randn(1, 33, 96, dtype=torch.float64),
        torch.randn(1, 33, 96, dtype=torch.bfloat16),
        torch.empty(1, 33, 96, device="meta"),
    ],
    ids=["a decode step", "float64", "bfloat16", "another device"],
)
def test_the_other_kernel_is_off_for_unsuitable_inputs(small: None, hidden: torch.Tensor) -> None:
    assert isinstance(fast_gemm(layers(dtype=hidden.dtype), hidden), nullcontext)


@pytest.mark.filterwarnings("ignore:TF32")
def test_the_other_kernel_is_off_for_small_models_or_if_unavailable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hidden = torch.randn(1, 33, 96)
    assert isinstance(fast_gemm(layers(), hidden), nullcontext)
    monkeypatch.setattr(gemm, "MIN_WEIGHT", 1)
    assert isinstance(fast_gemm(nn.ModuleList(), hidden), nullcontext)
    with torch.backends.mkldnn.flags(enabled=False):
        assert isinstance(fast_gemm(layers(), hidden), nullcontext)


def modes() -> int:
    return torch._C._len_torch_function_stack()


@needs_kernel
def test_an_exception_switches_the_other_kernel_off(small: None) -> None:
    before = modes()
    with pytest.raises(RuntimeError, match="on purpose"):
        with fast_gemm(layers(), torch.randn(1, 33, 96)) as mode:
            assert isinstance(mode, TorchFunctionMode) and modes() == before + 1
            raise RuntimeError("on purpose")
    assert modes() == before


@needs_kernel
@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "rows", [[[1, 5, 6, *PICTURE, 7, 8, 9]], [[1, 5, *PICTURE, 7], [1, *PICTURE, 3]]]
)
def test_any_plan_matches_the_reference(
    subject: Subject, small: None, calls: list[tuple[int, ...]], rows: list[list[int]], seed: int
) -> None:
    check_plan(subject, 1000 + seed, tiny.batch(rows))
    assert calls


@needs_kernel
def test_a_counter_sees_every_matrix_product(mha: Subject, small: None) -> None:
    """The counter does not know the other kernel, so it must be off."""
    counts = []
    for threshold in (1, 1 << 40):
        with pytest.MonkeyPatch.context() as patch, pruned(mha.model, tiny.whole(mha)):
            patch.setattr(gemm, "MIN_WEIGHT", threshold)
            counter = FlopCounterMode(display=False)
            with counter:
                tiny.logits(mha.model, tiny.batch([[1, 5, *PICTURE, 7]]))
            counts.append(counter.get_total_flops())
    assert counts[0] == counts[1] > 0


@needs_kernel
def test_a_dense_model_can_run_on_the_same_kernel(
    mha: Subject, small: None, calls: list[tuple[int, ...]]
) -> None:
    model, inputs, before = mha.model, tiny.batch([[1, 5, *PICTURE, 7]]), modes()
    usual = tiny.logits(model, inputs)
    decoder = model.get_decoder()
    hooks = len(decoder._forward_hooks), len(decoder._forward_pre_hooks)
    with gemm.same_gemm(decoder):
        found = tiny.logits(model, inputs)
        assert modes() == before  # only inside the decoder
        linears = [each for each in decoder.modules() if type(each) is nn.Linear]
        assert len(calls) == len(linears)
        with pytest.raises(ValueError):
            decoder(input_ids=None, inputs_embeds=None)
        assert modes() == before
    assert (len(decoder._forward_hooks), len(decoder._forward_pre_hooks)) == hooks
    torch.testing.assert_close(found, usual, rtol=1e-4, atol=1e-5)
    tiny.logits(model, inputs)
    assert len(calls) == len(linears)
