"""Print the tables of `scripts/study.py`'s results, and draw them.

    python scripts/study_report.py study.jsonl                        # markdown tables
    python scripts/study_report.py study.jsonl --picture front.png    # and the front, per model

Figures are means over calibration seeds, each followed by the largest deviation of a seed from the
mean. Baselines need no calibration, so they have a single figure. The cell of a budget that a
method cannot meet is empty.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from itertools import cycle
from pathlib import Path
from statistics import mean

from yopo.baselines.registry import with_own_budget

METHODS = {
    "paper+random": "paper's shape, random",
    "authors": "authors' rules",
    "paper": "paper's shape, scores",
    "paper+refit": "paper's shape, refit",
    "search": "shapes, searched",
    "allocated": "**allocated, refit**",
    "allocated+search": "allocated, refit, searched",
    **{name: each.label for name, each in with_own_budget().items()},
}
ROWS = {
    "sizes": "samples",
    "shift": "calibration",
    "sizes-of-images": "grids",
    "kv": "kv_budget",
}
"""The entry of the key that tells a study's rows apart."""

METHOD_ROWS = {
    "ablation": "what an allocation may use",
    "rho": "what ranks the heads of the paper's shape",
}
"""Studies with a row per method of their own."""

BASELINE_COLORS = ("#7f7f7f", "#2ca02c", "#bcbd22", "#c7c7c7", "#98df8a", "#dbdb8d")
COLORS = {
    "paper+random": "#e377c2",
    "authors": "#8c564b",
    "paper": "#d62728",
    "paper+refit": "#ff7f0e",
    "search": "#9467bd",
    "allocated": "#1f77b4",
    "allocated+search": "#17becf",
    **dict(zip(with_own_budget(), cycle(BASELINE_COLORS), strict=False)),
}


def read(path: Path) -> dict[tuple[str, str], list[dict]]:
    """Read the results by (study, model)."""
    results = defaultdict(list)
    for line in path.read_text().splitlines():
        result = json.loads(line)
        results[result["key"]["study"], result["key"]["model"]].append(result)
    return results


def grouped(results: list[dict], *more: str) -> dict[tuple, list[dict]]:
    """Group summaries by (method, budget, further entries of the key), without missing ones."""
    groups = defaultdict(list)
    for result in results:
        key = result["key"]
        if "summary" in result:
            names = ("method", "budget", *more)
            groups[tuple(key[name] for name in names)].append(result["summary"])
    return groups


def cell(found: list[dict] | None, name: str, form: str, scale: float = 1) -> str:
    """Format the mean over seeds and the largest deviation from it."""
    if not found:
        return ""
    values = [scale * each[name] for each in found]
    middle = mean(values)
    if len(values) == 1:
        return form.format(middle)
    spread = max(abs(value - middle) for value in values)
    return f"{form.format(middle)} ± {form.format(spread)}"


def table(groups: dict[tuple, list[dict]], rows: dict[str, str], title: str) -> None:
    """Print a row per method with accuracy over dense, agreement and KL for every budget."""
    budgets = sorted({key[1] for key in groups})
    print(f"\n{title}\n")
    print("| | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |")
    print("|---|" + "---:|" * len(budgets))
    columns = (("of_dense", "{:.1f}", 100), ("agreement", "{:.1f}", 100), ("kl", "{:.4f}", 1))
    for method, label in rows.items():
        cells = []
        for budget in budgets:
            found = groups.get((method, budget))
            shown = [cell(found, *column) for column in columns]
            cells.append(" / ".join(shown) if found else "")
        if any(cells):
            print(f"| {label} | " + " | ".join(cells) + " |")


def report(results: dict[tuple[str, str], list[dict]]) -> None:
    """Print all tables."""
    legend = "accuracy of dense, % / top-1 agreement, % / logit KL"
    for (study, model), found in sorted(results.items()):
        if study == "methods":
            # Searched allocations go into the same table, if they were run.
            found = [*found, *results.get(("deeper", model), [])]
            table(grouped(found), METHODS, f"{model}: {legend}")
            kept_table(found, "budget", f"{model}, what the default keeps, %")
        elif study == "deeper":
            continue
        elif study == "long":
            long_table(found, model)
        elif study in METHOD_ROWS:
            rows = {key[0]: key[0] for key in grouped(found)}
            table(grouped(found), rows, f"{model}, {METHOD_ROWS[study]}: {legend}")
        else:
            name = ROWS[study]
            groups = {(str(key[2]), key[1]): each for key, each in grouped(found, name).items()}
            rows = {key[0]: key[0] for key in groups}
            table(groups, rows, f"{model}, {name}: {legend}")
            if study == "kv":
                kept_table(found, name, f"{model}, {name}, %")


