"""Plans in the shape of Op-Skip (arXiv 2606.31903): whole operators of visual tokens are skipped.

In every layer visual tokens run attention and FFN, one of them (``attention_only``, ``ffn_only``)
or none (``freeze``), at full width; all layers keep the visual keys and values, and text reads them
with all heads. The paper takes the policy from a file. Here a policy is an order of preference of
all operators: those that still fit the budget are run. It starts with the first layers, whose work
visual tokens need most, and a search moves single operators to either end of the order as long as
the measured KL falls.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from yopo.plans.layer_plan import LayerPlan, full_layer

if TYPE_CHECKING:
    from yopo.planning.templates import Layers, TemplateBuilder

OP_SKIP = "op-skip"
"""The template's name."""

ATTENTION, FFN = "attention", "ffn"

Operator = tuple[int, str]
"""A layer, and ``ATTENTION`` or ``FFN``."""


@dataclass(frozen=True)
class Policy:
    """Operators in order of preference.

    Attributes:
        order: Those of all layers but the last, whose output no layer reads.
        compensation: That of the plan.
    """

    order: tuple[Operator, ...]
    compensation: str

    @classmethod
    def early(cls, layers: int, compensation: str) -> Policy:
        """The first layers first."""
        order = tuple((layer, kind) for layer in range(layers - 1) for kind in (ATTENTION, FFN))
        return cls(order, compensation)

    def layers(self, builder: TemplateBuilder) -> Layers | None:
        """The layers, with all operators that fit one after the other; None if not even frozen
        visual tokens do."""
        found = (builder.reader_layer,) * builder.shape.layers
        if not builder.fits(found):
            return None
        for layer, kind in self.order:
            more = _with(found[layer], kind, builder)
            tried = (*found[:layer], more, *found[layer + 1 :])
            found = tried if builder.fits(tried) else found
        return found


def swaps(policy: Policy) -> Iterator[tuple[str, Policy]]:
    """Every operator before or after all others, and the other compensation."""
    for operator in policy.order:
        rest = tuple(each for each in policy.order if each != operator)
        name = f"{operator[1]} of layer {operator[0]}"
        yield f"{name} first", replace(policy, order=(operator, *rest))
        yield f"{name} last", replace(policy, order=(*rest, operator))
    other = "none" if policy.compensation == "mean" else "mean"
    yield f"compensation {other}", replace(policy, compensation=other)


def _with(layer: LayerPlan, kind: str, builder: TemplateBuilder) -> LayerPlan:
    """A layer that runs an operator as well."""
    whole = full_layer(builder.shape)
    if kind == FFN:
        return replace(layer, neurons=whole.neurons)
    return replace(layer, attend_heads=whole.attend_heads, radius=None)
