"""Loss, gradient and one AdamW step of every shared GRPO variant against TRL, on one random tiny DeepseekV3ForCausalLM.

    pip install trl && PYTHONPATH=. python benchmarks/trl_parity.py [--output benchmarks/results/trl_parity.json]

Both sides get the same float32 weights (transformers' own implementation: one dense and one mixture-of-experts layer) and
the same hand-made batch: padded prompts, answers of different lengths, advantages of both signs, old, reference and engine
log-probabilities that differ enough for clips and masks to act (the table says how often). TRL computes its loss through
`GRPOTrainer.compute_loss` with the configuration a user would write; ours is `policy_objective` on the log-probabilities
of the same model. Nothing is generated and nothing is read from the network.

Limits: 1e-6 on the loss; 1e-5 on the gradient, in absolute terms and as a share of the largest. One clipped AdamW step at
rate 1e-3 is taken twice. From equal gradients the two optimizers must agree on every weight to 5e-7, a few units in the last
place of a weight near 1. From each side's own gradient the steps must agree to 1e-3 of their norm: Adam's first step is
`g / (|g| + 1e-8)`, which turns float32 rounding in a gradient that is all but zero into up to a tenth of the rate for that
one weight (`step_largest` in the JSON, without a limit). A control row compares two variants that are *not* the same (plain
and unbiased KL) and must be ten times over the limits of loss and gradient. Exits 1 when a row is over, or the control not.

Not compared, because TRL has no counterpart: dynamic sampling, keep-routing, keep-sampling-mask. Not compared, because the
two differ on purpose: the unbiased KL under sequence-level ratios (TRL weights tokens with the sequence's geometric mean,
which its documentation says is not unbiased; ours keeps the token's ratio), and RLOO off-policy (see `rl/variants.py`).
"""

import argparse
import contextlib
import io
import json
import logging
import os
import platform
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import transformers
import trl
from datasets import Dataset
from tokenizers import Tokenizer as RawTokenizer
from tokenizers.models import WordLevel
from torch import Tensor, nn
from transformers import DeepseekV3Config, DeepseekV3ForCausalLM, PreTrainedTokenizerFast
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer
from trl.rewards import get_soft_overlong_punishment

from shoal.rl.advantage import overlong_penalty
from shoal.rl.importance import ImportanceConfig, importance_weights
from shoal.rl.objective import ObjectiveConfig, ObjectiveResult, policy_objective
from shoal.training.optimizer import OptimizerConfig, OptimizerSet

