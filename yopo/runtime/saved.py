r"""``save_pretrained`` of a pruned model: a complete pruned checkpoint, or a plain dense one.

transformers would write the weights and a config.json that still says ``yopo``, without the plan,
its tensors and the loader's code. So the outer class is swapped for one that saves the dense model
without that claim and then has a writer, which knows the checkpoint format, complete the directory.
Uploads and Trainer checkpoints work the same way.

Recovery training: the accuracy lost at a small budget is recovered by training the pruned model for
a while. Visual tokens see every change of the text's weights at once, LoRA included; the weights
fitted only for them are trained as parameters of their own. The result is saved as a pruned
checkpoint again, whose plan is valid for the trained weights:

    from peft import LoraConfig, get_peft_model
    from transformers import Trainer, TrainingArguments

    import yopo

    model = yopo.load("llava-tiny-yopo", trainable=True)
    projections = r".*language_model.*\.(q|k|v|o|gate|up|down)_proj"
    adapter = LoraConfig(r=16, lora_alpha=32, target_modules=projections)
    adapted = get_peft_model(model, adapter)
    for parameter in yopo.fitted_parameters(model).values():
        parameter.requires_grad_()  # PEFT freezes all parameters but its own
    options = {"learning_rate": 3e-3, "per_device_train_batch_size": 4, "save_strategy": "no"}
    arguments = TrainingArguments("runs", max_steps=20, gradient_checkpointing=True, **options)
    trainer = Trainer(adapted, arguments, train_dataset=rows, data_collator=collate)
    trainer.train()
    adapted.merge_and_unload().save_pretrained("llava-tiny-recovered")
    recovered = yopo.load("llava-tiny-recovered")

An intermediate PEFT checkpoint holds only the adapter, not the fitted weights, although they are
trained. Without PEFT, ``Trainer`` checkpoints are complete; to resume from one, load the model with
``yopo.load(CHECKPOINT, trainable=True)`` and pass it as ``resume_from_checkpoint`` too.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from yopo.plans.schema import PruningPlan
from yopo.runtime.adapters import has_adapters
from yopo.support import console
from yopo.support.errors import ModelError

if TYPE_CHECKING:
    _Stock = PreTrainedModel
else:
    _Stock = object  # mixed into a model's class, which provides the rest

CLAIMS = ("yopo", "auto_map")
"""Entries of config.json that mark a directory as a pruned checkpoint."""


class Writer(Protocol):
    """Turns a directory with a dense model into a pruned checkpoint."""

    def __call__(self, folder: Path, plan: PruningPlan, *, trained: bool) -> None:
        """Write the missing files.

        Args:
            folder: Holds the weights and config.json just written.
            plan: The plan that the model ran under, with its current fitted weights.
            trained: Whether the fitted weights may differ from those that were loaded.
        """


@dataclass(frozen=True)
class Saving:
    """How a pruned model is saved: by a writer, or dense if there is none."""

    writer: Writer | None


class SavesWhole(_Stock):
    """Saves a pruned model; mixed into the outer class, whose ``yopo_saving`` it reads."""

    yopo_saving: Saving

    def save_pretrained(
        self,
        save_directory: str | os.PathLike[Any],
        is_main_process: bool = True,
        state_dict: dict[str, torch.Tensor] | None = None,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        """As in transformers; the directory loads by ``yopo.load``, and as a dense model.

        Raises:
            ModelError: Adapters are not merged, or trained weights would be lost.
        """
        if getattr(self, "_hf_peft_config_loaded", False):  # writes only adapters
            super().save_pretrained(save_directory, is_main_process, state_dict, *args, **kwargs)
            return
        if has_adapters(self.get_decoder()):
            raise ModelError(
                "The model has unmerged adapters: its weights would be saved under names that no "
                "loader knows.",
                remedy="Save model.merge_and_unload(), or only the adapters with PEFT's own class.",
            )
        state = self.get_decoder().yopo
        if self.yopo_saving.writer is None and any(True for _ in state.parameters()):
            raise ModelError(
                "The plan is not part of the checkpoint: its fitted weights, which may have been "
                "trained, cannot be saved with the model.",
                remedy="Bake it with `yopo apply`, then train "
                "yopo.load(DIRECTORY, trainable=True).",
            )
        everything = self.state_dict() if state_dict is None else state_dict
        own = _prefix(self, state)
        fitted = {name: value for name, value in everything.items() if name.startswith(own)}
        dense = {name: value for name, value in everything.items() if name not in fitted}
        with _without_claims(self.config):
            super().save_pretrained(save_directory, is_main_process, dense, *args, **kwargs)
        if is_main_process:
            self._complete(Path(save_directory), fitted)

    def _upload_modified_files(
        self, working_dir: str | os.PathLike[Any], *args: Any, **kwargs: Any
    ) -> Any:
        """Called by transformers in ``push_to_hub``, after it wrote its own model card."""
        self._complete(Path(working_dir), {})
        return super()._upload_modified_files(working_dir, *args, **kwargs)

    def _complete(self, folder: Path, gathered: Mapping[str, torch.Tensor]) -> None:
        """Let the writer complete a directory.

        Args:
            folder: Holds the dense model.
            gathered: Fitted weights by their names in the state dict, if they were gathered across
                processes; others are taken from the model.
        """
        if self.yopo_saving.writer is None:
            console.warn(
                f"{folder}: saved the dense model without the plan, which is only in memory. "
                "Bake a plan into a checkpoint with `yopo apply`."
            )
            return
        state = self.get_decoder().yopo
        names = {id(value): name for name, value in state.named_parameters()}
        own = _prefix(self, state)
        refit = {}
        for index, layer in enumerate(state.visual):
            weights = {
                name: gathered.get(own + names.get(id(value), ""), value).detach()
                for name, value in layer.fitted_weights().items()
            }
            if weights:
                refit[index] = weights
        tensors = replace(state.plan.tensors, refit=refit)
        plan = replace(state.plan, tensors=tensors)
        self.yopo_saving.writer(folder, plan, trained=bool(names))


def make_savable(model: PreTrainedModel, writer: Writer | None) -> None:
    """Make ``save_pretrained`` of a pruned model write all of it, until :func:`restore_saving`."""
    vars(model)["yopo_saving"] = Saving(writer)
    # mypy compares the class's own __hash__, which takes an object, with Hashable's.
    model.__class__ = saving_class(type(model))  # type: ignore[arg-type]


def restore_saving(model: PreTrainedModel) -> None:
    """Undo :func:`make_savable`."""
    model.__class__ = type(model).__mro__[2]
    del model.yopo_saving


@cache
def saving_class(stock: type[PreTrainedModel]) -> type[PreTrainedModel]:
    """The subclass of a model's class that saves it whole, under the same name."""
    members = {"__module__": stock.__module__, "__qualname__": stock.__qualname__}
    return type(stock.__name__, (SavesWhole, stock), members)


def _prefix(model: nn.Module, state: nn.Module) -> str:
    """The name prefix of a pruned decoder's own parameters."""
    return next(name for name, module in model.named_modules() if module is state) + "."


@contextmanager
def _without_claims(config: PreTrainedConfig) -> Iterator[None]:
    """Remove the claims from a configuration inside a ``with`` block."""
    claims = {name: vars(config).pop(name) for name in CLAIMS if name in vars(config)}
    try:
        yield
    finally:
        vars(config).update(claims)
