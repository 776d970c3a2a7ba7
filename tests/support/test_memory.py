"""Freed memory goes back to the system."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

CODE = """
import gc, threading, time
import torch
from yopo.support import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096

def work(kept):
    for _ in range(3):  # the first blocks that are freed have the C library keep later ones
        blocks = [torch.ones(1 << 18) for _ in range(32)]
        kept.append(torch.ones(64))
        del blocks

kept = []
threads = [threading.Thread(target=work, args=(kept,)) for _ in range(8)]
for each in threads:
    each.start()
for each in threads:
    each.join()
give_back, before = memory.GivingBack(), resident()
give_back()
too_soon = resident()
give_back._last -= memory.PERIOD
give_back()
print(before, too_soon, resident())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc alone keeps it")
def test_what_threads_freed_is_given_back_now_and_then() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    before, too_soon, after = map(int, done.stdout.split())
    assert after < before - (16 << 20)
    assert too_soon > after + (16 << 20)
