"""The pool reuses freed blocks, stays bounded, and survives threads; each case in a process of its own."""

import subprocess
import sys

import pytest

START = """
import random, threading
import torch
from shoal.kernels.array_pool import pool_arrays
early = torch.arange(100_000)
pool = pool_arrays()
def rss_mib():
    return [int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")][0] // 1024
"""
SAME_SIZE = """
kept, first = [], None
for step in range(60):
    block = torch.full((2**21,), step)
    kept.append(torch.full((random.choice([3, 50, 20_000]),), step))
    del block
    first = first or rss_mib()
assert rss_mib() < first + 40, (first, rss_mib())
assert all(int(tensor[-1]) == step for step, tensor in enumerate(kept))
assert int(early.sum()) == 4999950000
del early
"""
BOUNDED = """
most = 0
for step in range(300):
    size = random.Random(step).randrange(1 << 16, 1 << 25)
    block = torch.full((size,), 7, dtype=torch.uint8)
    most = max(most, pool.shoal_pool_used())
    assert int(block[-1]) == 7 and block.data_ptr() % 64 == 0
    held = pool.shoal_pool_used() + pool.shoal_pool_free()
    assert held <= 1.25 * most + (64 << 20), (held, most)
    del block
assert pool.shoal_pool_used() == 0 and pool.shoal_pool_free() > 0
"""
THREADS = """
def work(seed):
    rng, live = random.Random(seed), []
    for step in range(400):
        live.append((torch.full((rng.randrange(1, 1 << 19),), float(seed)), seed))
        if len(live) > 6:
            tensor, value = live.pop(rng.randrange(6))
            assert bool((tensor == value).all())
threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
empty, grown = torch.empty(0), torch.zeros(5)
grown.resize_(1 << 20)
assert torch.equal(torch.from_numpy(grown[:5].numpy().copy()), torch.zeros(5)) and empty.numel() == 0
assert pool.shoal_pool_used() <= 1 << 24
"""


@pytest.mark.skipif(sys.platform != "linux", reason="the pool is made of Linux's huge pages")
@pytest.mark.parametrize("body", [SAME_SIZE, BOUNDED, THREADS], ids=["same size", "bounded", "threads"])
def test_the_pool(body):
    check = "\nassert pool is not None, 'not built'\n"
    done = subprocess.run([sys.executable, "-c", START + check + body], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