VOCAB, ANSWERS, PROMPT_TOKENS, RESPONSE_TOKENS, GROUP = 61, 6, 5, 7, 3
LEARNING_RATE, WEIGHT_DECAY, BETA2 = 1e-3, 0.1, 0.95
LIMITS = {"loss": 1e-6, "gradient": 1e-5, "gradient_relative": 1e-5, "step": 1e-3, "step_of_equal_gradients": 5e-7}
MEASURED_PATHS = ("shoal/rl", "shoal/training/optimizer.py", "benchmarks/trl_parity.py")


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row: the same variant in both vocabularies."""

    name: str
    ours: ObjectiveConfig
    theirs: dict[str, Any]
    engine: ImportanceConfig | None = None
    """Handed to TRL as ready weights: its own are computed inside generation with vLLM."""
    micro_batches: int = 1
    is_on_policy: bool = False


def cases() -> list[Case]:
    """Every variant both have; wide GSPO clips beside the published ones, so that some answers are clipped and some not."""
    kl = {"kl_coefficient": 0.04}
    plain, corrected = {"beta": 0.04, "use_bias_correction_kl": False}, {"beta": 0.04, "use_bias_correction_kl": True}
    sequence = {"loss_average": "sequence"}
    length = {"loss_average": "constant", "max_response_tokens": RESPONSE_TOKENS}
    gspo = {"loss_type": "grpo", "importance_sampling_level": "sequence"}
    rows: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("grpo", sequence, {"loss_type": "grpo"}),
        ("grpo, KL", sequence | kl, {"loss_type": "grpo"} | plain),
        ("grpo, unbiased KL", sequence | kl | {"kl_estimator": "unbiased"}, {"loss_type": "grpo"} | corrected),
        (
            "r1: clip 10, KL 0.001",
            sequence | {"clip_low": 10.0, "clip_high": 10.0, "kl_coefficient": 0.001},
            {"loss_type": "grpo", "epsilon": 10.0, "beta": 0.001, "use_bias_correction_kl": False},
        ),
        ("bnpo", {}, {"loss_type": "bnpo"}),
        ("bnpo, KL", kl, {"loss_type": "bnpo"} | plain),
        ("dr_grpo", length, {"loss_type": "dr_grpo"}),
        ("dr_grpo, KL", length | kl, {"loss_type": "dr_grpo"} | plain),
        ("dapo: clip 0.2 / 0.28", {"clip_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
        ("dapo, KL", {"clip_high": 0.28} | kl, {"loss_type": "dapo", "epsilon_high": 0.28} | plain),
        ("dapo, unbiased KL", {"kl_estimator": "unbiased"} | kl, {"loss_type": "dapo"} | corrected),
        (
            "gspo: clip 3e-4 / 4e-4",
            sequence | {"level": "sequence", "clip_low": 3e-4, "clip_high": 4e-4},
            gspo | {"epsilon": 3e-4, "epsilon_high": 4e-4},
        ),
        (
            "gspo: clip 0.06",
            sequence | {"level": "sequence", "clip_low": 0.06, "clip_high": 0.06},
            gspo | {"epsilon": 0.06},
        ),
        (
            "gspo: clip 0.06, KL",
            sequence | {"level": "sequence", "clip_low": 0.06, "clip_high": 0.06} | kl,
            gspo | {"epsilon": 0.06} | plain,
        ),
        (
            "v3.2: unbiased KL, off-policy mask",
            sequence | kl | {"kl_estimator": "unbiased", "off_policy_threshold": 0.05},
            {"loss_type": "grpo", "off_policy_mask_threshold": 0.05} | corrected,
        ),
    ]
    found = [Case(name=name, ours=ObjectiveConfig(**ours), theirs=theirs) for name, ours, theirs in rows]
    dapo = ObjectiveConfig(clip_high=0.28)
    their_dapo = {"loss_type": "dapo", "epsilon_high": 0.28}
    for level in ("token", "sequence"):
        for bound in ("truncate", "mask"):
            weights = ImportanceConfig(level=level, bound=bound, low=0.8, high=1.15)
            ours = ObjectiveConfig(clip_high=0.28, importance=weights, **kl)
            name = f"dapo, KL, {level}-level {bound}d weights".replace("maskd", "masked")
            found.append(Case(name=name, ours=ours, theirs=their_dapo | plain, engine=weights))
    found.append(Case(name="dapo, on-policy", ours=dapo, theirs=their_dapo, is_on_policy=True))
    found.append(Case(name="dapo, 2 micro-batches", ours=dapo, theirs=their_dapo, micro_batches=2))
    found.append(
        Case(
            name="grpo, 2 micro-batches",
            ours=ObjectiveConfig(**sequence),
            theirs={"loss_type": "grpo"},
            micro_batches=2,
        )
    )
    return found


def control_case() -> Case:
    """Two variants that differ, to show that the comparison can tell."""
    ours = ObjectiveConfig(loss_average="sequence", kl_coefficient=0.04)
    theirs = {"loss_type": "grpo", "beta": 0.04, "use_bias_correction_kl": True}
    return Case(name="control: plain against unbiased KL", ours=ours, theirs=theirs)


def make_model(path: Path, seed: int) -> None:
    """A random two-layer model of the published family, saved where both sides load it from."""
    torch.manual_seed(seed)
    config = DeepseekV3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=24,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        n_routed_experts=4,
        num_experts_per_tok=2,
        n_group=1,
        topk_group=1,
        q_lora_rank=12,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=10,
        max_position_embeddings=64,
        initializer_range=0.2,
        num_mtp_layers=0,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    DeepseekV3ForCausalLM(config).float().save_pretrained(path)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{index}": index for index in range(3, VOCAB)}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=RawTokenizer(WordLevel(words, unk_token="<pad>")),
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        padding_side="left",
    )
    tokenizer.save_pretrained(path)


def make_batch(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """The hand-made batch, in TRL's names; prompts padded on the left, answers on the right."""
    generator = torch.Generator().manual_seed(seed)
    prompt_length = torch.tensor([5, 5, 5, 3, 3, 3])
    response_length = torch.tensor([7, 2, 5, 1, 6, 4])
    batch = {
        "prompt_ids": torch.randint(3, VOCAB, (ANSWERS, PROMPT_TOKENS), generator=generator),
        "completion_ids": torch.randint(3, VOCAB, (ANSWERS, RESPONSE_TOKENS), generator=generator),
        "prompt_mask": (torch.arange(PROMPT_TOKENS) >= PROMPT_TOKENS - prompt_length[:, None]).long(),
        "completion_mask": (torch.arange(RESPONSE_TOKENS) < response_length[:, None]).long(),
        "advantages": torch.tensor([1.1, -0.9, -0.2, 0.6, -1.3, 0.7]),
        "num_items_in_batch": response_length.sum(),
    }
    batch["prompt_ids"] *= batch["prompt_mask"]
    batch["completion_ids"] *= batch["completion_mask"]
    with torch.no_grad():
        current = log_probabilities(model, batch)

    def noise(scale: float) -> Tensor:
        return scale * torch.randn(ANSWERS, RESPONSE_TOKENS, generator=generator)

    batch["old_per_token_logps"] = current + noise(0.25)
    batch["ref_per_token_logps"] = current + noise(0.4)
    batch["sampling_per_token_logps"] = batch["old_per_token_logps"] + noise(0.15)
    return batch


