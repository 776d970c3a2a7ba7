"""Memory of a calibration whose decoder layers stay on disk, beside one that loads them.

Writes a checkpoint of random weights at published widths, layer by layer, calibrates it in
processes of their own, and prints a markdown row for each: seconds, the most resident memory, which
counts the pages of mapped files, and the most memory in use on a GPU. Prompts are those of a demo
model, their pictures enlarged. With ``--apply`` the plan is then baked, loaded with its layers on
disk and given one prompt. With ``--rounds`` calibrations with and without offloading alternate, and
ratios of their times are printed, without what imports take.

    python scripts/layerwise.py --shape-of llava-1.5-13b --layers 8 --folder /var/tmp
    python scripts/layerwise.py --shape-of internvl2-26b --offload always --folder /var/tmp
    python scripts/layerwise.py --layers 2 --side 4 --samples 16 32 64 --fit
    python scripts/layerwise.py --layers 4 --samples 8 --rounds 5
    python scripts/layerwise.py --model qwen2-vl-tiny --samples 64 --batch-size 8 --fit --rounds 5
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
from statistics import median

from large_checkpoint import MODELS, made, write

from yopo import demo
from yopo.bench.random_model import SHAPES

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
import time
import yopo.cli.calibrate
import yopo.pipeline.commands
from yopo.cli.main import main
started = time.perf_counter(), time.process_time()
code = main(sys.argv[1:])
print(time.perf_counter() - started[0], time.process_time() - started[1])
{PEAK}
sys.exit(code)
"""
"""Prints a command's seconds after imports, by the clock and of the CPUs, and peaks of memory."""

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
    parser.add_argument("--model", choices=demo.MODELS, help="a demo model, and no checkpoint")
    parser.add_argument("--side", type=int, default=24, help="visual tokens per row and column")
    parser.add_argument("--samples", type=int, nargs="+", default=[2], help="pairs, of each run")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--fit", action="store_true", help="fit weights, else the paper's shape")
    parser.add_argument("--offload", nargs="+", default=["never", "always"])
    parser.add_argument("--rounds", type=int, default=1, help="runs of each, in turns")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--work-dir", action="store_true", help="keep states in files")
    parser.add_argument("--apply", action="store_true", help="bake the last plan and load it")
    parser.add_argument("--folder", type=Path, help="where the checkpoint is written")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> None:
    """Print the table, row by row as it is measured."""
    options = arguments(words)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="yopo-layerwise-") as folder:
        written = Path(folder) / "model"
        model = options.model or str(written)
        if options.model is None:
            found = made(options.shape_of, options.layers, options.side)
            layers = found.layers
            size = write(found, written)
            del found
            print(f"{layers} layers of {options.shape_of}, {size / 1e9:.1f} GB of weights\n")
        print("| step | time | peak resident memory | on the GPU |")
        print("|---|---:|---:|---:|", flush=True)
        for samples in options.samples:
            compare(options, model, f"{written}-plan.yaml", samples)
        if options.apply:
            baked = f"{written}-baked"
            run("apply", COMMAND, ["apply", f"{written}-plan.yaml", "-o", baked, "-q"])
            shutil.rmtree(written, ignore_errors=True)
            run("load, and one prompt", FORWARD, [baked, pairs_of(options), options.device])


def pairs_of(options: argparse.Namespace) -> str:
    """The demo model's pairs that the model takes."""
    own = "internvl-tiny" if options.shape_of in MODELS else "llava-tiny"
    return demo.demo_data(options.model or own, "calibration")


def compare(options: argparse.Namespace, model: str, plan: str, samples: int) -> None:
    """Calibrate with each choice of offloading, in turns; print a row each and their ratios."""
    times = {
        offload: [calibrate(options, model, plan, samples, offload)] for offload in options.offload
    }
    for _ in range(options.rounds - 1):
        for offload, took in times.items():
            took.append(calibrate(options, model, plan, samples, offload))
    if options.rounds > 1 and {"never", "always"} <= times.keys():
        pairs = list(zip(times["never"], times["always"], strict=True))
        clock, cpu = ([always[i] / never[i] for never, always in pairs] for i in range(2))
        print(
            f"\nalways / never, {samples} pairs, without imports: {ratio(clock)} by the clock, "
            f"{ratio(cpu)} of CPU time\n",
            flush=True,
        )


def ratio(found: Sequence[float]) -> str:
    """The median of ratios, and their range."""
    return f"{median(found):.2f} ({min(found):.2f} to {max(found):.2f})"


def calibrate(
    options: argparse.Namespace, model: str, plan: str, samples: int, offload: str
) -> tuple[float, float]:
    """Calibrate once, print the row, and return seconds without imports: clock, CPUs."""
    request = ["--budget", "0.12"] if options.fit else ["--preset", "yopo-25"]
    command = ["calibrate", "--model", model, "--data", pairs_of(options), "-q", *request]
    command += ["--samples", str(samples), "--batch-size", str(options.batch_size)]
    command += ["--offload", offload, "--device", options.device, "-o", plan, "--force"]
    if options.work_dir:
        shutil.rmtree(f"{plan}-work", ignore_errors=True)
        command += ["--work-dir", f"{plan}-work"]
    printed = run(f"calibrate, {samples} pairs, --offload {offload}", COMMAND, command)
    return float(printed[0]), float(printed[1])


def run(what: str, code: str, words: Sequence[str]) -> list[str]:
    """Run code in a process of its own, print its row, and return the words that it prints."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True)
    took = time.perf_counter() - started
    if done.returncode:
        raise SystemExit(done.stderr)
    printed = done.stdout.split()
    host, device = (f"{int(peak) / 1e9:.2f} GB" for peak in printed[-2:])
    print(f"| {what} | {took:.0f} s | {host} | {device} |", flush=True)
    return printed


if __name__ == "__main__":
    main()
