"""Options in groups, for the help of commands that have dozens of them."""

from __future__ import annotations

import click

GROUPS: dict[str, tuple[str, ...]] = {
    "Model and data": (
        *("model", "data", "samples", "seed", "strict", "grids"),
        *("max_pixels", "min_pixels", "processor"),
    ),
    "Results": ("output", "stats", "budgets", "config", "force"),
    "Budget": (
        *("budget", "tolerance", "tolerance_on", "milliseconds", "costs", "kv_budget"),
        *("kv_groups", "template", "compensation", "reduce"),
    ),
    "The paper's knobs, instead of a budget": (
        *("preset", "head_ratio", "neuron_ratio", "visual_layers", "radius", "alpha"),
        *("queries", "bidirectional"),
    ),
    "Effort": ("search", "measure_pairs", "fit_pairs", "max_new_tokens", "batch_size"),
    "Machine": (
        "device",
        "device_map",
        "offload",
        "dtype",
        "work_dir",
        "status",
        "trust_remote_code",
    ),
}
"""Title -> options by name, in the order of the help. Others follow under "Other options"."""

FEW = 16
"""A command with at most this many options lists them in one group."""


def write_options(
    context: click.Context, command: click.Command, formatter: click.HelpFormatter
) -> bool:
    """Write a command's options in groups.

    Returns:
        Whether it has so many that this was done.
    """
    options = [each for each in command.get_params(context) if isinstance(each, click.Option)]
    if len(options) <= FEW:
        return False
    by_name = {str(each.name): each for each in options}
    for title, names in GROUPS.items():
        _write(context, formatter, title, [by_name.pop(name) for name in names if name in by_name])
    _write(context, formatter, "Other options", list(by_name.values()))
    return True


def _write(
    context: click.Context, formatter: click.HelpFormatter, title: str, options: list[click.Option]
) -> None:
    records = [record for each in options if (record := each.get_help_record(context)) is not None]
    if records:
        with formatter.section(title):
            formatter.write_dl(records)
