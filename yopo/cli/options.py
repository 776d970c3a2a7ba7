"""Options shared by several commands, and the library's records built from them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import TYPE_CHECKING, Any

import click

from yopo.cli.config import drop_overruled
from yopo.cli.values import Samples, Share
from yopo.data.drawing import DEFAULT_SAMPLES
from yopo.data.sources import check_exists

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
        type=Share(),
        metavar="F",
        help=f"Solve for this share of the visual FLOPs: 0.25 or 25%.  [default: {DEFAULT_BUDGET}]",
    ),
    click.option(
        "--tolerance",
        type=Share(),
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
        type=Share(),
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
    click.option("--head-ratio", type=Share(), metavar="F", help="Share of heads to keep."),
    click.option("--neuron-ratio", type=Share(), metavar="F", help="Share of FFN neurons to keep."),
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

device_map_option = click.option(
    "--device-map",
    metavar="auto|FILE",
    help="Instead of --device: the model over all GPUs, or as a YAML or JSON file of modules and "
    "devices says.",
)

run_options = _chain(
    click.option(
        "--samples",
        type=Samples(),
        metavar="N",
        default=DEFAULT_SAMPLES,
        show_default=True,
        help="Pairs to draw, evenly over files and kinds of question; all: every pair.",
    ),
    click.option(
        "--strict",
        is_flag=True,
        help="Refuse data in which a pair cannot be used, instead of leaving it out.",
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
    device_map_option,
    click.option(
        "--offload",
        type=click.Choice(("auto", "never", "always")),
        default="auto",
        show_default=True,
        help="Read decoder layers from disk one at a time; auto: where the weights do not fit.",
    ),
    click.option(
        "--dtype",
        default="auto",
        show_default=True,
        help="float32, bfloat16 or bf16, float16 or fp16; auto: the checkpoint's, or in place of "
        "float16 on a CPU what is faster there.",
    ),
    click.option(
        "--max-pixels",
        type=click.IntRange(min=1),
        metavar="N",
        help="Largest area of an image, as you will serve it (Qwen-VL; InternVL: in whole tiles).  "
        "[default: the processor's]",
    ),
    click.option(
        "--min-pixels",
        type=click.IntRange(min=1),
        metavar="N",
        help="Smallest area of an image, likewise.",
    ),
    click.option(
        "--processor",
        multiple=True,
        metavar="KEY=VALUE",
        help="Another setting of the processor, such as max_patches=6; repeatable.",
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

DATA_FORMS = (
    "JSONL, LLaVA JSON, CSV, parquet, image folder, hub id org/name:split, or demo:SPLIT; "
    "repeatable, with weights: a.jsonl:0.7"
)


def data_option(default: str) -> Decorator:
    """``--data``, once or several times."""
    text = f"Pairs: {DATA_FORMS}.  [default: for demo models: {default}]"
    return click.option("--data", multiple=True, metavar="SOURCE", help=text)


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


def check_settings(context: click.Context) -> None:
    """Refuse data, a dtype or processor options that cannot be right, before torch is imported.

    Raises:
        click.UsageError: Two options say where the model's parts go.
        YopoError: There is no such file or dtype, or an option has no value.
    """
    from yopo.support.dtypes import check_dtype

    if context.params["offload"] != "auto" and context.params["device_map"] is not None:
        raise click.UsageError("--offload and --device-map exclude one another.")
    check_exists(context.params["data"])
    check_dtype(context.params["dtype"])
    processor_options(context)


def run_settings(context: click.Context) -> RunOptions:
    """The run options of a command with ``run_options``, its device checked."""
    from yopo.pipeline.options import RunOptions

    values = {
        each.name: context.params[each.name]
        for each in fields(RunOptions)
        if each.name in context.params
    }
    values["processor_options"] = processor_options(context)
    values["data"] = one_or_all(values["data"])
    values |= device_settings(context)
    return RunOptions(**values)


def device_settings(context: click.Context) -> dict[str, Any]:
    """``device`` and ``device_map`` of a command, checked.

    Raises:
        click.UsageError: Both are given.
        YopoError: One is none.
    """
    from yopo.serving.loading import torch_device
    from yopo.serving.places import read_device_map
    from yopo.support.launched import processes
    from yopo.support.ranks import own_device

    is_default = context.get_parameter_source("device") == click.core.ParameterSource.DEFAULT
    drop_overruled(context, ("device",), ("device_map",))
    device, places = context.params["device"], context.params["device_map"]
    if places is None:
        return {"device": torch_device(own_device(device)), "device_map": None}
    if processes() > 1:
        raise click.UsageError("--device-map is for a single process.")
    if device is not None and not is_default:
        raise click.UsageError("--device and --device-map exclude one another.")
    return {"device": "cpu", "device_map": read_device_map(places)}


def processor_options(context: click.Context) -> dict[str, Any]:
    """The settings of the processor that a command was given."""
    from yopo.data.processor_options import parsed

    return dict(parsed(text) for text in context.params["processor"])


def one_or_all(data: tuple[str, ...]) -> str | list[str] | None:
    """Sources from the command line, as the library takes them."""
    return None if not data else data[0] if len(data) == 1 else list(data)
