"""Time prefills in vLLM, dense against pruned, in one engine on a CPU.

Full-width layers of LLaVA-1.5-7B with dummy weights, and as large a part of its vision tower. A
prefill whose visual rows nobody marks runs vLLM's own layers at full width: that is the dense one.
So both take turns in the same engine, with the same memory, images that no cache has seen, and no
prefix cache. Every round measures a dense prefill and a pruned one; the table shows medians.

    .venv-vllm/bin/python scripts/vllm_bench.py --images 1 --batch 1 --rounds 7

* forward: seconds in the language model; FLOPs of its decoder layers as executed: products of
  linear layers are counted as they run, attention, which is the same in both, is added.
* CPU: processor time of the same, which a machine that others use disturbs less.
* first token: seconds from the request to its first token: preprocessing, vision tower, sampling.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch
from PIL import Image

from yopo.bench.random_model import published_model
from yopo.checkpoint.sidecar_files import PLAN_FILE, TENSORS_FILE
from yopo.demo import LLAVA_TINY
from yopo.plans.flops import visual_budget
from yopo.plans.grid import Grid
from yopo.plans.schema import Budget, LayerPlan, ModelShape, PruningPlan, Workload, full_plan
from yopo.plans.storage import plan_files
from yopo.plans.tensors import PlanTensors

TEXT, SIDE, PATCH = 64, 336, 14
GRID = Grid(SIDE // PATCH, SIDE // PATCH)
VOCABULARY = 32064
TOWER = {
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "image_size": SIDE,
    "patch_size": PATCH,
    "projection_dim": 768,
}
TOWER_LAYERS = 24


@dataclass(frozen=True)
class Part:
    """What visual tokens do in every layer, in shares of the dense model's widths.

    Attributes:
        rank: Of the bottleneck of queries, keys and values.
        attends: Whether visual tokens attend, in all heads.
        neurons: Share of the FFN.
        map_rank: Of the linear map.
    """

    rank: float
    attends: bool
    neurons: float
    map_rank: float

    def of(self, shape: ModelShape) -> LayerPlan:
        """The layer's plan."""
        heads = tuple(range(shape.heads))
        return LayerPlan(
            read_heads=heads,
            attend_heads=heads if self.attends else (),
            radius=None,
            neurons=round(self.neurons * shape.ffn),
            qkv_rank=round(self.rank * shape.hidden),
            map_rank=round(self.map_rank * shape.hidden),
        )


PARTS = {
    "half": Part(1 / 2, True, 1 / 4, 1 / 16),
    "quarter": Part(1 / 4, False, 1 / 4, 1 / 8),
    "eighth": Part(1 / 8, False, 1 / 8, 1 / 16),
}


def arguments() -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--images", type=int, default=1, help="of 576 tokens each")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--kv-gigabytes", type=int, default=1)
    return parser.parse_args()


def plan_of(part: Part, layers: int, images: int) -> PruningPlan:
    """A plan with the same part in all layers, whose weights vLLM makes up."""
    model = published_model("llava-1.5-7b")
    model = replace(model, shape=replace(model.shape, layers=layers))
    plan = full_plan(model, Workload((GRID,) * images, TEXT, 5))
    order = torch.arange(model.shape.ffn).expand(layers, -1).contiguous()
    plan = replace(plan, compensation="refit", tensors=PlanTensors(neuron_order=order))
    plan = plan.with_layers([part.of(model.shape)] * layers)
    return replace(plan, budget=Budget(None, visual_budget(plan)))


def write_checkpoint(plan: PruningPlan, folder: Path) -> None:
    """Write everything of a baked checkpoint but weights."""
    shape = plan.model.shape
    for path in LLAVA_TINY.iterdir():
        if path.suffix in (".json", ".jinja"):
            (folder / path.name).write_text(path.read_text())
    config = json.loads((folder / "config.json").read_text())
    config["text_config"] |= {
        "hidden_size": shape.hidden,
        "intermediate_size": shape.ffn,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "num_hidden_layers": shape.layers,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 4096,
    }
    whole = published_model("llava-1.5-7b").shape.layers
    tower = max(1, round(TOWER_LAYERS * shape.layers / whole))
    config["vision_config"] |= TOWER | {"num_hidden_layers": tower}
    config |= {"image_seq_length": GRID.tokens, "yopo": {"plan": PLAN_FILE}}
    (folder / "config.json").write_text(json.dumps(config))
    processor = json.loads((folder / "processor_config.json").read_text())
    processor["image_processor"] |= {
        "crop_size": {"height": SIDE, "width": SIDE},
        "size": {"shortest_edge": SIDE},
    }
    (folder / "processor_config.json").write_text(json.dumps(processor | {"patch_size": PATCH}))
    for name, content in plan_files(plan, PLAN_FILE, TENSORS_FILE).items():
        (folder / name).write_bytes(content)


@dataclass
class Prefill:
    """One measured prefill.

    Attributes:
        forward: Seconds in the language model.
        processor: Processor time of this process meanwhile, in seconds.
        first_token: Seconds until all requests have their first token.
        linear: FLOPs of the decoder layers' linear layers.
    """

    forward: float = 0.0
    processor: float = 0.0
    first_token: float = 0.0
    linear: int = 0


