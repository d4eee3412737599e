"""What each number format costs a trained model: logits, perplexity, first choices and greedy answers, against bf16.

Every format is converted with `shoal convert`'s own function, opened as `shoal serve` opens it, and computed by the same
packed pass, inputs quantised as the kernels quantise them. Calibration reads one file, measurement another.

    python benchmarks/quality.py --model RUN --calibrate A.jsonl --measure B.jsonl --text-key answer --out quality.json
"""

import argparse
import json
import platform
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.checkpoint.hf_format import load_model
from shoal.checkpoint.quantised import Scheme
from shoal.checkpoint.stored_weights import StoredWeights
from shoal.engine.loading import find_model
from shoal.engine.making import pack_stored
from shoal.engine.packed_model import PackedModel
from shoal.model.fp8_latent_cache import Fp8LatentCache
from shoal.model.latent_cache import LatentCache
from shoal.model.transformer import Transformer
from shoal.recipes.convert import ConvertOptions, run_convert
from shoal.recipes.run import current_commit
from shoal.text.corpus import read_documents
from shoal.text.tokenizer import Tokenizer

ROW_TOKENS = 256
PROMPT_TOKENS, ANSWER_TOKENS = 32, 64
SCHEMES = {
    "fp8": Scheme(weights="fp8"),
    "fp8, powers of two": Scheme(weights="fp8", power_of_two=True),
    "int8": Scheme(weights="int8"),
    "int8, head and embedding too": Scheme(weights="int8", head=True, embedding=True),
    "int4, group 32, nearest": Scheme(weights="int4", group=32),
    "int4, group 64, nearest": Scheme(weights="int4", group=64),
    "int4, group 32, calibrated": Scheme(weights="int4", group=32, calibrated=True),
    "int4, group 64, calibrated": Scheme(weights="int4", group=64, calibrated=True),
    "int4, group 32, calibrated, head and embedding too": Scheme(
        weights="int4", group=32, calibrated=True, head=True, embedding=True
    ),
}


def logits_of(packed: PackedModel, row_S: Tensor) -> Tensor:
    """Scores of the whole vocabulary after every token of one row."""
    position = torch.arange(len(row_S), dtype=torch.int32)
    config = packed.config
    cache = torch.zeros(config.num_hidden_layers, 1, len(row_S), config.cache_width, dtype=torch.bfloat16)
    return packed.run(row_S, position, torch.zeros_like(position), cache, output_row=position)


def greedy(packed: PackedModel, prompt_S: Tensor) -> list[int]:
    """The answer that always takes the likeliest token."""
    config, length = packed.config, len(prompt_S) + ANSWER_TOKENS
    cache = torch.zeros(config.num_hidden_layers, 1, length, config.cache_width, dtype=torch.bfloat16)
    position = torch.arange(len(prompt_S), dtype=torch.int32)
    last = torch.tensor([len(prompt_S) - 1], dtype=torch.int32)
    zero = torch.zeros(1, dtype=torch.int32)
    logit = packed.run(prompt_S, position, torch.zeros_like(position), cache, output_row=last)
    answer = []
    for at in range(len(prompt_S), length):
        answer.append(int(logit.argmax()))
        logit = packed.run(
            torch.tensor([answer[-1]]), torch.tensor([at], dtype=torch.int32), zero, cache, output_row=zero
        )
    return answer


def measure(packed: PackedModel, row_BS: Tensor) -> dict[str, Any]:
    """Logits of all rows and greedy answers to their beginnings."""
    logit_BSV = torch.stack([logits_of(packed, row_S) for row_S in row_BS])
    loss = torch.nn.functional.cross_entropy(logit_BSV[:, :-1].flatten(0, 1), row_BS[:, 1:].flatten())
    answers = [greedy(packed, row_S[:PROMPT_TOKENS]) for row_S in row_BS[:24]]
    return {"logits": logit_BSV, "perplexity": float(loss.exp()), "answers": answers}


