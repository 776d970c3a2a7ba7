"""The registered families, and resolving a model's name: alias, local directory or hub id."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

from yopo.models.family import Family
from yopo.models.idefics3 import IDEFICS3, SMOLVLM
from yopo.models.internvl import INTERNVL
from yopo.models.llava import LLAVA
from yopo.models.llava_next import LLAVA_NEXT
from yopo.models.llava_onevision import LLAVA_ONEVISION
from yopo.models.mistral3 import MISTRAL3
from yopo.models.qwen_vl import QWEN2_5_VL, QWEN2_VL, QWEN3_VL
from yopo.support.errors import ModelError, suggest

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

FAMILIES: tuple[Family, ...] = (
    LLAVA,
    LLAVA_NEXT,
    LLAVA_ONEVISION,
    INTERNVL,
    QWEN2_VL,
    QWEN2_5_VL,
    QWEN3_VL,
    MISTRAL3,
    IDEFICS3,
    SMOLVLM,
)

ALIASES: dict[str, str] = {
    alias: target for family in FAMILIES for alias, target in family.aliases.items()
}


@dataclass(frozen=True)
class ModelSource:
    """A model's name and location.

    Attributes:
        name: Name in plans: the alias, the hub id, or the directory's own name.
        location: A local directory, or a hub id.
        revision: Hub revision, or None.
        is_local: Whether ``location`` is a directory on this machine.
    """

    name: str
    location: str
    revision: str | None
    is_local: bool


def family_of(config: PreTrainedConfig) -> Family:
    """The family of a model's outer configuration.

    Raises:
        ModelError: No registered family has its ``model_type``.
    """
    return family_of_type(config.model_type)


def family_of_type(found: str) -> Family:
    """The family of a ``model_type``; raises like :func:`family_of`."""
    for family in FAMILIES:
        if family.model_type == found:
            return family
    known = ", ".join(family.model_type for family in FAMILIES)
    raise ModelError(f"Models of type '{found}' are not supported (supported: {known}).")


def refuse_original(model_type: str | None, name: str) -> None:
    """Refuse a checkpoint that has to be converted before transformers can load it.

    Raises:
        ModelError: It is one; the remedy names ``yopo convert``.
    """
    for family in FAMILIES:
        if model_type in family.originals:
            raise ModelError(
                f"{name}: is an original {family.name} checkpoint ({model_type}), whose code does "
                "not run on this transformers version.",
                remedy=f"Convert it first: yopo convert {name} DIRECTORY.",
            )


def family_named(name: str) -> Family:
    """The family that a plan names.

    Raises:
        ModelError: No such family; suggests the closest names.
    """
    by_name = {family.name: family for family in FAMILIES}
    if name not in by_name:
        raise ModelError(f"Unknown model family '{name}'.", remedy=suggest(name, by_name))
    return by_name[name]


def resolve(name: str) -> ModelSource:
    """Resolve a model's name to a place to load it from, without network access.

    A checkpoint directory with that name takes precedence, as everywhere in transformers.

    Args:
        name: A directory, an alias, or a hub id ``org/name[@revision]``.

    Raises:
        ModelError: It is none of these; suggests the closest alias.
    """
    path = Path(name).expanduser()
    if name in ALIASES and not (path / "config.json").is_file():
        target = ALIASES[name]
        if target.startswith("package:"):
            inside = files("yopo").joinpath(target.removeprefix("package:"))
            return ModelSource(name, str(inside), None, is_local=True)
        return ModelSource(name, target, None, is_local=False)
    if path.is_dir():
        return ModelSource(path.resolve().name, str(path), None, is_local=True)
    if is_hub_id(name):
        repository, _, revision = name.partition("@")
        return ModelSource(name, repository, revision or None, is_local=False)
    if _looks_local(name) or "/" in name:
        raise ModelError(
            f"{name}: no such model directory.",
            remedy="Give a directory with config.json, a hub id org/name[@revision], or an alias.",
        )
    raise ModelError(f"Unknown model '{name}'.", remedy=suggest(name, ALIASES))


def is_hub_id(name: str) -> bool:
    """Whether a name that does not exist locally looks like ``org/name[@revision]``."""
    return name.partition("@")[0].count("/") == 1 and not _looks_local(name)


def _looks_local(name: str) -> bool:
    path = Path(name).expanduser()
    return path.is_absolute() or name.startswith((".", "~")) or path.exists()
