"""A new lever is one field of the layer plan; files, tables and cards follow automatically."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

from yopo.plans import layer_plan
from yopo.plans.schema import LEVERS, LayerPlan

FIELD = '    shared: int = _lever(0, column="shared", title="heads with shared keys")\n'

SCRIPT = """
import io, json, sys, types
from pathlib import Path

source = Path(sys.argv[1]).read_text(encoding="utf-8")
place = source.index("    map_rank: int = _lever(")
place = source.index("\\n", place) + 1
name = "yopo.plans.layer_plan"
module = sys.modules[name] = types.ModuleType(name)
exec(compile(source[:place] + sys.argv[2] + source[place:], name, "exec"), vars(module))

from rich.console import Console

from yopo.checkpoint.card import model_card
from yopo.plans.file import parse_plan, to_yaml
from yopo.plans.grid import Grid
from yopo.plans.schema import Budget, LayerPlan, ModelIdentity, ModelShape, PruningPlan, Workload
from yopo.report.json import plan_document
from yopo.report.plan_tables import LayerTable
from yopo.support.errors import PlanError

def table(plan):
    console = Console(file=io.StringIO(), width=80)
    console.print(LayerTable(plan))
    return console.file.getvalue()

def card(plan):
    return model_card(plan, "pruned", original_card=None)

def with_layers(*layers):
    shape = ModelShape(3, 64, 4, 4, 16, 96)
    identity = ModelIdentity("some", "llava", shape, "0" * 64)
    return PruningPlan(identity, Workload((Grid(2, 2),), 5), layers, Budget(None, 1.0))

plain = LayerPlan((0, 1), (0, 1), None, 96)
shared = LayerPlan((0, 1), (0, 1), None, 96, shared=7)
plan, without = with_layers(plain, plain, shared), with_layers(plain, plain, plain)
text = to_yaml(plan)
refused = ""
try:
    parse_plan("plan.yaml", text.replace("shared: 7", "shared: many"))
except PlanError as error:
    refused = str(error)
print(json.dumps({
    "yaml": text,
    "is_read_back": parse_plan("plan.yaml", text)[0].layers == plan.layers,
    "refused": refused,
    "table": table(plan),
    "card": card(plan),
    "document": plan_document(plan),
    "without": [to_yaml(without), table(without), card(without)],
}))
"""


def test_levers_are_the_fields_marked_as_such() -> None:
    assert [each.name for each in LEVERS] == [
        *("qkv_rank", "map_rank"),
        *("key_bits", "value_bits", "latent_bits"),
    ]
    required = [each.name for each in fields(LayerPlan) if not each.metadata]
    assert required == ["read_heads", "attend_heads", "radius", "neurons"]


def test_a_new_lever_appears_in_files_tables_and_cards() -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, layer_plan.__file__, FIELD],
        capture_output=True,
        text=True,
        cwd=Path(layer_plan.__file__).parents[2],
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert "shared: 7" in found["yaml"] and found["yaml"].count("shared: 0") == 0
    assert found["is_read_back"]
    assert "layers[2].shared must be a whole number, found 'many'" in found["refused"]
    title, head, *rows = (line.split() for line in found["table"].strip().splitlines())
    assert title[0] == "what" and head[0] == "layer"
    assert "shared" in head and "rank" not in head and "map" not in head
    assert [row[:5] for row in rows] == [
        ["0-1", "2", "all", "96", "-"],
        ["2", "2", "all", "96", "7"],
    ]
    assert "| heads with shared keys |" in found["card"] and "bottleneck" not in found["card"]
    assert "| 0 to 1 | 2 | yes | everything | 96 | - |" in found["card"]
    assert "| 2 | 2 | yes | everything | 96 | 7 |" in found["card"]
    assert [layer["shared"] for layer in found["document"]["layers"]] == [0, 0, 7]
    for text in found["without"]:
        assert "shared" not in text
