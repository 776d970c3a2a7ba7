"""Random tokens: what a choice of tokens has to beat.

A draw depends only on a seed, an image's size and its place in the prompt, so the same prompt
always keeps the same tokens, whatever else is in its batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from zlib import crc32

from yopo.reduction.method import Images, Method, Selection


@dataclass(frozen=True)
class RandomChoice(Method):
    """Tokens drawn at random.

    Attributes:
        seed: Seed of the draw.
    """

    seed: int = 0

    name = "random"
    label = "random tokens"
    is_regular = True

    def select(self, images: Images) -> Selection:
        """One draw per image."""
        import torch

        tokens, rows = images.features.shape[1], []
        for number in images.numbers or range(len(images.features)):
            # A checksum spreads the four over the 32 bits that torch's CPU generator uses.
            seed = crc32(f"{self.seed} {images.sides} {number}".encode())
            order = torch.randperm(tokens, generator=torch.Generator().manual_seed(seed))
            rows.append(order[: self.count(images.sides)].sort().values)
        return Selection(torch.stack(rows).to(images.features.device))
