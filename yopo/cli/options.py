"""Options shared by several commands, and the library's records built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.config import drop_overruled

if TYPE_CHECKING:
    from yopo.pipeline.options import RunOptions
    from yopo.planning.request import PlanRequest

Decorator = Callable[[Callable[..., Any]], Callable[..., Any]]

DEFAULT_BUDGET = 0.25
SEARCH_RUNS = 200

_BUDGET = (
    "budget",
    "template",
    "search",
    "tolerance",
    "tolerance_on",
    "milliseconds",
    "kv_budget",
)
_RATIOS = ("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha")
_ANY_REQUEST = ("compensation", "kv_groups", "bidirectional", "engine")


def _chain(*options: Decorator) -> Decorator:
    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


request_options = _chain(
    click.option(
        "--budget",
        type=float,
        metavar="F",
        help=f"Solve for this share of the visual FLOPs, in (0, 1].  [default: {DEFAULT_BUDGET}]",
    ),
    click.option(
        "--tolerance",
        type=float,
        metavar="F",
        help="Instead: the smallest budget that agrees with the dense model within F (0.01) on "
        "holdout pairs.",
    ),
    click.option(
        "--tolerance-on",
        type=click.Choice(("tokens", "answers")),
        help="A share of what --tolerance is.  [default: tokens]",
    ),
    click.option(
        "--milliseconds",
        type=float,
        metavar="F",
        help="Instead: prefill time of one prompt, according to --costs from this machine.",
    ),
    click.option(
        "--kv-budget",
        type=float,
        metavar="F",
        help="In addition: keep at most this share of the visual KV cache.",
    ),
    click.option(
        "--template",
        "--shape",
        "template",
        metavar="NAME",
        help="Plan template for the budget, instead of the best one.",
    ),
    click.option(
        "--search",
        type=click.IntRange(min=1),
        is_flag=False,
        flag_value=SEARCH_RUNS,
        metavar="[N]",
        help=f"Improve the best plan by measuring at most N ({SEARCH_RUNS}) variations of it.",
    ),
    click.option("--preset", metavar="NAME", help="A plan of the paper: yopo-25 or yopo-12."),
    click.option("--head-ratio", type=float, metavar="F", help="Share of heads to keep."),
    click.option("--neuron-ratio", type=float, metavar="F", help="Share of FFN neurons to keep."),
    click.option(
        "--visual-layers", type=int, metavar="N", help="Number of layers with visual tokens."
    ),
    click.option("--radius", type=int, metavar="N", help="Attention radius of visual tokens."),
    click.option(
        "--alpha", type=float, metavar="F", help="Keep heads by vote whose rho is above this."
    ),
    click.option(
        "--compensation",
        type=click.Choice(("none", "mean", "refit")),
        help="Compensate for what is pruned: by its mean, or weights fitted only for visual "
        "tokens.  [default: the best one at a budget, none for a preset]",
    ),
    click.option(
        "--kv-groups/--single-heads",
        default=False,
        help="Keep or drop the query heads of a KV head together, which frees its cache.  "
        "[default: single heads]",
    ),
    click.option(
        "--bidirectional/--causal",
        default=False,
        help="Visual tokens also attend later neighbors (fine-tuned models).  [default: causal]",
    ),
    click.option(
        "--engine",
        type=click.Choice(("vllm",)),
        help="Only a plan that this inference engine can run.",
    ),
)
"""Options for the requested plan."""

run_options = _chain(
    click.option(
        "--samples", type=int, metavar="N", help="Pairs to draw.  [default: all, or 256 demo pairs]"
    ),
    click.option(
        "--seed", type=int, metavar="N", default=0, show_default=True, help="Seed of the draw."
    ),
    click.option(
        "--batch-size",
        type=click.IntRange(min=1),
        metavar="N",
        default=8,
        show_default=True,
        help="Pairs per forward.",
    ),
    click.option(
        "--device",
        default="auto",
        show_default=True,
        help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="float32, bfloat16, float16; auto: the checkpoint's.",
    ),
    click.option(
        "--max-new-tokens",
        type=click.IntRange(min=1),
        metavar="N",
        default=32,
        show_default=True,
        help="Maximum length of generated answers.",
    ),
    click.option(
        "--trust-remote-code",
        is_flag=True,
        help="Run custom processor or tokenizer code from the model's files.",
    ),
)
"""Options for running a model over pairs."""

force_option = click.option("--force", is_flag=True, help="Replace existing output.")

DATA_FORMS = "JSONL, LLaVA JSON, parquet, image folder, hub id org/name:split, or demo:SPLIT."


def plan_request(
    context: click.Context, *, costs: str | None = None, budget: float | None = None
) -> PlanRequest:
    """The plan request of a command with ``request_options``; by default a budget.

    Args:
        context: Context of the running command.
        costs: The file of its ``--costs``, if it has that option.
        budget: Overrides its ``--budget``.
    """
    drop_overruled(context, _BUDGET, _RATIOS)
    drop_overruled(context, ("alpha",), ("head_ratio",))
    from yopo.planning.request import plan_request

    values = {name: context.params[name] for name in (*_BUDGET, *_RATIOS, *_ANY_REQUEST)}
    values["budget"] = values["budget"] if budget is None else budget
    ways = ("budget", "tolerance", "milliseconds", *_RATIOS)
    if all(values[name] is None for name in ways):
        values["budget"] = DEFAULT_BUDGET
    return plan_request(**values, costs=costs)


def run_settings(context: click.Context) -> RunOptions:
    """The run options of a command with ``run_options``, its device checked."""
    from yopo.pipeline.options import RunOptions
    from yopo.serving.loading import torch_device

    values = {each.name: context.params[each.name] for each in fields(RunOptions)}
    return RunOptions(**values | {"device": torch_device(values["device"])})
