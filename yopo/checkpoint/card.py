"""The README.md of a baked checkpoint: what was pruned, the savings, how to load it, provenance."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from yopo.checkpoint.sidecar_files import ORIGINAL_CARD_FILE, TENSORS_FILE
from yopo.checkpoint.writer import format_bytes
from yopo.models.registry import ALIASES
from yopo.plans.evaluated import Evaluated, evaluated_of
from yopo.plans.flops import (
    dense_prefill_flops,
    dense_visual_flops,
    dense_visual_kv_bytes,
    prefill_flops,
    visual_flops,
    visual_kv_bytes,
)
from yopo.plans.places import PLAN_FILE
from yopo.plans.quality import OPTIMISTIC, quality_of
from yopo.plans.schema import LEVERS, LayerPlan, PruningPlan, used_levers
from yopo.support.version import __version__

_CARRIED_OVER = ("license", "license_name", "license_link", "language")


def model_card(
    plan: PruningPlan,
    name: str,
    *,
    original_card: Path | None,
    tensors_bytes: int = 0,
    is_trained: bool = False,
) -> str:
    """Write the model card of a baked checkpoint.

    Args:
        plan: The baked plan.
        name: The directory's own name.
        original_card: The source's README.md, whose license entries are carried over, or None.
        tensors_bytes: Size of the side file with means or fitted weights; 0 if there is none.
        is_trained: Whether the weights were trained after the plan was baked.
    """
    sections = (
        _front_matter(plan, original_card),
        _introduction(
            plan, name, has_original_card=original_card is not None, is_trained=is_trained
        ),
        _savings(plan),
        _quality(plan, is_trained=is_trained),
        _layers(plan, tensors_bytes),
        _loading(name),
        _provenance(plan),
    )
    return "\n".join(sections)


def _front_matter(plan: PruningPlan, original_card: Path | None) -> str:
    data: dict[str, Any] = {}
    if original_card is not None:
        original = _read_front_matter(original_card)
        data |= {key: original[key] for key in _CARRIED_OVER if key in original}
    base = ALIASES.get(plan.model.name, plan.model.name)
    if base.count("/") == 1 and ":" not in base:  # the hub accepts only repositories here
        data["base_model"] = base
    data |= {"library_name": "transformers", "pipeline_tag": "image-text-to-text", "tags": ["yopo"]}
    return f"---\n{yaml.safe_dump(data, sort_keys=False, allow_unicode=True)}---\n"


def _read_front_matter(card: Path) -> dict[str, Any]:
    """The YAML front matter of another card; whatever cannot be parsed counts as absent."""
    parts = card.read_text(encoding="utf-8", errors="replace").split("---\n", 2)
    if len(parts) < 3 or parts[0].strip():
        return {}
    try:
        data = yaml.safe_load(parts[1])
    except yaml.YAMLError:
        return {}
    return data if isinstance(data, dict) else {}


def _introduction(
    plan: PruningPlan, name: str, *, has_original_card: bool, is_trained: bool
) -> str:
    change, dense = "no weight was removed or changed", "the original model"
    if is_trained:
        change, dense = "the model was trained afterwards", "the trained model, dense"
    text = f"""\
# {name}

