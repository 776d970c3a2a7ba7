"""Plot how prefill time grows with the number of visual tokens, dense and pruned.

The model has full-width layers of a published model with random weights. The dense model and every
preset take turns at prefilling the same prompt in one process; the plot shows medians, and both
axes are logarithmic. Solid lines are measured. Dotted lines are what the executed FLOPs predict:
dense time times the ratio of FLOPs, text included.

    python scripts/scaling.py scaling.png --layers 4 --threads 1 --save-data scaling.json
    python scripts/scaling.py scaling.png --data scaling.json      # draw again, measure nothing
    python scripts/scaling.py --save-data scaling.json             # measure, draw nothing

Drawing needs matplotlib (`pip install yopo[pictures]`). Prints the figures as a markdown table.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from yopo.bench.result import DENSE, PRUNED

COUNTS = (64, 144, 256, 576, 1024, 2304, 4096)
COLORS = {"dense": "#57606a", "yopo-25": "#0969da", "yopo-12": "#8250df", "reader-12": "#bc4c00"}
INK, PAPER, GRID = "#1f2328", "#ffffff", "#d8dee4"
DOTS_PER_INCH = 160

Points = dict[str, Any]
"""The saved data: ``about`` (how it was measured) and ``points``, one per token count, with
``visual`` tokens, ``ms`` and ``flops`` per curve; times are lists with one entry per run."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("picture", type=Path, nargs="?", help="PNG (or SVG) file to write")
    parser.add_argument("--data", type=Path, help="draw saved figures without measuring")
    parser.add_argument("--save-data", type=Path, metavar="JSON", help="save the figures")
    parser.add_argument("--visual-tokens", type=int, nargs="+", default=COUNTS)
    parser.add_argument("--text-tokens", type=int, default=64)
    parser.add_argument("--presets", nargs="+", default=["yopo-25", "reader-12"])
    parser.add_argument("--shape-of", default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=4, help="decoder layers to time")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(words)
    if not (options.picture or options.save_data):
        parser.error("nothing to write: name a picture to draw, or pass --save-data, or both")
    return options


def measure(options: argparse.Namespace) -> Points:
    """Time dense and pruned prefill at every number of visual tokens."""
    import torch

    from yopo.bench.plans import preset_plan, sampled_layers, with_layers, with_prompt
    from yopo.bench.prompt import made_up_prompt
    from yopo.bench.random_model import (
        WORKLOAD,
        fitted,
        grids_of,
        published_model,
        random_model,
    )
    from yopo.bench.subject import Bench
    from yopo.plans.flops import dense_prefill_flops, prefill_flops

    torch.set_num_threads(options.threads)
    published = published_model(options.shape_of)
    shape = replace(published.shape, layers=options.layers)
    model, points = None, []
    plans = {name: preset_plan(name, published, WORKLOAD) for name in options.presets}
    for visual in sorted(options.visual_tokens):
        subjects = {}
        for name, plan in plans.items():
            plan = with_prompt(plan, visual=visual, text=options.text_tokens)
            used = sampled_layers(plan, options.layers)
            few = fitted(with_layers(plan, used))
            model = model or random_model(shape)  # shared: time depends only on its shape
            prompt = made_up_prompt(model, few, 1)
            subjects[name] = Bench(model, few, prompt, grids_of(few))
        times = take_turns(subjects, options.runs)
        flops = {name: prefill_flops(each.plan) for name, each in subjects.items()}
        flops["dense"] = dense_prefill_flops(shape, few.workload)
        points.append({"visual": visual, "ms": times, "flops": flops})
        print(_line(points[-1], options.presets), flush=True)
    about = {
        "shape": options.shape_of,
        "layers": options.layers,
        "text": options.text_tokens,
        "threads": options.threads,
        "dtype": "float32",
        "runs": options.runs,
    }
    return {"about": about, "points": points}


def take_turns(subjects: dict[str, Any], runs: int) -> dict[str, list[float]]:
    """Return the prefill milliseconds of the dense model and of every preset, run by run.

    The first round is a warm-up and not counted; the order alternates from round to round.
    """
    some = next(iter(subjects.values()))
    calls = {"dense": lambda: some.measure(DENSE, 0).prefill}
    for name, subject in subjects.items():
        calls[name] = lambda subject=subject: subject.measure(PRUNED, 0).prefill
    times: dict[str, list[float]] = {name: [] for name in calls}
    for number in range(-1, runs):
        for name in list(calls) if number % 2 else reversed(list(calls)):
            milliseconds = calls[name]()
            if number >= 0:
                times[name].append(milliseconds)
    return times


def ratio(point: Points, name: str) -> float:
    """Return the median over rounds of the time ratio, pruned over dense."""
    pairs = zip(point["ms"][name], point["ms"]["dense"], strict=True)
    return median(after / before for after, before in pairs)


