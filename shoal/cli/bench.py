"""Measuring this machine: `shoal bench decode|prefill|cache`."""

from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app

bench_app = typer.Typer(help="Measure this machine: decoding, prefill, the context cache.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

BenchModelArgument = Annotated[str | None, typer.Argument(help="Model directory or run directory; or use --preset.")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="Random weights in this preset's shape.")]
WeightsOption = Annotated[str, typer.Option(help="f32, bf16, fp8, int8, int4, or auto: as stored, else bf16.")]
GroupOption = Annotated[
    int | None, typer.Option(help="Columns that share a scale, of a preset in int4: 32 (the default), 64 or 128.")
]
Fp8CacheOption = Annotated[bool, typer.Option("--fp8-cache", help="Cached latents in FP8 in the place of bf16.")]


@bench_app.command("decode")
def bench_decode(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "auto",
    group: GroupOption = None,
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens each has in its cache.")] = 128,
    fp8_cache: Fp8CacheOption = False,
    json_output: JsonOption = False,
) -> None:
    """Tokens per second of decoding, beside the measured limit of memory.

    Example: shoal bench decode --preset nano --weights int8
    """
    from shoal.kernels.array_pool import pool_arrays
    from shoal.log import print_json
    from shoal.recipes.bench import NEW_TOKENS, load_packed, published
    from shoal.recipes.bench import bench_decode as measure

    pool_arrays()
    loaded = load_packed(model, preset, weights, context + NEW_TOKENS, group)
    result = measure(loaded, batch=batch, context=context, fp8_cache=fp8_cache)
    if json_output:
        print_json(published(result))


@bench_app.command("prefill")
def bench_prefill(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "auto",
    group: GroupOption = None,
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    fp8_cache: Fp8CacheOption = False,
    fast_prefill: Annotated[
        bool, typer.Option("--fast-prefill", help="With keys and values expanded, as 'shoal serve --fast-prefill'.")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Tokens per second of reading a prompt, beside the measured limit of arithmetic.

    Example: shoal bench prefill --preset nano --weights bf16 --tokens 512
    """
    from shoal.kernels.array_pool import pool_arrays
    from shoal.log import print_json
    from shoal.recipes.bench import bench_prefill as measure
    from shoal.recipes.bench import load_packed, published

    pool_arrays()
    loaded = load_packed(model, preset, weights, tokens, group, fast_prefill)
    result = measure(loaded, tokens=tokens, fp8_cache=fp8_cache)
    if json_output:
        print_json(published(result))


@bench_app.command("cache")
def bench_cache(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "auto",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Prompts to take the median of.")] = 3,
    json_output: JsonOption = False,
) -> None:
    """Time to first token: computed, found in RAM, found on disk after a restart.

    Example: shoal bench cache --preset nano --prompt-tokens 1024
    """
    from shoal.kernels.array_pool import pool_arrays
    from shoal.log import print_json
    from shoal.recipes.bench import load_packed
    from shoal.recipes.bench_cache import bench_cache as measure

    pool_arrays()
    result = measure(
        load_packed(model, preset, weights, prompt_tokens + 64), prompt_tokens=prompt_tokens, rounds=rounds
    )
    if json_output:
        print_json(result)
