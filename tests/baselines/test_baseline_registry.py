"""A baseline is one class and one registry line, also for a method from outside."""

from __future__ import annotations

import subprocess
import sys

import pytest
import thinning
import tiny
import torch
from thinning import Thinning
from tiny import EOS, IMAGE, PICTURE, Subject

from yopo.baselines import registry
from yopo.baselines.baseline import Baseline
from yopo.baselines.install import baseline
from yopo.baselines.registry import BASELINES, baseline_class, solve_for, with_own_budget
from yopo.bench.run import BenchOptions, Sizes, bench_model
from yopo.models.answer_tokens import teacher_forced
from yopo.support.errors import PlanError


@pytest.mark.parametrize("name", BASELINES)
def test_every_entry_is_a_class_with_that_name(name: str) -> None:
    found = baseline_class(name)
    assert issubclass(found, Baseline) and found.name == name
    assert found.label and found.__doc__


def test_names_are_listed_without_importing_the_methods() -> None:
    """The command line lists them before torch is imported; classes are loaded on request."""
    modules = {target.partition(":")[0] for target in BASELINES.values()}
    code = f"import sys, yopo.baselines.registry; print({modules} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_labels_are_unique() -> None:
    labels = [baseline_class(name).label for name in BASELINES]
    assert len(set(labels)) == len(labels)
    assert set(BASELINES) - set(with_own_budget()) == {"masked"}


def test_an_unknown_name_suggests_known_ones() -> None:
    with pytest.raises(PlanError, match="'downsampel'") as caught:
        baseline_class("downsampel")
    assert "'downsample'" in caught.value.remedy


PROMPTS = [[1, 5, 6, *PICTURE, 7, 8], [1, *PICTURE, 3, 4, 9, 11, 12]]


def test_an_external_method_may_drop_at_several_layers(subject: Subject) -> None:
    """Its cache shrinks layer by layer; decode steps see the same as one forward of all tokens."""
    model, inputs = subject.model, tiny.batch(PROMPTS)
    length, settings = inputs["input_ids"].shape[1], {"do_sample": False, "max_new_tokens": 5}
    with torch.no_grad(), baseline(model, Thinning()):
        cache = model(**inputs, use_cache=True).past_key_values
        whole = model.generate(
            **inputs, **settings, min_new_tokens=5, suppress_tokens=[IMAGE], use_cache=True
        )
        more = torch.ones(len(whole), whole.shape[1] - length, dtype=torch.int64)
        mask = torch.cat([inputs["attention_mask"], more], dim=1)
        answers = torch.arange(whole.shape[1])[None].expand_as(whole) >= length
        with teacher_forced(answers):
            forced = model(**{**inputs, "input_ids": whole, "attention_mask": mask}).logits
    visual = len(PICTURE)
    counts = [layer.keys.shape[2] - (length - visual) for layer in cache.layers]
    assert counts == list(Thinning().tokens(subject.shape, tiny.workload().grids))
    assert counts == [visual, visual // 2, visual // 2, visual // 4]
    token = 2 * subject.shape.kv_heads * subject.shape.head_dim * 4 * len(PROMPTS)
    assert [layer.visual_bytes() for layer in cache.layers] == [count * token for count in counts]
    forced[..., [IMAGE, EOS]] = float("-inf")
    assert torch.equal(forced[:, length - 1 : -1].argmax(dim=-1), whole[:, length:])


def test_an_external_method_is_benched_once_registered(
    mha: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "BASELINES", BASELINES | thinning.LINE)
    plan = tiny.whole(mha)
    with pytest.raises(PlanError, match="thinning needs at least"):
        solve_for("thinning", plan, 0.1)
    assert [solve_for("thinning", plan, budget).step for budget in (0.3, 0.6)] == [64, 2]
    options = BenchOptions(runs=1, warmup=0, decode_steps=0, baselines=("thinning",))
    found = bench_model(mha.model, plan, Sizes(), options)
    shape, grids = mha.shape, plan.workload.grids
    per_layer = 2 * shape.kv_heads * shape.head_dim * 4
    held = found.measured["thinning"].visual_kv
    assert (
        held == per_layer * sum(Thinning(2).tokens(shape, grids)) == found.planned_kv_of("thinning")
    )