def log_probabilities(model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Of the response tokens, in the plainest way: all logits, log-softmax, gather."""
    ids = torch.cat([batch["prompt_ids"], batch["completion_ids"]], dim=1)
    mask = torch.cat([batch["prompt_mask"], batch["completion_mask"]], dim=1)
    logits = model(input_ids=ids, attention_mask=mask).logits[:, PROMPT_TOKENS - 1 : -1]
    return logits.log_softmax(-1).gather(-1, batch["completion_ids"].unsqueeze(-1)).squeeze(-1)


def parts_of(batch: dict[str, Tensor], count: int) -> Iterator[dict[str, Tensor]]:
    size = ANSWERS // count
    for start in range(0, ANSWERS, size):
        yield {key: value[start : start + size] if value.ndim else value for key, value in batch.items()}


def run_ours(path: Path, batch: dict[str, Tensor], case: Case) -> tuple[nn.Module, float, list[ObjectiveResult]]:
    """Gradients into a fresh copy of the model, the loss of the whole batch, and each micro-batch's report."""
    model = load(path)
    loss, outcomes = 0.0, []
    for part in parts_of(batch, case.micro_batches):
        logprob_MT = log_probabilities(model, part)
        outcome = policy_objective(
            logprob_MT,
            logprob_MT.detach() if case.is_on_policy else part["old_per_token_logps"],
            part["advantages"],
            part["completion_mask"],
            case.ours,
            reference_logprob_MT=part["ref_per_token_logps"],
            engine_logprob_MT=part["sampling_per_token_logps"] if case.engine else None,
            num_tokens_total=int(batch["completion_mask"].sum()),
            num_sequences_total=ANSWERS,
        )
        outcome.loss.backward()
        loss += float(outcome.loss.detach())
        outcomes.append(outcome)
    return model, loss, outcomes


def run_theirs(path: Path, batch: dict[str, Tensor], case: Case) -> tuple[GRPOTrainer, float]:
    """The same through TRL's trainer."""
    trainer = make_trainer(GRPOTrainer, GRPOConfig, path, case.micro_batches, case.theirs)
    if case.engine:
        trainer.use_vllm = True  # only says that weights are given; no engine is started
    loss = 0.0
    for part in parts_of(batch, case.micro_batches):
        inputs = dict(part)
        sampling = inputs.pop("sampling_per_token_logps")
        if case.is_on_policy:
            inputs.pop("old_per_token_logps")
        if case.engine:
            inputs["importance_sampling_ratio"] = their_weights(part, sampling, case.engine)
        piece = trainer.compute_loss(trainer.model, inputs)
        piece.backward()
        loss += float(piece.detach())
    return trainer, loss


def their_weights(part: dict[str, Tensor], sampling: Tensor, config: ImportanceConfig) -> Tensor:
    """TRL's published formula, written out: it computes the weights inside generation, which this does not run."""
    log_ratio = (part["old_per_token_logps"] - sampling) * part["completion_mask"]
    if config.level == "sequence":
        log_ratio = log_ratio.sum(dim=-1, keepdim=True)
    ratio = log_ratio.exp()
    if config.bound == "truncate":
        return ratio.clamp(config.low, config.high)
    return ratio.masked_fill((ratio < config.low) | (ratio > config.high), 0.0)


def make_trainer(trainer_class: Any, config_class: Any, path: Path, micro_batches: int, options: dict[str, Any]) -> Any:
    """A TRL trainer over the saved model, set up as inside its training loop."""
    config = config_class(
        output_dir=str(path / "out"),
        per_device_train_batch_size=ANSWERS // micro_batches,
        gradient_accumulation_steps=micro_batches,
        num_generations=GROUP,
        max_completion_length=RESPONSE_TOKENS,
        model_init_kwargs={"dtype": "float32"},
        bf16=False,
        use_cpu=True,
        gradient_checkpointing=False,
        optim="adamw_torch",
        learning_rate=LEARNING_RATE,
        weight_decay=WEIGHT_DECAY,
        adam_beta2=BETA2,
        report_to=[],
        disable_tqdm=True,
        **options,
    )
    trainer = trainer_class(
        model=str(path),
        reward_funcs=lambda completions, **columns: [0.0] * len(completions),
        args=config,
        train_dataset=Dataset.from_list([{"prompt": "w3 w4"}] * ANSWERS),
        processing_class=PreTrainedTokenizerFast.from_pretrained(path),
    )
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = micro_batches
    return trainer


def load(path: Path) -> nn.Module:
    return DeepseekV3ForCausalLM.from_pretrained(path, dtype=torch.float32).train()


def compare_gradients(ours: nn.Module, theirs: nn.Module) -> dict[str, float]:
    """Largest difference over all weights, absolute and as a share of the largest gradient."""
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters() if parameter.grad is not None}
    found = {name: parameter.grad for name, parameter in ours.named_parameters() if parameter.grad is not None}
    if wanted.keys() != found.keys():
        raise SystemExit(f"gradients reach different weights: {sorted(wanted.keys() ^ found.keys())}")
    largest = max(float(gradient.abs().max()) for gradient in wanted.values())
    difference = max(float((found[name] - wanted[name]).abs().max()) for name in wanted)
    return {"gradient": difference, "gradient_relative": difference / largest, "largest_gradient": largest}


