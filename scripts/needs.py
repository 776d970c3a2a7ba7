"""What a calibration says that it needs, beside what it takes, in processes of their own.

Prints a markdown row for each: the estimate, the most resident memory over that after imports, and
how much of it is not pages of mapped files (weights that keep their dtype, states in a work
directory), which the system can drop; and the estimate of time beside the CPU time on one thread,
since the clock depends on what else the machine does. Random weights have a shape of your own, and
the prompts of `llava-tiny` with enlarged pictures; `--model` takes a demo model as it is.

    python scripts/needs.py --model llava-tiny --samples 64
    python scripts/needs.py --layers 2 --hidden 512 --side 24 --samples 64 --offload never always
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from whole_calibration import DEMO, random_parts

from yopo.demo import demo_data, is_demo
from yopo.plans.schema import ModelShape

CHILD = """
import sys, threading, time
import yopo.pipeline.commands, yopo.cli.calibrate, yopo.data.processing, rich.console
from yopo.cli.main import main
def resident(name):
    lines = open("/proc/self/status").read().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])
before, started = resident("VmRSS"), time.process_time()
own, most, ended = resident("RssAnon"), 0, threading.Event()
def watch():
    global most
    while not ended.wait(0.02):
        most = max(most, resident("RssAnon"))
watcher = threading.Thread(target=watch)
watcher.start()
code = main(sys.argv[1:])
took = time.process_time() - started
ended.set()
watcher.join()
print(resident("VmHWM") - before, most - own, took)
sys.exit(code)
"""
"""A command that prints the memory that it took over its imports, in all and without mapped files
(looked at 50 times a second), and its CPU time."""

_SAID = re.compile(r"takes about ([\d.]+) (MB|GB) of memory.* (?:and|at least) ([\d.]+) (s|min|h)")
_UNITS = {"MB": 1e6, "GB": 1e9, "s": 1.0, "min": 60.0, "h": 3600.0}


@dataclass(frozen=True)
class Found:
    """One calibration: bytes and seconds, as it said and as they were."""

    said_bytes: float
    bytes: float
    own_bytes: float
    said_seconds: float
    seconds: float


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", help="a demo model, instead of random weights")
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=1024, help="a multiple of 128")
    parser.add_argument("--ffn", type=int, help="[default: 2.75 times the width]")
    parser.add_argument("--side", type=int, default=8, help="visual tokens per row and column")
    parser.add_argument("--dtype", default="float32", help="of the files")
    parser.add_argument("--samples", type=int, nargs="+", default=[32])
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--offload", nargs="+", default=["never"])
    parser.add_argument("--work-dir", action="store_true", help="keep stages, and states, in files")
    parser.add_argument("--request", default="--budget 0.12 --compensation refit")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written")
    return parser.parse_args(words)


def main(words: Sequence[str] | None = None) -> list[Found]:
    """Print the table, row by row as it is measured."""
    options, rows = arguments(words), []
    print("| model | pairs | offload | memory: said | resident | not mapped | ratio ", end="")
    print("| time: said | CPU | ratio |")
    print("|---|---:|---|---:|---:|---:|---:|---:|---:|---:|", flush=True)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="yopo-needs-") as folder:
        model, name = options.model, options.model
        if model is None:
            model, name = f"{folder}/model", _write(options, f"{folder}/model")
        for samples in options.samples:
            for offload in options.offload:
                found = measured(options, model, samples, offload, folder)
                where = f"{offload}, `--work-dir`" if options.work_dir else offload
                print(f"| {name} | {samples} | {where} | {_cells(found)} |", flush=True)
                rows.append(found)
    return rows


def _write(options: argparse.Namespace, folder: str) -> str:
    """Write a checkpoint of random weights; returns its name in the table."""
    width, ffn = options.hidden, options.ffn or options.hidden * 11 // 4
    heads = width // 128
    shape = ModelShape(options.layers, width, heads, heads, 128, ffn)
    model, processor = random_parts(shape, options.side, options.dtype)
    model.save_pretrained(folder, max_shard_size="2GB")
    processor.save_pretrained(folder)
    return f"{options.layers} x {width}, {options.side**2} visual tokens, {options.dtype}"


def measured(
    options: argparse.Namespace, model: str, samples: int, offload: str, folder: str
) -> Found:
    """Calibrate once."""
    command = ["calibrate", "--model", model, "--samples", str(samples), "--device", "cpu"]
    if not is_demo(model):
        command += ["--data", demo_data(DEMO, "calibration")]
    command += ["--batch-size", str(options.batch_size), "--offload", offload]
    command += [*options.request.split(), "-o", f"{folder}/plan.yaml", "--force"]
    with tempfile.TemporaryDirectory(dir=folder) as work:
        command += ["--work-dir", work] if options.work_dir else []
        done = subprocess.run(
            [sys.executable, "-c", CHILD, *command],
            capture_output=True,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    said = _SAID.search(done.stderr)
    if done.returncode or said is None:
        raise SystemExit(done.stderr)
    size, size_unit, took, time_unit = said.groups()
    taken, own, seconds = map(float, done.stdout.split()[-3:])
    said_seconds = float(took) * _UNITS[time_unit]
    return Found(float(size) * _UNITS[size_unit], taken, own, said_seconds, seconds)


def _cells(found: Found) -> str:
    sizes = (found.said_bytes, found.bytes, found.own_bytes)
    return " | ".join(
        [
            *(f"{each / 1e9:.2f} GB" for each in sizes),
            f"{found.said_bytes / found.bytes:.2f}",
            *(f"{each:.0f} s" for each in (found.said_seconds, found.seconds)),
            f"{found.said_seconds / found.seconds:.2f}",
        ]
    )


if __name__ == "__main__":
    main()
