"""Tiny real LLaVA models, prompts and random plans that tests share. Offline, on CPU.

Weights are random and large, so that attention is far from uniform and mistakes show. Closeness is
judged by a float64 oracle: a result may differ from it by at most a few times the rounding error
of an ordinary float32 run of the same computation.
"""

from __future__ import annotations

import copy
import inspect
import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from transformers import (
    CLIPVisionConfig,
    GenerationMixin,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
    Qwen2Config,
)

from yopo.models.family import GridsOf, shape_of
from yopo.models.fingerprint import fingerprint_of_decoder
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.kv_storage import LEVELS
from yopo.plans.schema import (
    Budget,
    LayerPlan,
    ModelIdentity,
    ModelShape,
    PruningPlan,
    Workload,
    full_plan,
)
from yopo.plans.tensors import PlanTensors, refit_sizes

BACKBONES = ("mha", "gqa", "qwen2")
PAD, BOS, IMAGE, EOS = 0, 1, 98, 99
PATCH = 8
SIDE = 4
"""Rows and columns of an image's visual tokens, unless a test says otherwise."""

PICTURE = [IMAGE] * SIDE**2
"""The placeholder tokens of one image."""

ROUNDING_FACTOR = 4
"""How many times an ordinary float32 run's error another order of the same sums may have."""

_COMMON = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "vocab_size": 100,
    "initializer_range": 0.2,
    "pad_token_id": PAD,
    "bos_token_id": BOS,
    "eos_token_id": EOS,
    "max_position_embeddings": 512,
}


def text_config(backbone: str) -> LlamaConfig | Qwen2Config:
    """Configure the text decoder: ``mha``, ``gqa`` (ragged, all biases) or ``qwen2``."""
    if backbone == "mha":
        return LlamaConfig(num_attention_heads=4, num_key_value_heads=4, **_COMMON)
    if backbone == "gqa":  # three query heads per KV head; heads wider in sum than the model
        return LlamaConfig(
            num_attention_heads=6,
            num_key_value_heads=2,
            head_dim=16,
            attention_bias=True,
            mlp_bias=True,
            **(_COMMON | {"hidden_size": 60}),
        )
    return Qwen2Config(num_attention_heads=4, num_key_value_heads=2, **_COMMON)


def llava(backbone: str = "mha", *, side: int = SIDE) -> LlavaForConditionalGeneration:
    """Build a LLaVA with random weights, biases and norms, always the same for equal arguments."""
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=side * PATCH,
            patch_size=PATCH,
        ),
        text_config=text_config(backbone),
        image_token_id=IMAGE,
        image_seq_length=side**2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(len(backbone) + side)
        model = LlavaForConditionalGeneration(config).eval()
        with torch.no_grad():
            for name, parameter in model.get_decoder().named_parameters():
                if name.endswith("bias") or "norm" in name:
                    parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def exact(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """Return a float64 copy whose norms compute in float64 (transformers' round to float32)."""
    oracle = copy.deepcopy(model).double()
    for module in list(oracle.get_decoder().modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], child.variance_epsilon).eval()
                norm.weight = child.weight
                setattr(module, name, norm)
    return oracle


@dataclass(frozen=True)
class Subject:
    """A model under test.

    Attributes:
        model: In float32.
        oracle: The same weights in float64 throughout.
        identity: What its plans say about it.
    """

    model: LlavaForConditionalGeneration
    oracle: LlavaForConditionalGeneration
    identity: ModelIdentity

    @property
    def shape(self) -> ModelShape:
        """Dimensions of its decoder."""
        return self.identity.shape

    def random_plan(self, seed: int, **fixed: Any) -> PruningPlan:
        """Make a plan by ``random_plan``, with tensors."""
        plan = random_plan(self.identity, random.Random(seed), **fixed)
        return replace(plan, tensors=random_tensors(plan, seed))


def make_subject(backbone: str, *, side: int = SIDE) -> Subject:
    """Build a model, its oracle and its identity."""
    model = llava(backbone, side=side)
    fingerprint = fingerprint_of_decoder(model.get_decoder())
    identity = ModelIdentity(f"tiny-{backbone}", "llava", shape_of(model.config), fingerprint)
    return Subject(model, exact(model), identity)


def workload(*, side: int = SIDE, text: int = 10, text_before: int = 3) -> Workload:
    """Return a workload of one square image and some text."""
    return Workload((Grid(side, side),), text, text_before)


