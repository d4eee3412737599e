"""The allocator keeps what is freed, and asks for huge pages where the system has them."""

import subprocess
import sys
from pathlib import Path

import pytest

PROBE = """
import ctypes
from shoal.allocator import keep_memory
keep_memory()
libc = ctypes.CDLL(None)
libc.malloc.restype = ctypes.c_void_p
libc.malloc.argtypes = libc.free.argtypes = [ctypes.c_size_t]
libc.sbrk.restype = ctypes.c_void_p
size = 256 << 20
block = libc.malloc(size)
ctypes.memset(block, 1, size)
huge = [line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages")]
libc.free(block)
rss = [line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("Rss")]
print(huge[0], rss[0])
"""
SWITCH = Path("/sys/kernel/mm/transparent_hugepage/enabled")


@pytest.mark.skipif(not Path("/proc/self/smaps_rollup").exists(), reason="needs Linux's smaps_rollup")
def test_freed_memory_is_kept_and_lies_in_huge_pages():
    done = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True, check=True, timeout=60)
    huge_kib, rss_kib = map(int, done.stdout.split())
    assert rss_kib > 256 << 10  # freed, and still there
    if SWITCH.exists() and "[never]" not in SWITCH.read_text(encoding="utf-8"):
        assert huge_kib > 128 << 10
