"""`shoal convert`: another format for a model, with what it cost in accuracy.

Conversion streams (`checkpoint/convert.py`); calibration and measurement run the model layer by layer, so all three need
the memory of a layer. The error of the weights is reported per layer; of a text, perplexity and accuracy before and after,
and how often both models prefer the same token. Calibrate on one text and measure on another.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from shoal.checkpoint.convert import Conversion, convert, units_of
from shoal.checkpoint.hf_format import load_config, present_config, verify_sums
from shoal.checkpoint.layerwise import TextScore, rows_of, score_steps
from shoal.checkpoint.quantised import Scheme
from shoal.checkpoint.weight_files import WeightFiles
from shoal.errors import ConfigError, DataError
from shoal.log import duration, progress_bar, say
from shoal.recipes.calibrate import Calibration
from shoal.text.corpus import read_documents
from shoal.text.tokenizer import Tokenizer

CALIBRATION_TOKENS = 32768
MEASURED_TOKENS = 16384
ROW_TOKENS = 512


@dataclass(frozen=True, kw_only=True)
class ConvertOptions:
    """What `shoal convert` can be told."""

    scheme: Scheme
    calibrate: Path | None = None
    """Text whose activations choose int4 codes."""
    measure: Path | None = None
    """Text on which both models are measured."""
    text_key: str = "text"
    calibration_tokens: int = CALIBRATION_TOKENS
    measured_tokens: int = MEASURED_TOKENS

    def __post_init__(self) -> None:
        if (
            self.calibrate is not None
            and self.measure is not None
            and self.calibrate.resolve() == self.measure.resolve()
        ):
            raise ConfigError("--calibrate and --measure name the same file; measure on a text that chose nothing.")
        if self.scheme.calibrated != (self.calibrate is not None):
            raise ConfigError("a calibrated scheme needs a calibration text, and a text a calibrated scheme.")
        if min(self.calibration_tokens, self.measured_tokens) < 2:
            raise ConfigError("at least 2 tokens are needed to calibrate or measure.")


def run_convert(source: Path, target: Path, options: ConvertOptions) -> dict[str, Any]:
    """Convert, measure, report; returns what `conversion.json` holds.

    Raises:
        CheckpointError, ConfigError, DataError, DiskFullError: as the message says.
    """
    started_s = time.perf_counter()
    verify_sums(source)
    config = present_config(WeightFiles(source), load_config(source))
    row_tokens = min(ROW_TOKENS, config.max_position_embeddings)
    measured_BS = _rows(source, options.measure, options, options.measured_tokens, row_tokens)
    calibration_BS = _rows(source, options.calibrate, options, options.calibration_tokens, row_tokens)
    calibration = Calibration(source, options.scheme, calibration_BS) if calibration_BS is not None else None
    num_units = len(list(units_of(config)))
    passes = 0 if measured_BS is None else 2 * (config.num_hidden_layers + 1)
    with progress_bar("convert", num_units + passes) as bar:

        def finish(directory: Path, conversion: Conversion) -> dict[str, Any]:
            if measured_BS is None:
                return {}
            before, after = (_score(path, measured_BS, bar) for path in (source, directory))
            return {"measured": _comparison(before, after, measured_BS, options.measure)}

        report = convert(
            source,
            target,
            config,
            options.scheme,
            command=options.scheme.command(str(source), str(target), str(options.calibrate)),
            choose=calibration.codes if calibration else None,
            done=lambda name: bar.advance(1, name),
            finish=finish,
        )
    _print(report)
    say(f"{target}: {options.scheme.weights} in {duration(time.perf_counter() - started_s)}")
    return report


def _rows(source: Path, text: Path | None, options: ConvertOptions, max_tokens: int, row_tokens: int) -> Tensor | None:
    if text is None:
        return None
    if not (source / "tokenizer.json").is_file():
        raise DataError(f"{source} has no tokenizer.json, so no text can be read; leave out --calibrate and --measure.")
    tokenizer = Tokenizer.load(source)
    ids: list[int] = []
    for document in read_documents([text], text_key=options.text_key):
        ids += [int(token) for token in tokenizer.encode(document)]
        if len(ids) >= max_tokens:
            break
    if len(ids) < 2:
        raise DataError(f"{text} holds {len(ids)} tokens; give a longer text.")
    return rows_of(ids, row_tokens, max_tokens)


def _score(directory: Path, token_BS: Tensor, bar: Any) -> TextScore:
    for score in score_steps(directory, token_BS):
        bar.advance(1, f"measure {directory.name.strip('.')}")
        if score is not None:
            return score
    raise AssertionError("score_steps ends with a score")


def _comparison(before: TextScore, after: TextScore, token_BS: Tensor, text: Path | None) -> dict[str, Any]:
    return {
        "text": str(text),
        "tokens": int(token_BS.numel() - len(token_BS)),
        "perplexity_before": before.perplexity,
        "perplexity_after": after.perplexity,
        "perplexity_change_fraction": after.perplexity / before.perplexity - 1,
        "accuracy_before": before.accuracy,
        "accuracy_after": after.accuracy,
        "same_first_choice_fraction": float((before.best_M == after.best_M).float().mean()),
    }


def _print(report: dict[str, Any]) -> None:
    """The report for people: one line per layer."""
    lines = [f"{'unit':<14} {'MB':>9} {'error':>8}  worst tensor"]
    for name, unit in report["units"].items():
        worst = unit["worst"]
        lines.append(
            f"{name:<14} {unit['bytes'] / 1e6:>9.1f} {unit['relative_error']:>8.4f}  "
            f"{worst['relative_error']:.4f} {worst['tensor']}"
        )
    measured = report.get("measured")
    if measured:
        lines.append(
            f"perplexity {measured['perplexity_before']:.4f} -> {measured['perplexity_after']:.4f} "
            f"({measured['perplexity_change_fraction']:+.2%}), accuracy {measured['accuracy_before']:.4f} -> "
            f"{measured['accuracy_after']:.4f}, same first choice {measured['same_first_choice_fraction']:.2%}"
        )
    sys.stderr.write("\n".join(lines) + "\n")
