"""Forwards that pass the layers together compute what each computes by itself, bit for bit."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
import zoo
from torch import nn
from zoo import PROMPTS, Row, Specimen

from yopo.calibration import measure as run
from yopo.calibration.statistics import Statistics
from yopo.data.prompts import Batch
from yopo.evaluation.fidelity import Recorded, answer_log_probs, compare
from yopo.models import offloaded, turns
from yopo.models.turns import in_turns
from yopo.models.window import Holding, window_of
from yopo.runtime.install import pruned
from yopo.support.work_dir import Stage

ROWS: list[Row] = [
    *PROMPTS["padded, different images"],
    *PROMPTS["two images"],
    *PROMPTS["one image"],
    *PROMPTS["padded, different images"],
]
PLENTY = 1 << 30


@pytest.fixture
def fetched(monkeypatch: pytest.MonkeyPatch) -> list[nn.Module]:
    """The layers that were brought to hand, in order."""
    found: list[nn.Module] = []

    @contextmanager
    def at_hand(layer: nn.Module) -> Iterator[None]:
        found.append(layer)
        yield

    monkeypatch.setattr(turns, "at_hand", at_hand)
    return found


@pytest.fixture(params=[False, True], ids=["decoder", "towers too"])
def towers(
    request: pytest.FixtureRequest, specimen: Specimen, monkeypatch: pytest.MonkeyPatch
) -> set[nn.Module]:
    """The layers of towers, if forwards wait at these as well, as if they were on disk."""
    if not request.param:
        return set()
    with monkeypatch.context() as patch:
        patch.setattr(offloaded, "is_offloaded", lambda _: True)
        found = offloaded.offloaded_towers(specimen.model)
    monkeypatch.setattr(turns, "offloaded_towers", lambda _: found)
    return set(found)


def check(fetched: list[nn.Module], layers: list[nn.Module], towers: set[nn.Module]) -> None:
    """The decoder's layers came once each, in order, and all of the towers'."""
    assert [each for each in fetched if each not in towers] == layers
    assert towers == set(fetched) - set(layers)


def measured(specimen: Specimen, monkeypatch: pytest.MonkeyPatch) -> Statistics:
    monkeypatch.setattr(
        run, "encode_for", lambda _, __, group: Batch(specimen.inputs(group), None, group)
    )
    monkeypatch.setattr(run, "by_size", iter)
    return run.measure(specimen.model, None, ROWS, name="tiny", batch_size=2)


def test_statistics_are_the_same(
    specimen: Specimen,
    monkeypatch: pytest.MonkeyPatch,
    fetched: list[nn.Module],
    towers: set[nn.Module],
) -> None:
    usual = vars(measured(specimen, monkeypatch))
    assert not fetched
    with window_of(PLENTY):
        found = vars(measured(specimen, monkeypatch))
    check(fetched, list(specimen.model.get_decoder().layers), towers)
    assert found.keys() == usual.keys()
    for name, value in usual.items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(found[name], value), name
        else:
            assert found[name] == value, name


def answers(specimen: Specimen, batches: list[dict[str, Any]]) -> list[list]:
    """Generated tokens and their logits, batch by batch."""

    def answer(number: int, inputs: dict[str, Any]) -> list[torch.Tensor]:
        said = specimen.generate(
            specimen.model,
            inputs,
            max_new_tokens=5 - number % 3,
            min_new_tokens=1,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return [said.sequences, *said.logits]

    finished = in_turns(specimen.model, answer, batches, new_tokens=6)
    return [each for some in finished for each in some.results]


def test_answers_are_the_same(
    specimen: Specimen, fetched: list[nn.Module], towers: set[nn.Module]
) -> None:
    """Also of batches that end early, in the dense and in the pruned model."""
    batches = [specimen.inputs(rows, seed) for seed, rows in enumerate(PROMPTS.values())]
    layers = list(specimen.model.get_decoder().layers)
    for plan in (None, specimen.plan(3)):
        with nullcontext() if plan is None else pruned(specimen.model, plan):
            usual = answers(specimen, batches)
            with window_of(PLENTY):
                found = answers(specimen, batches)
        for one, other in zip(found, usual, strict=True):
            assert len(one) == len(other)
            assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
        steps = max(len(each) - 1 for each in usual)
        check(fetched, layers * steps, towers)
        fetched.clear()


def test_judgements_are_the_same(
    specimen: Specimen, fetched: list[nn.Module], towers: set[nn.Module]
) -> None:
    records = []
    for seed, rows in enumerate(PROMPTS.values()):
        inputs = specimen.inputs(rows, seed)
        mask = torch.zeros_like(inputs["input_ids"], dtype=torch.bool)
        mask[:, -2:] = True
        batch = Batch(inputs, mask, tuple(rows))
        records.append(Recorded(batch, [], answer_log_probs(specimen.model, batch)))
    with pruned(specimen.model, specimen.plan(3)):
        usual = compare(specimen.model, records)
        with window_of(PLENTY):
            found = compare(specimen.model, records)
    assert found == usual
    assert usual.kl > 0
    check(fetched, list(specimen.model.get_decoder().layers), towers)


class Kept:
    """Work that stays in memory."""

    def __init__(self) -> None:
        self.stages: dict[str, Stage] = {}

    def load(self, name: str) -> Stage | None:
        return self.stages.get(name)

    def save(self, name: str, stage: Stage) -> None:
        tensors = {key: value.clone() for key, value in stage.tensors.items()}
        self.stages[name] = Stage(tensors, stage.about)


def test_statistics_go_on_after_the_last_whole_window(
    monkeypatch: pytest.MonkeyPatch, fetched: list[nn.Module]
) -> None:
    specimen = zoo.build(next(zoo.all_entries()))
    usual = measured(specimen, monkeypatch)
    monkeypatch.setattr(run, "PERIOD", 0.0)
    encode, rows, work = run.encode_for, [*ROWS, *ROWS], Kept()

    def fail(model: Any, processor: Any, group: tuple[Row, ...]) -> Batch:
        if len(fetched) >= specimen.identity.shape.layers:
            raise KeyboardInterrupt
        return encode(model, processor, group)

    def again(pairs: list[Row]) -> Statistics:
        return run.measure(specimen.model, None, pairs, name="tiny", batch_size=2, work=work)

    whole = run.measure(specimen.model, None, rows, name="tiny", batch_size=2)
    states = torch.zeros(2, specimen.inputs(ROWS[:2])["input_ids"].shape[1], 64)
    with window_of(3 * Holding(specimen.identity.shape, None).of(states)):
        monkeypatch.setattr(run, "encode_for", fail)
        with pytest.raises(KeyboardInterrupt):
            again(rows)
        monkeypatch.setattr(run, "encode_for", encode)
        assert 0 < work.stages[run.SNAPSHOT].about["pairs"] < len(rows)
        found = again(rows)
    for name in ("rho", "head_sum", "neuron_square", "head_effect_sum"):
        assert torch.equal(getattr(found, name), getattr(whole, name)), name
        assert not torch.equal(getattr(found, name), getattr(usual, name))