@dataclass
class Bench:
    """An engine, and the two ways to run it."""

    llm: Any
    images: int
    batch: int
    prompt: str
    running: Prefill = field(default_factory=Prefill)

    def __post_init__(self) -> None:
        self.model = self.llm.apply_model(lambda model: model)[0]
        self.layers = self.model.get_language_model().model.layers
        self._forward, self._mark = self.model.forward, self.model.rows.mark
        self.model.forward = self._timed

    def _timed(self, *args: Any, **kwargs: Any) -> Any:
        start, used = time.perf_counter(), time.process_time()
        found = self._forward(*args, **kwargs)
        self.running.forward += time.perf_counter() - start
        self.running.processor += time.process_time() - used
        return found

    def prefill(self, *, pruned: bool, count: bool = False) -> Prefill:
        """Run one batch of prompts; counting FLOPs takes time, so it is done in runs of its own."""
        from vllm import SamplingParams

        self.running = Prefill()
        self.model.rows.mark = self._mark if pruned else lambda mask: None
        requests = [
            {"prompt": self.prompt, "multi_modal_data": {"image": self._pictures()}}
            for _ in range(self.batch)
        ]
        with self._counting() if count else _nothing():
            start = time.perf_counter()
            found = self.llm.generate(
                requests, SamplingParams(temperature=0, max_tokens=1), use_tqdm=False
            )
            self.running.first_token = time.perf_counter() - start
        assert len(found[0].prompt_token_ids) == self.images * GRID.tokens + TEXT
        return self.running

    def _pictures(self) -> list[Image.Image]:
        return [
            Image.frombytes("RGB", (SIDE, SIDE), random.randbytes(3 * SIDE * SIDE))
            for _ in range(self.images)
        ]

    @contextmanager
    def _counting(self) -> Iterator[None]:
        from vllm.model_executor.layers.linear import UnquantizedLinearMethod

        parts = {id(part) for part in self.layers.modules()}
        usual = UnquantizedLinearMethod.apply

        def apply(method: Any, layer: Any, inputs: torch.Tensor, bias: Any = None) -> torch.Tensor:
            outputs: torch.Tensor = usual(method, layer, inputs, bias)
            if id(layer) in parts:
                self.running.linear += 2 * inputs.numel() * outputs.shape[-1]
            return outputs

        UnquantizedLinearMethod.apply = apply
        try:
            yield
        finally:
            UnquantizedLinearMethod.apply = usual


@contextmanager
def _nothing() -> Iterator[None]:
    yield


@contextmanager
def engine(folder: Path, options: argparse.Namespace) -> Iterator[Any]:
    """An engine in this process with dummy weights."""
    os.environ |= {
        "VLLM_CPU_KVCACHE_SPACE": str(options.kv_gigabytes),
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }
    from vllm import LLM
    from vllm.distributed import cleanup_dist_env_and_memory

    length = options.images * GRID.tokens + TEXT
    llm = LLM(
        str(folder),
        dtype=options.dtype,
        load_format="dummy",
        enforce_eager=True,
        max_model_len=length + 1,
        max_num_seqs=options.batch,
        max_num_batched_tokens=options.batch * (length + 1),  # no prompt is cut
        enable_prefix_caching=False,
        mm_processor_cache_gb=0,
        limit_mm_per_prompt={"image": options.images, "video": 0},
        disable_log_stats=True,
    )
    assert torch.get_num_threads() == options.threads
    try:
        yield llm
    finally:
        llm.llm_engine.engine_core.shutdown()
        del llm
        cleanup_dist_env_and_memory()


def prompt_of(folder: Path, images: int) -> str:
    """Images, and a text such that there are ``TEXT`` tokens beside theirs."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompt = "<image>" * images + "\n"
    while len(tokenizer(prompt).input_ids) - images < TEXT:
        prompt += " is"
    return prompt


def attention(plan: PruningPlan) -> int:
    """FLOPs of the attention of one prompt, which the engine's kernels compute in full."""
    shape, length = plan.model.shape, plan.workload.visual + TEXT
    return 2 * shape.layers * shape.heads * shape.head_dim * length * (length + 1)


def measure(name: str, options: argparse.Namespace) -> str:
    """A row of the table."""
    plan = plan_of(PARTS[name], options.layers, options.images)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        write_checkpoint(plan, folder)
        prompt = prompt_of(folder, options.images)
        with engine(folder, options) as llm:
            bench = Bench(llm, options.images, options.batch, prompt)
            whole = options.batch * attention(plan)
            flops = [
                bench.prefill(pruned=pruned, count=True).linear + whole for pruned in (False, True)
            ]
            rounds = [
                (bench.prefill(pruned=False), bench.prefill(pruned=True))
                for _ in range(options.rounds)
            ]
    executed = flops[1] / flops[0]
    cells = [f"{plan.budget.reached:.1%}", f"{executed:.3f}"]
    for kind in ("forward", "processor", "first_token"):
        pairs = [(getattr(dense, kind), getattr(pruned, kind)) for dense, pruned in rounds]
        before, after = (median(each) for each in zip(*pairs, strict=True))
        ratio = median(pruned / dense for dense, pruned in pairs)
        cells += [f"{before:.2f} -> {after:.2f}", f"{ratio:.3f}"]
        cells += [f"{ratio / executed:.2f}"] if kind != "first_token" else []
    return f"| {' | '.join(cells)} |"


def main() -> None:
    """Measure and print a table."""
    options = arguments()
    torch.set_num_threads(options.threads)  # before vLLM, which then forbids it
    titles = ["visual budget", "executed FLOPs"]
    for kind in ("forward, s", "CPU, s"):
        titles += [kind, "ratio", "over FLOPs"]
    titles += ["first token, s", "ratio"]
    print(f"| {' | '.join(titles)} |\n|{'---:|' * len(titles)}")
    for name in options.parts:
        print(measure(name, options), flush=True)


if __name__ == "__main__":
    main()
