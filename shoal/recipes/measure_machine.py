"""Measure what a plan for this machine needs to know: training steps, peak memory, decoding; about a minute.

Training is the real loop on made-up documents of the demo's lengths, so that everything that costs time in a run costs it
here: packing, Muon, multi-token prediction, metrics. Two shapes at two batch sizes each, see `planner/calibration.py`.
"""

import math
import statistics
import tempfile
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path

import numpy as np

from shoal.config import ModelConfig
from shoal.device import describe_machine, peak_memory_bytes
from shoal.log import read_metrics, say
from shoal.model.transformer import Transformer, initialise
from shoal.planner.calibration import Calibration, DecodePoint, MemoryGrowth, TrainingPoint, calibration_path, to_json
from shoal.presets import preset
from shoal.recipes.bench import NEW_TOKENS, bench_decode, load_packed
from shoal.recipes.demo import demo_config
from shoal.recipes.run import current_commit, only_run, write_json
from shoal.text.loader import Loader
from shoal.text.shards import Shards, ShardWriter
from shoal.training.loop import TrainingConfig, train
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

SEED = 0
MEMORY_STEPS = 60
"""Of the first measurement, whose process is still fresh: long enough for the growth of its memory to show."""
FEW_STEPS = 8
DECODE_CONTEXT = 128
MEAN_DOCUMENT_TOKENS = 32
"""About what the demo's documents have."""


def measure_machine() -> Calibration:
    """Measure this machine; run it in a process of its own, with nothing else running.

    Raises:
        ConfigError: a training run holds the machine.
    """
    with only_run(), tempfile.TemporaryDirectory(prefix="shoal-calibrate-") as folder:
        recipe = demo_config()
        small = recipe.model
        base_bytes = peak_memory_bytes()
        many, peaks = _measure(Path(folder) / "a", small, recipe.batch_rows, recipe.row_tokens, MEMORY_STEPS)
        growth = _growth(small, recipe.batch_rows, recipe.row_tokens, base_bytes, peaks)
        few, _ = _measure(Path(folder) / "b", small, max(1, recipe.batch_rows // 5), recipe.row_tokens, 2 * FEW_STEPS)
        large = preset("nano")
        large_few, _ = _measure(Path(folder) / "c", large, 1, 512, FEW_STEPS)
        large_many, _ = _measure(Path(folder) / "d", large, 4, 512, FEW_STEPS)
        decoding = tuple(_decode(name) for name in ("demo", "mini"))
    machine = describe_machine()
    return Calibration(
        machine={"device": machine.device, "processor": machine.processor, "num_cores": machine.num_cores},
        commit=current_commit(),
        made=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        seed=SEED,
        training=(few, many, large_few, large_many),
        decoding=decoding,
        memory=growth,
    )


def save_calibration(calibration: Calibration, path: Path | None = None) -> Path:
    """Keep it where `planner.calibration.load_calibration` looks; returns the path."""
    where = path or calibration_path()
    where.parent.mkdir(parents=True, exist_ok=True)
    write_json(where, to_json(calibration))
    return where


def _measure(
    folder: Path, model: ModelConfig, batch_rows: int, row_tokens: int, steps: int
) -> tuple[TrainingPoint, list[tuple[int, int]]]:
    """Median step of the real loop, and peak memory by step."""
    shards = _documents(folder / "shards", model.vocab_size, row_tokens, batch_rows * row_tokens * (steps + 2))
    made = Transformer(model)
    initialise(made, SEED)
    config = TrainingConfig(
        steps=steps,
        optimizer=OptimizerConfig(kind="muon", learning_rate=1e-3, muon_learning_rate=0.01),
        schedule=Schedule(kind="wsd", warmup_steps=1, total_steps=steps, decay_fraction=0.5),
        log_every=1,
        checkpoint_every=steps,
        seed=SEED,
    )
    loader = Loader(shards, batch_rows=batch_rows, row_tokens=row_tokens, seed=SEED, mode="pack")
    train(made, config, loader, folder, stage="calibrate")
    lines = [line for line in read_metrics(folder / "metrics.jsonl") if "tokens_per_s" in line]
    tokens = np.diff([0, *(line["tokens"] for line in lines)])
    seconds = [float(count) / line["tokens_per_s"] for count, line in zip(tokens, lines)]
    step_s = statistics.median(seconds[len(seconds) // 4 :])
    say(f"  {batch_rows} rows of {row_tokens}: {step_s * 1e3:.0f} ms a step")
    point = TrainingPoint(model=model, batch_rows=batch_rows, row_tokens=row_tokens, step_s=step_s)
    return point, [(line["step"], line["peak_memory_bytes"]) for line in lines]


def _growth(
    model: ModelConfig, batch_rows: int, row_tokens: int, base_bytes: int, peaks: Sequence[tuple[int, int]]
) -> MemoryGrowth:
    """Least squares of peak memory over the logarithm of the step, the first steps left out."""
    settled = [(math.log(step), peak) for step, peak in peaks if step > len(peaks) // 6]
    slope, intercept = np.polyfit([x for x, _ in settled], [y for _, y in settled], 1)
    return MemoryGrowth(
        model=model,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        base_bytes=base_bytes,
        first_bytes=float(intercept),
        per_e_fold_bytes=max(0.0, float(slope)),
    )


def _decode(name: str) -> DecodePoint:
    found = bench_decode(load_packed(None, name, "bf16", DECODE_CONTEXT + NEW_TOKENS), batch=1, context=DECODE_CONTEXT)
    model = preset(name).replace(num_nextn_predict_layers=0)
    return DecodePoint(model=model, context_tokens=DECODE_CONTEXT, step_s=1 / found["tokens_per_s"])


def _documents(folder: Path, vocab_size: int, row_tokens: int, num_tokens: int) -> Shards:
    """Random tokens in documents of random length, enough for `num_tokens`."""
    generator = np.random.default_rng(SEED)
    writer = ShardWriter(folder, vocab_size=vocab_size, tokenizer_digest="calibration")
    written = 0
    while written < num_tokens * 1.2:
        length = int(min(row_tokens, 4 + generator.exponential(MEAN_DOCUMENT_TOKENS)))
        writer.add(generator.integers(0, vocab_size, size=length))
        written += length
    writer.close()
    return Shards.open(folder, expected_digest="calibration")
