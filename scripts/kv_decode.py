"""Time decode steps over visual keys and values in few bits, or latents, against whole ones.

Full-width layers of LLaVA-1.5-7B with random weights; nothing is pruned, so that all that differs
is how the visual keys and values lie in the cache. The caches are filled with random numbers, which
takes no prefill. The stock model and every storage take turns, a step each; the table shows medians
of the step's time and of its ratio to the stock model's step in the same round, and to that of the
pruned runtime with whole keys and values.

    python scripts/kv_decode.py --layers 2 --threads 1 --contexts 640 4096
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from statistics import median

import torch
from transformers import DynamicCache, PreTrainedModel

from yopo.bench.random_model import fitted, published_model, random_model
from yopo.plans.flops import visual_kv_bytes
from yopo.plans.grid import Grid
from yopo.plans.schema import PruningPlan, Workload, full_plan
from yopo.runtime.cache import adopt
from yopo.runtime.install import pruned

TEXT = 64
WHOLE = "whole"
STORAGES = {WHOLE: (None, None)} | {
    f"K {keys}, V {values} bits": (keys, values)
    for keys, values in ((8, 8), (8, 4), (4, 4), (4, 2), (2, 2))
}
LATENT_BITS = 8


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contexts", type=int, nargs="+", default=[640, 4096])
    parser.add_argument("--ranks", type=int, nargs="*", default=[256], help="of latents, 8 bits")
    return parser.parse_args()


def full(layers: int, visual: int) -> PruningPlan:
    """The plan that prunes nothing."""
    model = published_model("llava-1.5-7b")
    model = replace(model, shape=replace(model.shape, layers=layers))
    return full_plan(model, Workload((Grid(1, visual),), TEXT, 5))


def plans_of(layers: int, visual: int, ranks: list[int]) -> dict[str, PruningPlan]:
    """The same, its visual keys and values stored in every way."""
    plan = full(layers, visual)
    changes = {
        name: {"key_bits": keys, "value_bits": values} for name, (keys, values) in STORAGES.items()
    }
    changes |= {
        f"latent of {rank}, {LATENT_BITS} bits": {"qkv_rank": rank, "latent_bits": LATENT_BITS}
        for rank in ranks
    }
    plans = {}
    for name, change in changes.items():
        kind = "refit" if "qkv_rank" in change else "none"
        stored = tuple(replace(each, **change) for each in plan.layers)
        plans[name] = fitted(replace(plan, layers=stored, compensation=kind))
    return plans


def draw(plan: PruningPlan, length: int, dtype: torch.dtype) -> torch.Tensor:
    """(1, KV heads, length, head_dim) random numbers."""
    shape = plan.model.shape
    return torch.randn(1, shape.kv_heads, length, shape.head_dim).to(dtype)


def stock_cache(plan: PruningPlan, dtype: torch.dtype) -> DynamicCache:
    """A filled cache of the stock model."""
    cache, length = DynamicCache(), plan.workload.visual + TEXT
    for layer in range(plan.model.shape.layers):
        cache.update(draw(plan, length, dtype), draw(plan, length, dtype), layer)
    return cache


def pruned_cache(model: PreTrainedModel, plan: PruningPlan) -> DynamicCache:
    """A filled cache of a model under a plan."""
    cache, visual, dtype = DynamicCache(), plan.workload.visual, model.dtype
    layers = adopt(cache, model.get_decoder().yopo.splits(model.device))
    places = torch.arange(visual + TEXT)[None]
    if any(each.latent_bits for each in plan.layers):
        states = torch.empty(1, visual, model.config.get_text_config().hidden_size, dtype=dtype)
        layers[0].index.place(model.get_decoder().rotary_emb(states, places[:, :visual]))
    for layer, part in zip(layers, plan.layers, strict=True):
        layer.append(draw(plan, TEXT, dtype), draw(plan, TEXT, dtype))
        if part.latent_bits is not None:
            room = layer.make_latent_room(states)
            room[:, :, :] = torch.randn(1, 1, visual, part.qkv_rank).to(dtype)
            continue
        for room in layer.make_room(visual):
            room[:, :, :] = draw(plan, visual, dtype)
    layers[0].index.extend(places[:, visual:], places[:, :visual], num_tokens=visual + TEXT)
    assert sum(each.visual_bytes() for each in layers) == visual_kv_bytes(plan, dtype.itemsize)
    return cache


def step(model: PreTrainedModel, cache: DynamicCache) -> float:
    """Seconds of one decode step, which the cache then forgets."""
    start = time.perf_counter()
    model(input_ids=torch.tensor([[9]]), past_key_values=cache)
    taken = time.perf_counter() - start
    cache.crop(-1)
    return taken


def measure(
    model: PreTrainedModel, plans: dict[str, PruningPlan], rounds: int
) -> dict[str, list[float]]:
    """Seconds of decode steps, in turns: the stock model's and those under every plan."""
    stock, caches = stock_cache(plans[WHOLE], model.dtype), {}
    for name, plan in plans.items():
        with pruned(model, plan, check=False):
            caches[name] = pruned_cache(model, plan)
    times: dict[str, list[float]] = {"stock": [], **{name: [] for name in plans}}
    for number in range(rounds + 1):
        found = {"stock": step(model, stock)}
        for name, plan in plans.items():
            with pruned(model, plan, check=False):
                found[name] = step(model, caches[name])
        for name, taken in found.items() if number else ():  # the first round warms up
            times[name].append(taken)
    return times


@torch.no_grad()
def main() -> None:
    """Measure and print a table per context."""
    options = arguments()
    torch.set_num_threads(options.threads)
    shape = full(options.layers, 1).model.shape
    model = random_model(shape, dtype=getattr(torch, options.dtype))
    for context in options.contexts:
        plans = plans_of(options.layers, context - TEXT, options.ranks)
        times = measure(model, plans, options.rounds)
        print(
            f"\n| context {context}, {options.dtype} | visual KV | step | over stock | over whole |"
        )
        print("|---|---:|---:|---:|---:|")
        for name, taken in times.items():
            size = visual_kv_bytes(plans.get(name, plans[WHOLE]), model.dtype.itemsize)
            over = [
                median(one / other for one, other in zip(taken, times[base], strict=True))
                for base in ("stock", WHOLE)
            ]
            cells = f"{size / 1e6:.1f} MB | {1e3 * median(taken):.1f} ms"
            print(f"| {name} | {cells} | {over[0]:.2f} | {over[1]:.2f} |")


if __name__ == "__main__":
    main()
