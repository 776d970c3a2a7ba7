"""``yopo apply``: bake a plan into a checkpoint, streaming, without ever holding the model.

The result loads in stock transformers as the original model and with yopo as the pruned one.
Everything is validated first; then shards, companions and, finally, config.json are written.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch

from yopo.checkpoint.card import model_card
from yopo.checkpoint.decoder_tensors import HEADS, KV_HEADS, NEURONS, UNITS, axes_of
from yopo.checkpoint.order import BakedLayer, baked_plan, order_layers
from yopo.checkpoint.readback import check_unchanged, compare_shard, source_state
from yopo.checkpoint.reader import INDEX_FILE, Checkpoint, fingerprint
from yopo.checkpoint.shards import Reorder
from yopo.checkpoint.sidecar_files import (
    CARD_FILE,
    CODE_FILE,
    MODELING_CODE,
    ORIGINAL_CARD_FILE,
    TENSORS_FILE,
    TENSORS_FILES,
    config_json,
    copy_companion,
    files_left_out,
    files_to_copy,
    index_json,
    numbered,
)
from yopo.checkpoint.weights import finished_shards, key_of, write_weights
from yopo.checkpoint.writer import OutputDirectory, Resume
from yopo.models.fingerprint import is_same
from yopo.plans.checks import check_tensors
from yopo.plans.places import PLAN_FILE
from yopo.plans.schema import PruningPlan
from yopo.plans.storage import plan_files
from yopo.support import console
from yopo.support.errors import ModelError, PlanError

_ROOM = 2**20
"""Bytes reserved for generated files: plan, card, code, configuration."""


@dataclass(frozen=True)
class BakeReport:
    """The result of ``bake``, or of a dry run.

    Attributes:
        output: The checkpoint directory.
        num_tensors: Tensors in the checkpoint.
        num_reordered: Tensors whose rows or columns are reordered.
        num_bytes: Size of the shards.
        seconds: Wall time.
        plan: The baked plan; None on a dry run.
    """

    output: Path
    num_tensors: int
    num_reordered: int
    num_bytes: int
    seconds: float
    plan: PruningPlan | None


def bake(
    plan: PruningPlan,
    source_dir: str | Path,
    output: str | Path,
    *,
    also: Sequence[PruningPlan] = (),
    force: bool = False,
    dry_run: bool = False,
) -> BakeReport:
    """Write a copy of a checkpoint with heads and neurons in the plan's order.

    Args:
        plan: The plan to bake; made for exactly this checkpoint.
        source_dir: The checkpoint directory; only read.
        output: The directory to create.
        also: Other plans for the same model: other budgets that the checkpoint can be loaded at.
            Heads and neurons are in the first plan's order.
        force: Whether a checkpoint in ``output`` may be replaced.
        dry_run: Validate everything, write nothing.

    Raises:
        PlanError: A plan is already baked, its tensors are incomplete, or the plans' neuron orders
            differ.
        ModelError: The plan was made for another model.
        CheckpointError: The source is incomplete, damaged or unsuitable.
        OutputError: The output exists, overlaps with the source or cannot be written.
    """
    started = time.perf_counter()
    before = source_state(source_dir)
    plans = (plan, *also)
    checkpoint = Checkpoint.open(source_dir)
    for each in plans:
        _check_plan(each, plan)
        _check_same_model(each, checkpoint)
    orders = order_layers(plan)
    reorders = find_reorders(checkpoint, orders)
    moved = [baked_plan(each, orders) for each in plans]
    copies = files_to_copy(checkpoint)
    _report_left_out(checkpoint)
    num_bytes = checkpoint.num_bytes + sum(path.stat().st_size for path in copies.values())
    target = OutputDirectory(
        output,
        source=source_dir,
        num_bytes=num_bytes + sum(each.tensors.num_bytes for each in moved) + _ROOM,
        force=force,
        resume=Resume(
            key_of(checkpoint, reorders),
            lambda folder: sum(each.size for each in finished_shards(folder, checkpoint.shards)),
        ),
    )
    target.check()
    baked = None
    if not dry_run:
        with target as folder:
            _copy(checkpoint, reorders, copies, folder)
            check_unchanged(_read_files(checkpoint, copies), before, source_state(source_dir))
            for shard in checkpoint.shards:
                compare_shard(checkpoint.path, folder, shard, reorders)
            # Read back from the written files: same layout, other bytes.
            written = fingerprint(replace(checkpoint, path=folder))
            moved = [_for_checkpoint(each, written) for each in moved]
            _write_plans(moved, folder)
            baked = moved[0]
            _write_documents(baked, checkpoint, folder, target.target.name, copies)
    return BakeReport(
        output=Path(output),
        num_tensors=len(checkpoint.tensors),
        num_reordered=len(reorders),
        num_bytes=checkpoint.num_bytes,
        seconds=time.perf_counter() - started,
        plan=baked,
    )


def _copy(
    checkpoint: Checkpoint,
    reorders: Mapping[str, Reorder],
    copies: Mapping[str, Path],
    folder: Path,
) -> None:
    write_weights(checkpoint, reorders, folder)
    for name, path in copies.items():
        (folder / name).parent.mkdir(exist_ok=True)
        copy_companion(path, folder / name)


def _read_files(checkpoint: Checkpoint, copies: Mapping[str, Path]) -> set[str]:
    copied = {str(path.relative_to(checkpoint.path)) for path in copies.values()}
    return {"config.json", *(shard.file for shard in checkpoint.shards), *copied}


def find_reorders(checkpoint: Checkpoint, orders: Sequence[BakedLayer]) -> dict[str, Reorder]:
    """The reorders of a checkpoint's tensors by name; unchanged tensors are omitted."""
    axes = axes_of(checkpoint.backbone)
    blocks = {HEADS: checkpoint.shape.head_dim, KV_HEADS: checkpoint.shape.head_dim, NEURONS: 1}
    unit_orders = [
        {
            HEADS: np.asarray(order.head_order),
            KV_HEADS: np.asarray(order.kv_order),
            NEURONS: order.neuron_order.numpy(),
        }
        for order in orders
    ]
    reorders = {}
    for (layer, name), entry in checkpoint.decoder.items():
        for number, axis in enumerate(axes[name]):
            if axis[0] in UNITS:
                order = _concatenate([unit_orders[layer][kind] for kind in axis])
                if not np.array_equal(order, np.arange(len(order))):
                    reorders[entry.name] = Reorder(order, number, blocks[axis[0]])
    return reorders


