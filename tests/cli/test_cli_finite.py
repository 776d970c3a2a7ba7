"""A NaN or an infinity anywhere is refused: at calibrate, plan, apply, load and eval."""

from __future__ import annotations

import os
import shutil
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from command_line import Yopo
from safetensors.torch import load_file, save_file

import yopo as package
from yopo.calibration.measure import measure
from yopo.calibration.statistics_file import load_statistics
from yopo.data.prompts import load_processor
from yopo.data.sources import open_pairs
from yopo.evaluation.fidelity import record_dense
from yopo.models.offloaded import is_offloaded, layers_on_disk
from yopo.models.registry import resolve
from yopo.serving.loading import load_dense
from yopo.support.errors import DataError, ModelError
from yopo.support.finite import first_layer_not_finite, is_finite

NAN, INFINITY = float("nan"), float("inf")


def poisoned(source: Path, target: Path, part: str, value: float, dtype: torch.dtype) -> str:
    """Copy a checkpoint with one value replaced; returns the tensor's name."""
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(file).items()}
    name = next(name for name in tensors if part in name)
    flat = tensors[name].view(-1)
    flat[len(flat) // 2] = value  # not among those that the fingerprint covers
    save_file(tensors, file, metadata={"format": "pt"})
    return name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [NAN, INFINITY, -INFINITY])
def test_a_single_non_finite_value_is_found(dtype: torch.dtype, value: float) -> None:
    tensor = torch.full((3, 1001), 3.0, dtype=dtype)
    tensor[0, 0] = torch.finfo(dtype).max
    assert is_finite(tensor) and is_finite(tensor[:0]) and is_finite(tensor.long())
    for place in (0, 17, 1000):
        changed = tensor.clone()
        changed[2, place] = value
        assert not is_finite(changed) and first_layer_not_finite([tensor, changed]) == 2
    assert first_layer_not_finite([tensor]) is None


@pytest.mark.parametrize(
    ("part", "value", "dtype"),
    [
        ("layers.1.mlp.up_proj", NAN, torch.float32),
        ("lm_head", INFINITY, torch.bfloat16),
        ("multi_modal_projector", -INFINITY, torch.float32),
    ],
)
def test_non_finite_weights_are_refused(
    yopo: Yopo, model: Path, plan: Path, tmp_path: Path, part: str, value: float, dtype: torch.dtype
) -> None:
    name = poisoned(model, tmp_path / "bad", part, value, dtype)
    done = yopo("apply", plan, "--model", tmp_path / "bad")
    # The fingerprint, which is compared first, covers a small tensor completely.
    reasons = (f"tensor '{name}' holds values that are not finite", "is not the checkpoint")
    assert done.is_sentence and any(each in done.err for each in reasons)
    for command in (("calibrate",), ("calibrate", "--offload", "always"), ("eval", plan)):
        done = yopo(
            *command,
            "--model",
            tmp_path / "bad",
            "--samples",
            2,
            "--max-new-tokens",
            2,
            "--data",
            "demo:heldout",
        )
        assert done.is_sentence and part in done.err and "not finite" in done.err
    assert not os.listdir()


def test_non_finite_weights_of_a_baked_checkpoint_are_refused(
    yopo: Yopo, model: Path, plan: Path, tmp_path: Path
) -> None:
    assert yopo("apply", plan, "--model", model, "-o", "baked").code == 0
    poisoned(Path("baked"), tmp_path / "bad", "layers.2.self_attn.o_proj", NAN, torch.float32)
    with pytest.raises(ModelError, match="o_proj.weight' holds values that are not finite"):
        package.load(tmp_path / "bad")


def test_weights_that_stay_on_disk_are_checked_in_the_precision_they_run_in(
    model: Path, tmp_path: Path
) -> None:
    value = 1e30  # fits bfloat16, not float16
    poisoned(model, tmp_path / "bad", "layers.2.self_attn.v_proj", value, torch.bfloat16)
    dense = load_dense(resolve(str(model)))
    places = layers_on_disk(dense, dense.get_decoder(), "cpu")
    source = resolve(str(tmp_path / "bad"))
    stored = load_dense(source, device_map=places)
    assert is_offloaded(stored) and next(stored.get_decoder().layers.parameters()).is_meta
    with pytest.raises(ModelError, match=r"layers.2.self_attn.v_proj.weight' .* not finite"):
        load_dense(source, device_map=places, dtype=torch.float16)


@pytest.mark.parametrize(
    ("part", "layer"), [("layers.1.mlp.gate_proj", 1), ("layers.2.self_attn.v_proj", 2)]
)
def test_non_finite_measurements_name_what_is_not_finite(
    model: Path, part: str, layer: int
) -> None:
    """The weight, if it is one, or else the layer, whose activations overflow."""
    for value, kind, reason in (
        (INFINITY, ModelError, f"^bad: the weight '.*{part}.weight' holds .* not finite"),
        (3e38, DataError, f"measurements of layer {layer} are not finite"),
    ):
        dense = load_dense(resolve(str(model)))
        weight = next(each for name, each in dense.named_parameters() if part in name)
        with torch.no_grad():
            weight.view(-1)[:8] = value
        pairs = open_pairs("demo:calibration", samples=2, seed=0)
        with pytest.raises(kind, match=reason) as found:
            measure(dense, load_processor(str(model)), pairs, name="bad")
        assert (found.value.remedy or "").startswith("The model's activations overflow") == (
            kind is DataError
        )


def test_non_finite_statistics_are_refused(yopo: Yopo, calibrated: Path, tmp_path: Path) -> None:
    good = load_statistics(calibrated / "stats.safetensors")
    path = tmp_path / "bad.safetensors"
    for each in fields(good):
        tensor = getattr(good, each.name)
        if not isinstance(tensor, torch.Tensor):
            continue
        changed = tensor.clone()
        changed.view(-1)[-1] = NAN
        path.write_bytes(replace(good, **{each.name: changed}).to_bytes())
        done = yopo("plan", path, "--preset", "yopo-25")
        assert done.is_sentence and "of layer 2 are not finite" in done.err and not os.listdir()
        assert "The file is damaged" in done.err


@pytest.mark.parametrize(
    ("factor", "reason"),
    [
        (3e38, "pair 0: the model's predictions .* are not finite"),  # only products overflow
        (INFINITY, "the weight 'lm_head.weight' holds values that are not finite"),
    ],
)
def test_non_finite_predictions_are_refused(model: Path, factor: float, reason: str) -> None:
    dense = load_dense(resolve(str(model)))
    with torch.no_grad():
        weight = dense.get_output_embeddings().weight
        weight.div_(weight.abs().max()).mul_(factor)
    pairs = open_pairs("demo:calibration", samples=2, seed=0)
    with pytest.raises(ModelError, match=reason):
        record_dense(dense, load_processor(str(model)), pairs, batch_size=2, max_new_tokens=2)
