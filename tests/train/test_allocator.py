"""The tuning of the allocator: done where it can be, left alone where somebody tuned it, never an error."""

import ctypes
import os
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.train.allocator import keep_freed_memory

ROOT = Path(__file__).parents[2]
GLIBC = hasattr(os, "confstr") and "CS_GNU_LIBC_VERSION" in os.confstr_names


@pytest.fixture
def untuned(monkeypatch):
    for name in [name for name in os.environ if name.startswith("MALLOC_") or name == "GLIBC_TUNABLES"]:
        monkeypatch.delenv(name)


@pytest.mark.parametrize(
    "name, value",
    [("MALLOC_MMAP_THRESHOLD_", "1000000"), ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1")],
)
def test_keep_freed_memory_respects_environment(name, value, untuned, monkeypatch):
    def no_library(path):
        raise AssertionError("the allocator was touched")

    monkeypatch.setattr(ctypes, "CDLL", no_library)
    monkeypatch.setenv(name, value)
    assert keep_freed_memory() is False


@pytest.mark.parametrize("error", [OSError, AttributeError])
def test_keep_freed_memory_on_other_systems(error, untuned, monkeypatch):
    def missing(*arguments):
        raise error("no such library")

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert keep_freed_memory() is False
    monkeypatch.delattr(os, "confstr", raising=False)
    assert keep_freed_memory() is False


SAVES = """
import resource, torch
from finetune.train.allocator import freed_at_once, keep_freed_memory
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        torch.zeros(8 << 20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
def grows(mib):
    before = int(open("/proc/self/statm").read().split()[1])
    torch.ones(mib << 18)  # and freed
    return int(open("/proc/self/statm").read().split()[1]) - before > mib / 2 * 256  # pages of 4 KiB
with freed_at_once():  # before anything is kept: without effect
    found = [grows(64)]
found.append(keep_freed_memory())
found.append(grows(64))
with freed_at_once():
    found.append(grows(256))
found.append(grows(256))
try:
    with freed_at_once():
        1 / 0
except ZeroDivisionError:
    found.append(grows(1000))
faults()
print(*found, faults())
"""


@pytest.mark.skipif(not GLIBC or os.sysconf("SC_PAGE_SIZE") != 4096, reason="reads /proc as of Linux on x86")
@pytest.mark.slow
def test_keep_freed_memory_and_freed_at_once(untuned):
    done = subprocess.run([sys.executable, "-c", SAVES], cwd=ROOT, capture_output=True, text=True, check=True)
    *found, faults = done.stdout.split()
    # Kept while training; what is more goes back inside the block; kept again after it, and after an error.
    assert found == ["False", "True", "True", "False", "True", "True"]
    # 32 MiB twenty times is far more than this where each is mapped again, even in pages of 2 MiB.
    assert int(faults) < 20
