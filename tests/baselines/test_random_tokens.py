"""Random tokens are repeatable per prompt, act like a mask, and meet budgets to the token."""

from __future__ import annotations

import pytest
import tiny
import torch
from tiny import IMAGE, PICTURE, Subject

from yopo.baselines.install import baseline
from yopo.baselines.random import RandomTokens
from yopo.baselines.registry import solve

ONE = [1, 5, 6, *PICTURE, 7, 8, 9, 10]
VISUAL = len(PICTURE)


@torch.no_grad()
def kept_places(subject: Subject, method: RandomTokens, rows: list[list[int]]) -> torch.Tensor:
    """Return (batch, kept) int64: which of each row's visual tokens the last layer holds."""
    inputs = tiny.batch(rows)
    with baseline(subject.model, method):
        cache = subject.model(**inputs, use_cache=True).past_key_values
    places = cache.layers[-1].record.stretch(3).places
    found = []
    for ids, held in zip(inputs["input_ids"], places, strict=True):
        images = (ids == IMAGE).nonzero()[:, 0]
        found.append(torch.isin(images, held).nonzero()[:, 0])
    return torch.stack(found)


@pytest.mark.parametrize("layers", [0, 2])
def test_a_prompt_keeps_the_same_tokens(mha: Subject, layers: int) -> None:
    """By itself, repeated or in a padded batch; other seeds and prompts keep other tokens."""
    method = RandomTokens(layers, share=0.5)
    (alone,) = kept_places(mha, method, [ONE])
    assert len(alone) == VISUAL // 2
    assert torch.equal(kept_places(mha, method, [ONE])[0], alone)
    longer = [1, *PICTURE, *range(3, 17)]
    together = kept_places(mha, method, [longer, ONE])
    assert torch.equal(together[1], alone) and not torch.equal(together[0], alone)
    other = kept_places(mha, RandomTokens(layers, share=0.5, seed=1), [ONE])
    assert not torch.equal(other[0], alone)


def test_every_position_is_drawn_equally_often(mha: Subject) -> None:
    """Over seeds, every token is kept about equally often."""
    counts = torch.zeros(VISUAL)
    for seed in range(48):
        counts[kept_places(mha, RandomTokens(0, share=0.5, seed=seed), [ONE])[0]] += 1
    assert counts.sum() == 48 * VISUAL // 2 and 10 <= counts.min() and counts.max() <= 38


def test_an_early_drop_is_the_stock_model_without_those_tokens(subject: Subject) -> None:
    """Text after a gap keeps its positions."""
    inputs, method = tiny.batch([ONE]), RandomTokens(0, share=0.4)
    (kept,) = kept_places(subject, method, [ONE])
    stays = torch.ones(len(ONE), dtype=torch.bool)
    stays[3 : 3 + VISUAL] = torch.isin(torch.arange(VISUAL), kept)
    where = stays.nonzero()[:, 0]

    @torch.no_grad()
    def shortened(model: torch.nn.Module) -> torch.Tensor:
        base = model.base_model
        pixels = inputs["pixel_values"].to(model.dtype)
        features = base.get_image_features(pixels, return_dict=True).pooler_output[0]
        embeds = model.get_input_embeddings()(inputs["input_ids"][0])
        embeds[3 : 3 + VISUAL] = features
        hidden = model.get_decoder()(
            inputs_embeds=embeds[where][None], position_ids=where[None]
        ).last_hidden_state
        return model.lm_head(hidden)[:, -4:]

    usual, oracle = shortened(subject.model), shortened(subject.oracle)
    with baseline(subject.model, method):
        found = tiny.logits(subject.model, inputs)[:, -4:]
    tiny.assert_close(found, usual, oracle, torch.ones(1, 4, dtype=torch.bool))


def test_budgets_are_met_to_the_token() -> None:
    """Before the first layer there is no smallest budget."""
    shape, workload = tiny.make_subject("mha").shape, tiny.workload()
    method = solve("random", shape, workload, 0.5)
    count = method.kept(VISUAL)
    assert method.tokens(shape, workload.grids) == (count,) * shape.layers
    assert method.reached(shape, workload) <= 0.5
    more = RandomTokens(0, share=(count + 1) / VISUAL)
    assert more.reached(shape, workload) > 0.5
    assert solve("random", shape, workload, 0.01).kept(VISUAL) == 0


def test_the_share_is_named_in_the_description() -> None:
    shape, workload = tiny.make_subject("mha").shape, tiny.workload()
    assert RandomTokens(0, share=0.25).describe(shape, workload) == "R = 25.0 %"
    later = RandomTokens(2, share=0.25)
    assert later.describe(shape, workload) == "K = 2 of 4 layers, R = 25.0 %"
    assert later.tokens(shape, workload.grids) == (16, 16, 4, 4)