def compare(reference: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    """Figures of one format beside bf16."""
    wrong, right = found["logits"] - reference["logits"], reference["logits"]
    same = [[a == b for a, b in zip(*pair)] for pair in zip(reference["answers"], found["answers"])]
    until_apart = [row.index(False) if False in row else len(row) for row in same]
    return {
        "perplexity": found["perplexity"],
        "perplexity_change_fraction": found["perplexity"] / reference["perplexity"] - 1,
        "logit_error_fraction": float(wrong.norm() / right.norm()),
        "same_first_choice_fraction": float((found["logits"].argmax(-1) == right.argmax(-1)).float().mean()),
        "greedy_tokens_before_apart_fraction": sum(until_apart) / (len(same) * ANSWER_TOKENS),
        "greedy_answers_equal_fraction": sum(all(row) for row in same) / len(same),
    }


def cache_quality(source: Path, row_BS: Tensor) -> dict[str, dict[str, float]]:
    """What the precision of cached latents alone costs: float32 weights, the text read in chunks of 32 through the cache."""
    config, state = load_model(source, dtype=torch.float32)
    model = Transformer(config).eval()
    model.load_state_dict(state)
    caches = {
        "f32": lambda: LatentCache(config, len(row_BS), row_BS.shape[1]),
        "bf16": lambda: LatentCache(config, len(row_BS), row_BS.shape[1], dtype=torch.bfloat16),
        "fp8": lambda: Fp8LatentCache(config, len(row_BS), row_BS.shape[1]),
    }
    logits, figures = {}, {}
    for name, make in caches.items():
        cache, parts = make(), []
        for start in range(0, row_BS.shape[1], PROMPT_TOKENS):
            stop = min(start + PROMPT_TOKENS, row_BS.shape[1])
            cache.num_visible = stop
            position_BS = torch.arange(start, stop).expand(len(row_BS), -1)
            with torch.no_grad():
                parts.append(model.logits(model(row_BS[:, start:stop], position_BS=position_BS, cache=cache)))
        logits[name] = torch.cat(parts, dim=1)
        loss = torch.nn.functional.cross_entropy(logits[name][:, :-1].flatten(0, 1), row_BS[:, 1:].flatten())
        figures[name] = {
            "bytes_per_token": cache.bytes_per_token,
            "perplexity": float(loss.exp()),
            "logit_error_fraction": float((logits[name] - logits["f32"]).norm() / logits["f32"].norm()),
            "same_first_choice_fraction": float((logits[name].argmax(-1) == logits["f32"].argmax(-1)).float().mean()),
        }
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("model", "calibrate", "measure", "out"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--text-key", default="text")
    parser.add_argument("--rows", type=int, default=48)
    options = parser.parse_args()
    source = find_model(options.model)
    tokenizer = Tokenizer.load(source)
    text = "\n\n".join(read_documents([options.measure], text_key=options.text_key))
    ids = [int(token) for token in tokenizer.encode(text)][: options.rows * ROW_TOKENS]
    row_BS = torch.tensor(ids).view(-1, ROW_TOKENS)
    reference = measure(pack_stored(StoredWeights(source), "bf16"), row_BS)
    result: dict[str, Any] = {
        "commit": current_commit(),
        "command": f"python benchmarks/quality.py --model RUN --calibrate {options.calibrate.name} "
        f"--measure {options.measure.name} --text-key {options.text_key} --rows {options.rows}",
        "machine": platform.processor() or platform.machine(),
        "model": json.loads((source.parent / "text.json").read_text())
        if (source.parent / "text.json").is_file()
        else {},
        "tokens": row_BS.numel(),
        "bf16_perplexity": reference["perplexity"],
        "cache": cache_quality(source, row_BS),
        "formats": {},
    }
    print("cache", json.dumps(result["cache"]), flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        for number, (name, scheme) in enumerate(SCHEMES.items()):
            target = Path(scratch) / f"converted-{number}"
            calibrate = options.calibrate if scheme.calibrated else None
            report = run_convert(
                source, target, ConvertOptions(scheme=scheme, calibrate=calibrate, text_key=options.text_key)
            )
            figures: dict[str, Any] = compare(reference, measure(pack_stored(StoredWeights(target)), row_BS))
            figures["file_bytes"] = sum(unit["bytes"] for unit in report["units"].values())
            result["formats"][name] = figures
            options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
            print(name, json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
