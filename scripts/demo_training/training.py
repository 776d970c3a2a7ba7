"""Train a demo model from scratch on CPU, in two stages.

1. tower: only the vision tower learns, to name what each visual token shows. A decoder on top of an
   untrained tower would learn nothing in that time.
2. decoder: the tower is frozen; the decoder and what connects it to the tower learn from a dozen
   questions per picture.
"""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from demo_training.recipes import Recipe, Stage
from demo_training.rows import IGNORED

logger = logging.getLogger(__name__)

WARMUP_STEPS = 100


class TokenHeads(nn.Module):
    """Linear readouts of what visual tokens show; thrown away after the first stage."""

    def __init__(self, width: int, labels: dict[str, int]) -> None:
        """Build a readout per label, with its number of classes."""
        super().__init__()
        self.labels = labels
        self.norm = nn.LayerNorm(width)
        self.linear = nn.Linear(width, sum(labels.values()))

    def loss(self, features: Tensor, labels: Tensor) -> tuple[Tensor, str]:
        """Cross-entropy of features (picture, token, width) against labels (picture, token, label).

        The text reports accuracies on tokens that show something (whose first label is not 0).
        """
        logits = self.linear(self.norm(features)).split(list(self.labels.values()), dim=-1)
        losses, accuracies = [], []
        covered = labels[..., 0] > 0
        for index, part in enumerate(logits):
            losses.append(F.cross_entropy(part.flatten(0, 1), labels[..., index].flatten()))
            right = part.argmax(-1) == labels[..., index]
            accuracies.append(right[covered].float().mean().item())
        pairs = zip(self.labels, accuracies, strict=True)
        return sum(losses), " ".join(f"{name} {value:.3f}" for name, value in pairs)


def answer_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> tuple[Tensor, str]:
    """Next-token cross-entropy on answers; the text reports the share of correct answer tokens."""
    labels = batch["labels"][:, 1:]
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    hidden = model.model(**inputs, use_cache=False).last_hidden_state[:, :-1]
    asked = labels != IGNORED
    logits = model.lm_head(hidden[asked])  # (answer token, vocabulary)
    right = (logits.argmax(-1) == labels[asked]).float().mean().item()
    return F.cross_entropy(logits, labels[asked]), f"answer tokens {right:.3f}"


class Trainer:
    """Runs the stages in order, with checkpoints; seed and resume points determine the result."""

    def __init__(self, recipe: Recipe, work: Path, seed: int) -> None:
        """Build the untrained model; `work` is the directory of the checkpoint."""
        self.recipe = recipe
        self.checkpoint = work / "checkpoint.pt"
        self.seed = seed
        self.model = recipe.build_model(seed=seed)
        self.heads = TokenHeads(recipe.width, recipe.labels)
        self.processor = recipe.build_processor()
        if recipe.is_compiled:
            self.model.get_decoder().compile()  # in place: names unchanged
        self.stage_name, self.step, self.seconds = "", 0, 0.0
        self.saved_optimizers: list[dict] | None = None

    def resume(self) -> None:
        """Continue from the checkpoint, if there is one."""
        if not self.checkpoint.exists():
            return
        state = torch.load(self.checkpoint, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.heads.load_state_dict(state["heads"])
        self.stage_name, self.step = state["stage"], state["step"]
        self.seconds, self.saved_optimizers = state["seconds"], state["optimizers"]
        logger.info("resumed in stage %s at step %d", self.stage_name, self.step)

    def save(self, optimizers: list[torch.optim.Optimizer]) -> None:
        """Write a temporary file, then rename: a killed run leaves the previous checkpoint."""
        state = {
            "model": self.model.state_dict(),
            "heads": self.heads.state_dict(),
            "stage": self.stage_name,
            "step": self.step,
            "seconds": self.seconds,
            "optimizers": [optimizer.state_dict() for optimizer in optimizers],
        }
        temporary = self.checkpoint.with_suffix(".tmp")
        torch.save(state, temporary)
        os.replace(temporary, self.checkpoint)

    def run(self, stages: list[Stage], save_every: int) -> None:
        """Run the remaining steps of all stages."""
        names = [stage.name for stage in stages]
        done = names.index(self.stage_name) if self.stage_name else 0
        for stage in stages[done:]:
            if stage.name != self.stage_name:
                self.stage_name, self.step, self.saved_optimizers = stage.name, 0, None
            self._run_stage(stage, save_every)

    def _trained(self, stage: Stage) -> list[nn.Module]:
        if stage.name == "tower":
            return [self.recipe.tower(self.model), self.heads]
        return self.recipe.after_tower(self.model)

    def _loss(self, stage: Stage) -> Iterator[tuple[Tensor, str]]:
        """Yield the loss of each fresh batch."""
        recipe, size = self.recipe, stage.batch_size
        data_seed = self.seed + self.step  # a resumed run must not repeat its data
        if stage.name == "tower":
            for images, labels in recipe.tower_batches(self.processor, size, data_seed):
                yield self.heads.loss(recipe.features(self.model, images), labels)
        else:
            for batch in recipe.decoder_batches(self.processor, size, data_seed + 1_000_000):
                yield answer_loss(self.model, batch)

    def _run_stage(self, stage: Stage, save_every: int) -> None:
        self.model.requires_grad_(False)
        modules = self._trained(stage)
        for module in modules:
            module.requires_grad_(True)
        optimizers = make_optimizers(modules)
        for optimizer, state in zip(optimizers, self.saved_optimizers or [], strict=False):
            optimizer.load_state_dict(state)
        parameters = [p for module in modules for p in module.parameters()]
        losses, began = self._loss(stage), time.monotonic()
        while self.step < stage.num_steps:
            for optimizer in optimizers:
                for group in optimizer.param_groups:
                    group["lr"] = group["scale"] * learning_rate(stage, self.step)
                optimizer.zero_grad()
            loss, text = next(losses)
            loss.backward()
            nn.utils.clip_grad_norm_(parameters, 1.0)
            for optimizer in optimizers:
                optimizer.step()
            self.step += 1
            if self.step % 20 == 0:
                logger.info("%s %d: loss %.4f, %s", stage.name, self.step, loss.item(), text)
            if self.step % save_every == 0 or self.step == stage.num_steps:
                self.seconds += time.monotonic() - began
                began = time.monotonic()
                self.save(optimizers)


def make_optimizers(modules: list[nn.Module]) -> list[torch.optim.Optimizer]:
    """Give the matrices of transformer layers to Muon and the rest to AdamW.

    Muon costs more per step but needs fewer steps, which pays off on a CPU.
    """
    named = [(name, p) for module in modules for name, p in module.named_parameters()]
    matrices = [p for name, p in named if p.ndim == 2 and ("layers." in name or "blocks." in name)]
    chosen = {id(p) for p in matrices}
    rest = [p for _, p in named if id(p) not in chosen]
    adam = torch.optim.AdamW([{"params": rest, "scale": 1.0}], betas=(0.9, 0.98), weight_decay=0.01)
    muon = torch.optim.Muon(
        [{"params": matrices, "scale": 2.0}],
        momentum=0.95,
        weight_decay=0.01,
        adjust_lr_fn="match_rms_adamw",
    )
    return [adam, muon]


def learning_rate(stage: Stage, step: int) -> float:
    """Warm up linearly, then follow a cosine down to the stage's final rate."""
    progress = step / stage.num_steps
    cosine = 0.5 * (1 + math.cos(math.pi * progress))
    rate = stage.final_rate + (stage.learning_rate - stage.final_rate) * cosine
    return rate * min(1.0, (step + 1) / WARMUP_STEPS)
