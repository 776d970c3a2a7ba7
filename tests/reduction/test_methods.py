"""Methods against the papers' formulas, and what has to hold of any of them."""

from __future__ import annotations

from dataclasses import replace

import brute_force
import pytest
import torch

from yopo.reduction.arithmetic import unit
from yopo.reduction.method import Images, Method, Question, Selection
from yopo.reduction.methods.par import PAR
from yopo.reduction.registry import METHODS, make_method, method_class, parse_method
from yopo.support.errors import PlanError

SIDES, WIDTH = (4, 6), 5
TOKENS = SIDES[0] * SIDES[1]
BLIND = [name for name in METHODS if not method_class(name).is_regular]
"""Methods to which a token's place means nothing."""


def _images(seed: int = 0, *, many: int = 2, tokens: int = TOKENS, words: int = 3) -> Images:
    torch.manual_seed(seed)
    features = torch.randn(many, tokens, WIDTH, dtype=torch.float64)
    embeds = torch.randn(many, words, WIDTH, dtype=torch.float64)
    attention = torch.rand(many, tokens, dtype=torch.float64)
    attention = attention / attention.sum(dim=1, keepdim=True)
    question = Question(embeds, torch.ones(many, words, dtype=torch.float64))
    return Images(features, SIDES, question, attention, tuple(range(many)))


def _rows(images: Images, number: int) -> tuple[list, list, list]:
    assert images.question is not None and images.attention is not None
    parts = (images.features, images.question.embeds, images.attention)
    tokens, words, attention = (each[number].tolist() for each in parts)
    return tokens, words, attention


def _features(images: Images, selection: Selection) -> torch.Tensor:
    if selection.mixing is None:
        index = selection.kept[..., None].expand(-1, -1, WIDTH)
        return images.features.gather(1, index)
    return selection.mixing.to(images.features) @ images.features


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("seed", range(3))
def test_divprune_is_greedy_max_min(seed: int, keep: float) -> None:
    images, method = _images(seed), make_method("divprune", keep)
    kept = method.select(images).kept
    for number in range(2):
        tokens, _, _ = _rows(images, number)
        assert kept[number].tolist() == brute_force.divprune(tokens, method.count(SIDES))


@pytest.mark.parametrize("prompt", [True, False])
@pytest.mark.parametrize("keep", [0.1, 0.2])
@pytest.mark.parametrize("seed", range(3))
def test_cdpruner_is_the_greedy_determinant(seed: int, keep: float, prompt: bool) -> None:
    images, method = _images(seed), make_method("cdpruner", keep, prompt=prompt)
    kept = method.select(images).kept
    for number in range(2):
        tokens, words, _ = _rows(images, number)
        expected = brute_force.cdpruner(tokens, method.count(SIDES), words if prompt else None)
        assert kept[number].tolist() == expected


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_scope_is_greedy_coverage(keep: float, alpha: float) -> None:
    images, method = _images(1), make_method("scope", keep, alpha=alpha)
    kept = method.select(images).kept
    for number in range(2):
        tokens, _, attention = _rows(images, number)
        expected = brute_force.scope(tokens, method.count(SIDES), attention, alpha)
        assert kept[number].tolist() == expected


@pytest.mark.parametrize("keep", [0.1, 0.5, 0.9])
def test_prumerge_adds_the_nearest_dropped_tokens(keep: float) -> None:
    images, method = _images(2), make_method("prumerge", keep, neighbors=4)
    found = method.select(images)
    for number in range(2):
        tokens, _, attention = _rows(images, number)
        kept, merged = brute_force.prumerge(tokens, method.count(SIDES), attention, 4)
        assert found.kept[number].tolist() == kept
        expected = torch.tensor(merged, dtype=torch.float64)
        torch.testing.assert_close(_features(images, found)[number], expected, rtol=1e-6, atol=1e-6)


