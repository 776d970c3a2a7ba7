"""Memory of a calibration whose decoder layers stay on disk, beside one that loads them.

Writes a checkpoint of random weights at published widths, calibrates it in processes of their own,
and prints a markdown row for each: seconds, and the most resident memory, which counts the pages of
mapped files. Prompts are those of `llava-tiny`, their pictures enlarged.

    python scripts/layerwise.py --shape-of llava-1.5-13b --layers 8 --samples 2 --folder /var/tmp
    python scripts/layerwise.py --layers 2 --side 4 --samples 16 32 64 --fit
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from whole_calibration import DEMO, model_and_processor

from yopo.bench.random_model import SHAPES
from yopo.demo import demo_data

CHILD = """
import sys
from yopo.cli.main import main
code = main(sys.argv[1:])
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(1024 * int(line.split()[1]))
sys.exit(code)
"""
"""A command that prints its own peak: ``ru_maxrss`` of a child starts at its parent's."""


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape-of", choices=sorted(SHAPES), default="llava-1.5-7b")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--side", type=int, default=24, help="visual tokens per row and column")
    parser.add_argument("--samples", type=int, nargs="+", default=[2], help="pairs, of each run")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--fit", action="store_true", help="fit weights, else the paper's shape")
    parser.add_argument("--offload", nargs="+", default=["never", "always"])
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    options = parser.parse_args(words)
    options.device = "cpu"
    return options


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, row by row as it is measured."""
    options = arguments(words)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="yopo-layerwise-") as made:
        folder = f"{made}/model"
        model, processor = model_and_processor(options)
        size = sum(weight.nbytes for weight in model.parameters())
        model.save_pretrained(folder, max_shard_size="2GB")
        processor.save_pretrained(folder)
        del model
        print(f"{options.layers} layers of {options.shape_of}, {size / 1e9:.1f} GB of weights\n")
        print("| pairs | offload | time | peak resident memory |\n|---:|---|---:|---:|", flush=True)
        for samples in options.samples:
            for offload in options.offload:
                run(options, folder, samples, offload)


def run(options: argparse.Namespace, folder: str, samples: int, offload: str) -> None:
    """Calibrate once and print its row."""
    request = ["--budget", "0.12"] if options.fit else ["--preset", "yopo-25"]
    command = ["calibrate", "--model", folder, "--data", demo_data(DEMO, "calibration"), "-q"]
    command += ["--samples", str(samples), "--batch-size", str(options.batch_size)]
    command += ["--offload", offload, "--device", "cpu", *request, "-o", f"{folder}-plan.yaml"]
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-c", CHILD, *command, "--force"], capture_output=True, text=True
    )
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    peak = int(done.stdout.split()[-1])
    print(f"| {samples} | {offload} | {took:.0f} s | {peak / 1e9:.2f} GB |", flush=True)


if __name__ == "__main__":
    main()