def random_layer(shape: ModelShape, rng: random.Random, *, fitted: bool = False) -> LayerPlan:
    """Draw a layer plan: no, some or all heads and neurons, any radius.

    ``fitted`` ones may have a bottleneck and a linear map as well.
    """
    count = rng.choice([0, shape.heads, rng.randint(1, shape.heads), rng.randint(1, shape.heads)])
    heads = tuple(sorted(rng.sample(range(shape.heads), count)))
    attend = rng.choice([(), heads, heads, tuple(sorted(rng.sample(heads, (count + 1) // 2)))])
    neurons = rng.choice([0, 1, shape.ffn // 5, shape.ffn - 1, shape.ffn])
    has_map = fitted and neurons < shape.ffn and rng.random() < 0.6
    return LayerPlan(
        read_heads=heads,
        attend_heads=attend,
        radius=rng.choice([None, 0, 1, 2, 3]),
        neurons=neurons,
        qkv_rank=rng.randint(1, shape.hidden) if fitted and heads and rng.random() < 0.6 else None,
        map_rank=rng.randint(1, 12) if has_map else 0,
    )


def random_plan(identity: ModelIdentity, rng: random.Random, **fixed: Any) -> PruningPlan:
    """Draw a valid plan; keyword arguments set fields of ``PruningPlan`` instead."""
    shape = identity.shape
    compensation = fixed.get("compensation") or rng.choice(["none", "mean", "refit", "refit"])
    fitted = compensation == "refit"
    drawn = {
        "workload": workload(),
        "layers": tuple(random_layer(shape, rng, fitted=fitted) for _ in range(shape.layers)),
        "budget": Budget(None, 0.5),
        "compensation": compensation,
        "bidirectional": rng.random() < 0.3,
        "baked": rng.random() < 0.3,
    }
    plan = PruningPlan(identity, **(drawn | fixed))
    return replace(plan, budget=Budget(plan.budget.asked, round(visual_budget(plan), 6)))


def in_few_bits(plan: PruningPlan, seed: int) -> PruningPlan:
    """The same plan, visual keys and values stored in few bits in most layers that are read."""
    rng, shape = random.Random(seed), plan.model.shape
    generator = torch.Generator().manual_seed(seed)

    def stored(layer: LayerPlan) -> LayerPlan:
        if not layer.read_heads:
            return layer
        return replace(
            layer, key_bits=rng.choice([8, 4, 4, 2, None]), value_bits=rng.choice(LEVELS)
        )

    size = shape.layers, shape.kv_heads, shape.head_dim
    scale = 0.5 + torch.rand(size, generator=generator)
    layers = tuple(stored(layer) for layer in plan.layers)
    return replace(plan, layers=layers, tensors=replace(plan.tensors, key_scale=scale))


def as_latents(plan: PruningPlan, seed: int) -> PruningPlan:
    """The same plan, but fitted, layers with a bottleneck caching its output in few bits; others
    like ``in_few_bits``. Draws plans until some layer does."""
    for draw in range(seed, seed + 1000):
        rng = random.Random(draw)
        few = in_few_bits(plan, draw)
        shape = plan.model.shape
        layers = tuple(
            replace(
                layer,
                qkv_rank=rng.randint(1, shape.hidden),
                key_bits=None,
                value_bits=None,
                latent_bits=rng.choice(LEVELS),
            )
            if layer.read_heads and rng.random() < 0.7
            else layer
            for layer in few.layers
        )
        if any(layer.latent_bits for layer in layers):
            break
    made = replace(few, layers=layers, compensation="refit")
    tensors = replace(random_tensors(made, seed), key_scale=few.tensors.key_scale)
    return replace(made, tensors=tensors)


def random_tensors(plan: PruningPlan, seed: int) -> PlanTensors:
    """Draw orders (none for a baked plan), means and fitted weights of the right shapes."""
    shape, generator = plan.model.shape, torch.Generator().manual_seed(seed)
    orders = [torch.randperm(shape.ffn, generator=generator) for _ in range(shape.layers)]
    neurons = 0.2 * torch.randn(shape.layers, shape.ffn, generator=generator)
    heads = 0.2 * torch.randn(shape.layers, shape.heads, shape.head_dim, generator=generator)
    if plan.compensation != "mean":
        neurons = heads = None
    refit = random_refit(plan, generator) if plan.compensation == "refit" else {}
    return PlanTensors(None if plan.baked else torch.stack(orders), neurons, heads, refit)


def random_refit(
    plan: PruningPlan, generator: torch.Generator
) -> dict[int, dict[str, torch.Tensor]]:
    """Draw fitted weights for every layer that needs them."""
    return {
        index: {
            name: 0.2 * torch.randn(size, generator=generator)
            for name, size in refit_sizes(layer, plan.model.shape).items()
        }
        for index, layer in enumerate(plan.layers[: plan.visual_depth])
    }


def whole(subject: Subject) -> PruningPlan:
    """Return the plan that prunes nothing."""
    return full_plan(subject.identity, workload())


def batch(
    rows: Sequence[Sequence[int]], *, seed: int = 0, side: int = SIDE, pad: str = "left"
) -> dict[str, torch.Tensor]:
    """Build padded inputs from prompts of token ids, with an image per run of placeholders."""
    width = max(len(row) for row in rows)
    ids = torch.full((len(rows), width), PAD)
    mask = torch.zeros(len(rows), width, dtype=torch.int64)
    for number, row in enumerate(rows):
        place = slice(0, len(row)) if pad == "right" else slice(width - len(row), width)
        ids[number, place], mask[number, place] = torch.tensor(row), 1
    inputs = {"input_ids": ids, "attention_mask": mask}
    count = int((ids == IMAGE).sum()) // side**2
    if count:
        inputs["pixel_values"] = pictures(count, seed=seed, side=side)
    return inputs


def pictures(count: int, *, seed: int = 0, side: int = SIDE) -> torch.Tensor:
    """Return (count, 3, height, width) random pixels."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, side * PATCH, side * PATCH, generator=generator)


def as_dtype(inputs: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Return inputs with floating-point tensors in another precision."""
    return {
        key: value.to(dtype) if torch.is_tensor(value) and value.is_floating_point() else value
        for key, value in inputs.items()
    }


def real(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (batch, sequence) bool: everything but padding."""
    return inputs["attention_mask"].bool()


def real_text(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """Return (batch, sequence) bool: text tokens without padding, whose logits plans keep."""
    return real(inputs) & (inputs["input_ids"] != IMAGE)


def try_few_plans(patch: pytest.MonkeyPatch) -> None:
    """Let a budget try one allocation instead of a dozen, where any plan within it serves."""
    patch.setattr("yopo.planning.weightings.VISUAL_WEIGHTS", (1.0,))
    patch.setattr("yopo.planning.allocations.near", lambda weighting: ())
    patch.setattr("yopo.planning.allocations.GENERATIONS", 0)
    patch.setattr("yopo.planning.weightings.near", lambda weighting: ())


def takes_encoded(model: PreTrainedModel) -> bool:
    """Return whether this transformers' model takes encoded images (since 5.18)."""
    return "mm_encoder_outputs" in inspect.signature(type(model.base_model).forward).parameters


def skip_unless_takes_encoded(model: PreTrainedModel) -> None:
    """Skip a test of encoded images, or of prefill chunks, which come with images only so."""
    if not takes_encoded(model):
        pytest.skip("this transformers takes no encoded images")


def processors_count_images() -> bool:
    """Return whether processors compare placeholders with images (since transformers 5.23)."""
    return tuple(map(int, transformers.__version__.split(".")[:2])) >= (5, 23)


def beams_get_their_images(model: PreTrainedModel, inputs: dict[str, Any]) -> bool:
    """Return whether stock ``generate`` hands every beam the images of its own row.

    Where it does not encode images first, it repeats every entry of ``pixel_values`` by itself,
    which is right only if no row has several: the dense model answers about other images, too.
    """
    own = (
        type(model)._expand_inputs_for_generation
        is not GenerationMixin._expand_inputs_for_generation
    )
    several = len(inputs.get("pixel_values", ())) > len(inputs["input_ids"])
    return own or takes_encoded(model) or not several


def skip_unless_beams_get_their_images(model: PreTrainedModel, inputs: dict[str, Any]) -> None:
    """Skip a test of beams where the stock model's own beams would get wrong images."""
    if not beams_get_their_images(model, inputs):
        pytest.skip("this transformers gives beams wrong images where a row has several")


def fixed_grids(*rows: Sequence[tuple[int, int]]) -> GridsOf:
    """Return a ``grids_of`` that gives every batch row these (rows, columns) per image."""
    grids = [tuple(Grid(*size) for size in row) for row in rows]
    return lambda *_: grids


@torch.no_grad()
def logits(model: LlavaForConditionalGeneration, inputs: dict[str, Any]) -> torch.Tensor:
    """Return (batch, sequence, vocabulary) logits of one forward, in the model's own precision."""
    return model(**as_dtype(inputs, model.dtype)).logits


def assert_close(
    found: torch.Tensor, usual: torch.Tensor, oracle: torch.Tensor, where: torch.Tensor
) -> None:
    """Check a result by the error of the usual computation.

    Args:
        found: (batch, sequence, vocabulary) logits under test.
        usual: Logits of stock code in the same precision.
        oracle: Logits of stock code in float64.
        where: (batch, sequence) bool, the positions that count.
    """
    assert where.any()
    error = (found.double() - oracle)[where].abs().max().item()
    rounding = (usual.double() - oracle)[where].abs().max().item()
    assert error <= ROUNDING_FACTOR * rounding, f"off by {error:.2e}, rounding is {rounding:.2e}"