def test_prumerge_plus_spreads_half_of_its_tokens() -> None:
    images = _images(2)
    found, salient = (make_method(n, 0.5).select(images) for n in ("prumerge+", "prumerge"))
    assert images.attention is not None
    for number in range(2):
        order = images.attention[number].argsort(descending=True).tolist()
        kept = set(found.kept[number].tolist())
        assert set(order[:6]) <= kept
        rest = [place for place in range(TOKENS) if place not in order[:6]]
        places = [rest.index(each) for each in sorted(kept - set(order[:6]))]
        assert {b - a for a, b in zip(places, places[1:], strict=False)} == {3}
    assert not torch.equal(found.kept, salient.kept)


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.5, 0.9])
def test_folder_is_size_weighted_bipartite_merging(keep: float) -> None:
    images, method = _images(3), make_method("folder", keep)
    found = method.select(images)
    for number in range(2):
        kept, merged = brute_force.folder(_rows(images, number)[0], method.count(SIDES))
        assert found.kept[number].tolist() == kept
        expected = torch.tensor(merged, dtype=torch.float64)
        torch.testing.assert_close(_features(images, found)[number], expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("keep", [0.1, 0.25])
def test_par_without_a_graph_retrieves_routes_and_merges(seed: int, keep: float) -> None:
    images, method = _images(seed), make_method("par", keep, graph=False)
    found = method.select(images)
    for number in range(2):
        tokens, words, _ = _rows(images, number)
        kept, merged = brute_force.par(tokens, method.count(SIDES), words, quantile=0.9, pool=3.0)
        assert found.kept[number].tolist() == kept
        expected = torch.tensor(merged, dtype=torch.float64)
        torch.testing.assert_close(_features(images, found)[number], expected, rtol=1e-5, atol=1e-6)


def _components(edges: torch.Tensor) -> list[int]:
    """The smallest token of each one's component, by following edges."""
    labels: dict[int, int] = {}
    for start in range(len(edges)):
        front = [start]
        while front:
            one = front.pop()
            if labels.setdefault(one, start) == start:
                front += [j for j in range(len(edges)) if edges[one, j] and j not in labels]
    return [labels[each] for each in range(len(edges))]


def test_par_clusters_are_connected_components_of_near_and_similar_tokens() -> None:
    images, method = _images(4), PAR(0.5, neighbors=2, quantile=0.8)
    units = unit(images.features)
    cosines = units @ units.transpose(1, 2)
    threshold = torch.full((2, 1), 0.3, dtype=torch.float64)
    labels = method.clusters(cosines, threshold, TOKENS)
    for number in range(2):
        others = cosines[number] - 2 * torch.eye(TOKENS)
        near = torch.zeros(TOKENS, TOKENS, dtype=torch.bool)
        for one in range(TOKENS):
            near[one, others[one].argsort(descending=True)[:2]] = True
        edges = (near | near.T) & (others > 0.3)
        assert labels[number].tolist() == _components(edges)


def test_par_cuts_clusters_that_are_too_large() -> None:
    images = _images(5)
    units = unit(images.features)
    cosines, method = units @ units.transpose(1, 2), PAR(0.5)
    low = torch.full((2, 1), -1.0, dtype=torch.float64)
    sizes = [
        max(torch.unique(labels, return_counts=True)[1].max() for labels in found)
        for found in (method.clusters(cosines, low, TOKENS), method.clusters(cosines, low, 6))
    ]
    assert sizes[0] == TOKENS and sizes[1] <= 6


def test_par_keeps_what_the_prompt_names_and_one_token_of_the_background() -> None:
    """Four kinds of token; the words name the first."""
    torch.manual_seed(0)
    kinds = torch.eye(8, dtype=torch.float64)[:4]
    member = [0] * 8 + [1] * 6 + [2] * 6 + [3] * 4
    features = kinds[member][None] + 0.01 * torch.randn(1, TOKENS, 8, dtype=torch.float64)
    question = Question(kinds[None, :1], torch.ones(1, 1, dtype=torch.float64))
    images = Images(features, SIDES, question)
    routed = PAR(1 / 3, pool=1.0, quantile=0.8)
    kept = [member[each] for each in routed.select(images).kept[0].tolist()]
    assert kept == [0, 0, 0, 0, 0, 1, 2, 3]
    relevant = replace(routed, router=False)
    kept = [member[each] for each in relevant.select(images).kept[0].tolist()]
    assert kept == [0] * 8


def test_common_words_hardly_count() -> None:
    images = _images(6)
    assert images.question is not None
    ids = torch.tensor([[7, 8, 9]] * 2)
    embeds = images.question.embeds
    both = Images(images.features, SIDES, Question(embeds, torch.ones(2, 3), ids))
    weights = torch.tensor([[0.1, 1.0, 0.1]] * 2)
    weighted = Images(images.features, SIDES, Question(embeds, weights))
    found = [PAR(0.1, common=(7, 9)).select(both), PAR(0.1).select(weighted)]
    assert torch.equal(found[0].kept, found[1].kept)
    assert not torch.equal(found[0].kept, PAR(0.1).select(both).kept)
    alike = PAR(0.1, words=False, common=(7, 9)).select(both)
    assert torch.equal(alike.kept, PAR(0.1).select(both).kept)


def test_common_words_are_those_of_most_questions() -> None:
    questions = [[7, 8, 9, 9], [7, 9], [7, 4, 4, 4], [5, 9]]
    found = PAR(0.5, merge=False).calibrated(questions)
    assert found == PAR(0.5, merge=False, common=(7, 9)) and not found.needs_questions
    for method in (PAR(0.5, words=False), PAR(0.5, prompt=False), PAR(0.5, common=(3,))):
        assert method.calibrated(questions) == method
    assert make_method("divprune", 0.5).calibrated(questions) == make_method("divprune", 0.5)


@pytest.mark.parametrize(
    ("name", "switch"),
    [("par", "prompt"), ("par", "router"), ("par", "graph"), ("cdpruner", "prompt")],
)
def test_switches_change_the_choice(name: str, switch: str) -> None:
    chosen = [
        [make_method(name, 0.1, **{switch: on}).select(_images(seed)).kept.tolist() for on in both]
        for seed, both in enumerate([(True, False)] * 6)
    ]
    assert any(on != off for on, off in chosen)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [0.01, 0.11, 0.25, 0.5, 0.99])