def _concatenate(orders: Sequence[np.ndarray]) -> np.ndarray:
    """The order of an axis whose consecutive segments have these orders."""
    starts = np.cumsum([0, *(len(order) for order in orders[:-1])])
    return np.concatenate([order + start for order, start in zip(orders, starts, strict=True)])


def _check_plan(plan: PruningPlan, first: PruningPlan) -> None:
    if plan.baked:
        raise PlanError(
            "The plan is already baked: its checkpoint is in this order.",
            remedy="Apply the plan that `yopo calibrate` wrote.",
        )
    check_tensors(plan)
    order, others = plan.tensors.neuron_order, first.tensors.neuron_order
    if plan.needs_order and (order is None or others is None or not torch.equal(order, others)):
        raise PlanError(
            "The plans have different neuron orders, so no single checkpoint can serve them all.",
            remedy="Bake plans from one calibration together: `yopo calibrate --budgets`.",
        )


def _check_same_model(plan: PruningPlan, checkpoint: Checkpoint) -> None:
    model, path = plan.model, checkpoint.path
    if checkpoint.family.name != model.family:
        raise ModelError(
            f"{path}: is a {checkpoint.family.name} model, but the plan was made for "
            f"{model.family}."
        )
    if checkpoint.shape != model.shape:
        expected, found = asdict(model.shape), asdict(checkpoint.shape)
        different = [
            f"{key} {found[key]} (plan: {expected[key]})"
            for key in found
            if found[key] != expected[key]
        ]
        raise ModelError(
            f"{path}: its decoder's dimensions differ from those of the plan's model {model.name}: "
            f"{', '.join(different)}."
        )
    found_fingerprint = fingerprint(checkpoint)
    if not is_same(found_fingerprint, model.fingerprint):
        raise ModelError(
            f"{path}: is not the checkpoint that the plan was made for, {model.name}: its "
            f"fingerprint is {found_fingerprint}, the plan's is {model.fingerprint}.",
            remedy="Calibrate on this checkpoint, or apply the plan to the one it was made for.",
        )


def _report_left_out(checkpoint: Checkpoint) -> None:
    names = ", ".join(files_left_out(checkpoint))
    if names:
        console.note(f"{checkpoint.path}: code is not copied to the result: {names}.")


def _for_checkpoint(plan: PruningPlan, fingerprint: str) -> PruningPlan:
    return replace(plan, model=replace(plan.model, fingerprint=fingerprint))


def _write_plans(plans: Sequence[PruningPlan], folder: Path) -> None:
    for number, plan in enumerate(plans):
        names = numbered(PLAN_FILE, number), numbered(TENSORS_FILE, number)
        for name, content in plan_files(plan, *names).items():
            (folder / name).write_bytes(content)


def _write_documents(
    plan: PruningPlan, checkpoint: Checkpoint, folder: Path, name: str, copies: Mapping[str, Path]
) -> None:
    size = (folder / TENSORS_FILE).stat().st_size if plan.tensors.num_bytes else 0
    index = index_json(checkpoint) if any(folder.glob(TENSORS_FILES)) else None
    if index is not None:
        (folder / INDEX_FILE).write_text(index, encoding="utf-8")
    original = copies.get(ORIGINAL_CARD_FILE)
    card = model_card(plan, name, original_card=original, tensors_bytes=size)
    (folder / CODE_FILE).write_text(MODELING_CODE, encoding="utf-8")
    (folder / CARD_FILE).write_text(card, encoding="utf-8")
    # Last: without it the directory is not a checkpoint, whatever happens before the rename.
    (folder / "config.json").write_text(config_json(checkpoint), encoding="utf-8")
