"""How long a prompt takes to its first token: computed, found in RAM, and found on disk by an engine that starts afresh."""

import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from shoal.engine.disk_cache import DiskCache
from shoal.engine.prefix_cache import UNIT_TOKENS, CacheIdentity
from shoal.engine.request import Request, SamplingParams
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.errors import ConfigError
from shoal.log import say
from shoal.recipes.bench import BenchModel


def bench_cache(bench: BenchModel, *, prompt_tokens: int, rounds: int = 3, seed: int = 0) -> dict[str, Any]:
    """Times to first token of one prompt, the medians of `rounds`; the disk is a directory that is deleted afterwards.

    The disk figure belongs to an engine with empty RAM that reads files another engine wrote. The operating system may
    still hold these files in memory, as it does on a server that was restarted.
    """
    if prompt_tokens < 2 * UNIT_TOKENS:
        raise ConfigError(f"prompt_tokens={prompt_tokens} is shorter than two units of {UNIT_TOKENS} tokens.")
    generator = torch.Generator().manual_seed(seed)
    vocabulary = bench.packed.config.vocab_size
    cold, ram, disk, sizes = [], [], [], set()
    for _ in range(rounds):
        prompt = tuple(torch.randint(0, vocabulary, (prompt_tokens,), generator=generator).tolist())
        folder = Path(tempfile.mkdtemp(prefix="shoal-bench-cache-"))
        try:
            first = _engine(bench, prompt_tokens, folder)
            cold.append(_first_token_s(first, prompt, found=0))
            ram.append(_first_token_s(first, prompt, found=(prompt_tokens - 1) // UNIT_TOKENS * UNIT_TOKENS))
            assert first.disk is not None
            first.disk.close(timeout_s=120)
            second = _engine(bench, prompt_tokens, folder)
            disk.append(_first_token_s(second, prompt, found=(prompt_tokens - 1) // UNIT_TOKENS * UNIT_TOKENS))
            assert second.disk is not None
            second.disk.close()
            sizes.add(first.unit_bytes)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
    result = {
        "mode": "cache",
        "model": bench.source,
        "weights": bench.packed.format,
        "prompt_tokens": prompt_tokens,
        "rounds": rounds,
        "ttft_cold_s": _median(cold),
        "ttft_ram_s": _median(ram),
        "ttft_disk_s": _median(disk),
        "ram_speedup": _median(cold) / _median(ram),
        "disk_speedup": _median(cold) / _median(disk),
        "unit_bytes": sizes.pop(),
    }
    say(
        f"first token of {prompt_tokens} tokens, {bench.source} {bench.packed.format}: cold {result['ttft_cold_s']:.3f} s, "
        f"RAM {result['ttft_ram_s']:.4f} s ({result['ram_speedup']:.0f}x), disk {result['ttft_disk_s']:.4f} s "
        f"({result['disk_speedup']:.0f}x)"
    )
    return result


def _engine(bench: BenchModel, prompt_tokens: int, folder: Path) -> ServingEngine:
    identity = CacheIdentity(
        weights_digest="bench", dtype=bench.packed.format, layout_version=1, rope_digest="", tokenizer_digest=""
    )
    engine = ServingEngine(bench.packed, ServingConfig(max_context=prompt_tokens + 64), identity=identity)
    engine.disk = DiskCache(folder, max_bytes=1 << 40, max_age_s=3600, unit_bytes=engine.unit_bytes)
    return engine


def _first_token_s(engine: ServingEngine, prompt: tuple[int, ...], *, found: int) -> float:
    """Seconds from the request to its only token.

    Raises:
        AssertionError: the caches gave something else than they should: the time would be of another thing.
    """
    engine.add(Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=1, temperature=0.0)))
    started_s = time.perf_counter()
    while not (events := engine.step()):
        pass
    elapsed_s = time.perf_counter() - started_s
    if events[0].found_tokens != found:
        raise AssertionError(f"the caches held {events[0].found_tokens} of the prompt's tokens, not {found}")
    return elapsed_s


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]
