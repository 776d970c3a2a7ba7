"""``yopo bench``: whether time follows the FLOPs on this machine."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from yopo.baselines.registry import BASELINES
from yopo.cli.command import Command, load
from yopo.cli.next_step import YOURS, suggest_loading, suggest_next
from yopo.cli.options import device_map_option, device_settings
from yopo.support.dtypes import check_dtype

if TYPE_CHECKING:
    from yopo.bench.result import Benchmark
    from yopo.plans.schema import PruningPlan
    from yopo.serving.places import DeviceMap

DEFAULT_SHAPE = "llava-1.5-7b"

_COUNT = click.IntRange(min=1)


def _count(name: str, text: str, **settings: Any) -> Any:
    return click.option(name, type=_COUNT, metavar="N", help=text, **settings)


@click.command(cls=Command)
@click.argument("target", required=False)
@click.option(
    "--preset", metavar="NAME", help="No TARGET: yopo-25, yopo-12, reader-12 or fitted-12."
)
@click.option(
    "--shape-of",
    metavar="NAME",
    help=f"The preset's model: llava-1.5-7b or llava-1.5-13b.  [default: {DEFAULT_SHAPE}]",
)
@click.option("--model", help="The dense model, if not where the plan says.")
@click.option(
    "--random-weights", is_flag=True, help="No checkpoint: random weights of the plan's shape."
)
@_count("--layers", "Number of random layers, in the plan's proportions.  [default: all]")
@_count("--batch", "Prompts per forward.", default=1, show_default=True)
@_count("--visual-tokens", "Per prompt: whole images, or a square.  [default: the plan's]")
@_count("--text-tokens", "Per prompt; also grows the context.  [default: the plan's]")
@_count("--runs", "Timed pairs of dense and pruned.", default=7, show_default=True)
@click.option(
    "--decode-steps",
    type=click.IntRange(min=0),
    metavar="N",
    default=8,
    show_default=True,
    help="Tokens decoded after each prefill; 0 skips decoding.",
)
@click.option(
    "--context",
    "contexts",
    type=_COUNT,
    metavar="N",
    multiple=True,
    help="Also time decode steps after prompts of N tokens; repeatable.",
)
@click.option(
    "--baseline",
    "baselines",
    metavar="NAME",
    multiple=True,
    help=f"Also time at the same visual FLOPs, repeatable: {', '.join(BASELINES)}.",
)
@click.option("--baselines", "all_baselines", is_flag=True, help="All baselines that can run.")
@click.option("--rival", "old_baselines", multiple=True, hidden=True)
@click.option("--rivals", "old_all_baselines", is_flag=True, hidden=True)
@_count("--threads", "CPU threads.  [default: torch's]")
@click.option(
    "--device",
    default="auto",
    show_default=True,
    help="cpu, cuda, cuda:1, mps; auto: a GPU if there is one.",
)
@device_map_option
@click.option(
    "--dtype",
    default="auto",
    show_default=True,
    help="float32, bfloat16, float16; auto: the checkpoint's (but not float16 on a CPU), or "
    "float32.",
)
@click.option("--json", "as_json", is_flag=True, help="One JSON document instead of a table.")
@click.pass_context
def command(context: click.Context, as_json: bool, **values: Any) -> None:
    """Time the pruned model of TARGET against the dense one: prefill, decode, memory, KV cache.

    TARGET is what `yopo apply` wrote (a directory or hub id), a plan, or - for a plan on stdin.
    Both models alternate in one process, on the same kernels; the time is shown next to what the
    FLOPs allow. If pruned serving uses a faster kernel than transformers, a second figure compares
    both "as shipped". Without any checkpoint:

    \b
    yopo bench --preset yopo-25 --shape-of llava-1.5-7b --layers 4
    """
    from yopo.cli.output import print_json, print_report

    _check_usage(values)
    found = _measure(values, **device_settings(context))
    if as_json:
        print_json(load("yopo.bench.document").document(found))
    else:
        from yopo.report.bench_tables import bench_report

        print_report(bench_report(found))
        _suggest_next(values["target"], values["shape_of"])


def _suggest_next(target: str | None, shape_of: str | None) -> None:
    if target is None:
        suggest_next("calibrate", "--model", shape_of or DEFAULT_SHAPE, "--data", YOURS)
    elif Path(target).is_file():
        suggest_next("apply", target)
    elif target != "-":
        suggest_loading(target)


def _check_usage(values: dict[str, Any]) -> None:
    """Refuse options that exclude or need each other."""
    check_dtype(values["dtype"])
    if (values["target"] is None) == (values["preset"] is None):
        raise click.UsageError("Give either a TARGET or --preset.")
    if values["shape_of"] and not values["preset"]:
        raise click.UsageError("--shape-of needs --preset.")
    is_random = values["random_weights"] or values["preset"] is not None
    if values["model"] and is_random:
        raise click.UsageError("--model and random weights exclude one another.")
    if values["device_map"] and is_random:
        raise click.UsageError("--device-map needs a checkpoint; random weights take --device.")
    if values["layers"] and not is_random:
        raise click.UsageError("--layers needs --random-weights.")
    if values["contexts"] and not values["decode_steps"]:
        raise click.UsageError("--context times decode steps: --decode-steps must not be 0.")


def _measure(values: dict[str, Any], device: str, device_map: DeviceMap | None) -> Benchmark:
    bench, serving = load("yopo.bench.run"), load("yopo.serving.loading")
    workflow = load("yopo.pipeline.commands")
    sizes = bench.Sizes(values["batch"], values["visual_tokens"], values["text_tokens"])
    is_all, named = _baselines(values)
    options = bench.BenchOptions(
        runs=values["runs"],
        decode_steps=values["decode_steps"],
        threads=values["threads"],
        baselines=tuple(BASELINES) if is_all else named,
        may_leave_out=is_all,
        contexts=values["contexts"],
    )
    dtype = serving.torch_dtype(values["dtype"])
    if values["preset"]:
        plan = _preset(values["preset"], values["shape_of"])
    else:
        plan = workflow.read_target(values["target"])
    if values["preset"] or values["random_weights"]:
        kind = serving.torch_dtype("float32") if dtype == "auto" else dtype
        return bench.bench_random(
            plan,
            sizes,
            options,
            num_layers=values["layers"],
            dtype=kind,
            device=device,
        )
    if values["model"]:
        source = load("yopo.models.registry").resolve(values["model"])
    else:
        source = workflow.source_of_target(values["target"], plan, None)
    if device_map is None:
        reader, precision = load("yopo.checkpoint.reader"), load("yopo.serving.precision")
        checkpoint = reader.Checkpoint.open(reader.fetch(source))
        kind = precision.dtype_for(dtype, checkpoint, device)
        model = serving.load_dense(source, checkpoint=checkpoint, dtype=kind).to(device)
    else:
        model = serving.load_dense(source, dtype=dtype, device_map=device_map)
    return bench.bench_model(model, plan, sizes, options)


def _baselines(values: dict[str, Any]) -> tuple[bool, tuple[str, ...]]:
    """Whether all baselines were requested, and those requested by name; includes old flags."""
    named = (*values["baselines"], *values["old_baselines"])
    return values["all_baselines"] or values["old_all_baselines"], tuple(dict.fromkeys(named))


def _preset(name: str, shape_of: str | None) -> PruningPlan:
    return load("yopo.bench.random_model").published_plan(name, shape_of or DEFAULT_SHAPE)
