"""Each training stage trains what it names, and an interrupted run resumes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from demo_training.recipes import RECIPES, Stage
from demo_training.training import Trainer, learning_rate

STAGES = [Stage("tower", 2, 2, 1e-3, 1e-4), Stage("decoder", 2, 2, 1e-3, 1e-5)]


@pytest.mark.parametrize("name", RECIPES)
def test_stages_train_what_they_name_and_resume(name: str, tmp_path: Path) -> None:
    recipe = replace(RECIPES[name], is_compiled=False)
    before = {key: value.clone() for key, value in recipe.build_model().state_dict().items()}
    trainer = Trainer(recipe, tmp_path, seed=0)
    trainer.run(STAGES[:1], save_every=1)
    middle = {key: value.clone() for key, value in trainer.model.state_dict().items()}
    in_tower = {id(p) for p in recipe.tower(trainer.model).parameters()}
    tower = {key for key, p in trainer.model.named_parameters() if id(p) in in_tower}
    assert {key for key in before if not torch.equal(before[key], middle[key])} <= tower
    assert not torch.equal(before[max(tower)], middle[max(tower)])

    resumed = Trainer(recipe, tmp_path, seed=0)
    resumed.resume()
    assert (resumed.stage_name, resumed.step) == ("tower", 2)
    assert all(torch.equal(v, middle[k]) for k, v in resumed.model.state_dict().items())
    resumed.run(STAGES, save_every=2)
    assert (resumed.stage_name, resumed.step) == ("decoder", 2) and resumed.seconds > 0
    after = resumed.model.state_dict()
    assert all(torch.equal(after[key], middle[key]) for key in tower)  # frozen by then
    assert not torch.equal(after["lm_head.weight"], middle["lm_head.weight"])
    assert not (tmp_path / "checkpoint.tmp").exists()


def test_the_learning_rate_warms_up_and_decays() -> None:
    stage = Stage("decoder", 1000, 16, 1e-3, 1e-5)
    rates = [learning_rate(stage, step) for step in range(1000)]
    assert rates[0] == pytest.approx(1e-5) and max(rates) < 1e-3
    peak = rates.index(max(rates))
    assert peak == 99 and rates[peak:] == sorted(rates[peak:], reverse=True)
    assert rates[-1] == pytest.approx(1e-5, rel=0.01)
