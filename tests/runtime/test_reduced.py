"""Plans that reduce visual tokens: the fast runtime against the specification, and their cost."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from yopo.baselines.install import baseline
from yopo.baselines.registry import baseline_class
from yopo.plans.file import parse_plan, to_yaml
from yopo.plans.flops import prefill_flops, visual_budget, visual_kv_bytes
from yopo.plans.schema import Budget, InvalidPlan, PruningPlan
from yopo.plans.servable import engine_problem
from yopo.reduction.method import Method
from yopo.reduction.registry import make_method
from yopo.runtime.install import pruned
from yopo.runtime.reference import reference
from yopo.support.errors import PlanError

TOWER = ("scope", "prumerge", "prumerge+")
"""Methods that rank tokens by the vision tower's attention."""

METHODS = ("par", "divprune", "cdpruner", *TOWER, "folder", "random", "grid")
BLIND = ("divprune", *TOWER, "folder", "grid")
"""Methods that choose alike whatever text follows and wherever the image is."""

PROMPTS = {
    "one image": [[1, 5, 6, *PICTURE, 7, 8, 9, 10]],
    "two images": [[1, 5, *PICTURE, 6, 7, *PICTURE, 8, 9]],
    "padded": [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, *PICTURE, 3]],
    "one and two images": [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, *PICTURE, 9]],
    "a row without image": [[1, 5, 6, *PICTURE, 7, 8, 9, 10], [1, 2, 3]],
    "no image": [[1, 2, 3, 4, 5]],
}
GRIDS = {
    "3x5 and 1x1": ([[1, 5, *PICTURE, 7, 8]], tiny.fixed_grids([(3, 5), (1, 1)])),
    "other grids per row": (
        [[1, 5, 6, *PICTURE, 7], [2, *PICTURE, 9, *PICTURE, 3]],
        tiny.fixed_grids([(3, 5), (1, 1)], [(2, 8), (4, 4)]),
    ),
}


def reducing(subject: Subject, seed: int, method: Method, **fixed: Any) -> PruningPlan:
    """A random plan without neighborhoods that reduces tokens as well."""
    plan = subject.random_plan(seed, **fixed)
    layers = [replace(layer, radius=None) for layer in plan.layers]
    plan = replace(plan.with_layers(layers), reduction=method)
    return replace(plan, budget=Budget(None, round(visual_budget(plan), 6)))


