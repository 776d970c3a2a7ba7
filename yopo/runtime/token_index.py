"""Which tokens a cache holds: their positions, shared by all of its layers."""

from __future__ import annotations

import torch

from yopo.support.errors import ModelError

Rotary = tuple[torch.Tensor, torch.Tensor]
"""Cosines and sines, (batch, length, head_dim) each."""


class TokenIndex:
    """Positions of the cached tokens, shared by all layers of a cache.

    Attributes:
        length: Logical length: tokens seen, padding and visual ones included.
        text: (batch, text tokens) int64, logical positions; -1 on stream padding.
        visual: (batch, visual tokens) int64, logical positions; -1 on stream padding.
        is_padded: Whether any position is -1.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        self.length = 0
        self.text: torch.Tensor | None = None
        self.visual: torch.Tensor | None = None
        self.is_padded = False
        self._visual_rotary: dict[torch.device, Rotary] = {}

    def rotary_on(self, device: torch.device) -> Rotary | None:
        """Cosines and sines of the cached visual tokens on a device, (batch, visual tokens,
        head_dim) each; None unless some layer rebuilds their keys."""
        held = self._visual_rotary
        if held and device not in held:
            cosines, sines = next(iter(held.values()))
            held[device] = cosines.to(device), sines.to(device)
        return held.get(device)

    def place(self, rotary: Rotary) -> None:
        """Add cosines and sines of a forward's visual tokens."""
        device = rotary[0].device
        held = self.rotary_on(device)
        if held is not None:
            cosines, sines = (torch.cat(each, dim=1) for each in zip(held, rotary, strict=True))
            rotary = cosines, sines
        self._visual_rotary = {device: rotary}

    def extend(
        self, text: torch.Tensor, visual: torch.Tensor | None = None, *, num_tokens: int
    ) -> torch.Tensor:
        """Add a forward's ``num_tokens`` tokens: (batch, new) logical positions of both streams.

        Returns:
            The updated ``text``.
        """
        text = text if self.text is None else torch.cat([self.text, text], dim=1)
        self.text = text
        if visual is not None:
            both = visual if self.visual is None else torch.cat([self.visual, visual], dim=1)
            self.visual = both
        self.length += num_tokens
        return text

    @property
    def num_visual(self) -> int:
        """Cached visual positions per row, padding included."""
        return 0 if self.visual is None else self.visual.shape[1]

    def select(self, rows: torch.Tensor) -> None:
        """Keep (or repeat) batch rows."""
        if self.text is not None:
            self.text = self.text[rows.to(self.text.device)]
        if self.visual is not None:
            self.visual = self.visual[rows.to(self.visual.device)]
        for device, (cosines, sines) in self._visual_rotary.items():
            own = rows.to(device)
            self._visual_rotary[device] = cosines[own], sines[own]

    def crop(self, count: int) -> None:
        """Forget the last ``count`` logical tokens, all of which must be text."""
        if self.text is None:
            raise ModelError("An empty cache cannot be cropped.")
        last = self.text[:, -count:]
        if last.shape[1] < count or bool((last < self.length - count).any()):
            raise ModelError("A pruned cache cannot be cropped into an image.")
        self.text = self.text[:, :-count]
        self.length -= count
