"""A prefill that is replayed from a recording gives what it would give without."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any

import pytest
import tiny
import torch
from peft import LoraConfig, get_peft_model
from tape import Tape, replays_of
from test_conversation import CONVERSATIONS, Talk, say
from test_prefill import GRIDS, PROMPTS, check_plan
from test_reduced import reducing
from tiny import PICTURE, Subject
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, PreTrainedModel

from yopo.plans.schema import PruningPlan
from yopo.reduction.registry import make_method
from yopo.runtime import replay
from yopo.runtime.install import install, pruned, uninstall
from yopo.runtime.replay import Recordings
from yopo.runtime.snapshot import Snapshot
from yopo.runtime.watching import watching
from yopo.support.errors import YopoWarning

ONE = [[1, 5, 6, *PICTURE, 7, 8, 9]]
TWO = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]]
TALKS = (
    "decode after text alone",
    "a new image first",
    "decode, padded",
    "new images, padded",
    "first images in other turns",
)
PLANS: dict[str, Callable[[PruningPlan, int], PruningPlan]] = {
    "whole": lambda plan, seed: plan,
    "in few bits": tiny.in_few_bits,
    "as latents": tiny.as_latents,
}


def plan_of(subject: Subject, seed: int = 41, stored: str = "whole") -> PruningPlan:
    return PLANS[stored](subject.random_plan(seed), seed)


def without(
    model: PreTrainedModel, plan: PruningPlan, call: Callable[[], Any], **options: Any
) -> Any:
    """What a call gives under a plan without recordings."""
    with pruned(model, plan, cuda_graphs=False, **options):
        return call()


def assert_same(one: torch.Tensor, other: torch.Tensor) -> None:
    """Equal up to rounding of float64."""
    assert (one - other).abs().max() <= 1e-12 * other.abs().max()


# Against the specification: what existing tests check, every prefill replayed.


@pytest.mark.parametrize("name", PROMPTS)
def test_any_plan_is_the_specification(subject: Subject, at_once: None, name: str) -> None:
    for seed in range(2):
        check_plan(subject, seed, tiny.batch(PROMPTS[name]))


@pytest.mark.parametrize("name", GRIDS)
def test_other_grids_are_the_specification(subject: Subject, at_once: None, name: str) -> None:
    rows, grids_of = GRIDS[name]
    for seed in range(2):
        check_plan(subject, seed, tiny.batch(rows), grids_of)


# Against the same model without recordings


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("stored", PLANS)
def test_text_that_is_not_filled_up_gives_the_same_bits(
    subject: Subject, at_once: None, monkeypatch: pytest.MonkeyPatch, stored: str, side: str
) -> None:
    monkeypatch.setattr(replay, "TEXT_STEP", 1)
    for seed in range(2):
        plan = plan_of(subject, seed, stored)
        for rows in PROMPTS.values():
            if side == "right" and len({*map(len, rows)}) == 1:
                continue  # nothing is padded
            inputs = tiny.batch(rows, pad=side)
            expected = without(subject.model, plan, partial(tiny.logits, subject.model, inputs))
            with pruned(subject.model, plan):
                assert torch.equal(tiny.logits(subject.model, inputs), expected)
                assert replays_of(subject.model) == (inputs["input_ids"].shape[1] > 1)


@pytest.mark.parametrize("stored", PLANS)
@pytest.mark.parametrize("name", TALKS)
def test_conversations_continue_a_replayed_prefill(
    subject: Subject, at_once: None, name: str, stored: str
) -> None:
    plan, turns = plan_of(subject, 7, stored), Talk.of(CONVERSATIONS[name]).turns
    model = subject.oracle
    expected = without(model, plan, lambda: say(model, turns, DynamicCache()))
    with pruned(model, plan):
        found, cache = say(model, turns, DynamicCache()), DynamicCache()
        again = say(model, turns, cache)
        assert replays_of(model) == 2
    assert_same(found, expected)
    assert torch.equal(again, found)
    assert cache.get_seq_length() == expected.shape[1]


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("stored", PLANS)
def test_generate_says_the_same(subject: Subject, at_once: None, stored: str, beams: int) -> None:
    plan, inputs, model = plan_of(subject, 3, stored), tiny.batch(TWO), subject.oracle
    given = tiny.as_dtype(inputs, torch.float64)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "num_beams": beams}

    def call() -> torch.Tensor:
        return model.generate(**given, **options, suppress_tokens=[tiny.IMAGE])

    if beams > 1:
        tiny.skip_unless_beams_get_their_images(model, inputs)
    expected = without(model, plan, call)
    with pruned(model, plan):
        assert torch.equal(call(), expected)
        assert replays_of(model) == 1


@pytest.mark.parametrize("method", ["par", "folder", "scope"])
def test_reduced_tokens(subject: Subject, at_once: None, method: str) -> None:
    plan, model = reducing(subject, 3, make_method(method, 0.4)), subject.oracle
    for rows in (ONE, TWO):
        inputs = tiny.batch(rows)
        expected = without(model, plan, partial(tiny.logits, model, inputs))
        with pruned(model, plan):
            assert_same(tiny.logits(model, inputs), expected)
            assert replays_of(model) == 1


def test_the_cache_holds_the_bytes_of_one_without(subject: Subject, at_once: None) -> None:
    inputs, model = tiny.batch(ONE), subject.model
    for stored in PLANS:
        plan = plan_of(subject, 5, stored)

        @torch.no_grad()
        def held() -> list[int]:
            cache = model(**inputs, use_cache=True).past_key_values
            text = [layer.kept_text[0].shape[2] for layer in cache.layers if layer.num_visual]
            return [layer.visual_bytes() for layer in cache.layers] + text

        expected = without(model, plan, held)
        with pruned(model, plan):
            assert held() == expected
            assert replays_of(model) == 1


# One recording, other contents


def test_a_recording_serves_whatever_differs_in_contents(subject: Subject, tape: None) -> None:
    """Tokens, pixels, places of the image, text of another length, padding on another row."""
    plan, model = plan_of(subject), subject.oracle
    prompts = [
        tiny.batch(ONE, seed=1),
        tiny.batch(ONE, seed=2),
        tiny.batch([[9, 8, 7, *PICTURE, 4]], seed=3),
        tiny.batch([[9, 8, 7, *PICTURE, *range(2, 30)]], seed=3),
    ]
    expected = [without(model, plan, partial(tiny.logits, model, p)) for p in prompts]
    with pruned(model, plan):
        found = [tiny.logits(model, each) for each in (*prompts, prompts[0])]
        assert replays_of(model) == 4
        assert len(model.get_decoder().yopo.recordings._recordings) == 1
    for one, other in zip(found, [*expected, expected[0]], strict=True):
        assert_same(one, other)


def test_masks_and_positions_are_those_of_the_prefill(subject: Subject, tape: None) -> None:
    """Rows with padding on different sides: the same sizes, other masks and positions."""
    rows = [[1, 5, 6, *PICTURE, 7, 8], [1, 2, *PICTURE, 9]]
    plan, model = plan_of(subject), subject.oracle
    prompts = [tiny.batch(each, pad="left") for each in (rows, rows[::-1])]
    prompts += [tiny.batch(each, pad="right") for each in (rows, rows[::-1])]
    expected = [without(model, plan, partial(tiny.logits, model, p)) for p in prompts]
    with pruned(model, plan):
        tiny.logits(model, prompts[0])
        found = [tiny.logits(model, each) for each in prompts]
        assert replays_of(model) > 1
    for prompt, one, other in zip(prompts, found, expected, strict=True):
        assert_same(one[tiny.real_text(prompt)], other[tiny.real_text(prompt)])


@pytest.mark.parametrize("seed", range(4))
def test_grids_of_equal_counts_are_told_apart(subject: Subject, tape: None, seed: int) -> None:
    plan, model, inputs = plan_of(subject, seed), subject.oracle, tiny.batch(ONE)
    sizes = [(2, 8), (2, 8), (8, 2), (4, 4), (2, 8)]
    own = iter(sizes)

    def grids_of(*given: Any) -> Any:
        return tiny.fixed_grids([next(own)])(*given)

    expected = [
        without(model, plan, partial(tiny.logits, model, inputs), grids_of=tiny.fixed_grids([size]))
        for size in sizes
    ]
    with pruned(model, plan, grids_of=grids_of):
        found = [tiny.logits(model, inputs) for _ in sizes]
        assert replays_of(model) >= 2
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


@pytest.mark.parametrize("stored", PLANS)
def test_a_later_replay_leaves_earlier_caches_alone(
    subject: Subject, at_once: None, stored: str
) -> None:
    plan, model = plan_of(subject, 9, stored), subject.oracle
    prompts = [tiny.batch(ONE, seed=1), tiny.batch([[9, 8, 7, *PICTURE, 4, 3, 2]], seed=2)]
    step = {"input_ids": torch.tensor([[11]])}

    @torch.no_grad()
    def steps() -> list[torch.Tensor]:
        caches = [DynamicCache() for _ in prompts]
        outputs = [
            model(**tiny.as_dtype(prompt, model.dtype), past_key_values=cache)
            for prompt, cache in zip(prompts, caches, strict=True)
        ]
        kept = [each.logits for each in outputs]
        for _ in range(3):
            kept += [model(**step, past_key_values=cache).logits for cache in caches]
        return kept

    expected = without(model, plan, steps)
    with pruned(model, plan):
        found = steps()
        assert replays_of(model) == 2
        tiny.logits(model, prompts[0])
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


# When recordings are made, kept and dropped


def recordings_of(model: PreTrainedModel) -> Any:
    return model.get_decoder().yopo.recordings


def test_the_second_prefill_of_a_kind_is_recorded(mha: Subject, tape: None) -> None:
    with pruned(mha.model, plan_of(mha)):
        counts = []
        for rows in (ONE, TWO, ONE, ONE, TWO):
            tiny.logits(mha.model, tiny.batch(rows))
            counts.append(replays_of(mha.model))
        assert counts == [0, 0, 1, 2, 3]


def test_recordings_are_bounded_and_rare_kinds_make_room(
    mha: Subject, tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST", 2)
    monkeypatch.setattr(replay, "TEXT_STEP", 1)
    rows = [[[*range(1, count), *PICTURE, 7]] for count in (3, 4, 5)]
    made = []
    record = Tape.record
    monkeypatch.setattr(Tape, "record", lambda self, each: made.append(1) or record(self, each))
    with pruned(mha.model, plan_of(mha)):
        expected = [tiny.logits(mha.model, tiny.batch(each)) for each in rows]
        for _ in range(5):  # in turn: the third kind comes as often as the others
            for each in rows:
                tiny.logits(mha.model, tiny.batch(each))
        assert len(made) == 2
        for _ in range(10):
            assert torch.equal(tiny.logits(mha.model, tiny.batch(rows[2])), expected[2])
        assert len(made) == 3
        assert len(recordings_of(mha.model)._recordings) == 2
        for each, one in zip(rows, expected, strict=True):
            assert torch.equal(tiny.logits(mha.model, tiny.batch(each)), one)


def test_old_counts_fade(mha: Subject, tape: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(replay, "MEMORY", 8)
    with pruned(mha.model, plan_of(mha)):
        for count in range(2, 30):
            tiny.logits(mha.model, tiny.batch([[1, *PICTURE * (count // 8), 2]]))
        assert recordings_of(mha.model)._counts.total() < 8


def test_large_batches_run_as_usual(
    mha: Subject, at_once: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replay, "MOST_TOKENS", 2 * 22)
    with pruned(mha.model, plan_of(mha)):
        tiny.logits(mha.model, tiny.batch([ONE[0]] * 3))
        assert replays_of(mha.model) == 0
        tiny.logits(mha.model, tiny.batch([ONE[0]] * 2))
        assert replays_of(mha.model) == 1


def test_weights_may_change_in_place_and_may_be_replaced(mha: Subject, tape: None) -> None:
    model, inputs = copy.deepcopy(mha.oracle), tiny.batch(ONE)
    plan = plan_of(mha)
    layer = model.get_decoder().layers[2]

    def by_two(weight: torch.Tensor) -> None:
        with torch.no_grad():
            weight.mul_(2)

    def replaced() -> None:
        layer.mlp.down_proj.weight = nn.Parameter(layer.mlp.down_proj.weight.detach() * 2)

    with pruned(model, plan, check=False):
        for change in (
            lambda: None,
            lambda: by_two(layer.mlp.up_proj.weight),
            replaced,
            lambda: by_two(layer.self_attn.v_proj.weight),
        ):
            before = tiny.logits(model, inputs)
            change()
            found = [tiny.logits(model, inputs) for _ in range(3)]
            uncached = recordings_of(model)
            model.get_decoder().yopo.recordings = None
            expected = tiny.logits(model, inputs)
            model.get_decoder().yopo.recordings = uncached
            for each in found:
                assert_same(each, expected)
            changed = not torch.allclose(before, expected, rtol=1e-6)
            assert changed == (change.__code__.co_names != ())
        assert replays_of(model) > 8
        assert len(recordings_of(model)._recordings) == 1


def test_a_copy_of_a_model_has_recordings_of_its_own(mha: Subject, tape: None) -> None:
    model, inputs = copy.deepcopy(mha.model), tiny.batch(ONE)
    install(model, plan_of(mha))
    expected = [tiny.logits(model, inputs) for _ in range(3)][0]
    other = copy.deepcopy(model)
    assert recordings_of(other) is not recordings_of(model)
    assert not recordings_of(other)._recordings
    uninstall(model)
    assert torch.equal(tiny.logits(other, inputs), expected)


def test_stored_whole_from_now_on(mha: Subject, at_once: None) -> None:
    model, inputs, plan = mha.oracle, tiny.batch(ONE), plan_of(mha, 5, "in few bits")
    with pruned(model, plan):
        before = tiny.logits(model, inputs)
        model.get_decoder().yopo.store_whole()
        found = tiny.logits(model, inputs)
        assert replays_of(model) == 2

    def whole() -> torch.Tensor:
        model.get_decoder().yopo.store_whole()
        return tiny.logits(model, inputs)

    assert_same(found, without(model, plan, whole))
    assert not torch.allclose(found, before)


def test_inference_mode_and_no_grad_share_recordings(mha: Subject, tape: None) -> None:
    model, inputs, plan = mha.model, tiny.batch(ONE), plan_of(mha)
    step = {"input_ids": torch.tensor([[11]])}

    def talk() -> list[torch.Tensor]:
        cache = DynamicCache()
        found = [model(**inputs, past_key_values=cache).logits]
        return found + [model(**step, past_key_values=cache).logits for _ in range(2)]

    modes = (torch.no_grad, torch.inference_mode)
    for first, second in (modes, modes[::-1]):
        with pruned(model, plan):
            for mode in (first, first, second, first, second):
                with mode():
                    found = talk()
            assert replays_of(model) == 4
        with torch.no_grad():
            expected = without(model, plan, talk)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def addresses(*tensors: Any) -> set[int]:
    found = (each for each in tensors if isinstance(each, torch.Tensor))
    return {each.untyped_storage().data_ptr() for each in found}


@pytest.mark.parametrize("stored", PLANS)
def test_memory_that_is_replayed_is_watched_or_held(
    subject: Subject, at_once: None, stored: str
) -> None:
    """Weights, which are compared before every replay; the arena; indices of heads; and the
    buffers into which slices of weights are gathered."""
    for seed in range(4):
        plan = plan_of(subject, seed, stored)
        with pruned(subject.model, plan):
            tiny.logits(subject.model, tiny.batch(TWO))
            decoder = subject.model.get_decoder()
            parts = [*decoder.layers, *decoder.yopo.visual]
            weights = [e for part in parts for e in (*part.parameters(), *part.buffers())]
            recordings: Recordings = decoder.yopo.recordings
            (recording,) = recordings._recordings.values()
            splits = [vars(layer.split).values() for layer in recording.layers]
            packed = [e.packings for e in (layer.split for layer in recording.layers)]
            scales = [each.scale for pair in packed for each in pair if each is not None]
            modules = (module for part in parts for module in part.modules())
            gathered = [vars(module).get("_gathered") for module in modules]
            held = addresses(*weights, *recordings._arena._chunks, *scales, *gathered)
            held |= addresses(*(each for split in splits for each in split))
            borrowed = recordings._recorder.borrowed()
            assert addresses(decoder.layers[0].mlp.up_proj.weight) <= borrowed <= held


# What runs as usual


def hooked(model: PreTrainedModel) -> None:
    model.get_decoder().layers[1].mlp.register_forward_hook(lambda *_: None)


def wrapped(model: PreTrainedModel) -> None:
    projection = model.get_decoder().layers[1].mlp.up_proj
    forward = projection.forward
    projection.forward = lambda states: forward(states)


def adapted(model: PreTrainedModel) -> None:
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    get_peft_model(model, config)
    model.eval()


def training(model: PreTrainedModel) -> None:
    model.get_decoder().layers[0].train()


@pytest.mark.parametrize("change", [hooked, wrapped, adapted, training])
def test_layers_that_may_do_more_are_not_recorded(
    mha: Subject, tape: None, change: Callable[[PreTrainedModel], None]
) -> None:
    model, inputs = copy.deepcopy(mha.model), tiny.batch(ONE)
    install(model, plan_of(mha))
    for _ in range(3):
        tiny.logits(model, inputs)
    assert replays_of(model) == 2
    change(model)
    found = [tiny.logits(model, inputs) for _ in range(3)]
    assert replays_of(model) == 2
    model.get_decoder().yopo.recordings = None
    assert torch.equal(found[2], tiny.logits(model, inputs))


class Packed(torch.Tensor):
    """Stands in for a quantised weight."""


def packed(layer: Any) -> None:
    layer.mlp.up_proj.weight = nn.Parameter(layer.mlp.up_proj.weight.detach().as_subclass(Packed))


def elsewhere(layer: Any) -> None:
    layer.mlp.up_proj.to("meta")


def in_other_memory(layer: Any) -> None:
    layer.mlp.up_proj.weight.data = layer.mlp.up_proj.weight.data.clone()


def with_bias(layer: Any) -> None:
    layer.mlp.up_proj.bias = nn.Parameter(torch.zeros(layer.mlp.up_proj.out_features))


def replaced(layer: Any) -> None:
    layer.mlp = copy.copy(layer.mlp)


def foreign(layer: Any) -> None:
    layer.mlp.act_fn = type("Activation", (nn.Module,), {"__module__": "somewhere"})().eval()


@pytest.mark.parametrize(
    ("change", "may_go_on"),
    [(packed, False), (elsewhere, False), (foreign, False)]
    + [(in_other_memory, True), (with_bias, True), (replaced, True)],
)
def test_changes_of_layers_are_noticed(
    mha: Subject, change: Callable[[Any], None], may_go_on: bool
) -> None:
    layers = copy.deepcopy(mha.model.get_decoder().layers)
    snapshot = Snapshot(layers, nn.ModuleList(), torch.device("cpu"))
    assert snapshot.is_plain and snapshot.is_current()
    with torch.no_grad():
        layers[1].mlp.up_proj.weight.mul_(2)
    assert snapshot.is_current()
    change(layers[1])
    assert not snapshot.is_current()
    changed = Snapshot(layers, nn.ModuleList(), torch.device("cpu"))
    assert changed.is_plain == may_go_on
    assert changed.is_current()  # it is not looked at anew in every prefill


def test_layers_are_recorded_once_they_are_plain(mha: Subject, tape: None) -> None:
    model, inputs = copy.deepcopy(mha.model), tiny.batch(ONE)
    layers = model.get_decoder().layers
    projection = layers[1].mlp.up_proj
    weight = projection.weight
    projection.to("meta")
    snapshot = Snapshot(layers, nn.ModuleList(), torch.device("cpu"))
    assert not snapshot.is_plain and snapshot.is_current()
    projection.weight = weight
    assert not snapshot.is_current()
    hook = projection.register_forward_hook(lambda *_: None)
    with pruned(model, plan_of(mha)):
        for _ in range(3):
            tiny.logits(model, inputs)
        assert replays_of(model) == 0
        hook.remove()
        for _ in range(3):
            tiny.logits(model, inputs)
        assert replays_of(model) == 2


def test_requested_hidden_states_leave_hooks_that_do_not_matter(mha: Subject, tape: None) -> None:
    """transformers' own, on layers and their attention, whose forwards are never called."""
    model, inputs = copy.deepcopy(mha.model), tiny.batch(ONE)
    model(**inputs, output_hidden_states=True, output_attentions=True)
    assert model.get_decoder().layers[0]._forward_hooks
    with pruned(model, plan_of(mha)):
        for _ in range(3):
            tiny.logits(model, inputs)
        assert replays_of(model) == 2


