"""A warning, once per model, where prompts lie well beyond what its plan was calibrated on."""

from __future__ import annotations

import warnings
from weakref import WeakKeyDictionary

from torch import nn

from yopo.models.streams import TokenLayout
from yopo.plans.extent import Extent
from yopo.support.errors import YopoWarning

_WARNED: WeakKeyDictionary[nn.Module, Extent] = WeakKeyDictionary()
"""Decoders about which was warned, with the extent that was left: not again at every prompt, nor
when the same plan is installed anew."""


def warn_beyond(decoder: nn.Module, extent: Extent | None, layout: TokenLayout | None) -> None:
    """Warn if a prompt's images are larger, or more, than the plan's weights were fitted for.

    Args:
        decoder: The pruned decoder.
        extent: Of the plan's calibration; None: unknown.
        layout: Of this forward; None: it has no images.
    """
    if extent is None or layout is None or _WARNED.get(decoder) == extent:
        return
    found = next(filter(None, map(extent.exceeded_by, layout.grids)), None)
    if found is None:
        return
    _WARNED[decoder] = extent
    warnings.warn(
        f"A prompt has {found}: the pruned model may stray further there than was measured. "
        "Calibrate on such images, or on resized ones as well (--grids). This is said once.",
        YopoWarning,
        stacklevel=2,
    )
