"""Seconds per reinforcement-learning step against TRL's GRPOTrainer on CPU: same model, groups, and forced answer lengths.

    pip install trl && PYTHONPATH=. python benchmarks/trl_speed.py [--output benchmarks/results/trl_speed.json]

Both sides load the same random float32 `DeepseekV3ForCausalLM` (hidden 128, 3 layers, 8 experts of 128, latent 64), multiply
in `--precision` (TRL's `bf16` is autocast; weights and moments stay float32 on both sides), and run
whole steps: sample groups of 16 answers at temperature 1, score them by the same rule, one update with DAPO's loss and no
divergence. Every answer has 56 tokens: without equal lengths a comparison measures how long a model likes to talk. TRL
samples with transformers' `generate`, its way on a CPU. The first step is left out; the time of a step is the median of the
rest. Each side and vocabulary runs in a process of its own, so that its peak memory is its own.

Not measured: training quality (`trl_parity.py` shows that losses and gradients agree), GPUs, TRL with vLLM.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

GROUP, NEW_TOKENS, PROMPT_TOKENS, LEARNING_RATE = 16, 56, 8, 1e-6


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One row of the table."""

    vocab: int
    answers: int
    """Per step."""


SHAPES = {"128": Shape(vocab=128, answers=256), "32768": Shape(vocab=32768, answers=128)}