def test_forwards_that_someone_looks_into_are_not_replayed(mha: Subject, at_once: None) -> None:
    model, inputs = mha.model, tiny.batch(ONE)
    watched: list[int] = []
    with pruned(model, plan_of(mha)):
        with watching(lambda number, *_: watched.append(number)):
            tiny.logits(model, inputs)
        assert watched == [0, 1, 2, 3]
        with FlopCounterMode(display=False) as counter:
            tiny.logits(model, inputs)
        assert counter.get_total_flops() > 0
        with torch.autocast("cpu", torch.bfloat16):
            tiny.logits(model, inputs)
        model(**inputs)  # gradients are recorded
        assert replays_of(model) == 0
        tiny.logits(model, inputs)
        assert replays_of(model) == 1


def test_it_can_be_switched_off(mha: Subject, at_once: None) -> None:
    with pruned(mha.model, plan_of(mha), cuda_graphs=False):
        tiny.logits(mha.model, tiny.batch(ONE))
        assert recordings_of(mha.model) is None


def test_by_default_a_cpu_records_nothing(mha: Subject) -> None:
    with pruned(mha.model, plan_of(mha)):
        for _ in range(3):
            tiny.logits(mha.model, tiny.batch(ONE))
        assert replays_of(mha.model) == 0
        assert not recordings_of(mha.model)._counts


