"""The tensors file next to a plan: named by its content, never overwritten."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from yopo.plans.file import TensorsFile
from yopo.support import console
from yopo.support.errors import OutputError
from yopo.support.files import PLAN, check_writable, write_file


def check_plan_writable(path: Path, *, force: bool) -> None:
    """Refuse a plan file that must not be written there.

    Raises:
        OutputError: As for ``check_writable``; or the folder holds a model's weights.
    """
    if path.suffix == ".safetensors":
        raise OutputError(f"{path}: .safetensors is for tensors; give the plan a .yaml name.")
    check_writable(path, PLAN, force=force)
    folder = path.absolute().parent
    if any((folder / f"model.safetensors{index}").exists() for index in ("", ".index.json")):
        raise OutputError(
            f"{path}: its folder holds a model's weights, which the plan's tensors must not be "
            "mixed with.",
            remedy="Write the plan elsewhere: -o FILE.",
        )


def write_side_file(path: Path, data: bytes) -> None:
    """Write tensors under a name that contains their hash, unless they already exist.

    Raises:
        OutputError: A different file has that name, or it cannot be written.
    """
    if os.path.lexists(path):
        if path.is_file() and path.read_bytes() == data:
            return
        raise OutputError(
            f"{path}: exists already, but its content does not match the hash in its name.",
            remedy="It may be damaged: remove it.",
        )
    write_file(path, data)


def own_side_file(plan_path: Path, named: TensorsFile) -> Path | None:
    """The side file that a plan names; None if it is missing or has other content."""
    side = plan_path.with_name(Path(named.file).name)
    if side.name != named.file or not side.is_file():
        return None
    return side if hashlib.sha256(side.read_bytes()).hexdigest() == named.sha256 else None


def remove_unless_named(side: Path) -> None:
    """Remove a replaced plan's tensors, unless a copy of the plan still names them."""
    for each in side.parent.iterdir():
        if each.suffix in (".yaml", ".yml") and each.is_file():
            try:
                if side.name.encode() in each.read_bytes():
                    return
            except OSError:  # it may name them
                return
    try:
        side.unlink()
    except OSError as error:
        console.warn(f"{side}: the replaced plan's tensors cannot be removed: {error.strerror}.")