def reward(prompts: list[Any], completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
    """Something that differs within groups and costs nothing."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def make_model(path: Path, vocab: int) -> None:
    """The same random weights and tokenizer for both sides."""
    import torch
    from tokenizers import Tokenizer as RawTokenizer
    from tokenizers.models import WordLevel
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = DeepseekV3Config(
        vocab_size=vocab,
        hidden_size=128,
        intermediate_size=384,
        moe_intermediate_size=128,
        num_hidden_layers=3,
        first_k_dense_replace=1,
        num_attention_heads=4,
        num_key_value_heads=4,
        n_routed_experts=8,
        num_experts_per_tok=2,
        n_shared_experts=1,
        n_group=1,
        topk_group=1,
        q_lora_rank=None,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        max_position_embeddings=256,
        num_mtp_layers=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    DeepseekV3ForCausalLM(config).float().save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, vocab)}
    PreTrainedTokenizerFast(
        tokenizer_object=RawTokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    ).save_pretrained(path)


def prompt_words(number: int) -> list[int]:
    """Eight ids below 128 that differ by problem."""
    return [3 + (number * 7 + place * 11) % 120 for place in range(PROMPT_TOKENS)]


def run_shoal(path: Path, shape: Shape, steps: int, precision: str) -> dict[str, Any]:
    """Whole steps of `train_grpo`, metrics and all."""
    from shoal.allocator import keep_memory
    from shoal.checkpoint.hf_format import load_model
    from shoal.log import read_metrics
    from shoal.model.transformer import Transformer
    from shoal.rl.grpo import train_grpo
    from shoal.rl.grpo_config import GrpoConfig
    from shoal.rl.objective import ObjectiveConfig
    from shoal.rl.rewards import WeightedReward
    from shoal.rl.tasks import Problem
    from shoal.training.optimizer import OptimizerConfig

    keep_memory()  # as every shoal command does
    config, state = load_model(path)
    model = Transformer(config)
    model.load_state_dict(state)
    model.float().eval()
    problems = [Problem(family="addition", difficulty=1, prompt=str(number), answer="0") for number in range(64)]
    prompter = SimpleNamespace(
        tokenizer=SimpleNamespace(eos_token_id=-1),  # no token ends an answer: all have the full length
        prompt_ids=lambda problem: tuple(prompt_words(int(problem.prompt))),
        text=lambda ids: "",
    )
    settings = GrpoConfig(
        steps=steps + 2,
        prompts_per_step=shape.answers // GROUP,
        group_size=GROUP,
        max_response_tokens=NEW_TOKENS,
        objective=ObjectiveConfig(clip_low=0.2, clip_high=0.2, loss_average="token"),
        optimizer=OptimizerConfig(learning_rate=LEARNING_RATE, weight_decay=0.0),
        mtp_weight=0.0,
        precision=precision,  # type: ignore[arg-type]
        checkpoint_every=1000,
    )
    ends: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        train_grpo(
            model,
            settings,
            problems,
            prompter,  # type: ignore[arg-type]
            Path(folder),
            rewards=[WeightedReward(function=reward)],
            after_step=lambda step: ends.append(time.perf_counter()),
        )
        lines = read_metrics(Path(folder) / "metrics.jsonl")
    seconds = [later - earlier for earlier, later in pairwise(ends)][:steps]  # without the first and the last
    assert all(line["response_tokens"] == NEW_TOKENS for line in lines)
    return {"step_s": seconds, "generate_s": [line["rollout_s"] for line in lines[1 : steps + 1]]}


def run_trl(path: Path, shape: Shape, steps: int, precision: str) -> dict[str, Any]:
    """Whole steps of `GRPOTrainer.train`."""
    from datasets import Dataset
    from transformers import PreTrainedTokenizerFast, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    ends: list[float] = []
    lengths: list[int] = []
    generate_s: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *arguments: Any, **options: Any) -> None:
            ends.append(time.perf_counter())

    def their_reward(completions: list[Any], completion_ids: list[list[int]], **columns: Any) -> list[float]:
        lengths.extend(map(len, completion_ids))
        return reward([], completions, completion_ids)

    with tempfile.TemporaryDirectory() as folder:
        config = GRPOConfig(
            output_dir=folder,
            per_device_train_batch_size=shape.answers,
            gradient_accumulation_steps=1,
            num_generations=GROUP,
            max_completion_length=NEW_TOKENS,
            generation_kwargs={"min_new_tokens": NEW_TOKENS},
            max_steps=steps + 2,
            loss_type="dapo",
            beta=0.0,
            bf16=precision == "bf16",
            use_cpu=True,
            gradient_checkpointing=False,
            model_init_kwargs={"dtype": "float32"},
            learning_rate=LEARNING_RATE,
            lr_scheduler_type="constant",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            logging_steps=1000,
        )
        prompts = [" ".join(f"w{word}" for word in prompt_words(number)) for number in range(64)]
        trainer = GRPOTrainer(
            model=str(path),
            reward_funcs=their_reward,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in prompts]),
            processing_class=PreTrainedTokenizerFast.from_pretrained(path),
            callbacks=[Clock()],
        )
        generate = trainer._generate_and_score_completions

        def timed(inputs: Any) -> Any:
            started_s = time.perf_counter()
            outputs = generate(inputs)
            generate_s.append(time.perf_counter() - started_s)
            return outputs

        trainer._generate_and_score_completions = timed
        trainer.train()
    if set(lengths) != {NEW_TOKENS}:
        raise SystemExit(f"TRL's answers have {sorted(set(lengths))} tokens, not {NEW_TOKENS}; the comparison is void.")
    seconds = [later - earlier for earlier, later in pairwise(ends)][:steps]
    return {"step_s": seconds, "generate_s": generate_s[1 : steps + 1]}


def measure(side: str, path: Path, vocab: str, steps: int, precision: str) -> dict[str, Any]:
    """One side in a process of its own."""
    command = [sys.executable, __file__, "--side", side, "--model", str(path), "--vocab", vocab, "--steps", str(steps)]
    done = subprocess.run([*command, "--precision", precision], check=True, stdout=subprocess.PIPE, text=True)
    values: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    step_s = statistics.median(values["step_s"])
    return {
        "step_s": step_s,
        "answers_per_s": SHAPES[vocab].answers / step_s,
        "generate_s": statistics.median(values["generate_s"]),
        "peak_memory_bytes": values["peak_memory_bytes"],
        "every_step_s": values["step_s"],
    }


def compare(vocabs: list[str], steps: int, precision: str) -> dict[str, Any]:
    """The table."""
    rows = {}
    for vocab in vocabs:
        with tempfile.TemporaryDirectory() as folder:
            make_model(Path(folder), SHAPES[vocab].vocab)
            sides = {side: measure(side, Path(folder), vocab, steps, precision) for side in ("shoal", "trl")}
        ratio = sides["trl"]["step_s"] / sides["shoal"]["step_s"]
        rows[vocab] = {**sides, "answers": SHAPES[vocab].answers, "times_faster": ratio}
        print(f"vocabulary {vocab}, {SHAPES[vocab].answers} answers of {NEW_TOKENS} tokens a step:", file=sys.stderr)
        for side, row in sides.items():
            print(
                f"  {side:6} {row['step_s']:7.2f} s a step (generate {row['generate_s']:.2f} s), "
                f"{row['answers_per_s']:7.1f} answers/s, peak {row['peak_memory_bytes'] / 2**20:.0f} MiB",
                file=sys.stderr,
            )
        print(f"  {ratio:.1f} times as fast", file=sys.stderr)
    return rows


def facts() -> dict[str, Any]:
    """Where and with what this was measured."""
    import torch
    import transformers
    import trl

    commit = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False).stdout.strip()
    names = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    return {
        "command": "python " + " ".join(sys.argv),
        "commit": commit,
        "processor": names[0].partition(":")[2].strip() if names else platform.processor(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "trl": trl.__version__},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path)
    parser.add_argument("--steps", type=int, default=3, help="timed steps; one before and one after are not")
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32", help="of products, on both sides")
    parser.add_argument("--only", choices=list(SHAPES))
    parser.add_argument("--side", choices=["shoal", "trl"], help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--vocab", choices=list(SHAPES), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        run = run_shoal if options.side == "shoal" else run_trl
        values = run(options.model, SHAPES[options.vocab], options.steps, options.precision)
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        print(json.dumps({**values, "peak_memory_bytes": peak}))
        return
    rows = compare([options.only] if options.only else list(SHAPES), options.steps, options.precision)
    result = {
        **facts(),
        "precision": options.precision,
        "new_tokens": NEW_TOKENS,
        "group": GROUP,
        "steps": options.steps,
        "rows": rows,
    }
    if options.output:
        options.output.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({vocab: round(row["times_faster"], 2) for vocab, row in rows.items()}))


if __name__ == "__main__":
    main()