def test_what_cannot_be_captured_is_said_once(
    mha: Subject, tape: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(self: Tape, function: Callable[[], None]) -> Callable[[], None]:
        function()
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(Tape, "record", fails)
    plan, prompts = plan_of(mha), [tiny.batch(ONE), tiny.batch(TWO)]
    expected = [without(mha.model, plan, partial(tiny.logits, mha.model, p)) for p in prompts]
    with pruned(mha.model, plan), warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = [tiny.logits(mha.model, prompts[number]) for number in (0, 0, 0, 1, 1)]
        assert replays_of(mha.model) == 0
    for each, number in zip(found, (0, 0, 0, 1, 1), strict=True):
        assert torch.equal(each, expected[number])
    (warning,) = (each for each in said if issubclass(each.category, YopoWarning))
    assert "not permitted when stream is capturing)" in str(warning.message)


def test_threads_share_recordings(mha: Subject, tape: None) -> None:
    plan, model = plan_of(mha, 3), mha.oracle
    prompts = [
        tiny.batch(ONE, seed=1),
        tiny.batch([[9, 8, 7, *PICTURE, 4]], seed=2),
        tiny.batch(TWO),
    ]
    expected = [without(model, plan, partial(tiny.logits, model, p)) for p in prompts]

    def work(shift: int) -> float:
        worst = 0.0
        for turn in range(12):
            number = (turn + shift) % len(prompts)
            off = (tiny.logits(model, prompts[number]) - expected[number]).abs().max().item()
            worst = max(worst, off)
        return worst

    with pruned(model, plan), ThreadPoolExecutor(4) as pool:
        assert max(pool.map(work, range(4))) < 1e-10
        assert replays_of(model) > 4


def test_who_finds_the_recordings_in_use_runs_as_usual(mha: Subject, at_once: None) -> None:
    with pruned(mha.model, plan_of(mha)):
        expected = tiny.logits(mha.model, tiny.batch(ONE))
        recordings: Recordings = recordings_of(mha.model)
        with recordings._lock:
            found = tiny.logits(mha.model, tiny.batch(ONE))
        assert recordings.replays == 1
        torch.testing.assert_close(found, expected)
