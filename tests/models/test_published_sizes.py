"""Figures of full-size models, as quoted in configs/, follow their published configurations."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import statistics_maker

from yopo.cli.calibrate import command
from yopo.cli.config import load_config
from yopo.planning.planner import make_plan
from yopo.planning.request import BudgetRequest
from yopo.plans.flops import dense_visual_flops
from yopo.plans.grid import Grid
from yopo.plans.schema import ModelShape, Workload

CONFIGS = Path(__file__).parents[2] / "configs"

SHAPES = {
    "llava-next-mistral-7b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "llava-next-vicuna-7b": ModelShape(32, 4096, 32, 32, 128, 11008),
    "llava-next-vicuna-13b": ModelShape(40, 5120, 40, 40, 128, 13824),
    "internvl2-4b": ModelShape(32, 3072, 32, 32, 96, 8192),
    "internvl2-8b": ModelShape(32, 4096, 32, 8, 128, 14336),
    "internvl2-26b": ModelShape(48, 6144, 48, 8, 128, 16384),
    "internvl3-1b": ModelShape(24, 896, 14, 2, 64, 4864),
    "internvl3-2b": ModelShape(28, 1536, 12, 2, 128, 8960),
    "internvl3-8b": ModelShape(28, 3584, 28, 4, 128, 18944),
    "internvl3.5-1b": ModelShape(28, 1024, 16, 8, 128, 3072),
    "internvl3.5-2b": ModelShape(28, 2048, 16, 8, 128, 6144),
    "internvl3.5-4b": ModelShape(36, 2560, 32, 8, 128, 9728),
    "internvl3.5-8b": ModelShape(36, 4096, 32, 8, 128, 12288),
    "internvl3.5-14b": ModelShape(40, 5120, 40, 8, 128, 17408),
    "internvl3.5-38b": ModelShape(64, 5120, 64, 8, 128, 25600),
}
"""Text decoders; InternVL's tiles are 448 pixels by patches of 14, shuffled to 16 x 16."""

TILE = Grid(16, 16)
IMAGES = {
    "llava-next": [(Grid(24, 24), Grid(48, 49))],  # 672 x 672 pixels
    "internvl": [(TILE,), (TILE,) * 13],
}


@pytest.mark.parametrize("name", SHAPES)
def test_configs_quote_the_right_flops(name: str) -> None:
    family = next(family for family in IMAGES if name.startswith(family))
    flops = [dense_visual_flops(SHAPES[name], Workload(grids, 40)) for grids in IMAGES[family]]
    text = " ".join((CONFIGS / f"{name}.yaml").read_text().replace("#", " ").split())
    assert re.findall(r"([\d.]+) T\b", text) == [f"{each / 1e12:.2f}" for each in flops]


PAPER = {"internvl2-4b": 0.717, "internvl2-8b": 0.75, "internvl2-26b": 0.5}


@pytest.mark.parametrize("tiles", [1, 7, 13])
@pytest.mark.parametrize("name", PAPER)
def test_the_papers_share_is_reached(name: str, tiles: int) -> None:
    values = load_config(CONFIGS / f"{name}.yaml", command)
    assert (values["budget"], values["template"]) == (PAPER[name], "paper")
    statistics = statistics_maker.make(
        shape=SHAPES[name], family="internvl", workload=Workload((TILE,) * tiles, 40), samples=2
    )
    request = BudgetRequest(values["budget"], template="paper", compensation="none")
    plan, _ = make_plan(statistics, request)
    assert plan.budget.reached == pytest.approx(PAPER[name], rel=0.01)
    assert plan.budget.reached <= PAPER[name]
    used = [layer for layer in plan.layers if not layer.is_empty]
    *whole, last = used
    # The paper's kind of plan.
    assert all(layer.attend_heads and layer.radius == 2 for layer in whole)
    assert last.read_heads and not last.attend_heads and not last.neurons  # it only reads
    assert len(used) < len(plan.layers) and plan.layers[: len(used)] == tuple(used)