def compare_step(path: Path, ours: nn.Module, trainer: GRPOTrainer) -> dict[str, float]:
    """One clipped AdamW step on each side, each with its own optimizer and its own rule for what decays."""
    copy = load(path)
    before = {name: parameter.detach().clone() for name, parameter in copy.named_parameters()}
    for mine, given in zip(copy.parameters(), trainer.model.parameters()):
        mine.grad = None if given.grad is None else given.grad.clone()
    our_step(ours)
    our_step(copy)
    trainer.create_optimizer()
    torch.nn.utils.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
    trainer.optimizer.step()
    theirs = {name: parameter.detach() for name, parameter in trainer.model.named_parameters()}
    apart, moved, apart_equal = differences(ours, theirs), differences(ours, before), differences(copy, theirs)
    return {
        "step": float(apart.norm() / moved.norm()),
        "step_largest": float(apart.max()),
        "step_of_equal_gradients": float(apart_equal.max()),
        "largest_move": float(moved.max()),
    }


def our_step(model: nn.Module) -> None:
    OptimizerSet(
        model,
        OptimizerConfig(learning_rate=LEARNING_RATE, beta1=0.9, beta2=BETA2, weight_decay=WEIGHT_DECAY, clip_norm=1.0),
    ).step()


def differences(model: nn.Module, other: dict[str, Tensor]) -> Tensor:
    """Absolute, of all weights, in one vector."""
    parts = [(parameter.detach() - other[name]).abs().flatten() for name, parameter in model.named_parameters()]
    return torch.cat(parts).double()


def compare(path: Path, batch: dict[str, Tensor], case: Case) -> dict[str, Any]:
    """One row of the table."""
    ours, our_loss, outcomes = run_ours(path, batch, case)
    trainer, their_loss = run_theirs(path, batch, case)
    row: dict[str, Any] = {
        "variant": case.name,
        "trl": case.theirs,
        "loss_ours": our_loss,
        "loss_trl": their_loss,
        "loss": abs(our_loss - their_loss),
        **compare_gradients(ours, trainer.model),
        **compare_step(path, ours, trainer),
    }
    for name in ("clip_fraction", "off_policy_fraction", "importance_bounded_fraction"):
        row[name] = sum(getattr(outcome, name) for outcome in outcomes) / len(outcomes)
    return row | {"passed": all(row[name] <= limit for name, limit in LIMITS.items())}


