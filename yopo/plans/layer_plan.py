"""One layer's plan and the decoder shape that it is for. Frozen, no torch."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from yopo.plans.kv_storage import LEVELS

MAX_RADIUS = 1 << 20


@dataclass(frozen=True)
class ModelShape:
    """Dimensions of a text decoder: L layers, width d, H query heads, FFN width m."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int

    @property
    def group(self) -> int:
        """Query heads per KV head."""
        return self.heads // self.kv_heads


def _lever(default: Any, *, column: str, title: str, topic: str = "weights") -> Any:
    """A field of a layer plan that only some plans use: see :class:`Lever`."""
    about = {"default": default, "column": column, "title": title, "topic": topic}
    return field(default=default, metadata=about)


@dataclass(frozen=True)
class LayerPlan:
    """The visual computation that remains in one layer.

    Attributes:
        read_heads: Sorted query heads that may read visual keys. Empty: no visual K/V exists here.
        attend_heads: The subset of them in which visual tokens run attention as queries, sorted.
        radius: Chebyshev radius of a visual query's neighborhood; None means no limit.
        neurons: FFN neurons that visual tokens use; 0 skips the FFN.
        qkv_rank: Width of the bottleneck through which visual queries, keys and values are
            computed; None means the original projections.
        map_rank: Rank of the fitted linear map of the normed FFN input that replaces what visual
            tokens no longer compute here; 0 means none.
        key_bits: Bits per number of the visual keys in the cache: 8, 4 or 2; None means the
            model's dtype.
        value_bits: The same for the visual values.
        latent_bits: Bits per number of the bottleneck's output, which the cache then holds in
            place of visual keys and values; None means that it holds these.
    """

    read_heads: tuple[int, ...]
    attend_heads: tuple[int, ...]
    radius: int | None
    neurons: int
    qkv_rank: int | None = _lever(None, column="rank", title="bottleneck of queries, keys, values")
    map_rank: int = _lever(0, column="map", title="rank of the linear map")
    key_bits: int | None = _lever(None, column="K bits", title="bits of keys", topic="storage")
    value_bits: int | None = _lever(None, column="V bits", title="bits of values", topic="storage")
    latent_bits: int | None = _lever(
        None, column="z bits", title="bits of the latent that is cached instead", topic="latent"
    )

    @property
    def is_empty(self) -> bool:
        """Whether nothing visual happens in this layer."""
        return not self.read_heads and not self.has_ffn

    @property
    def has_ffn(self) -> bool:
        """Whether visual tokens compute anything in place of the FFN."""
        return self.neurons > 0 or self.map_rank > 0

    @property
    def is_fitted(self) -> bool:
        """Whether the layer needs separate weights for visual tokens."""
        return self.qkv_rank is not None or self.map_rank > 0

    @property
    def is_quantised(self) -> bool:
        """Whether visual keys, values or what they are made from are stored in few bits."""
        each = (self.key_bits, self.value_bits, self.latent_bits)
        return any(bits is not None for bits in each)

    def is_full(self, shape: ModelShape) -> bool:
        """Whether visual tokens do everything that they do in the dense model."""
        everything = len(self.read_heads) == shape.heads and self.neurons == shape.ffn
        attends = self.attend_heads == self.read_heads and self.radius is None
        return everything and attends and not self.is_fitted and not self.is_quantised

    def kept_kv(self, shape: ModelShape) -> tuple[int, ...]:
        """KV heads whose visual keys and values exist: those with a kept query head."""
        return tuple(sorted({head // shape.group for head in self.read_heads}))


@dataclass(frozen=True)
class Lever:
    """A field of :class:`LayerPlan` with a default; files and tables show it only if it is used.

    Attributes:
        name: Name of the field, and its key in files.
        default: Its value in a layer that does not use it.
        column: Heading in the table of ``yopo inspect``.
        title: Heading in model cards.
        topic: What it is about; levers of one topic are written together.
    """

    name: str
    default: int | None
    column: str
    title: str
    topic: str


LEVERS = tuple(Lever(each.name, **each.metadata) for each in fields(LayerPlan) if each.metadata)


def full_layer(shape: ModelShape) -> LayerPlan:
    """The layer plan that prunes nothing."""
    heads = tuple(range(shape.heads))
    return LayerPlan(heads, heads, radius=None, neurons=shape.ffn)


def layer_problem(layer: LayerPlan, shape: ModelShape) -> tuple[str, str] | None:
    """The first problem of a layer: (key, the problem as the rest of a sentence), or None."""
    return _heads_problem(layer, shape) or _sizes_problem(layer, shape) or _storage_problem(layer)


def _heads_problem(layer: LayerPlan, shape: ModelShape) -> tuple[str, str] | None:
    for name in ("read_heads", "attend_heads"):
        found = getattr(layer, name)
        if not isinstance(found, tuple | list):  # files also allow true, false, all and none
            return name, f"must be a tuple of heads, empty for none, found {found!r}"
    outside = [head for head in layer.read_heads if not 0 <= head < shape.heads]
    if outside:
        return "read_heads", f"names head {outside[0]}, but the heads are 0 to {shape.heads - 1}"
    if list(layer.read_heads) != sorted(set(layer.read_heads)):
        return "read_heads", "must be ascending and without repetition"
    if not set(layer.attend_heads) <= set(layer.read_heads):
        return "attend_heads", "must name heads that read visual tokens, or be true or false"
    if list(layer.attend_heads) != sorted(set(layer.attend_heads)):
        return "attend_heads", "must be ascending and without repetition"
    return None


def _sizes_problem(layer: LayerPlan, shape: ModelShape) -> tuple[str, str] | None:
    if layer.radius is not None and layer.radius < 0:
        return "radius", f"must be null or at least 0, found {layer.radius}"
    if layer.radius is not None and layer.radius > MAX_RADIUS:
        return "radius", f"must be null (no limit) or at most {MAX_RADIUS}, found {layer.radius}"
    if not 0 <= layer.neurons <= shape.ffn:
        return "neurons", f"must lie between 0 and {shape.ffn}, found {layer.neurons}"
    if layer.qkv_rank is not None and not (
        layer.read_heads and 1 <= layer.qkv_rank <= shape.hidden
    ):
        return "qkv_rank", f"must lie between 1 and {shape.hidden}, in a layer with read_heads"
    if not 0 <= layer.map_rank <= shape.hidden:
        return "map_rank", f"must lie between 0 and {shape.hidden}, found {layer.map_rank}"
    if layer.map_rank and layer.neurons == shape.ffn:
        return "map_rank", "must be 0 when all neurons are kept"
    return None


def _storage_problem(layer: LayerPlan) -> tuple[str, str] | None:
    if layer.latent_bits is not None:
        if layer.qkv_rank is None:
            return "latent_bits", "must be null in a layer without qkv_rank: it has no latent"
        if layer.key_bits is not None or layer.value_bits is not None:
            return "latent_bits", "must be null where key_bits or value_bits is given"
    for key in ("key_bits", "value_bits", "latent_bits"):
        bits = getattr(layer, key)
        if bits is None:
            continue
        if bits not in LEVELS:
            return key, f"must be null, 8, 4 or 2, found {bits}"
        if not layer.read_heads:
            return key, "must be null in a layer that is not read: nothing visual is cached there"
    return None
