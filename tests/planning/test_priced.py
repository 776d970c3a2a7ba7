"""Heads selected all at once are those that an enumeration, head by head, would select."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from yopo.planning.priced import HeadCosts, PricedHeads

LAYERS, RANKS, GROUPS, MEMBERS = 3, 4, 3, 2
PRICES = st.floats(0, 3)


def draw(seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, HeadCosts]:
    """Gains, lost shares and costs; some heads mix nothing."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*shape: int) -> torch.Tensor:
        return torch.rand(*shape, generator=generator, dtype=torch.float64)

    mixing = rand(LAYERS, GROUPS, MEMBERS) * (rand(LAYERS, GROUPS, MEMBERS) > 0.3)
    costs = HeadCosts(*(rand(RANKS) for _ in range(5)))
    return rand(LAYERS, GROUPS, MEMBERS), mixing, rand(LAYERS, RANKS), costs


@given(seed=st.integers(0, 999), price=PRICES, kv_price=PRICES)
def test_selected_heads_are_worth_their_price(seed: int, price: float, kv_price: float) -> None:
    reading, mixing, lost, costs = draw(seed)
    found = PricedHeads(reading, mixing, lost, costs).select(price, kv_price)
    for layer in range(LAYERS):
        nets = []
        for rank in range(RANKS):
            kept = 1 - float(lost[layer, rank])
            reads, attends, net = [], [], 0.0
            net -= float(price * costs.start[rank] + kv_price * costs.start_bytes[rank])
            for group in range(GROUPS):
                members = range(group * MEMBERS, (group + 1) * MEMBERS)
                own = kept * mixing[layer, group]
                busy = [
                    head
                    for head, gain in zip(members, own.tolist(), strict=True)
                    if gain > price * float(costs.attend[rank])
                ]
                gain = kept * float(reading[layer, group].sum())
                gain += sum(kept * float(mixing[layer].flatten()[head]) for head in busy)
                cost = price * float(costs.kv[rank] + len(busy) * costs.attend[rank])
                cost += kv_price * float(costs.kv_bytes[rank])
                if gain - cost > 0:
                    reads += members
                    attends += busy
                    net += gain - cost
            nets.append(net if reads else -torch.inf)
            assert found.heads([rank] * LAYERS)[layer] == (tuple(reads), tuple(attends))
        torch.testing.assert_close(found.net[layer], torch.tensor(nets).double())
        best = max(range(RANKS), key=lambda rank: nets[rank])
        assert found.best()[layer] == (best if nets[best] > 0 else None)


@given(seed=st.integers(0, 999), price=PRICES)
def test_everywhere_leaves_only_the_bottleneck_and_attending_to_choose(
    seed: int, price: float
) -> None:
    reading, mixing, lost, costs = draw(seed)
    priced = PricedHeads(reading, mixing, lost, costs)
    usual = priced.select(price, 0.0)
    found = PricedHeads(reading, mixing, lost, costs, everywhere=True).select(price, 0.0)
    assert found.read.all()
    worthwhile = usual.read[..., None]
    assert torch.equal(found.attend & worthwhile, usual.attend)
    assert (found.net <= usual.net.clamp(min=-price * costs.start) + 1e-12).all()
    assert found.best() == found.net.argmax(dim=1).tolist()
    whole = usual.read.all(dim=-1)
    torch.testing.assert_close(found.net[whole], usual.net[whole])
