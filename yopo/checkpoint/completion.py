"""Completes the output of ``save_pretrained`` to a pruned checkpoint like those of ``bake``.

The weights may have been trained since the plan was baked: heads and neurons are still in its
order, so the plan is valid, with a new fingerprint. Plans for other budgets in the source
checkpoint are carried over as long as the weights are the same.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from yopo.checkpoint.card import model_card
from yopo.checkpoint.manifest import write_manifest
from yopo.checkpoint.reader import INDEX_FILE, SINGLE_FILE, Checkpoint, fingerprint
from yopo.checkpoint.sidecar_files import (
    CARD_FILE,
    CODE_FILE,
    MODELING_CODE,
    ORIGINAL_CARD_FILE,
    TENSORS_FILE,
    TENSORS_FILES,
    config_json,
    index_json,
    numbered,
)
from yopo.models.fingerprint import is_same
from yopo.plans.file import read_document
from yopo.plans.places import PLAN_FILE, PLAN_FILES
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import plan_files
from yopo.support import console
from yopo.support.files import write_file

Files = Mapping[str, bytes]
"""Contents by file name."""


@dataclass(frozen=True)
class Completion:
    """Completes the files saved by a model that was loaded from a pruned checkpoint.

    Attributes:
        source: That checkpoint's directory, with its other plans and its original card.
    """

    source: Path

    def __call__(self, folder: Path, plan: PruningPlan, *, trained: bool) -> None:
        """Write plans, their tensors, loader code, card and, last, config.json's entries.

        Args:
            folder: Holds weights and config.json, just written; files of a former plan are
                replaced.
            plan: The plan that the model ran under, with its current fitted weights.
            trained: Whether the fitted weights may differ from the loaded ones.

        Raises:
            CheckpointError: The directory lacks a decoder weight or is otherwise unsuitable.
            OutputError: A file cannot be written.
        """
        _remove_own_index(folder)
        checkpoint = Checkpoint.open(folder)
        found = fingerprint(checkpoint)
        is_changed = not is_same(found, plan.model.fingerprint)
        files = dict(self._other_plans(plan, is_changed=is_changed))
        number = 0 if is_changed else self._number_of(plan)
        if trained or is_changed or not _carry(plan, self.source, number, files):
            plan = _retaken(plan, found)
            names = numbered(PLAN_FILE, number), numbered(TENSORS_FILE, number)
            plan = replace(plan, tensors=plan.needed_tensors)
            files |= plan_files(plan, *names)
        original = self.source / ORIGINAL_CARD_FILE
        if original.is_file():
            files[ORIGINAL_CARD_FILE] = original.read_bytes()
        size = len(files.get(numbered(TENSORS_FILE, number), b""))
        card = model_card(
            plan,
            folder.resolve().name,
            original_card=original if original.is_file() else None,
            tensors_bytes=size,
            is_trained=trained or is_changed,
        )
        files |= {CARD_FILE: card.encode(), CODE_FILE: MODELING_CODE.encode()}
        index = index_json(checkpoint) if size else None
        if index is not None:
            files[INDEX_FILE] = index.encode()
        _remove_former(folder, keep=files)
        for name, content in files.items():
            write_file(folder / name, content)
        # Last: without it the directory is a dense checkpoint, whatever happens before.
        write_file(folder / "config.json", config_json(checkpoint).encode())
        write_manifest(folder)

    def _siblings(self) -> dict[int, PruningPlan]:
        """The plans of the source by number; empty if it no longer exists."""
        found = {}
        for file in self.source.glob(PLAN_FILES):
            suffix = file.stem.removeprefix(Path(PLAN_FILE).stem).removeprefix("-")
            if suffix.isdecimal() or not suffix:
                found[int(suffix or 0)] = read_document(file)[0]
        return dict(sorted(found.items()))

    def _number_of(self, plan: PruningPlan) -> int:
        same = plan.without_tensors()
        return next((number for number, each in self._siblings().items() if each == same), 0)

    def _other_plans(self, plan: PruningPlan, *, is_changed: bool) -> dict[str, bytes]:
        same = plan.without_tensors()
        others = {number: each for number, each in self._siblings().items() if each != same}
        if is_changed and others:
            budgets = ", ".join(f"{each.budget.reached:.3g}" for each in others.values())
            console.warn(
                f"The weights were trained: plans for other budgets ({budgets}) were made for "
                f"the weights in {self.source} and are not saved."
            )
        files: dict[str, bytes] = {}
        for number, each in others.items():
            if not is_changed and is_same(each.model.fingerprint, plan.model.fingerprint):
                _carry(each, self.source, number, files)
        return files


def _carry(plan: PruningPlan, source: Path, number: int, files: dict[str, bytes]) -> bool:
    """Carry over a plan and its tensors unchanged; return whether they exist unaltered."""
    file = source / numbered(PLAN_FILE, number)
    if not file.is_file():
        return False
    there, named = read_document(file)
    if there != plan.without_tensors():
        return False
    found = {file.name: file.read_bytes()}
    if named is not None:
        side = source / named.file
        content = side.read_bytes() if side.is_file() else b""
        if hashlib.sha256(content).hexdigest() != named.sha256:
            return False
        found[side.name] = content
    files |= found
    return True


def _retaken(plan: PruningPlan, fingerprint: str) -> PruningPlan:
    """The same plan for the current weights."""
    if is_same(plan.model.fingerprint, fingerprint):
        return plan
    origin = {**plan.provenance, "trained_from": plan.model.fingerprint}
    return replace(plan, model=replace(plan.model, fingerprint=fingerprint), provenance=origin)


def _remove_own_index(folder: Path) -> None:
    """Remove a previously written index of a single file: it may list other tensors."""
    path = folder / INDEX_FILE
    if (folder / SINGLE_FILE).is_file() and path.is_file():
        files = json.loads(path.read_text(encoding="utf-8")).get("weight_map", {}).values()
        if set(files) == {SINGLE_FILE}:
            path.unlink()


def _remove_former(folder: Path, *, keep: Files) -> None:
    """Remove files of another plan from a directory that is saved to again."""
    for pattern in (PLAN_FILES, TENSORS_FILES):
        for file in folder.glob(pattern):
            if file.name not in keep:
                file.unlink()