def check(subject: Subject, plan: PruningPlan, inputs: dict[str, Any], grids: Any = None) -> None:
    """Compare in float64, in which no choice hangs on rounding."""
    with reference(subject.oracle, plan, grids_of=grids):
        expected = tiny.logits(subject.oracle, inputs)
    with pruned(subject.oracle, plan, grids_of=grids):
        found = tiny.logits(subject.oracle, inputs)
    text = tiny.real_text(inputs)
    torch.testing.assert_close(found[text], expected[text], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("prompt", PROMPTS)
@pytest.mark.parametrize("name", METHODS)
def test_any_plan_is_what_the_specification_says(subject: Subject, name: str, prompt: str) -> None:
    for seed in range(2):
        plan = reducing(subject, seed, make_method(name, 0.4))
        check(subject, plan, tiny.batch(PROMPTS[prompt]))


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("case", GRIDS)
def test_on_any_grids(subject: Subject, name: str, case: str) -> None:
    rows, grids = GRIDS[case]
    check(subject, reducing(subject, 3, make_method(name, 0.3)), tiny.batch(rows), grids)


def test_common_words_of_a_plan_count_less(subject: Subject) -> None:
    """The words' ids reach the method of the runtime and of the specification."""
    inputs, found = tiny.batch(PROMPTS["padded"]), []
    for common in ((), (7, 8, 9)):
        method = make_method("par", 0.2, common=common, merge=False)
        plan = reducing(subject, 0, method)
        check(subject, plan, inputs)
        with pruned(subject.oracle, plan):
            found.append(tiny.logits(subject.oracle, inputs))
    assert not torch.equal(*found)


@pytest.mark.parametrize("name", METHODS)
def test_keeping_all_tokens_changes_no_bit(subject: Subject, name: str) -> None:
    inputs = tiny.batch(PROMPTS["one and two images"])
    plan = reducing(subject, 5, make_method(name, 1.0))
    found = []
    for each in (plan, replace(plan, reduction=None)):
        with pruned(subject.model, each):
            found.append(tiny.logits(subject.model, inputs))
    assert torch.equal(*found)
    assert visual_budget(plan) == visual_budget(replace(plan, reduction=None))


@pytest.mark.parametrize("name", [name for name in METHODS if name != "random"])
def test_without_pruning_it_is_the_baseline_of_that_name(subject: Subject, name: str) -> None:
    """Two implementations: fewer rows in the visual stream, and a shorter prompt."""
    inputs = tiny.batch(PROMPTS["two images"])
    plan = replace(tiny.whole(subject), reduction=make_method(name, 0.4))
    with pruned(subject.oracle, plan):
        found = tiny.logits(subject.oracle, inputs)
    method = baseline_class(name)(0.4)  # type: ignore[call-arg]
    with baseline(subject.oracle, method), torch.no_grad():
        expected = subject.oracle(**tiny.as_dtype(inputs, torch.float64)).logits
    text = tiny.real_text(inputs)
    torch.testing.assert_close(found[text], expected[text], rtol=1e-5, atol=1e-6)


def generated(model: Any, inputs: dict[str, Any], **options: Any) -> torch.Tensor:
    fixed = {"max_new_tokens": 6, "suppress_tokens": [IMAGE], "do_sample": False}
    return model.generate(**tiny.as_dtype(inputs, model.dtype), **fixed | options)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}], ids=["greedy", "beams"])
@pytest.mark.parametrize("name", BLIND)
def test_generate_gives_the_specified_tokens(subject: Subject, name: str, options: dict) -> None:
    inputs = tiny.batch(PROMPTS["one and two images"])
    if options:
        tiny.skip_unless_beams_get_their_images(subject.oracle, inputs)
    plan = reducing(subject, 40, make_method(name, 0.4))
    with reference(subject.oracle, plan):
        expected = generated(subject.oracle, inputs, use_cache=False, **options)
    with pruned(subject.oracle, plan):
        assert torch.equal(generated(subject.oracle, inputs, **options), expected)


@pytest.mark.parametrize("name", ["par", "cdpruner"])
def test_rows_of_a_batch_answer_as_alone(subject: Subject, name: str) -> None:
    rows = PROMPTS["padded"]
    inputs = tiny.batch(rows)
    plan = reducing(subject, 41, make_method(name, 0.4))
    with pruned(subject.oracle, plan):
        together = generated(subject.oracle, inputs, num_beams=2)
        for number, row in enumerate(rows):
            one = tiny.batch([row])
            one["pixel_values"] = inputs["pixel_values"][number : number + 1]
            alone = generated(subject.oracle, one, num_beams=2)
            assert torch.equal(alone[0, len(row) :], together[number, -6:])


@pytest.mark.parametrize("name", BLIND)
def test_a_second_turn_with_an_image_continues_the_cache(subject: Subject, name: str) -> None:
    plan = reducing(subject, 42, make_method(name, 0.4))
    first, then = [1, 5, *PICTURE, 7, 8], [9, *PICTURE, 10, 11]
    turns = [tiny.batch([first], seed=0), tiny.batch([then], seed=1)]
    whole = tiny.batch([first + then])
    whole["pixel_values"] = torch.cat([turn["pixel_values"] for turn in turns])
    with reference(subject.oracle, plan):
        expected = tiny.logits(subject.oracle, whole)
    with pruned(subject.oracle, plan), torch.no_grad():
        turns = [tiny.as_dtype(turn, torch.float64) for turn in turns]
        cache = subject.oracle(**turns[0], use_cache=True).past_key_values
        assert cache.get_seq_length() == len(first)
        mask = whole["attention_mask"]
        found = subject.oracle(**turns[1] | {"attention_mask": mask}, past_key_values=cache).logits
    text = tiny.real_text(tiny.batch([then]))
    torch.testing.assert_close(found[text], expected[:, len(first) :][text], rtol=1e-5, atol=1e-6)