def kept_table(found: list[dict], column: str, heading: str) -> None:
    """Print what the default keeps: of the mean, the worst kind and whole answers, row by row.

    Args:
        found: Results of one model.
        column: Entry of the key that tells rows apart: ``budget``, ``kv_budget``.
        heading: Title of the table.
    """
    rows: dict[object, list[dict]] = defaultdict(list)
    for result in found:
        if result["key"]["method"] == "allocated" and "summary" in result:
            kind, share = worst_kind(result["kinds"])
            more = {"worst": share, "worst_name": kind}
            rows[result["key"][column]].append(result["summary"] | more)
    print(f"\n{heading}\n")
    print("| | accuracy of dense | worst kind | same answers | same tokens | logit KL |")
    print("|---|" + "---:|" * 5)
    for row, each in rows.items():
        label = f"{row:.0%}" if isinstance(row, float) else row
        kinds = ", ".join(sorted({one["worst_name"] for one in each}))
        cells = [
            cell(each, "of_dense", "{:.1f}", 100),
            cell(each, "worst", "{:.1f}", 100) + f" ({kinds})",
            cell(each, "same", "{:.1f}", 100),
            cell(each, "agreement", "{:.1f}", 100),
            cell(each, "kl", "{:.4f}"),
        ]
        print(f"| {label} | " + " | ".join(cells) + " |")


def worst_kind(kinds: dict[str, dict]) -> tuple[str, float]:
    """The kind with the smallest accuracy relative to the dense model, and that."""
    shares = {name: each["pruned"] / each["dense"] for name, each in kinds.items() if each["dense"]}
    worst = min(sorted(shares), key=lambda name: shares[name])
    return worst, shares[worst]


def long_table(found: list[dict], model: str) -> None:
    """Print the shares of whole answers and of tokens that stay the same."""
    groups = grouped(found)
    budgets = sorted({key[1] for key in groups})
    kinds = {result["key"]["kind"] for result in found}
    print(
        f"\n{model}, {', '.join(map(str, kinds))}: same answer to the end, % / top-1 agreement, %\n"
    )
    print("| | " + " | ".join(f"{budget:.0%}" for budget in budgets) + " |")
    print("|---|" + "---:|" * len(budgets))
    for method, label in METHODS.items():
        cells = [
            " / ".join(cell(each, name, "{:.1f}", 100) for name in ("same", "agreement"))
            if each
            else ""
            for each in (groups.get((method, budget)) for budget in budgets)
        ]
        if any(cells):
            print(f"| {label} | " + " | ".join(cells) + " |")


def draw(results: dict[tuple[str, str], list[dict]], path: Path) -> None:
    """Draw accuracy and KL over the visual budget, with a column per model."""
    try:
        import matplotlib
    except ImportError:
        sys.exit("Drawing needs matplotlib: pip install 'yopo[pictures]'")
    matplotlib.use("Agg")
    from matplotlib import pyplot

    models = sorted(model for study, model in results if study == "methods")
    figure, axes = pyplot.subplots(
        2, len(models), figsize=(5.4 * len(models), 7.2), squeeze=False, sharex=True, sharey="row"
    )
    for column, model in enumerate(models):
        groups = grouped(results["methods", model])
        for row, (name, label) in enumerate(
            (("of_dense", "accuracy of dense"), ("kl", "logit KL"))
        ):
            axis = axes[row][column]
            for method in METHODS:
                points = sorted(
                    (mean(each["reached"] for each in found), mean(each[name] for each in found))
                    for (each_method, _), found in groups.items()
                    if each_method == method and found[0]["reached"] > 0  # the axis is logarithmic
                )
                if points:
                    axis.plot(
                        *zip(*points, strict=True),
                        marker="o",
                        color=COLORS[method],
                        linewidth=2.5 if method == "allocated" else 1.3,
                        label=METHODS[method].strip("*"),
                    )
            axis.set_xscale("log")
            axis.set_xticks([0.05, 0.12, 0.25, 0.5], ["5 %", "12 %", "25 %", "50 %"])
            axis.minorticks_off()
            axis.grid(alpha=0.3)
            axis.set_ylabel(label)
        axes[0][column].set_title(model)
        axes[1][column].set_yscale("log")
        axes[1][column].set_xlabel("visual FLOPs of dense")
    axes[0][-1].legend(fontsize=8, loc="center left")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Print the tables, and draw if requested."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    results = read(options.results)
    report(results)
    if options.picture:
        draw(results, options.picture)


if __name__ == "__main__":
    main()