def test_every_image_keeps_its_count_in_order(name: str, keep: float) -> None:
    method = make_method(name, keep)
    found = method.select(_images())
    count = method.count(SIDES)
    assert 1 <= count <= max(1, keep * TOKENS)
    assert found.kept.shape == (2, count)
    assert (found.kept.diff(dim=1) > 0).all() and found.kept.min() >= 0
    assert found.kept.max() < TOKENS
    assert (found.mixing is not None) == method.mixes
    if found.mixing is not None:
        assert found.mixing.shape == (2, count, TOKENS)


@pytest.mark.parametrize("name", METHODS)
def test_images_do_not_see_each_other(name: str) -> None:
    method, both = make_method(name, 0.25), _images(7)
    found = method.select(both)
    assert both.question is not None and both.attention is not None
    for row in range(2):
        part = slice(row, row + 1)
        question = Question(both.question.embeds[part], both.question.weights[part])
        alone = Images(both.features[part], SIDES, question, both.attention[part], (row,))
        one = method.select(alone)
        assert torch.equal(one.kept[0], found.kept[row])
        if found.mixing is not None and one.mixing is not None:
            torch.testing.assert_close(one.mixing[0], found.mixing[row])


@pytest.mark.parametrize("name", [name for name in BLIND if name != "prumerge+"])
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_permuted_tokens_give_the_permuted_choice(name: str, keep: float) -> None:
    method, images = make_method(name, keep), _images(8)
    images.features[:, 0] = -images.features[:, 1:].mean(dim=1)  # the farthest: DivPrune's first
    order = torch.randperm(TOKENS)
    assert images.attention is not None
    moved = Images(
        images.features[:, order], SIDES, images.question, images.attention[:, order], (0, 1)
    )
    found, other = method.select(images), method.select(moved)
    assert torch.equal(order[other.kept].sort(dim=1).values, found.kept)
    before, after = _features(images, found), _features(moved, other)
    place = order[other.kept].argsort(dim=1)
    after = after.gather(1, place[..., None].expand_as(after))
    torch.testing.assert_close(after, before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["divprune", "cdpruner", "scope", "par"])
def test_duplicates_go_first(name: str) -> None:
    """Half of the tokens repeat the others: one of each pair is kept."""
    images = _images(9)
    half = TOKENS // 2
    first = images.features[:, :half]
    attention = torch.full((2, TOKENS), 1 / TOKENS, dtype=torch.float64)
    twice = Images(torch.cat([first, first], dim=1), SIDES, images.question, attention, (0, 1))
    parameters = {"graph": False, "pool": 8.0} if name == "par" else {}
    kept = make_method(name, 0.2, **parameters).select(twice).kept % half
    assert all(len(set(row.tolist())) == kept.shape[1] for row in kept)