{plan.model.name} with a pruning plan baked in (`{PLAN_FILE}`) by yopo {__version__} (you only prune
once, [arXiv 2410.06169](https://arxiv.org/abs/2410.06169)). The attention heads and FFN neurons of
the text decoder are sorted by their importance for visual tokens; {change}.
Loaded as usual, this *is* {dense}. Loaded with yopo, visual tokens skip what the plan
prunes, and text tokens keep everything.
"""
    if has_original_card:
        text += f"\nThe original model card is in [{ORIGINAL_CARD_FILE}]({ORIGINAL_CARD_FILE}).\n"
    return text


def _savings(plan: PruningPlan) -> str:
    shape, workload = plan.model.shape, plan.workload
    rows = [
        ("visual FLOPs", dense_visual_flops(shape, workload), visual_flops(plan), _flops),
        ("prefill FLOPs, text included", dense_prefill_flops(shape, workload), prefill_flops(plan))
        + (_flops,),
        (
            "visual KV cache, 16 bit",
            dense_visual_kv_bytes(shape, workload),
            visual_kv_bytes(plan),
            format_bytes,
        ),
    ]
    lines = ["## Savings", "", "| per prompt | dense | pruned | share |", "|---|---:|---:|---:|"]
    for label, dense, pruned, show in rows:
        lines.append(f"| {label} | {show(dense)} | {show(pruned)} | {pruned / dense:.1%} |")
    grids = ", ".join(f"{grid.rows} x {grid.cols}" for grid in workload.grids)
    lines += [
        "",
        f"These figures are for a prompt of {workload.visual} visual tokens ({grids}) and "
        f"{workload.text} text tokens.",
        *_reduced(plan),
        "Visual FLOPs count only visual tokens in the decoder, and a multiply-add as 2.",
        "",
    ]
    return "\n".join(lines)


def _reduced(plan: PruningPlan) -> list[str]:
    """What a reduction leaves of the prompt, and who describes the method."""
    reduction = plan.reduction
    if reduction is None:
        return []
    source = f" ({reduction.source})" if reduction.source else ""
    return [
        f"Before the first layer, {reduction.describe()}{source} are kept: {plan.seen.visual} of "
        f"{plan.workload.visual}. Choosing them is part of the FLOPs.",
    ]


def _quality(plan: PruningPlan, *, is_trained: bool) -> str:
    """What calibration measured, and the evaluation that the plan records, as far as known."""
    found, evaluated = quality_of(plan), evaluated_of(plan)
    lines = ["## Quality", ""]
    if found is None or not found.is_current:
        what = "was not measured" if found is None else "was measured before the plan was edited"
        lines += [f"In calibration, how close it is to the dense model {what}.", ""]
    else:
        lines += ["| kind | pairs | logit KL, nats per answer token | same whole answers |"]
        lines += ["|---|---:|---:|---:|"]
        for name, each in {"all": found, **found.kinds}.items():
            numbers = f"{each.pairs} | {each.kl:.3g} | {each.whole_answers:.1%}"
            lines.append(f"| {_cell(name)} | {numbers} |")
        lines += ["", "Pruned against dense, along the dense model's answers to calibration pairs "]
        lines[-1] += f"that nothing was fitted on; {OPTIMISTIC}."
        lines.append("")
    if evaluated is not None:
        lines += [_evaluated(evaluated), ""]
    if is_trained:
        lines += ["All of this was measured before the model was trained.", ""]
    return "\n".join(lines)


def _evaluated(found: Evaluated) -> str:
    share = found.same_answers / found.pairs
    text = f"Evaluated on {found.pairs} pairs: logit KL {found.kl:.3g}, the same answer to "
    text += f"{share:.1%} of them."
    if found.answered:
        kept = f" ({found.pruned / found.dense:.1%} kept)" if found.dense else ""
        text += f" Right answers: {found.pruned} of {found.answered}; "
        text += f"the dense model's: {found.dense}{kept}."
    return text


def _cell(name: str) -> str:
    """A kind's name, which comes from data, inside a table and without markup."""
    return "".join(f"\\{each}" if each in "|<>[]`*_\\" else each for each in name)


def _flops(count: int) -> str:
    for power, unit in ((12, "T"), (9, "G"), (6, "M")):
        if count >= 10**power:
            return f"{count / 10**power:.2f} {unit}"
    return str(count)


def _layers(plan: PruningPlan, tensors_bytes: int) -> str:
    shape = plan.model.shape
    levers = used_levers(plan)
    titles = "".join(f" {lever.title} |" for lever in levers)
    lines = [
        "## What visual tokens still do",
        "",
        f"| layers | read by heads (of {shape.heads}) | attend | neighborhood "
        f"| FFN neurons (of {shape.ffn}) |{titles}",
        "|---|---:|---|---|---:|" + "---:|" * len(levers),
    ]
    for first, last, layer in _runs(plan.layers):
        label = f"{first}" if first == last else f"{first} to {last}"
        radius = "everything" if layer.radius is None else f"radius {layer.radius}"
        attend, reach = (_attend(layer), radius) if layer.attend_heads else ("no", "-")
        more = "".join(f" {getattr(layer, lever.name) or '-'} |" for lever in levers)
        row = f"| {label} | {len(layer.read_heads)} | {attend} | {reach} | {layer.neurons} |{more}"
        lines.append(row)
    direction = "both directions" if plan.bidirectional else "causal"
    compensation = _compensation(plan, tensors_bytes)
    lines += ["", f"Attention among visual tokens: {direction}.{compensation}", ""]
    return "\n".join(lines)


def _attend(layer: LayerPlan) -> str:
    return (
        "yes" if layer.attend_heads == layer.read_heads else f"in {len(layer.attend_heads)} heads"
    )


def _compensation(plan: PruningPlan, tensors_bytes: int) -> str:
    kinds = {"mean": "means", "refit": "separate weights, fitted to the original model"}
    if plan.compensation not in kinds or not tensors_bytes:
        return ""
    kind = kinds[plan.compensation]
    return f" Compensation: {kind} ({format_bytes(tensors_bytes)} in `{TENSORS_FILE}`)."


def _runs(layers: tuple[LayerPlan, ...]) -> Iterator[tuple[int, int, LayerPlan]]:
    def look(indexed: tuple[int, LayerPlan]) -> tuple[Any, ...]:
        layer = indexed[1]
        width = len(layer.read_heads), len(layer.attend_heads), layer.radius
        return *width, layer.neurons, *(getattr(layer, each.name) for each in LEVERS)

    for _, run in groupby(enumerate(layers), key=look):
        members = list(run)
        yield members[0][0], members[-1][0], members[0][1]


def _loading(name: str) -> str:
    return f"""\
## Loading

With yopo installed, load it pruned:

```python
import yopo

model = yopo.load("{name}")
```

or `AutoModelForImageTextToText.from_pretrained("{name}", trust_remote_code=True)`. Without yopo, it
loads dense:

```python
from transformers import AutoModelForImageTextToText

model = AutoModelForImageTextToText.from_pretrained("{name}")
```
"""


def _provenance(plan: PruningPlan) -> str:
    details = yaml.safe_dump(
        {"fingerprint": plan.model.fingerprint, **plan.provenance},
        sort_keys=False,
        allow_unicode=True,
    )
    return f"## Provenance\n\n```yaml\n{details}```\n"