SIDE = 12
INPUTS = tiny.batch([[1, 5, 6, *[IMAGE] * SIDE**2, *range(7, 24)]], side=SIDE)
WORKLOAD = tiny.workload(side=SIDE, text=20, text_before=3)


@pytest.mark.parametrize("name", METHODS)
def test_executed_flops_and_cached_bytes_are_predicted(name: str) -> None:
    subject = tiny.make_subject("gqa", side=SIDE)
    for seed in range(3):
        plan = reducing(subject, seed, make_method(name, 0.4), workload=WORKLOAD)
        counter = FlopCounterMode(display=False)
        with pruned(subject.model, plan), torch.no_grad():
            with counter, sdpa_kernel(SDPBackend.MATH):
                cache = subject.model(**INPUTS, use_cache=True).past_key_values
        counts = counter.get_flop_counts()
        (decoder,) = (each for each in counts if each.endswith("model.language_model"))
        assert sum(counts[decoder].values()) == pytest.approx(prefill_flops(plan), rel=0.01)
        held = sum(layer.visual_bytes() for layer in cache.layers)
        assert held == visual_kv_bytes(plan, itemsize=4)


def test_a_plan_with_a_reduction_survives_its_file(subject: Subject) -> None:
    method = make_method("par", 0.5, merge=False, common=(3, 9))
    plan = reducing(subject, 1, method, baked=True).without_tensors()
    text = to_yaml(plan)
    assert parse_plan("plan", text)[0].reduction == method
    assert to_yaml(parse_plan("plan", text)[0]) == text
    assert "reduction" not in to_yaml(replace(plan, reduction=None))


@pytest.mark.parametrize(
    ("before", "after", "problem"),
    [
        ("method: par", "method: parr", "Unknown reduction 'parr'"),
        ("method: par", "method: [par]", "needs a 'method'"),
        ("keep: 0.5", "keep: 2", r"keep must lie in \(0, 1\]"),
        ("keep: 0.5", "keep: half", "keep is a float"),
        ("merge: false", "merge: 0", "merge is a bool"),
        ("pool: 3.0", "poll: 3.0", "no parameter 'poll'"),
        ("method: par, ", "", "needs a 'method'"),
        ("keep: 0.5, ", "", "share of tokens to 'keep'"),
    ],
)
def test_bad_reductions_in_a_file_are_refused(
    subject: Subject, before: str, after: str, problem: str
) -> None:
    plan = reducing(subject, 1, make_method("par", 0.5, merge=False), baked=True)
    text = to_yaml(plan.without_tensors())
    assert before in text
    with pytest.raises(PlanError, match=problem):
        parse_plan("plan", text.replace(before, after))


def test_what_does_not_go_together_is_refused(subject: Subject) -> None:
    plan = tiny.whole(subject)
    near = replace(plan.layers[0], radius=2)
    method = make_method("divprune", 0.5)
    with pytest.raises(InvalidPlan, match=r"layers\[0\].radius must be null: a reduction"):
        replace(plan.with_layers([near, *plan.layers[1:]]), reduction=method)
    problem = engine_problem(replace(plan, reduction=method))
    assert problem is not None and "reduces visual tokens (divprune)" in problem
    with pytest.raises(PlanError, match="the plan reduces visual tokens"):
        with baseline(subject.model, "masked", replace(plan, reduction=method)):
            pass
