"""A model whose layers stay on disk reads each layer once per pass of a window."""

from __future__ import annotations

import copy
import time
from collections import Counter
from pathlib import Path
from typing import Any

import accelerate
import pytest
import tiny
import torch
from fetches import count_fetches, of_decoder
from tiny import PICTURE, Subject
from transformers import LlavaForConditionalGeneration

from yopo.models import window
from yopo.models.offloaded import at_hand, is_offloaded, layers_on_disk, offloaded_towers
from yopo.models.turns import in_turns
from yopo.runtime.install import install
from yopo.runtime.sliced_linear import SlicedLinear
from yopo.support import memory

PROMPTS = [
    tiny.batch([[1, 5, 6, *PICTURE, 7, 8]], seed=1),
    tiny.batch([[*PICTURE, 9, *PICTURE, 4]], seed=2),
    tiny.batch([[1, 5, *PICTURE, 7], [1, 2, 3]], seed=3),
]


@pytest.fixture
def source(mha: Subject, tmp_path: Path) -> Path:
    """The tiny model's checkpoint."""
    mha.model.save_pretrained(tmp_path / "source")
    return tmp_path / "source"


def on_disk(mha: Subject, source: Path, *, towers: bool) -> LlavaForConditionalGeneration:
    """The tiny model, its layers on disk."""
    places = layers_on_disk(mha.model, mha.model.get_decoder(), "cpu", towers=towers)
    return LlavaForConditionalGeneration.from_pretrained(source, device_map=places).eval()


@pytest.fixture
def stored(mha: Subject, source: Path) -> LlavaForConditionalGeneration:
    """The tiny model, its decoder's layers on disk."""
    return on_disk(mha, source, towers=False)


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each weight was read from disk."""
    return count_fetches(monkeypatch)


def run(
    model: LlavaForConditionalGeneration, steps: int, *, alone: bool = False
) -> list[torch.Tensor]:
    """Logits, or answers of several steps; of prompts in turns, or each alone."""

    def call(_: int, inputs: dict[str, Any]) -> torch.Tensor:
        if not steps:
            return model(**inputs).logits
        return model.generate(
            **inputs, max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            suppress_tokens=[tiny.IMAGE],
        )  # fmt: skip

    with torch.no_grad():
        if alone:
            return [call(number, inputs) for number, inputs in enumerate(PROMPTS)]
        finished = list(in_turns(model, call, PROMPTS, new_tokens=steps or None))
    return [each for some in finished for each in some.results]


@pytest.mark.parametrize("steps", [0, 3])
def test_each_layer_is_read_once(
    mha: Subject, stored: LlavaForConditionalGeneration, reads: Counter[str], steps: int
) -> None:
    usual, found = run(mha.model, steps), run(stored, steps)
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    layers = mha.model.get_decoder().layers
    assert len(reads) == sum(len(list(layer.parameters())) for layer in layers)
    assert set(reads.values()) == {max(steps, 1)}
    assert of_decoder(reads) == reads
    assert is_offloaded(stored.get_decoder())
    assert not is_offloaded(mha.model.get_decoder())


@pytest.mark.parametrize("steps", [0, 3])
def test_a_tower_is_read_for_the_first_prompt_and_once_for_the_others(
    mha: Subject, source: Path, reads: Counter[str], steps: int
) -> None:
    model = on_disk(mha, source, towers=True)
    usual, found = run(mha.model, steps), run(model, steps)
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    counts = of_decoder(reads), reads - of_decoder(reads)
    expected = (model.get_decoder().layers, max(steps, 1)), (offloaded_towers(model), 2)
    for found_counts, (layers, times) in zip(counts, expected, strict=True):
        assert len(found_counts) == sum(len(list(layer.parameters())) for layer in layers)
        assert set(found_counts.values()) == {times}


def test_a_tower_is_read_once_more_per_window(
    mha: Subject, source: Path, reads: Counter[str]
) -> None:
    """As large as those before it: what a call holds is known by then."""
    model, same = on_disk(mha, source, towers=True), [PROMPTS[0]] * 7
    rows, length = PROMPTS[0]["input_ids"].shape
    states = torch.zeros(rows, length, mha.shape.hidden)
    with torch.no_grad(), window.window_of(3 * window.Holding(mha.shape, None).of(states)):
        finished = list(in_turns(model, lambda _, inputs: model(**inputs).logits, same))
    assert [len(some.results) for some in finished] == [3, 3, 1]
    assert set(of_decoder(reads).values()) == {3}
    assert set((reads - of_decoder(reads)).values()) == {4}


@pytest.mark.parametrize("steps", [0, 3])
def test_a_window_has_only_so_many_tokens_unless_it_generates(
    stored: LlavaForConditionalGeneration,
    reads: Counter[str],
    steps: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(window, "MOST_TOKENS", {"cpu": PROMPTS[0]["input_ids"].shape[1] + 1})
    run(stored, steps)
    assert set(reads.values()) == {steps or 2}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize("steps", [0, 3])
def test_each_layer_of_a_pruned_model_is_read_once(
    mha: Subject, reads: Counter[str], steps: int, alone: bool, tmp_path: Path
) -> None:
    """Text and visual tokens share what was read, also after the last layer of visual ones."""
    model = tiny.llava("mha")
    layers = model.get_decoder().layers
    plans = (mha.random_plan(seed) for seed in range(99))
    plan = next(each for each in plans if 0 < each.visual_depth < len(layers))
    install(model, plan)
    usual = run(model, steps, alone=alone)
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    found = run(model, steps, alone=alone)
    assert all(torch.equal(one, other) for one, other in zip(found, usual, strict=True))
    counts = of_decoder(reads)
    assert len(counts) == sum(len(list(layer.parameters())) for layer in layers)
    assert set(counts.values()) == {max(steps, 1) * (len(PROMPTS) if alone else 1)}


def test_no_part_of_a_weight_stays_in_memory(mha: Subject, tmp_path: Path) -> None:
    model = tiny.llava("mha")
    install(model, mha.random_plan(3))
    fetched = copy.deepcopy(model)
    accelerate.disk_offload(fetched, tmp_path, execution_device="cpu")
    for each, keeps in ((model, True), (fetched, False)):
        run(each, 0)
        parts = [part for part in each.modules() if isinstance(part, SlicedLinear)]
        held = [value for part in parts for value in vars(part).values()]
        assert any(isinstance(value, torch.Tensor) for value in held) == keeps


def test_weights_go_away_also_after_an_error(stored: LlavaForConditionalGeneration) -> None:
    layer = stored.get_decoder().layers[0]
    with pytest.raises(ZeroDivisionError), at_hand(layer):
        assert not any(weight.is_meta for weight in layer.parameters())
        raise ZeroDivisionError
    assert all(weight.is_meta for weight in layer.parameters())


def test_what_was_freed_is_given_back_however_short_windows_are(
    stored: LlavaForConditionalGeneration, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = stored.get_decoder().layers[0]
    trims: list[bool] = []

    def trim(_: int) -> int:
        trims.append(all(each.is_meta for each in layer.parameters()))
        return 1

    def is_due() -> None:
        monkeypatch.setattr(memory.give_back, "_last", time.monotonic() - memory.PERIOD)

    monkeypatch.setattr(memory, "_trim", lambda: trim)
    is_due()
    with window.window_of(1):
        for _ in in_turns(stored, lambda _, inputs: stored(**inputs), PROMPTS):
            pass
    assert len(trims) == 1
    is_due()
    with at_hand(layer):
        assert not any(each.is_meta for each in layer.parameters())
    assert trims[1:] == [True], "after the layer's weights are gone"
