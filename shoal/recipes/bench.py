"""How fast this machine decodes and prefills a model, beside what its memory and arithmetic allow.

Decoding a token reads the weights it needs once, so the limit is bytes over bandwidth; reading a prompt is arithmetic, so
its limit is operations over rate. Both limits are measured here, in the same minute as the speed: bandwidth by streaming
buffers larger than the caches with this library's own vector code, rate by a large product in the same format. A preset
stands for random weights in its shape: speed does not depend on what the numbers are, only how many experts they reach.
"""

import ctypes
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.stored_weights import StoredWeights
from shoal.config import ModelConfig
from shoal.engine.codes import INT4_GROUP, quantised
from shoal.engine.loading import find_model
from shoal.engine.making import pack_stored
from shoal.engine.packed_model import PackedModel
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.kernels.huge_pages import WeightMemory, huge_bytes
from shoal.kernels.packed import linear, pack
from shoal.log import say
from shoal.planner.counts import cache_bytes_per_token, expert_parameters, parameter_counts, prefill_flops
from shoal.planner.energy import EnergyMeter
from shoal.presets import PRESETS, preset

WEIGHTS = ("f32", "bf16", "fp8", "int8", "int4")
BITS = {"f32": 32.0, "bf16": 16.0, "fp8": 8.0 + 32 / (16 * 128), "int8": 8.0, "int4": 4.0 + 16 / INT4_GROUP}
"""Stored bits of one weight, scales included (int8: one scale per row is neglected)."""

PAGE_TOKENS = 64
STREAM_BYTES = 1 << 30
MIN_SECONDS = 3.0
"""How long the timed part lasts at least."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A packed model and how it came about."""

    packed: PackedModel
    load_s: float
    source: str


def load_packed(model: str | None, preset_name: str | None, weights: str, max_positions: int) -> BenchModel:
    """Pack a model directory or a preset with random weights.

    Raises:
        ConfigError: unknown preset or format, or neither a model nor a preset named.
    """
    if weights not in ("auto", *WEIGHTS):
        raise ConfigError(f"weights={weights!r} is not a format; use auto or one of {', '.join(WEIGHTS)}.")
    if (model is None) == (preset_name is None):
        raise ConfigError(f"name a model directory or a preset, one of them; presets: {', '.join(sorted(PRESETS))}.")
    started_s = time.perf_counter()
    if preset_name is not None:
        config = preset(preset_name).replace(num_nextn_predict_layers=0)
        format_name = "bf16" if weights == "auto" else weights
        packed = PackedModel(config, RandomWeights(config), format_name, max_positions=max_positions)
    else:
        packed = pack_stored(StoredWeights(find_model(Path(str(model)))), weights, max_positions=max_positions)
    return BenchModel(packed=packed, load_s=time.perf_counter() - started_s, source=preset_name or str(model))


def published(result: dict[str, Any]) -> dict[str, Any]:
    """What scripts read of a result; joules only where the machine told them."""
    keys = ("tokens_per_s", "limit_tokens_per_s", "limit_fraction", "bandwidth_gb_s", "peak_rss_bytes")
    kept = {key: result[key] for key in keys}
    if result["joules_kind"] == "measured":
        kept["joules_per_token"] = result["joules_per_token"]
    return kept


