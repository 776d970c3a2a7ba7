"""FLOPs and KV bytes, dense and under a plan, in closed form. No torch.

Two conventions, never mixed:

* *visual FLOPs* - the paper's (arXiv 2410.06169): visual tokens only, a multiply-add is 2, no
  vision encoder, no text, causality not discounted. Dense, per layer, with n visual tokens:
  ``n (8 d^2 + 6 d m) + 4 n^2 d`` for multi-head attention; smaller K/V projections with GQA.
  LLaVA-1.5-7B: 7.63 T, 13B: 14.89 T. A plan's *visual budget* is its visual FLOPs over these.
* *prefill FLOPs* - the matrix products that the runtime's decoder executes for a whole prompt,
  text included: what latency can track and what ``torch``'s FlopCounterMode counts. The language
  model head and the vision encoder are the same in both models and not counted.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

from yopo.plans.grid import row_blocks, window_pairs
from yopo.plans.kv_storage import bytes_of_head
from yopo.plans.schema import LayerPlan, ModelShape, PruningPlan, Workload, full_layer


@dataclass(frozen=True)
class HeadCounts:
    """Number of query heads that each attention call of a layer multiplies.

    A KV head's kept query heads are padded to the largest such count in the layer, so that calls
    are rectangular; multi-head attention and whole KV groups need no padding.

    Attributes:
        reading: Query heads, padding included, that attend text and visual keys.
        text_only: Query heads, padding included, that attend only text keys.
        attending: Query heads, padding included, in which visual tokens attend.
    """

    reading: int
    text_only: int
    attending: int


def head_counts(layer: LayerPlan, shape: ModelShape) -> HeadCounts:
    """Count the rectangles of query heads that the runtime multiplies in this layer."""
    kept, attending = (
        Counter(head // shape.group for head in heads)
        for heads in (layer.read_heads, layer.attend_heads)
    )
    if not kept:
        return HeadCounts(0, shape.heads, 0)
    dropped = len(kept) * (shape.group - min(kept.values()))
    others = (shape.kv_heads - len(kept)) * shape.group
    return HeadCounts(_padded(kept), dropped + others, _padded(attending))


def _padded(per_kv: Counter[int]) -> int:
    return len(per_kv) * max(per_kv.values(), default=0)


@dataclass(frozen=True)
class VisualParts:
    """Visual FLOPs of one layer for one prompt, by what they are spent on.

    Attributes:
        projections: Queries, keys, values and output; through a bottleneck, only the output.
        bottleneck: Into and out of the bottleneck, where there is one.
        attention: Scores of visual queries, and sums of values under them.
        ffn: The neurons.
        map: The linear map in place of what is no longer computed.
    """

    projections: int
    bottleneck: int
    attention: int
    ffn: int
    map: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.projections + self.bottleneck + self.attention + self.ffn + self.map


def visual_parts_of_layer(layer: LayerPlan, shape: ModelShape, workload: Workload) -> VisualParts:
    """Visual FLOPs of one layer by part; arguments as for :func:`visual_flops_of_layer`."""
    width, tokens = shape.hidden, workload.visual
    keys = 2 * len(layer.kept_kv(shape)) * shape.head_dim  # and values
    queries = len(layer.attend_heads) * shape.head_dim
    output = 2 * width * queries
    inputs, bottleneck = 2 * width * (keys + queries), 0
    if layer.qkv_rank is not None:
        inputs, bottleneck = 0, 2 * layer.qkv_rank * (width + keys + queries)
    pairs = window_pairs(workload.grids, layer.radius) if layer.attend_heads else 0
    return VisualParts(
        projections=tokens * (inputs + output),
        bottleneck=tokens * bottleneck,
        attention=4 * pairs * queries,
        ffn=tokens * 6 * width * layer.neurons,
        map=tokens * 4 * width * layer.map_rank,
    )


def visual_flops_of_layer(layer: LayerPlan, shape: ModelShape, workload: Workload) -> int:
    """Visual FLOPs of one layer for one prompt, in the paper's convention."""
    return visual_parts_of_layer(layer, shape, workload).total