def _line(point: Points, names: Sequence[str]) -> str:
    cells = [str(point["visual"]), f"{median(point['ms']['dense']):.0f} ms"]
    for name in names:
        share = point["flops"][name] / point["flops"]["dense"]
        time = ratio(point, name)
        cells.append(f"{median(point['ms'][name]):.0f} ms, {time:.3f} ({time / share:.2f})")
    return f"| {' | '.join(cells)} |"


def table_head(names: Sequence[str]) -> str:
    """Return the head of the printed table."""
    titles = [f"{name}: time, over dense (over FLOPs ratio)" for name in names]
    return f"| visual tokens | dense | {' | '.join(titles)} |\n|---:|{'---:|' * (len(names) + 1)}"


def draw(found: Points, target: Path) -> None:
    """Draw the curves with their predictions, and label each curve at its end."""
    pyplot = _pyplot()
    points, about = found["points"], found["about"]
    counts = [point["visual"] for point in points]
    names = [name for name in points[0]["ms"] if name != "dense"]
    figure, axes = pyplot.subplots(figsize=(8, 5), facecolor=PAPER)
    axes.set_facecolor(PAPER)
    axes.set(xscale="log", yscale="log")
    dense = [median(point["ms"]["dense"]) / 1e3 for point in points]
    curves = {"dense": dense}
    for name in names:
        shares = [point["flops"][name] / point["flops"]["dense"] for point in points]
        predicted = [time * share for time, share in zip(dense, shares, strict=True)]
        curves[name] = [
            time * ratio(point, name) for time, point in zip(dense, points, strict=True)
        ]
        axes.plot(counts, predicted, ":", color=_color(name), linewidth=1.4)
    for name, times in curves.items():
        axes.plot(counts, times, "-o", color=_color(name), linewidth=2, markersize=5)
    for name, height in _apart({name: times[-1] for name, times in curves.items()}).items():
        share = "" if name == "dense" else f" ({curves[name][-1] / dense[-1]:.0%})"
        axes.annotate(
            f"{name}{share}",
            (counts[-1], height),
            xytext=(9, 0),
            textcoords="offset points",
            color=_color(name),
            fontweight="bold",
            va="center",
        )
    _furnish(axes, counts, about)
    figure.savefig(target, dpi=DOTS_PER_INCH, bbox_inches="tight", facecolor=PAPER)
    pyplot.close(figure)


def _apart(heights: dict[str, float], step: float = 1.22) -> dict[str, float]:
    """Move labels on a logarithmic axis up where they would overlap; return their heights."""
    placed: dict[str, float] = {}
    lowest = 0.0
    for name, height in sorted(heights.items(), key=lambda entry: entry[1]):
        placed[name] = lowest = max(height, lowest)
        lowest *= step
    return placed


def _furnish(axes: Any, counts: Sequence[int], about: dict[str, Any]) -> None:
    """Add titles, ticks at the measured counts and a light grid."""
    from matplotlib.ticker import LogLocator

    axes.set_title(
        f"Prefill time, {about['layers']} layer{'s' * (about['layers'] > 1)} of {about['shape']}",
        color=INK,
        loc="left",
    )
    axes.set_xlabel(f"visual tokens (plus {about['text']} text tokens)", color=INK)
    axes.set_ylabel("seconds", color=INK)
    axes.set_xticks(counts, [str(count) for count in counts])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    axes.grid(True, color=GRID, linewidth=0.7)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, length=0)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(GRID)
    threads = f"{about['threads']} CPU thread{'s' * (about['threads'] > 1)}"
    axes.text(
        0.01,
        0.98,
        f"solid: measured, {threads}, {about['dtype']}\ndotted: what the FLOPs predict",
        transform=axes.transAxes,
        color=INK,
        fontsize=9,
        va="top",
    )


def _color(name: str) -> str:
    return COLORS.get(name, INK)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise SystemExit(
            "Drawing needs matplotlib: pip install 'yopo[pictures]', or pass only --save-data."
        ) from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def read_data(path: Path) -> Points:
    """Read figures that ``--save-data`` wrote."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        if not found["points"] or not found["about"]:
            raise KeyError("points")
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SystemExit(f"{path} is not a file that --save-data wrote ({error}).") from error
    return found


def main(words: Sequence[str] | None = None) -> None:
    """Measure (or read), save, print and draw."""
    options = arguments(words)
    if options.picture:
        _pyplot()  # better to fail now than after an hour of measuring
    if options.data:
        found = read_data(options.data)
        names = [name for name in found["points"][0]["ms"] if name != "dense"]
        print(table_head(names), *(_line(point, names) for point in found["points"]), sep="\n")
    else:
        print(table_head(options.presets), flush=True)
        found = measure(options)
    if options.save_data:
        options.save_data.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    if options.picture:
        draw(found, options.picture)


if __name__ == "__main__":
    main()
