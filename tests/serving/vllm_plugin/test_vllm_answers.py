"""An engine's answers and log-probabilities are those of ``yopo.load``, however it cuts prompts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed (scripts/test_vllm.sh does it)")

from engines import Prompt, Reference, answers, engine
from serving_models import KINDS, Kind, baked, pictures, prompt

CASES = [
    ("llava", "refit"),
    ("llava", "mean"),
    ("llava", "none"),
    ("qwen2_vl", "refit"),
    ("qwen2_vl", "mean"),
    ("qwen3_vl", "refit"),
    ("internvl", "refit"),
]


@dataclass(frozen=True)
class Case:
    """A baked checkpoint, prompts, and the right answers."""

    kind: Kind
    folder: Path
    prompts: list[Prompt]
    reference: Reference


def prompts_for(kind: Kind) -> list[Prompt]:
    """One image, two, none, text between images, another question, text before the image."""
    one, two = pictures(kind, 2)
    between = f"{kind.image}\nwhat is {kind.image}\nwhat color is it"
    return [
        (prompt(kind, "what color is the red one"), [one]),
        (prompt(kind, "is there one", 2), [one, two]),
        ("what is there", []),
        (between, [two, one]),
        (prompt(kind, "where is the blue one"), [one]),
        ("what color is this one " * 3 + prompt(kind, "is it"), [two]),
    ]


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """One family with one kind of compensation."""
    name, compensation = request.param
    kind = KINDS[name]
    folder = baked(kind, tmp_path_factory.mktemp("model"), (len(compensation), compensation))
    prompts = prompts_for(kind)
    return Case(kind, folder, prompts, Reference.of(folder, prompts))


def test_the_plans_of_these_tests_change_the_answers(case: Case) -> None:
    shown = [(text, images) for text, images in case.prompts if images]
    pruned = Reference.of(case.folder, shown)
    dense = Reference.of(case.folder, shown, dense=True)
    assert pruned.distance(dense) > 1000 * pruned.rounding


def test_whole_prompts(case: Case) -> None:
    with engine(case.folder, enable_prefix_caching=False) as llm:
        case.reference.check(answers(llm, case.prompts))


def test_pieces_that_cut_images_and_hits_inside_them(case: Case) -> None:
    """Pieces of 13 tokens; blocks of 32, so that a cached prefix can end inside an image."""
    cut = {"max_num_batched_tokens": 13, "enable_chunked_prefill": True}
    with engine(case.folder, enable_prefix_caching=True, **cut) as llm:
        for _ in range(2):
            case.reference.check(answers(llm, case.prompts))
        # One after another: the fifth prompt continues the first one's image otherwise.
        for number in (4, 0, 1):
            case.reference.check(answers(llm, [case.prompts[number]]), [number])


def test_many_requests_of_mixed_kinds(case: Case) -> None:
    numbers = [number % len(case.prompts) for number in range(32)]
    with engine(case.folder, max_num_batched_tokens=100) as llm:
        case.reference.check(answers(llm, [case.prompts[each] for each in numbers]), numbers)