def visual_flops(plan: PruningPlan) -> int:
    """Visual FLOPs of a plan for one prompt of its workload."""
    shape, workload = plan.model.shape, plan.workload
    return sum(visual_flops_of_layer(layer, shape, workload) for layer in plan.layers)


def dense_visual_flops(shape: ModelShape, workload: Workload) -> int:
    """Visual FLOPs of the dense model for one prompt."""
    return shape.layers * visual_flops_of_layer(full_layer(shape), shape, workload)


def visual_budget(plan: PruningPlan) -> float:
    """A plan's visual FLOPs over the dense model's, in [0, 1]."""
    return visual_flops(plan) / dense_visual_flops(plan.model.shape, plan.workload)


def prefill_flops(plan: PruningPlan) -> int:
    """Matrix-product FLOPs that the pruned decoder executes to prefill one prompt."""
    shape, workload = plan.model.shape, plan.workload
    total = 0
    for index, layer in enumerate(plan.layers):
        total += _text_flops(layer, shape, workload)
        if index < plan.visual_depth:
            total += _visual_stream_flops(layer, plan)
    return total


def dense_prefill_flops(shape: ModelShape, workload: Workload) -> int:
    """Matrix-product FLOPs of the stock decoder for one prompt (attention not discounted)."""
    length = workload.visual + workload.text
    query_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 4 * shape.hidden * (query_width + kv_width) + 6 * shape.hidden * shape.ffn
    return shape.layers * (length * linear + 4 * length**2 * query_width)


def _text_flops(layer: LayerPlan, shape: ModelShape, workload: Workload) -> int:
    text, visual = workload.text, workload.visual
    query_width, kv_width = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    linear = 4 * shape.hidden * (query_width + kv_width) + 6 * shape.hidden * shape.ffn
    counts = head_counts(layer, shape)
    pairs = counts.reading * text * (text + visual) + counts.text_only * text * text
    return text * linear + 4 * pairs * shape.head_dim


def _visual_stream_flops(layer: LayerPlan, plan: PruningPlan) -> int:
    shape, workload = plan.model.shape, plan.workload
    parts = visual_parts_of_layer(layer, shape, workload)
    flops = parts.total - parts.attention
    if layer.attend_heads:
        width = head_counts(layer, shape).attending * shape.head_dim
        starts = workload.starts()
        for block in row_blocks(workload.grids, layer.radius, plan.bidirectional):
            text_pairs = (block.stop - block.start) * workload.text_seen(block, starts)
            flops += 4 * (block.pairs + text_pairs) * width
    return flops


def visual_kv_bytes(plan: PruningPlan, itemsize: int = 2) -> int:
    """Bytes of visual keys and values, or latents, in the cache for one prompt, steps included.

    Args:
        plan: The plan.
        itemsize: Bytes of a number that is not quantised (16 bits unless told).
    """
    shape, workload = plan.model.shape, plan.workload
    return sum(visual_kv_bytes_of_layer(each, shape, workload, itemsize) for each in plan.layers)


def visual_kv_bytes_of_layer(
    layer: LayerPlan, shape: ModelShape, workload: Workload, itemsize: int = 2
) -> int:
    """Bytes of one layer's visual keys and values; arguments as for :func:`visual_kv_bytes`."""
    if layer.latent_bits is not None:
        assert layer.qkv_rank is not None, "checked with the plan"
        return bytes_of_head(layer.qkv_rank, layer.latent_bits, itemsize) * workload.visual
    head = sum(
        bytes_of_head(shape.head_dim, bits, itemsize) for bits in (layer.key_bits, layer.value_bits)
    )
    return len(layer.kept_kv(shape)) * head * workload.visual


def dense_visual_kv_bytes(shape: ModelShape, workload: Workload, itemsize: int = 2) -> int:
    """Bytes of visual keys and values in the dense model's cache for one prompt."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * workload.visual * itemsize
