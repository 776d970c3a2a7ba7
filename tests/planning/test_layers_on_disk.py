"""Profile and fit of a model whose layers stay on disk are those of the model in memory."""

from __future__ import annotations

import mmap
import random
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from transformers import PreTrainedModel
from zoo import Specimen

from yopo.data.prompts import Batch
from yopo.fitting.layerwise import DenseWalk, enter
from yopo.fitting.profile import profile
from yopo.fitting.refit import refit
from yopo.fitting.states import InFiles, InHostMemory, OnDevice, Room, room_for
from yopo.models.offloaded import is_offloaded, layers_on_disk
from yopo.plans.schema import PruningPlan

ROOMS: dict[str, Callable[[Path], Room]] = {
    "device": lambda _: OnDevice(),
    "host": lambda _: InHostMemory(),
    "files": InFiles,
}


def on_disk(model: PreTrainedModel, folder: Path) -> PreTrainedModel:
    """The model, saved and loaded with its layers left on disk."""
    model.save_pretrained(folder)
    places = layers_on_disk(model, model.get_decoder(), "cpu", towers=True)
    loaded = type(model).from_pretrained(folder, device_map=places, dtype=model.dtype)
    return loaded.eval()


def unfitted(specimen: Specimen) -> list[PruningPlan]:
    """Plans that part after the first layer."""
    fixed = {"compensation": "refit", "bidirectional": False, "baked": False}
    one, other = (
        tiny.random_plan(specimen.identity, random.Random(seed), **fixed) for seed in (1, 2)
    )
    none = replace(one.tensors, neuron_order=None, refit={})
    return [
        replace(one, tensors=none),
        replace(one, layers=(one.layers[0], *other.layers[1:]), tensors=none),
    ]


@pytest.mark.parametrize("kind", ROOMS)
def test_walks_compute_the_same(
    specimen: Specimen, batches: list[Batch], kind: str, tmp_path: Path
) -> None:
    stored, shape = on_disk(specimen.model, tmp_path / "model"), specimen.identity.shape
    decoder = stored.get_decoder()
    assert is_offloaded(decoder)
    assert all(weight.is_meta for weight in decoder.layers.parameters())
    usual, plans = enter(specimen.model, batches), unfitted(specimen)
    found = enter(stored, batches, None, ROOMS[kind](tmp_path))
    for _ in range(2):  # a walk leaves where it started from as it is
        one, other = profile(specimen.model, usual, shape), profile(stored, found, shape)
        assert all(torch.equal(vars(one)[name], vars(other)[name]) for name in vars(one))
        pairs = zip(refit(specimen.model, usual, plans), refit(stored, found, plans), strict=True)
        for each, again in pairs:
            assert each.keys() == again.keys()
            for number, weights in each.items():
                assert weights.keys() == again[number].keys()
                assert all(torch.equal(weights[name], again[number][name]) for name in weights)
    assert all(weight.is_meta for weight in decoder.layers.parameters())
    assert [each.name for each in tmp_path.iterdir()] == ["model"]


class Counted(OnDevice):
    """States stay where they are, and are counted as long as somebody holds them."""

    def __init__(self) -> None:
        self.held: list[weakref.ref[torch.Tensor]] = []

    def put(self, states: torch.Tensor, over: torch.Tensor | None = None) -> torch.Tensor:
        stored = states.clone()
        self.held.append(weakref.ref(stored))
        return stored

    def sizes(self) -> list[torch.Size]:
        return [each().shape for each in self.held if each() is not None]


def test_a_fit_keeps_only_the_states_that_it_aims_at(
    specimen: Specimen, batches: list[Batch]
) -> None:
    room = Counted()
    walk = DenseWalk(specimen.model, enter(specimen.model, batches[:1], None, room))
    visual = walk.batches[0].visual(walk.batches[0].hidden).shape
    others = room.sizes().count(visual)  # features that are added after the first layers
    walk.skip(0)
    assert room.sizes().count(visual) == others
    walk.step(1)
    walk.step(2)
    assert room.sizes().count(visual) == others + 2  # within and after the layer


def test_states_wait_where_there_is_room(specimen: Specimen, tmp_path: Path) -> None:
    assert isinstance(room_for(specimen.model.get_decoder(), tmp_path), OnDevice)
    decoder = on_disk(specimen.model, tmp_path / "model").get_decoder()
    assert isinstance(room_for(decoder, None), InHostMemory)
    assert isinstance(room_for(decoder, tmp_path), InFiles)


def test_files_leave_memory_and_are_used_again(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    room, size = InFiles(tmp_path), 1 << 24  # 64 MiB of float32
    first = room.put(torch.zeros(1))
    before = resident()
    kept = [room.put(torch.full((size,), float(number))) for number in range(3)]
    assert resident() - before < 2 * 4 * size
    assert [float(each[-1]) for each in kept] == [0, 1, 2]
    again = room.put(torch.ones(size), over=kept[2])
    assert again.data_ptr() == kept[2].data_ptr()
    assert float(kept[2].sum()) == size
    assert float(first) == 0
    assert not list(tmp_path.iterdir())


def test_a_file_goes_with_its_states(tmp_path: Path) -> None:
    def files() -> int:
        return Path("/proc/self/maps").read_text().count(str(tmp_path))

    room = InFiles(tmp_path)
    states = room.put(torch.ones(1 << 16))
    assert files() == 1
    del states
    assert files() == 0
