"""How fast this machine decodes and prefills a model, beside what its memory and arithmetic allow.

Decoding a token reads the weights it needs once, so the limit is bytes over bandwidth; reading a prompt is arithmetic, so
its limit is operations over rate. Both limits are measured here. Bandwidth: by reading the model's own weights from end to
end, in turn with the steps, because on a shared machine it depends on the second and on where the memory lies. Rate: by a
large product in the same format, in the same minute. A preset stands for random weights in its shape: speed does not depend
on what the numbers are, only how many experts they reach.
"""

import ctypes
import itertools
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.quantised import INT4_GROUPS
from shoal.checkpoint.stored_weights import StoredWeights
from shoal.config import ModelConfig
from shoal.engine.codes import INT4_GROUP, quantised
from shoal.engine.loading import find_model
from shoal.engine.making import pack_stored
from shoal.engine.packed_model import PackedModel, cache_width
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.kernels.huge_pages import WeightMemory
from shoal.kernels.packed import linear, pack
from shoal.log import say
from shoal.planner.counts import cache_bytes_per_token, expert_parameters, parameter_counts, prefill_flops
from shoal.planner.energy import EnergyMeter
from shoal.presets import PRESETS, preset
from shoal.quant.latent import pack_entries

WEIGHTS = ("f32", "bf16", "fp8", "int8", "int4")
BITS = {"f32": 32.0, "bf16": 16.0, "fp8": 8.0 + 32 / (16 * 128), "int8": 8.0, "int4": 4.0}
"""Stored bits of one weight; int8 has a scale per row besides, which is neglected, int4 one of 16 bits for each group."""

PAGE_TOKENS = 64
NEW_TOKENS = 64
"""What every sequence decodes behind its context, over and over."""
MIN_SECONDS = 3.0
"""How long the timed part lasts at least."""
WINDOW_SECONDS = 0.1
"""Steps between two measurements of the bandwidth."""


@dataclass(frozen=True, kw_only=True)
class BenchModel:
    """A packed model and how it came about."""

    packed: PackedModel
    load_s: float
    source: str


def load_packed(
    model: str | None,
    preset_name: str | None,
    weights: str,
    max_positions: int,
    group: int | None = None,
    fast_prefill: bool = False,
) -> BenchModel:
    """Pack a model directory or a preset with random weights.

    Args:
        group: columns of an int4 matrix that share a scale, of a preset; a directory has its own.

    Raises:
        ConfigError: unknown preset, format or group, or neither a model nor a preset named.
    """
    if weights not in ("auto", *WEIGHTS):
        raise ConfigError(f"weights={weights!r} is not a format; use auto or one of {', '.join(WEIGHTS)}.")
    if (model is None) == (preset_name is None):
        raise ConfigError(f"name a model directory or a preset, one of them; presets: {', '.join(sorted(PRESETS))}.")
    if group is not None and (preset_name is None or weights != "int4" or group not in INT4_GROUPS):
        raise ConfigError(f"group={group}: a preset in int4 can have {', '.join(map(str, INT4_GROUPS))}.")
    started_s = time.perf_counter()
    if preset_name is not None:
        config = preset(preset_name).replace(num_nextn_predict_layers=0)
        format_name = "bf16" if weights == "auto" else weights
        source = RandomWeights(config)
        packed = PackedModel(
            config, source, format_name, group=group, max_positions=max_positions, fast_prefill=fast_prefill
        )
    else:
        stored = StoredWeights(find_model(Path(str(model))))
        packed = pack_stored(stored, weights, max_positions=max_positions, fast_prefill=fast_prefill)
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


