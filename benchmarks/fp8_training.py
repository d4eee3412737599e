"""FP8 against bfloat16 training, in pairs: same start, same data, same order, three seeds.

On a machine without FP8 units the FP8 side is emulated: scales, codes and rounding are the published ones, products are
taken in float32 of what the codes stand for. The gap is that of the losses smoothed with factor 0.9, as in DeepSeek-V3
appendix B.1 (published: below 0.25 %).

    python benchmarks/fp8_training.py --data TEXT --out benchmarks/results/fp8_training.json
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from shoal.config import ModelConfig
from shoal.model.layers import compute_dtype, set_compute_dtype, set_fp8
from shoal.model.transformer import Transformer, initialise
from shoal.quant import fp8
from shoal.quant.accumulation import limited_product
from shoal.quant.fp8_recipe import Fp8Recipe
from shoal.recipes.run import current_commit
from shoal.text.tokenizer import Tokenizer
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.schedule import Schedule

SEEDS = (0, 1, 2)
SMOOTHING = 0.9
ROWS, LENGTH = 8, 128
WARM_UP = 20
"""Steps left out of the comparison: the first losses fall by whole nats per step."""
MODEL = ModelConfig(
    vocab_size=512,
    hidden_size=128,
    num_hidden_layers=3,
    num_attention_heads=4,
    intermediate_size=256,
    kv_lora_rank=64,
    qk_nope_head_dim=16,
    qk_rope_head_dim=16,
    v_head_dim=32,
    n_routed_experts=8,
    num_experts_per_tok=2,
    moe_intermediate_size=128,
    max_position_embeddings=512,
    initializer_range=0.05,
)


def train(precision: str, seed: int, token_T: torch.Tensor, steps: int) -> list[float]:
    """Losses of every step."""
    model = Transformer(MODEL)
    initialise(model, seed)
    set_compute_dtype(model, compute_dtype("bf16", torch.device("cpu")))
    wgrad = "bf16" if precision == "fp8, wgrad bf16" else "fp8"
    set_fp8(model, Fp8Recipe(wgrad=wgrad, backend="reference") if precision != "bf16" else None)
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=3e-3))
    schedule = Schedule(kind="wsd", warmup_steps=WARM_UP, total_steps=steps, decay_fraction=0.3)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    for step in range(steps):
        start_B = torch.randint(0, len(token_T) - LENGTH - 1, (ROWS,), generator=generator)
        row_BS = torch.stack([token_T[start : start + LENGTH + 1] for start in start_B.tolist()])
        logits = model.logits(model(row_BS[:, :-1]))
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), row_BS[:, 1:].flatten())
        loss.backward()
        optimizers.set_rate(schedule.multiplier(step))
        optimizers.step()
        losses.append(float(loss.detach()))
    return losses


def relative_gaps(reference: list[float], other: list[float]) -> list[float]:
    """Signed gap of the smoothed losses after the warm-up, relative to the reference."""
    gaps, smooth = [], [reference[0], other[0]]
    for step, pair in enumerate(zip(reference, other)):
        smooth = [SMOOTHING * old + (1 - SMOOTHING) * new for old, new in zip(smooth, pair)]
        if step >= 2 * WARM_UP:
            gaps.append(smooth[1] / smooth[0] - 1)
    return gaps


def accumulation_errors() -> list[dict[str, object]]:
    """Raw against promoted accumulation over K = 4096, for normal and for positive data."""
    found = []
    for data in ("normal", "uniform in [0, 1)"):
        generator = torch.Generator().manual_seed(0)
        draw = torch.randn if data == "normal" else torch.rand
        left, right = (fp8.tiles(draw(64, 4096, generator=generator)).code for _ in range(2))
        exact = left.double() @ right.double().T
        for bits in (13, 14):
            row: dict[str, object] = {"data": data, "register_bits": bits}
            for name, every in (("raw", None), ("promoted", 128)):
                wrong = limited_product(left, right, register_bits=bits, promote_every=every) - exact
                row[f"{name}_max_error_fraction"] = float(wrong.abs().max() / exact.abs().max())
            found.append(row)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a text file")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    text = options.data.read_text(encoding="utf-8")
    tokenizer = Tokenizer.train([text], MODEL.vocab_size)
    token_T = torch.tensor([int(token) for token in tokenizer.encode(text)])
    result: dict[str, object] = {
        "commit": current_commit(),
        "command": f"python benchmarks/fp8_training.py --data {options.data.name} --steps {options.steps}",
        "machine": platform.machine(),
        "is_emulated": True,
        "steps": options.steps,
        "tokens_per_step": ROWS * LENGTH,
        "parameters": sum(parameter.numel() for parameter in Transformer(MODEL).parameters()),
        "accumulation_at_k_4096": accumulation_errors(),
    }
    pairs: list[dict[str, object]] = []
    result["pairs"] = pairs
    for seed in SEEDS:
        started_s = time.perf_counter()
        reference = train("bf16", seed, token_T, options.steps)
        for precision in ("fp8", "fp8, wgrad bf16"):
            losses = train(precision, seed, token_T, options.steps)
            gaps = relative_gaps(reference, losses)
            pairs.append(
                {
                    "seed": seed,
                    "precision": precision,
                    "final_loss_bf16": sum(reference[-10:]) / 10,
                    "final_loss": sum(losses[-10:]) / 10,
                    "mean_gap_fraction": sum(gaps) / len(gaps),
                    "largest_gap_fraction": max(gaps, key=abs),
                    "last_gap_fraction": gaps[-1],
                    "wall_s": time.perf_counter() - started_s,
                }
            )
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(json.dumps(pairs[-1]), flush=True)


if __name__ == "__main__":
    main()
