"""Training and rollout speed against transformers, on the same model, batch and machine.

    python benchmarks/train.py [--rounds 3] [--only nano,mini,rollout] [--output benchmarks/results/train.json]

Every measurement runs in its own process (so peak memory is its own), the systems take turns, and the table shows medians
over the rounds with the ratio to the best transformers variant of the same round set. Work done is the same: forward, mean
cross-entropy over all positions, backward, AdamW. Precision: Shoal multiplies in bfloat16 where the processor does and
keeps float32 elsewhere; transformers is measured in float32, autocast and pure bfloat16, and its best counts. Rollouts
force the number of new tokens.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

SHAPES = {"nano": {"rows": 16, "row_tokens": 256, "steps": 6}, "mini": {"rows": 8, "row_tokens": 512, "steps": 3}}
ROLLOUT = {"rows": 64, "prompt_tokens": 32, "new_tokens": 64}
SYSTEMS = {
    "nano": ("shoal-bf16", "shoal-fp32", "transformers-fp32", "transformers-amp", "transformers-bf16"),
    "mini": ("shoal-bf16", "shoal-fp32", "transformers-fp32", "transformers-amp"),
    "rollout": ("shoal-fp32", "shoal-bf16", "transformers-fp32", "transformers-bf16"),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", default="nano,mini,rollout")
    parser.add_argument("--output", type=Path, default=None)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        case, system = args.measure.split("/")
        print(json.dumps(measure(case, system)))
        return
    results = {case: compare(case, args.rounds) for case in args.only.split(",")}
    payload = {"command": " ".join(sys.argv), "machine": machine(), "commit": commit(), "results": results}
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(payload))


def compare(case: str, rounds: int) -> dict[str, Any]:
    """Alternate the systems for `rounds` rounds; medians, and ours over the best of theirs."""
    samples: dict[str, list[dict[str, float]]] = {system: [] for system in SYSTEMS[case]}
    for _ in range(rounds):
        for system in SYSTEMS[case]:
            command = [sys.executable, __file__, "--measure", f"{case}/{system}"]
            done = subprocess.run(command, check=True, capture_output=True, text=True)
            samples[system].append(json.loads(done.stdout.strip().splitlines()[-1]))
            print(f"{case:8} {system:18} {samples[system][-1]}", file=sys.stderr, flush=True)
    table = {
        system: {key: statistics.median(sample[key] for sample in found) for key in found[0]}
        for system, found in samples.items()
    }
    best = max(values["tokens_per_s"] for system, values in table.items() if system.startswith("transformers"))
    for system, values in table.items():
        values["ratio_to_best_transformers"] = values["tokens_per_s"] / best
        if system.endswith("fp32"):
            values["ratio_to_transformers_fp32"] = values["tokens_per_s"] / table["transformers-fp32"]["tokens_per_s"]
    return table


def measure(case: str, system: str) -> dict[str, float]:
    """Tokens per second and peak memory of one system, in this process."""
    import resource

    import torch

    from shoal.allocator import keep_memory

    if system.startswith("shoal"):
        keep_memory()
    torch.manual_seed(0)
    rate = rollout_rate(system) if case == "rollout" else training_rate(case, system)
    return {"tokens_per_s": rate, "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024}


def training_rate(case: str, system: str) -> float:
    import torch

    shape = SHAPES[case]
    token_BS = torch.randint(0, 4096, (shape["rows"], shape["row_tokens"]))
    step = (
        shoal_step(case, system, token_BS) if system.startswith("shoal") else transformers_step(case, system, token_BS)
    )
    return token_BS.numel() / median_time(step, shape["steps"])


def shoal_step(case: str, system: str, token_BS: Any) -> Callable[[], None]:
    import numpy as np

    from shoal.model.layers import compute_dtype, set_compute_dtype
    from shoal.model.transformer import Transformer, initialise
    from shoal.presets import preset
    from shoal.text.packing import Batch
    from shoal.training.loss import LossWeights
    from shoal.training.optimizer import OptimizerConfig, OptimizerSet
    from shoal.training.step import train_step

    model = Transformer(preset(case))
    initialise(model, 0)
    set_compute_dtype(model, compute_dtype(system.partition("-")[2], model.embed_tokens.weight.device))
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-4))
    token = token_BS.numpy()
    label = np.full_like(token, -100)
    label[:, :-1] = token[:, 1:]
    place = np.broadcast_to(np.arange(token.shape[1]), token.shape)
    batch = Batch(token_BS=token, label_BS=label, document_BS=np.zeros_like(token), position_BS=place)
    weights = LossWeights(mtp=0.0, sequence_balance=0.0)
    return lambda: train_step(model, optimizers, [batch], weights=weights, bias_speed=0.0) and None


def transformers_step(case: str, system: str, token_BS: Any) -> Callable[[], None]:
    import torch

    model = transformers_model(case)
    if system.endswith("bf16"):
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)

    def step() -> None:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=system.endswith("amp")):
            loss = model(token_BS, labels=token_BS).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def transformers_model(case: str) -> Any:
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    from shoal.presets import preset

    config = preset(case)
    names = [
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "intermediate_size",
        "q_lora_rank",
        "kv_lora_rank",
        "qk_nope_head_dim",
        "qk_rope_head_dim",
        "v_head_dim",
        "n_routed_experts",
        "n_shared_experts",
        "num_experts_per_tok",
        "moe_intermediate_size",
        "first_k_dense_replace",
        "n_group",
        "topk_group",
        "norm_topk_prob",
        "routed_scaling_factor",
        "max_position_embeddings",
    ]
    values = {name: getattr(config, name) for name in names}
    values |= {"num_key_value_heads": config.num_attention_heads, "num_mtp_layers": 0}
    return DeepseekV3ForCausalLM(DeepseekV3Config(**values))


def rollout_rate(system: str) -> float:
    import torch

    prompts = torch.randint(2, 4096, (ROLLOUT["rows"], ROLLOUT["prompt_tokens"]))
    new = ROLLOUT["new_tokens"]
    if system.startswith("shoal"):
        generate = shoal_rollout(system, prompts)
    else:
        model = transformers_model("nano").eval()
        if system.endswith("bf16"):
            model = model.bfloat16()
        mask = torch.ones_like(prompts)

        def generate() -> None:
            with torch.no_grad():
                model.generate(
                    prompts,
                    attention_mask=mask,
                    do_sample=True,
                    temperature=1.0,
                    top_k=0,
                    min_new_tokens=new,
                    max_new_tokens=new,
                    pad_token_id=0,
                )

    return prompts.shape[0] * new / median_time(generate, 3)


def shoal_rollout(system: str, prompts: Any) -> Callable[[], None]:
    from shoal.engine.engine import Engine
    from shoal.engine.request import Request, SamplingParams
    from shoal.model.layers import compute_dtype, set_compute_dtype
    from shoal.model.transformer import Transformer, initialise
    from shoal.presets import preset

    model = Transformer(preset("nano"))
    initialise(model, 0)
    set_compute_dtype(model, compute_dtype(system.partition("-")[2], model.embed_tokens.weight.device))
    engine = Engine(model.eval())
    params = SamplingParams(max_tokens=ROLLOUT["new_tokens"], temperature=1.0, seed=0)
    requests = [Request(prompt_ids=tuple(row), sampling=params) for row in prompts.tolist()]
    return lambda: engine.generate(requests) and None


def median_time(step: Callable[[], None], count: int) -> float:
    """Median seconds of `count` calls after one warm-up."""
    step()
    times = []
    for _ in range(count):
        started = time.perf_counter()
        step()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def machine() -> dict[str, Any]:
    from dataclasses import asdict

    from shoal.device import describe_machine

    return {**asdict(describe_machine()), "python": platform.python_version()}


def commit() -> str | None:
    from shoal.recipes.run import current_commit

    return current_commit()


if __name__ == "__main__":
    main()
