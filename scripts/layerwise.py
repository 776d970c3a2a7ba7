"""Memory of a calibration whose decoder layers stay on disk, beside one that loads them.

Writes a checkpoint of random weights at published widths, layer by layer, calibrates it in
processes of their own, and prints a markdown row for each: seconds, the most resident memory, which
counts the pages of mapped files, and the most memory in use on a GPU. Prompts are those of a demo
model, their pictures enlarged. With ``--apply`` the plan is then baked, loaded with its layers on
disk and given one prompt.

    python scripts/layerwise.py --shape-of llava-1.5-13b --layers 8 --folder /var/tmp
    python scripts/layerwise.py --shape-of internvl2-26b --offload always --folder /var/tmp
    python scripts/layerwise.py --layers 2 --side 4 --samples 16 32 64 --fit
"""

from __future__ import annotations

import argparse
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from large_checkpoint import MODELS, made, write

from yopo.bench.random_model import SHAPES
from yopo.demo import demo_data

PEAK = """
import torch
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(1024 * int(line.split()[1]), torch.cuda.max_memory_allocated())
"""
"""Prints a process's own peaks, on the host (``ru_maxrss`` of a child starts at its parent's) and
on a GPU."""

COMMAND = f"""
import sys
from yopo.cli.main import main
code = main(sys.argv[1:])
{PEAK}
sys.exit(code)
"""

FORWARD = f"""
import sys
import torch
import yopo
from yopo.checkpoint.reader import Checkpoint
from yopo.data.prompts import batches, encode_for, load_processor
from yopo.data.sources import open_pairs
from yopo.serving.layers_on_disk import map_for
folder, data, device = sys.argv[1:]
places = map_for(Checkpoint.open(folder), "auto", device, "always")
model = yopo.load(folder, device_map=places)
processor = load_processor(folder)
pairs = open_pairs(data, samples=1, seed=0)
batch = encode_for(model, processor, next(iter(batches(pairs, 1))))
with torch.no_grad():
    logits = model(**batch.inputs, logits_to_keep=1).logits
assert logits.isfinite().all()
{PEAK}
"""
"""Loads a baked checkpoint, its layers on disk, and runs one prompt."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape-of", choices=sorted({*SHAPES, *MODELS}), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, help="decoder layers  [default: all]")
    parser.add_argument("--side", type=int, default=24, help="visual tokens per row and column")
    parser.add_argument("--samples", type=int, nargs="+", default=[2], help="pairs, of each run")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--fit", action="store_true", help="fit weights, else the paper's shape")
    parser.add_argument("--offload", nargs="+", default=["never", "always"])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work-dir", action="store_true", help="keep states in files")
    parser.add_argument("--apply", action="store_true", help="bake the last plan and load it")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, row by row as it is measured."""
    options = arguments(words)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="yopo-layerwise-") as folder:
        model = Path(folder) / "model"
        found = made(options.shape_of, options.layers, options.side)
        layers = found.layers
        size = write(found, model)
        del found
        print(f"{layers} layers of {options.shape_of}, {size / 1e9:.1f} GB of weights\n")
        print("| step | time | peak resident memory | on the GPU |")
        print("|---|---:|---:|---:|", flush=True)
        for samples in options.samples:
            for offload in options.offload:
                calibrate(options, model, samples, offload)
        if options.apply:
            baked = f"{model}-baked"
            run("apply", COMMAND, ["apply", f"{model}-plan.yaml", "-o", baked, "-q"])
            shutil.rmtree(model)
            data = demo_data(demo_of(options.shape_of), "calibration")
            run("load, and one prompt", FORWARD, [baked, data, options.device])


def demo_of(name: str) -> str:
    """The demo model whose prompts a shape takes."""
    return "internvl-tiny" if name in MODELS else "llava-tiny"


def calibrate(options: argparse.Namespace, model: Path, samples: int, offload: str) -> None:
    """Calibrate once and print its row."""
    request = ["--budget", "0.12"] if options.fit else ["--preset", "yopo-25"]
    data = demo_data(demo_of(options.shape_of), "calibration")
    command = ["calibrate", "--model", str(model), "--data", data, "-q", *request]
    command += ["--samples", str(samples), "--batch-size", str(options.batch_size)]
    command += ["--offload", offload, "--device", options.device, "-o", f"{model}-plan.yaml"]
    if options.work_dir:
        shutil.rmtree(f"{model}-work", ignore_errors=True)
        command += ["--work-dir", f"{model}-work"]
    run(f"calibrate, {samples} pairs, --offload {offload}", COMMAND, [*command, "--force"])


def run(what: str, code: str, words: Sequence[str]) -> None:
    """Run code in a process of its own and print its row."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    host, device = (f"{int(peak) / 1e9:.2f} GB" for peak in done.stdout.split()[-2:])
    print(f"| {what} | {took:.0f} s | {host} | {device} |", flush=True)


if __name__ == "__main__":
    main()
