"""Verbs of the training room: `shoal pretrain`, `shoal sft`, `shoal eval`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, cast

import typer

from shoal.cli.root import JsonOption, ModelArgument, app


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="Text files or folders (.txt, .jsonl, .parquet); may be repeated.")],
    recipe: Annotated[str, typer.Option(help="Only 'text' so far.")] = "text",
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/text"
    ),
    variant: Annotated[
        str, typer.Option(help="'moe', 'dense', 'gqa', or 'both' for moe and dense side by side.")
    ] = "moe",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, key=value; may be repeated.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field that holds the text in JSON lines and Parquet.")] = "text",
    precision: Annotated[
        str, typer.Option(help="Of matrix products: auto, fp32, bf16, or fp8 (emulated without FP8 units).")
    ] = "auto",
    fp8_wgrad: Annotated[str, typer.Option(help="With fp8, of the weight gradients: fp8, or bf16.")] = "fp8",
    json_output: JsonOption = False,
) -> None:
    """Pretrain a small model on your own text and measure it on the held-out last tenth.

    Example: shoal pretrain --recipe text --data book.txt --set steps=200
    """
    from shoal.log import print_json
    from shoal.recipes.text import run_text, text_config

    if TYPE_CHECKING:
        from shoal.training.loop import Precision

    config = text_config(
        recipe,
        variant=variant,
        overrides=set_ or [],
        precision=cast("Precision", precision),
        fp8_wgrad=cast("Literal['fp8', 'bf16']", fp8_wgrad),
    )
    result = run_text(run_dir, data, config, text_key=text_key)
    if json_output:
        print_json(result)


@app.command()
def sft(
    data: Annotated[
        list[Path],
        typer.Option(help="JSON lines with messages, or prompt and response (.jsonl, .jsonl.gz); may be repeated."),
    ],
    model: ModelArgument = None,
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/sft"
    ),
    steps: Annotated[int, typer.Option(help="Optimizer steps.")] = 100,
    learning_rate: Annotated[float, typer.Option(help="Peak rate of AdamW.")] = 3e-4,
    batch_rows: Annotated[int, typer.Option(help="Rows of packed examples per step.")] = 8,
    row_tokens: Annotated[int, typer.Option(help="Tokens per row; 0: as many as the longest example needs.")] = 0,
    held_out_fraction: Annotated[float, typer.Option(help="Share of the questions that are only measured.")] = 0.05,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal weights.")] = 0,
    json_output: JsonOption = False,
) -> None:
    """Fine-tune a model on your own conversations; only answers are learnt.

    Example: shoal sft runs/demo --data chats.jsonl --steps 200
    """
    from shoal.log import print_json
    from shoal.recipes.fine_tuning import FineTuningConfig, fine_tune

    config = FineTuningConfig(
        steps=steps,
        learning_rate=learning_rate,
        batch_rows=batch_rows,
        row_tokens=row_tokens,
        held_out_fraction=held_out_fraction,
        seed=seed,
    )
    result = fine_tune(run_dir, model, data, config)
    if json_output:
        print_json(result)


@app.command("eval")
def evaluate(
    model: ModelArgument = None,
    data: Annotated[
        list[Path] | None, typer.Option(help="Text to foretell: files or folders; may be repeated.")
    ] = None,
    task: Annotated[
        str | None,
        typer.Option(help="Problems to solve: a family's name, my_task.py, jsonl:FILE, math:FILE or gym:NAME."),
    ] = None,
    difficulty: Annotated[int | None, typer.Option(help="Of a built-in family.")] = None,
    problems: Annotated[int, typer.Option(help="Held-out problems asked.")] = 100,
    samples: Annotated[int, typer.Option(help="Answers to each.")] = 4,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 256,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Equal seeds give equal answers.")] = 0,
    text_key: Annotated[str, typer.Option(help="Field that holds the text in JSON lines and Parquet.")] = "text",
    json_output: JsonOption = False,
) -> None:
    """Measure a model: bits per byte on a text, pass@1 on a task.

    Example: shoal eval runs/demo --task chain_sum --problems 100
    """
    from shoal.errors import ConfigError
    from shoal.log import print_json, say
    from shoal.recipes.evaluating import evaluate_task, evaluate_text

    if not data and task is None:
        raise ConfigError("nothing to measure; give --data FILE, --task NAME, or both.")
    result = {}
    if data:
        result["text"] = found = evaluate_text(model, data, text_key=text_key)
        say(
            f"text: {found['bits_per_byte']:.3f} bits per byte, {found['nats_per_character']:.3f} nats per character, "
            f"perplexity {found['perplexity']:.2f} over {found['tokens']} tokens"
        )
    if task is not None:
        result["task"] = found = evaluate_task(
            model,
            task,
            difficulty=difficulty,
            num_problems=problems,
            samples=samples,
            max_tokens=max_tokens,
            temperature=temperature,
            seed=seed,
        )
        low, high = found["pass_at_1_interval"]
        say(
            f"{found['task']}: pass@1 {found['pass_at_1']:.1%} (95 %: {low:.1%} to {high:.1%}), "
            f"{found['response_tokens']:.0f} tokens per answer"
        )
    if json_output:
        print_json(result)
