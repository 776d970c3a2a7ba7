"""``--config FILE``: options of a command from YAML; defaults < file < command line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from yopo.support.documents import Document, read_text

_NOT_IN_FILES = ("config", "status", "verbose", "quiet", "help")
_KINDS: dict[str, type | tuple[type, ...]] = {
    "integer": int,
    "float": float,
    "boolean": bool,
    "share": (float, str),
    "share list": (float, str),
    "number list": (float, str),
    "samples": (int, str),
}
"""Kind of option -> what a file may hold for it."""


def config_option() -> Any:
    """The decorator that adds ``--config`` to a command."""
    return click.option(
        "--config",
        type=click.Path(path_type=Path),
        is_eager=True,  # its values must be set before other options are resolved
        expose_value=False,
        callback=_apply,
        metavar="FILE",
        help="Read options from YAML: same names, with underscores. Flags take precedence.",
    )


def load_config(path: Path, command: click.Command) -> dict[str, Any]:
    """Read a configuration file.

    Args:
        path: YAML file, option names (``batch_size``) to values; null leaves an option unset.
        command: The command with these options.

    Returns:
        Checked values by option name.

    Raises:
        PlanError: Unreadable, not YAML, or an unknown option or invalid value; names file and
            line.
    """
    document = Document(*read_text(path))
    options = {
        key: each
        for each in command.params
        if isinstance(each, click.Option) and each.name not in _NOT_IN_FILES
        for key in _spellings(each)
    }
    data = document.check_keys((), document.data, options)
    values: dict[str, Any] = {}
    for key, value in data.items():
        if value is None:
            continue
        name = str(options[key].name)
        if name in values:
            other = next(each for each in _spellings(options[key]) if each != key)
            raise document.error((key,), f"is another name for {other}, which is also given")
        values[name] = _checked(document, key, options[key], value)
    return values


def _spellings(option: click.Option) -> list[str]:
    """An option's names in files: its own, and former ones that the command line still accepts."""
    flags = [each[2:].replace("-", "_") for each in option.opts if each.startswith("--")]
    return list(dict.fromkeys([str(option.name), *flags]))


def _checked(document: Document, key: str, option: click.Option, value: Any) -> Any:
    if option.multiple and isinstance(value, list):
        numbered = enumerate(value)
        return tuple(_one_checked(document, (key, place), option, one) for place, one in numbered)
    found = _one_checked(document, (key,), option, value)
    return (found,) if option.multiple else found


def _one_checked(
    document: Document, path: tuple[str | int, ...], option: click.Option, value: Any
) -> Any:
    value = document.typed(path, value, _kind(option.type))
    try:
        return option.type.convert(value, option, None)
    except click.BadParameter as error:
        problem = error.message[:1].lower() + error.message[1:].rstrip(".")
        kind = "is wrong" if problem.startswith("expected") else "is out of range"
        raise document.error(path, f"{kind}: {problem}") from error


def _kind(parameter: click.ParamType) -> type | tuple[type, ...]:
    if isinstance(parameter, click.types.IntParamType):
        return int
    return _KINDS.get(parameter.name, str)


def _apply(context: click.Context, parameter: click.Parameter, value: Path | None) -> None:
    if value is not None and not context.resilient_parsing:
        context.default_map = load_config(value, context.command)


def drop_overruled(context: click.Context, *alternatives: tuple[str, ...]) -> None:
    """Drop options from the file that a flag overrules with an alternative.

    ``--preset yopo-12`` on top of a file with ``budget: 0.25`` requests the preset; if both are
    given in the same place they are kept, and later refused as contradictory.

    Args:
        context: Context of the running command; its ``params`` change.
        *alternatives: Groups of option names that exclude one another.
    """
    from_flags = click.core.ParameterSource.COMMANDLINE
    sources = {name: context.get_parameter_source(name) for group in alternatives for name in group}
    given = [group for group in alternatives if any(sources[name] == from_flags for name in group)]
    for group in alternatives:
        if given and group not in given:
            for name in group:
                context.params[name] = None