def bench_decode(
    bench: BenchModel, *, batch: int, context: int, fp8_cache: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Tokens per second of `batch` sequences that each hold `context` tokens.

    Steps and measurements of the bandwidth take turns; speed and limit are those of the window with the median fraction.
    """
    if batch < 1 or context < 1:
        raise ConfigError(f"batch={batch} and context={context} must be at least 1.")
    packed = bench.packed
    cache, table = _filled_cache(packed.config, batch, context + NEW_TOKENS, fp8_cache)
    generator = torch.Generator().manual_seed(seed)
    rows = torch.arange(batch, dtype=torch.int32)
    touched = _touched_experts(packed, cache, table, rows, context, generator)
    tokens = torch.randint(0, packed.config.vocab_size, (NEW_TOKENS, batch), generator=generator)
    positions = (
        torch.arange(context, context + NEW_TOKENS, dtype=torch.int32).unsqueeze(1).expand(-1, batch).contiguous()
    )
    steps_done = itertools.count()

    def step() -> None:
        at = next(steps_done) % NEW_TOKENS
        packed.run(tokens[at], positions[at], rows, cache, output_row=rows, table_BX=table)

    for _ in range(3):
        step()
    peak_bytes = peak_rss_bytes()
    windows = _windows(step, packed)
    bytes_per_step = decode_bytes(packed, batch, context, touched, fp8_cache)
    windows.sort(key=lambda window: bytes_per_step / window.step_s / window.bandwidth)
    middle = windows[len(windows) // 2]
    seconds, bandwidth = middle.step_s, middle.bandwidth
    steps = sum(window.steps for window in windows)
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
        "fp8_cache": fp8_cache,
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
        "joules_per_token": sum(window.joules for window in windows) / (steps * batch),
        "joules_kind": middle.joules_kind,
    }


def bench_prefill(
    bench: BenchModel, *, tokens: int, chunk: int = 512, fp8_cache: bool = False, seed: int = 0
) -> dict[str, Any]:
    """Prompt tokens per second, one sequence, in chunks."""
    if tokens < 1:
        raise ConfigError(f"tokens={tokens} must be at least 1.")
    packed = bench.packed
    cache, table = _filled_cache(packed.config, 1, tokens, fp8_cache)
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
        seconds, rounds = _time_steps(read, max_steps=20)
    reading, peak_bytes = meter.reading(), peak_rss_bytes()
    flops = prefill_flops(packed.config, tokens)
    rate_flops = measured_rate(packed.format, packed.group)
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
        "fp8_cache": fp8_cache,
        "fast_prefill": packed.fast_prefill,
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


def decode_bytes(
    packed: PackedModel, batch: int, context: int, experts_per_layer: float, fp8_cache: bool = False
) -> float:
    """Bytes that one step must read: weights of the experts it reaches, everything else once, and the cache."""
    config = packed.config
    counts = parameter_counts(config)
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(config.num_hidden_layers))
    always = counts.active - moe_layers * config.num_experts_per_tok * expert_parameters(config)
    reached = moe_layers * experts_per_layer * expert_parameters(config)
    fp8_bytes = config.num_hidden_layers * cache_width(config, True)
    cache = batch * context * (fp8_bytes if fp8_cache else cache_bytes_per_token(config))
    bits = BITS[packed.format] + (16 / (packed.group or INT4_GROUP) if packed.format == "int4" else 0)
    return (always + reached) * bits / 8 + cache


def measured_bandwidth(packed: PackedModel) -> float:
    """Bytes per second at which all threads together read a model's weights, one matrix after the other."""
    kernels = library()
    assert kernels is not None
    num_bytes, started_s = 0, time.perf_counter()
    for data in packed.weight_data():
        kernels.stream_words(ctypes.c_void_p(data.data_ptr()), ctypes.c_int64(data.numel() // 4))
        num_bytes += data.numel()
    return num_bytes / (time.perf_counter() - started_s)


def measured_rate(format_name: str, group: int | None = None) -> float:
    """Operations per second of a product of 512 rows with a 2048 x 2048 matrix in this format, or in PyTorch's bfloat16
    if that is faster."""
    weight, x_MD = torch.randn(1, 2048, 2048), torch.randn(512, 2048)
    packed = pack(quantised(weight, format_name, group))
    low_weight, low_x = weight[0].bfloat16(), x_MD.bfloat16()
    best_s = min(_best_time(lambda: linear(packed, x_MD)), _best_time(lambda: low_x @ low_weight.t()))
    return 2 * 512 * 2048 * 2048 / best_s


def peak_rss_bytes() -> int:
    """Most memory this process ever held. Read before a limit is measured, whose buffers are not the model's."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _filled_cache(config: ModelConfig, batch: int, positions: int, fp8: bool = False) -> tuple[Tensor, Tensor]:
    """Pages full of plausible latents, scattered as a served cache is."""
    per_sequence = -(-positions // PAGE_TOKENS)
    shape = (config.num_hidden_layers, batch * per_sequence, PAGE_TOKENS, cache_width(config, fp8))
    cache = WeightMemory().empty(shape, torch.uint8 if fp8 else torch.bfloat16)
    for page in cache.flatten(0, 1):
        plain = torch.randn(PAGE_TOKENS, config.cache_width)
        page.copy_(pack_entries(plain, config.kv_lora_rank) if fp8 else plain)
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


@dataclass(frozen=True, kw_only=True)
class _Window:
    """A tenth of a second of steps, and the bandwidth around it in bytes per second."""

    step_s: float
    steps: int
    bandwidth: float
    joules: float
    joules_kind: str


def _windows(step: Callable[[], None], packed: PackedModel) -> list[_Window]:
    """Steps for `MIN_SECONDS` in all, each window between two measurements of the bandwidth whose mean it is held against."""
    windows: list[_Window] = []
    spent_s, before = 0.0, measured_bandwidth(packed)
    while spent_s < MIN_SECONDS:
        times: list[float] = []
        with EnergyMeter() as meter:
            while not times or sum(times) < WINDOW_SECONDS:
                started_s = time.perf_counter()
                step()
                times.append(time.perf_counter() - started_s)
        reading, after = meter.reading(), measured_bandwidth(packed)
        windows.append(
            _Window(
                step_s=statistics.median(times),
                steps=len(times),
                bandwidth=(before + after) / 2,
                joules=reading.joules,
                joules_kind=reading.kind,
            )
        )
        spent_s, before = spent_s + sum(times), after
    return windows


def _time_steps(step: Callable[[], None], *, max_steps: int) -> tuple[float, int]:
    """Median seconds of a step, the first left out, and how many were timed."""
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
