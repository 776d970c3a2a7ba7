"""Visual tokens have streams and grid coordinates, and a probe finds them in each forward."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject

from yopo.models.layout import LayoutProbe
from yopo.models.llava import LLAVA
from yopo.models.streams import TokenLayout, build_layout
from yopo.plans.grid import Grid
from yopo.support.errors import ModelError

ROWS = [[1, 5, *[IMAGE] * 6, 7], [2, *[IMAGE] * 4, 8]]
GRIDS = [(Grid(2, 3),), (Grid(1, 2), Grid(2, 1))]


@pytest.fixture
def ragged() -> tuple[torch.Tensor, TokenLayout]:
    """Two padded rows with different images: (is visual, layout)."""
    width = max(len(row) for row in ROWS)
    is_visual = torch.zeros(2, width, dtype=torch.bool)
    for number, row in enumerate(ROWS):
        is_visual[number, width - len(row) :] = torch.tensor(row) == IMAGE
    return is_visual, build_layout(is_visual, GRIDS)


def test_streams_partition_every_row(ragged: tuple) -> None:
    is_visual, layout = ragged
    for number in range(2):
        found = {}
        for kind, stream in (("text", layout.text), ("visual", layout.visual)):
            keep = slice(None) if stream.mask is None else stream.mask[number]
            found[kind] = stream.index[number][keep].tolist()
            assert found[kind] == sorted(found[kind])
        assert found["visual"] == is_visual[number].nonzero().flatten().tolist()
        assert sorted(found["text"] + found["visual"]) == list(range(is_visual.shape[1]))


def test_gather_and_scatter_are_inverse(ragged: tuple) -> None:
    is_visual, layout = ragged
    states = torch.randn(*is_visual.shape, 5)
    joined = torch.zeros_like(states)
    for stream in (layout.text, layout.visual):
        stream.scatter(joined, stream.gather(states))
    assert torch.equal(joined, states)


def test_rows_with_equal_layouts_share_their_positions() -> None:
    same = torch.tensor([[False, True, True, False]] * 2)
    grids = [(Grid(1, 2),), (Grid(2, 1),)]
    layout = build_layout(same, grids)
    assert layout.text.shared and layout.visual.shared
    assert layout.text.mask is None and layout.visual.mask is None
    assert not layout.has_uniform_grids
    states = torch.randn(2, 4, 3)
    assert torch.equal(layout.visual.gather(states), states[:, 1:3])
    shifted = build_layout(torch.stack([same[0], same[0].roll(1)]), grids)
    assert not shifted.text.shared and shifted.text.mask is None


def test_coordinates_are_row_major_per_image(ragged: tuple) -> None:
    _, layout = ragged
    assert layout.coordinates().tolist() == [
        [[0, 0, 0], [0, 0, 1], [0, 0, 2], [0, 1, 0], [0, 1, 1], [0, 1, 2]],
        [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 1, 0], [-1, -1, -1], [-1, -1, -1]],
    ]


@pytest.fixture
def probe(mha: Subject) -> LayoutProbe:
    probe = LayoutProbe(mha.model.base_model, LLAVA.grids_of)
    yield probe
    probe.remove()


class Spy:
    """Records the probe's layout while the decoder runs."""

    def __init__(self, subject: Subject, probe: LayoutProbe):
        self.seen: list[TokenLayout | None] = []
        self.handle = subject.model.get_decoder().register_forward_pre_hook(
            lambda *_: self.seen.append(probe.layout)
        )


@pytest.fixture
def spy(mha: Subject, probe: LayoutProbe) -> Spy:
    spy = Spy(mha, probe)
    yield spy
    spy.handle.remove()


def test_the_probe_sees_images_in_prefill_and_none_in_decode_steps(
    mha: Subject, probe: LayoutProbe, spy: Spy
) -> None:
    inputs = tiny.batch([[1, 5, *PICTURE, 7, *PICTURE, *PICTURE], [1, *PICTURE, 3]])
    mha.model.generate(**inputs, max_new_tokens=3, min_new_tokens=3, do_sample=False)
    prefill, *steps = spy.seen
    sizes = [[(grid.rows, grid.cols) for grid in row] for row in prefill.grids]
    assert sizes == [[(4, 4)] * 3, [(4, 4)]]
    assert len(steps) == 2 and steps == [None, None]
    assert probe.layout is None  # outside of a forward there is none


def test_the_probe_finds_none_in_text(mha: Subject, spy: Spy) -> None:
    tiny.logits(mha.model, tiny.batch([[1, 2, 3]]))
    tiny.logits(mha.model, {"input_ids": torch.tensor([[1, IMAGE, 3]])})  # no pixels: text
    assert spy.seen == [None, None]


def test_the_probe_forgets_a_forward_that_failed(mha: Subject, probe: LayoutProbe) -> None:
    inputs = tiny.batch([[1, 5, *PICTURE, 7]])
    with pytest.raises(ModelError, match="whole number"):
        tiny.logits(mha.model, inputs | {"input_ids": inputs["input_ids"][:, :10]})
    assert probe.layout is None
    with pytest.raises(ValueError):
        tiny.logits(mha.model, inputs | {"pixel_values": torch.zeros(1, 3, 5, 5)})
    assert probe.layout is None


def test_a_removed_probe_leaves_no_hooks(mha: Subject) -> None:
    base = mha.model.base_model
    LayoutProbe(base, LLAVA.grids_of).remove()
    hooks = (base._forward_pre_hooks, base._forward_hooks, base._forward_hooks_always_called)
    assert not any(hooks)