class RandomWeights:
    """Norms, gates and embeddings in numbers; every other matrix as a shape on the meta device, to be packed as random codes."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        from shoal.model.transformer import Transformer

        with torch.device("meta"):
            model = Transformer(config)
        self.shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, name: str) -> Tensor:
        shape = self.shapes[name]
        if name.endswith("norm.weight"):
            return torch.ones(shape)
        if name.endswith("e_score_correction_bias"):
            return torch.zeros(shape)
        if name.endswith("gate.weight"):
            return torch.randn(shape, generator=self.generator) * 0.02
        if name == "embed_tokens.weight":
            return torch.empty(shape, dtype=torch.bfloat16).normal_(0, 0.02, generator=self.generator)
        return torch.empty(shape, device="meta")


def bench_decode(bench: BenchModel, *, batch: int, context: int, seed: int = 0) -> dict[str, Any]:
    """Tokens per second of `batch` sequences that each hold `context` tokens."""
    if batch < 1 or context < 1:
        raise ConfigError(f"batch={batch} and context={context} must be at least 1.")
    packed = bench.packed
    cache, table = _filled_cache(packed.config, batch, context + 512)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(batch, dtype=torch.int32)
    touched = _touched_experts(packed, cache, table, rows, context, generator)
    position = [context]

    def step() -> None:
        token = torch.randint(0, packed.config.vocab_size, (batch,), generator=generator)
        at = torch.full((batch,), min(position[0], context + 500), dtype=torch.int32)
        packed.run(token, at, rows, cache, output_row=rows, table_BX=table)
        position[0] += 1

    with EnergyMeter() as meter:
        seconds, steps = _time_steps(step, max_steps=400)
    reading, peak_bytes = meter.reading(), peak_rss_bytes()
    bytes_per_step = decode_bytes(packed, batch, context, touched)
    bandwidth = measured_bandwidth()
    rate, limit = batch / seconds, batch * bandwidth / bytes_per_step
    say(
        f"decode {bench.source} {packed.format}: {rate:.1f} tokens/s, {bytes_per_step / seconds / 1e9:.1f} GB/s, "
        f"{rate / limit:.0%} of the measured limit of {limit:.1f}"
    )
    return {
        "mode": "decode",
        "model": bench.source,
        "weights": packed.format,
        "batch": batch,
        "context": context,
        "tokens_per_s": rate,
        "limit_tokens_per_s": limit,
        "limit_fraction": rate / limit,
        "bandwidth_gb_s": bytes_per_step / seconds / 1e9,
        "measured_bandwidth_gb_s": bandwidth / 1e9,
        "bytes_per_step": bytes_per_step,
        "experts_per_layer": touched,
        "steps": steps,
        "load_s": bench.load_s,
        "weight_bytes": packed.weight_bytes,
        "peak_rss_bytes": peak_bytes,
        "joules_per_token": reading.joules / (steps * batch),
        "joules_kind": reading.kind,
    }


def bench_prefill(bench: BenchModel, *, tokens: int, chunk: int = 512, seed: int = 0) -> dict[str, Any]:
    """Prompt tokens per second, one sequence, in chunks."""
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be at least 1.")
    packed = bench.packed
    cache, table = _filled_cache(packed.config, 1, tokens)
    generator = torch.Generator().manual_seed(seed)
    token = torch.randint(0, packed.config.vocab_size, (tokens,), generator=generator)
    position, zero = torch.arange(tokens, dtype=torch.int32), torch.zeros(tokens, dtype=torch.int32)

    def read() -> None:
        for start in range(0, tokens, chunk):
            part = slice(start, start + chunk)
            count = len(token[part])
            last = torch.tensor([count - 1] if start + chunk >= tokens else [], dtype=torch.int32)
            packed.run(token[part], position[part], zero[part], cache, output_row=last, table_BX=table)

    with EnergyMeter() as meter:
        seconds, rounds = _time_steps(read, max_steps=20, warm_up=1)
    reading, peak_bytes = meter.reading(), peak_rss_bytes()
    flops = prefill_flops(packed.config, tokens)
    rate_flops = measured_rate(packed.format)
    rate, limit = tokens / seconds, tokens * rate_flops / flops
    say(
        f"prefill {bench.source} {packed.format}: {rate:.0f} tokens/s, {flops / seconds / 1e9:.0f} GFLOP/s, "
        f"{rate / limit:.0%} of the measured limit of {limit:.0f}"
    )
    return {
        "mode": "prefill",
        "model": bench.source,
        "weights": packed.format,
        "tokens": tokens,
        "tokens_per_s": rate,
        "limit_tokens_per_s": limit,
        "limit_fraction": rate / limit,
        "gflops": flops / seconds / 1e9,
        "measured_gflops": rate_flops / 1e9,
        "bandwidth_gb_s": packed.weight_bytes * -(-tokens // chunk) / seconds / 1e9,
        "rounds": rounds,
        "load_s": bench.load_s,
        "weight_bytes": packed.weight_bytes,
        "peak_rss_bytes": peak_bytes,
        "joules_per_token": reading.joules / (rounds * tokens),
        "joules_kind": reading.kind,
    }


def decode_bytes(packed: PackedModel, batch: int, context: int, experts_per_layer: float) -> float:
    """Bytes that one step must read: weights of the experts it reaches, everything else once, and the cache."""
    config = packed.config
    counts = parameter_counts(config)
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    always = counts.active - moe_layers * config.num_experts_per_tok * expert_parameters(config)
    reached = moe_layers * experts_per_layer * expert_parameters(config)
    cache = batch * context * cache_bytes_per_token(config)
    return (always + reached) * BITS[packed.format] / 8 + cache


def measured_bandwidth() -> float:
    """Bytes per second that all threads together read from memory, the best of several passes over a gigabyte."""
    kernels = library()
    assert kernels is not None
    kernels.stream_sum.restype = ctypes.c_float
    buffer = huge_bytes(STREAM_BYTES).fill_(1).view(torch.float32)
    times = []
    for _ in range(5):
        started_s = time.perf_counter()
        kernels.stream_sum(ctypes.c_void_p(buffer.data_ptr()), ctypes.c_int64(buffer.numel()))
        times.append(time.perf_counter() - started_s)
    return STREAM_BYTES / min(times)


def measured_rate(format_name: str) -> float:
    """Operations per second of a product of 512 rows with a 2048 x 2048 matrix in this format, or in PyTorch's bfloat16
    if that is faster."""
    weight, x_MD = torch.randn(1, 2048, 2048), torch.randn(512, 2048)
    packed = pack(quantised(weight, format_name))
    low_weight, low_x = weight[0].bfloat16(), x_MD.bfloat16()
    best_s = min(_best_time(lambda: linear(packed, x_MD)), _best_time(lambda: low_x @ low_weight.t()))
    return 2 * 512 * 2048 * 2048 / best_s


def peak_rss_bytes() -> int:
    """Most memory this process ever held. Read before a limit is measured, whose buffers are not the model's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _filled_cache(config: ModelConfig, batch: int, positions: int) -> tuple[Tensor, Tensor]:
    """Pages full of plausible latents, scattered as a served cache is."""
    per_sequence = -(-positions // PAGE_TOKENS)
    shape = (config.num_hidden_layers, batch * per_sequence, PAGE_TOKENS, config.cache_width)
    cache = WeightMemory().empty(shape, torch.bfloat16).normal_()
    order = torch.randperm(batch * per_sequence, generator=torch.Generator().manual_seed(0))
    return cache, order.to(torch.int32).view(batch, per_sequence)


def _touched_experts(
    packed: PackedModel, cache: Tensor, table: Tensor, rows: Tensor, context: int, generator: torch.Generator
) -> float:
    """Mean number of different experts that a step reaches per MoE layer, counted."""
    config = packed.config
    layers = [layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer)]
    if not layers:
        return 0.0
    found = []
    for _ in range(8):
        chosen = torch.full((config.num_hidden_layers, len(rows), config.num_experts_per_tok), -1, dtype=torch.int32)
        token = torch.randint(0, config.vocab_size, (len(rows),), generator=generator)
        at = torch.full((len(rows),), context, dtype=torch.int32)
        packed.run(token, at, rows, cache, output_row=rows, table_BX=table, chosen_LMK=chosen)
        found += [len(chosen[layer].unique()) for layer in layers]
    return statistics.mean(found)


def _time_steps(step: Callable[[], None], *, max_steps: int, warm_up: int = 3) -> tuple[float, int]:
    """Median seconds of a step, and how many were timed."""
    for _ in range(warm_up):
        step()
    times: list[float] = []
    while len(times) < max_steps and (sum(times) < MIN_SECONDS or len(times) < 3):
        started_s = time.perf_counter()
        step()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times), len(times)


def _best_time(work: Callable[[], Any]) -> float:
    work()
    times = []
    for _ in range(8):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return min(times)