def compare_rloo(path: Path, batch: dict[str, Tensor]) -> dict[str, Any]:
    """RLOO's first update, TRL's divided by the longest answer as ours is. The losses themselves are different numbers: one
    ratio per answer there, one per token here."""
    ours = load(path)
    logprob_MT = log_probabilities(ours, batch)
    objective = ObjectiveConfig(
        loss_average="constant", max_response_tokens=RESPONSE_TOKENS, clip_low=1e9, clip_high=1e9
    )
    policy_objective(
        logprob_MT, logprob_MT.detach(), batch["advantages"], batch["completion_mask"], objective
    ).loss.backward()
    trainer = make_trainer(RLOOTrainer, RLOOConfig, path, 1, {"beta": 0.0})
    old_logps = (logprob_MT.detach() * batch["completion_mask"]).sum(1)
    (trainer.compute_loss(trainer.model, dict(batch) | {"old_logps": old_logps}) / RESPONSE_TOKENS).backward()
    row = {"variant": "rloo, on-policy (gradient and step)", "trl": {"trainer": "RLOOTrainer", "beta": 0.0}}
    row |= compare_gradients(ours, trainer.model) | compare_step(path, ours, trainer)
    return row | {"passed": all(row[name] <= limit for name, limit in LIMITS.items() if name in row)}


def compare_parts(batch: dict[str, Tensor]) -> dict[str, float]:
    """Pieces that both have as plain functions: the overlong penalty, and the weights handed to TRL above."""
    lengths = [1, 60, 80, 81, 90, 99, 100, 130]
    theirs = get_soft_overlong_punishment(max_completion_len=100, soft_punish_cache=20)(
        completion_ids=[[0] * length for length in lengths]
    )
    penalty = (overlong_penalty(torch.tensor(lengths), 100, 20) - torch.tensor(theirs)).abs().max()
    found = {"overlong_penalty": float(penalty)}
    for level in ("token", "sequence"):
        for bound in ("truncate", "mask"):
            config = ImportanceConfig(level=level, bound=bound, low=0.8, high=1.15)
            old, sampling, mask = (
                batch[name] for name in ("old_per_token_logps", "sampling_per_token_logps", "completion_mask")
            )
            mine = importance_weights(old, sampling, mask, config).weight_MT
            wanted = their_weights(batch, sampling, config) * mask
            found[f"importance_{level}_{bound}"] = float((mine - wanted).abs().max())
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/trl_parity.json"))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder)
        make_model(path, args.seed)
        batch = make_batch(load(path), args.seed)
        with contextlib.redirect_stdout(io.StringIO()):
            rows = [compare(path, batch, case) for case in cases()] + [compare_rloo(path, batch)]
            control = compare(path, batch, control_case())
            parts = compare_parts(batch)
    report([*rows, control], parts)
    passed = (
        all(row["passed"] for row in rows)
        and all(value <= LIMITS["loss"] for value in parts.values())
        and all(control[name] > 10 * LIMITS[name] for name in ("loss", "gradient", "gradient_relative"))
    )
    payload = {
        "command": " ".join(["python", "benchmarks/trl_parity.py", *sys.argv[1:]]),
        "seed": args.seed,
        "commit": commit(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "trl": trl.__version__,
        },
        "model": "DeepseekV3ForCausalLM, random, float32, 1 dense and 1 mixture-of-experts layer",
        "limits": LIMITS,
        "passed": passed,
        "rows": rows,
        "control": control,
        "parts": parts,
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(payload, indent=1) + "\n", encoding="utf-8")
    return 0 if passed else 1


def report(rows: list[dict[str, Any]], parts: dict[str, float]) -> None:
    """The table on standard output."""
    print(f"{'variant':42} {'|d loss|':>9} {'|d grad|':>9} {'rel.':>9} {'d step':>9} {'equal g':>9} {'clipped':>8}  ok")
    for row in rows:
        loss = f"{row['loss']:9.1e}" if "loss" in row else f"{'':9}"
        clipped = f"{row['clip_fraction']:8.2f}" if "clip_fraction" in row else f"{'':8}"
        print(
            f"{row['variant']:42} {loss} {row['gradient']:9.1e} {row['gradient_relative']:9.1e} {row['step']:9.1e} "
            f"{row['step_of_equal_gradients']:9.1e} {clipped}  {'yes' if row['passed'] else 'NO'}"
        )
    for name, value in parts.items():
        print(f"{name:42} {value:9.1e}")


def commit() -> str:
    """The commit measured, marked when one of the files compared here differs from it."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", *MEASURED_PATHS], check=True, capture_output=True, text=True
        )
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("-dirty" if changed.stdout else "")


if __name__ == "__main__":
    sys.exit(main())