@pytest.mark.parametrize("name", METHODS)
def test_a_single_token_and_equal_tokens(name: str) -> None:
    torch.manual_seed(0)
    equal = torch.ones(1, TOKENS, WIDTH)
    question = Question(torch.randn(1, 2, WIDTH), torch.ones(1, 2))
    attention = torch.full((1, TOKENS), 1 / TOKENS)
    found = make_method(name, 0.25).select(Images(equal, SIDES, question, attention, (0,)))
    assert len(set(found.kept[0].tolist())) == found.kept.shape[1]
    if found.mixing is not None:
        assert torch.isfinite(found.mixing).all()
    none = make_method(name, 0.25).select(Images(equal.clone(), SIDES, None, attention, (0,)))
    assert none.kept.shape == found.kept.shape


def test_random_draws_depend_on_seed_size_and_place() -> None:
    features = torch.zeros(3, TOKENS, 1)
    images = Images(features, SIDES, numbers=(0, 1, 0))
    kept = make_method("random", 0.5).select(images).kept
    assert torch.equal(kept[0], kept[2]) and not torch.equal(kept[0], kept[1])
    assert not torch.equal(kept, make_method("random", 0.5, seed=1).select(images).kept)


@pytest.mark.parametrize(
    ("sides", "keep", "expected"),
    [
        ((4, 6), 0.5, (3, 4)),
        ((4, 6), 0.25, (2, 3)),
        ((24, 24), 0.25, (12, 12)),
        ((24, 24), 0.11, (7, 9)),
        ((1, 9), 0.5, (1, 4)),
        ((4, 6), 0.01, (1, 1)),
    ],
)
def test_the_coarser_grid(sides: tuple[int, int], keep: float, expected: tuple[int, int]) -> None:
    method = make_method("grid", keep)
    assert method.coarser(sides) == expected  # type: ignore[attr-defined]
    assert method.count(sides) == expected[0] * expected[1]


def test_a_grid_averages_its_cells_at_their_middle() -> None:
    features = torch.arange(TOKENS, dtype=torch.float32)[None, :, None]
    found = make_method("grid", 0.25).select(Images(features, SIDES))
    assert found.kept.tolist() == [[0, 2, 4, 12, 14, 16]]
    assert found.mixing is not None
    cells = features.reshape(2, 2, 3, 2).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close((found.mixing @ features)[0, :, 0], cells)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("keep", [0.1, 0.5])
def test_flops_are_those_of_the_matrix_products(name: str, keep: float) -> None:
    from torch.utils.flop_counter import FlopCounterMode

    method, images = make_method(name, keep), _images(many=1)
    with FlopCounterMode(display=False) as counter:
        found = method.select(images)
        _features(images, found)
    assert counter.get_total_flops() == method.flops(SIDES, WIDTH, words=3)
    assert make_method(name, 1.0).flops(SIDES, WIDTH, words=3) == 0


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("parr:0.5", "Unknown reduction 'parr'"),
        ("par", "NAME:SHARE"),
        ("par:half", "NAME:SHARE"),
        ("par:0", r"keep must lie in \(0, 1\]"),
        ("par:1.5", r"keep must lie in \(0, 1\]"),
        ("par:nan", r"keep must lie in \(0, 1\]"),
        ("par:0.5,merg=true", "no parameter 'merg'"),
        ("par:0.5,merge=yes", "merge is a bool"),
        ("par:0.5,pool=0.5", "pool must be at least 1"),
        ("par:0.5,quantile=1", "quantile"),
        ("scope:0.5,alpha=-1", "alpha"),
        ("prumerge:0.5,neighbors=0", "neighbors"),
        ("par:0.5,common=1", "common is a"),
    ],
)
def test_bad_descriptions_are_refused(text: str, problem: str) -> None:
    with pytest.raises(PlanError, match=problem):
        parse_method(text)


def test_descriptions_are_parsed() -> None:
    assert parse_method("par:50%,merge=false,pool=2") == PAR(0.5, merge=False, pool=2.0)
    assert "re-implemented from its description" in PAR(0.5).describe()
    values = PAR(0.5, common=(1, 2)).to_dict()
    assert values["method"] == "par" and values["common"] == [1, 2]
    again: Method = make_method(
        values.pop("method"), values.pop("keep"), **values | {"common": (1, 2)}
    )
    assert again == PAR(0.5, common=(1, 2))
