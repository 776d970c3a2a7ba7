"""The papers' formulas, one token at a time, in plain numbers: no batches, no updates."""

from __future__ import annotations

import math

Vector = list[float]


def cosine(a: Vector, b: Vector) -> float:
    dot = math.fsum(x * y for x, y in zip(a, b, strict=True))
    return dot / math.sqrt(math.fsum(x * x for x in a) * math.fsum(y * y for y in b))


def divprune(tokens: list[Vector], count: int) -> list[int]:
    """Max-min distance: the first is the one farthest from its nearest neighbor."""
    everyone = range(len(tokens))

    def least(one: int, others: list[int]) -> float:
        return min(1 - cosine(tokens[one], tokens[each]) for each in others)

    chosen = [max(everyone, key=lambda i: least(i, [j for j in everyone if j != i]))]
    while len(chosen) < count:
        rest = [i for i in everyone if i not in chosen]
        chosen.append(max(rest, key=lambda i: least(i, chosen)))
    return sorted(chosen)


def determinant(matrix: list[Vector]) -> float:
    rows, total = [list(row) for row in matrix], 1.0
    for place in range(len(rows)):
        pivot = max(range(place, len(rows)), key=lambda i: abs(rows[i][place]))
        if rows[pivot][place] == 0:
            return 0.0
        if pivot != place:
            rows[place], rows[pivot] = rows[pivot], rows[place]
            total = -total
        total *= rows[place][place]
        for other in rows[place + 1 :]:
            factor = other[place] / rows[place][place]
            for k in range(place, len(rows)):
                other[k] -= factor * rows[place][k]
    return total


def cdpruner(tokens: list[Vector], count: int, words: list[Vector] | None) -> list[int]:
    """The greedy maximum of the determinant of diag(r) S diag(r), by determinants."""
    relevance = [1.0] * len(tokens)
    if words is not None:
        raw = [math.fsum(cosine(word, each) for word in words) / len(words) for each in tokens]
        relevance = [(each - min(raw)) / (max(raw) - min(raw)) for each in raw]

    def kernel(members: list[int]) -> float:
        return determinant(
            [
                [relevance[i] * cosine(tokens[i], tokens[j]) * relevance[j] for j in members]
                for i in members
            ]
        )

    chosen: list[int] = []
    while len(chosen) < count:
        rest = [i for i in range(len(tokens)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: round(kernel([*chosen, i]), 12)))
    return sorted(chosen)


def scope(tokens: list[Vector], count: int, attention: Vector, alpha: float) -> list[int]:
    """Greedy coverage times saliency."""
    everyone = range(len(tokens))
    chosen: list[int] = []
    while len(chosen) < count:

        def gain(i: int) -> float:
            covered = [
                max([0.0, *(cosine(tokens[u], tokens[s]) for s in chosen)]) for u in everyone
            ]
            added = (max(0.0, cosine(tokens[u], tokens[i]) - covered[u]) for u in everyone)
            return math.fsum(added) * attention[i] ** alpha

        chosen.append(max((i for i in everyone if i not in chosen), key=gain))
    return sorted(chosen)


def prumerge(
    tokens: list[Vector], count: int, attention: Vector, neighbors: int
) -> tuple[list[int], list[Vector]]:
    """The most attended tokens, and their features with those of dropped neighbors added."""
    order = sorted(range(len(tokens)), key=lambda i: -attention[i])
    kept = sorted(order[:count])
    dropped, merged = order[count:], []
    for i in kept:
        near = sorted(dropped, key=lambda j: -cosine(tokens[i], tokens[j]))[:neighbors]
        merged.append(
            [
                tokens[i][k] + math.fsum(attention[j] * tokens[j][k] for j in near)
                for k in range(len(tokens[i]))
            ]
        )
    return kept, merged


def folder(tokens: list[Vector], count: int) -> tuple[list[int], list[Vector]]:
    """Merge the most similar tokens of even places into odd ones, until ``count`` remain."""
    left = [(place, each, 1) for place, each in enumerate(tokens)]
    while len(left) > count:
        even, odd = left[::2], left[1::2]
        pairs = []
        for place, one, size in even:
            to = max(range(len(odd)), key=lambda i: cosine(one, odd[i][1]))
            pairs.append((cosine(one, odd[to][1]), place, to, one, size))
        pairs.sort(key=lambda pair: -pair[0])
        leaving = pairs[: min(len(odd), len(left) - count)]
        sums = [[value * size for value in each] for _, each, size in odd]
        sizes = [size for _, _, size in odd]
        for _, _, to, one, size in leaving:
            sums[to] = [a + b * size for a, b in zip(sums[to], one, strict=True)]
            sizes[to] += size
        gone = {place for _, place, *_ in leaving}
        merged = [
            (odd[i][0], [value / sizes[i] for value in sums[i]], sizes[i]) for i in range(len(odd))
        ]
        left = sorted([each for each in even if each[0] not in gone] + merged)
    return [place for place, _, _ in left], [each for _, each, _ in left]


def par(
    tokens: list[Vector], count: int, words: list[Vector], *, quantile: float, pool: float
) -> tuple[list[int], list[Vector]]:
    """PAR without a graph: retrieval one by one, routing, merging."""
    width, everyone = len(tokens[0]), range(len(tokens))
    mean = [math.fsum(each[k] for each in tokens) / len(tokens) for k in range(width)]
    centred = [[a - b for a, b in zip(each, mean, strict=True)] for each in tokens]
    raw = [math.fsum(max(0.0, cosine(word, each)) for word in words) for each in centred]
    relevance = [max(each / max(raw), 1e-3) for each in raw]
    order = sorted(everyone, key=lambda i: -relevance[i])
    candidates = set(order[: int(pool * count)])
    pairs = sorted(cosine(centred[i], centred[j]) for i in everyone for j in everyone if i != j)
    threshold = pairs[min(int(quantile * len(pairs)), len(pairs) - 1)]
    chosen: list[int] = []
    while len(chosen) < count:

        def merit(i: int) -> float:
            nearest = max([-1.0, *(cosine(centred[i], centred[s]) for s in chosen)])
            return math.sqrt(relevance[i]) * (1 - nearest)

        rest = [i for i in everyone if i not in chosen and i in candidates]
        chosen.append(max(rest, key=merit))
    chosen.sort()
    groups = {i: [tokens[i]] for i in chosen}
    for j in everyone:
        if j not in chosen:
            to = max(chosen, key=lambda i: cosine(centred[i], centred[j]))
            if cosine(centred[to], centred[j]) > threshold:
                groups[to].append(tokens[j])
    merged = [
        [math.fsum(each[k] for each in groups[i]) / len(groups[i]) for k in range(width)]
        for i in chosen
    ]
    return chosen, merged
