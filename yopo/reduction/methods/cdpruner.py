"""CDPruner: relevant and diverse tokens, by a determinantal point process (arXiv 2506.10967).

The kernel is ``diag(r) S diag(r)`` with the cosines S of the tokens and their relevance r to the
question, scaled to [0, 1] per image; the greedy maximum of its determinant is taken. The paper
compares with CLIP's text tower; models without one are compared with the language model's input
embeddings, here for all.
"""

from __future__ import annotations

from dataclasses import dataclass

from yopo.reduction.method import Images, Method, Selection, Sides, pairs_flops


@dataclass(frozen=True)
class CDPruner(Method):
    """Tokens of the largest determinant.

    Attributes:
        prompt: Whether tokens count by their relevance to the question; else all alike.
    """

    prompt: bool = True

    name = "cdpruner"
    label = "CDPruner"
    source = "arXiv 2506.10967"
    reads_prompt = True

    @property
    def uses_prompt(self) -> bool:
        """Whether relevance counts."""
        return self.prompt

    def select(self, images: Images) -> Selection:
        """Greedy maximum a posteriori inference, one Cholesky column per chosen token."""
        import torch

        from yopo.reduction.arithmetic import ascending, pick, relevance, row, scaled, unit

        units = unit(images.features)
        kernel = units @ units.transpose(1, 2)
        kernel.diagonal(dim1=1, dim2=2).fill_(1.0)  # exactly, so that ties go to the first
        if self.prompt and images.question is not None:
            weights = scaled(relevance(units, images.question))
            kernel = weights[:, :, None] * kernel * weights[:, None, :]
        gain = kernel.diagonal(dim1=1, dim2=2).clone()
        count = self.count(images.sides)
        columns = kernel.new_zeros(len(kernel), count, kernel.shape[1])
        chosen: list[torch.Tensor] = []
        for step in range(count):
            chosen.append(gain.argmax(dim=1))
            index = chosen[-1][:, None, None].expand(-1, step, 1)
            own = columns[:, :step].gather(2, index).transpose(1, 2)  # (images, 1, step)
            rest = row(kernel, chosen[-1]) - (own @ columns[:, :step])[:, 0]
            root = pick(gain, chosen[-1]).clamp(min=1e-12).sqrt()
            columns[:, step] = rest / root[:, None]
            gain = gain - columns[:, step].square()
            gain = gain.scatter(1, torch.stack(chosen, dim=1), float("-inf"))
        return Selection(ascending(chosen))

    def choosing_flops(self, sides: Sides, width: int, words: int) -> int:
        """All pairs, the words against all tokens, and the columns."""
        tokens, kept = sides[0] * sides[1], self.count(sides)
        asked = 2 * words * tokens * width if self.prompt else 0
        return pairs_flops(sides, width) + asked + kept * (kept - 1) * tokens
