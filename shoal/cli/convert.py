"""The verb that changes a model's format: `shoal convert`."""

from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app


@app.command()
def convert(
    model: Annotated[Path, typer.Argument(help="Model directory or run directory.")],
    out: Annotated[Path, typer.Argument(help="New directory.")],
    weights: Annotated[str, typer.Option(help="int4, int8, fp8 or bf16.")] = "int4",
    group: Annotated[int, typer.Option(help="Columns that share a scale in int4: 32, 64 or 128.")] = 32,
    calibrate: Annotated[Path | None, typer.Option(help="Text whose activations choose int4 codes.")] = None,
    measure: Annotated[Path | None, typer.Option(help="Text to measure before and after; another file.")] = None,
    text_key: Annotated[str, typer.Option(help="Field that holds the text in JSON lines and Parquet.")] = "text",
    calibration_tokens: Annotated[int, typer.Option(help="Tokens of the calibration text to use.")] = 32768,
    measured_tokens: Annotated[int, typer.Option(help="Tokens of the measured text to use.")] = 16384,
    quantise_head: Annotated[bool, typer.Option("--quantise-head", help="The output head too (int8, int4).")] = False,
    quantise_embedding: Annotated[
        bool, typer.Option("--quantise-embedding", help="The embedding too, in int8 (int8, int4).")
    ] = False,
    power_of_two: Annotated[
        bool, typer.Option("--power-of-two", help="fp8 scales as powers of two (DeepSeek-V3.1).")
    ] = False,
    json_output: JsonOption = False,
) -> None:
    """Store a model in another format, streaming; a stopped conversion goes on with the same command.

    Example: shoal convert runs/text runs/text-int4 --weights int4 --calibrate book.txt --measure other.txt
    """
    from shoal.checkpoint.quantised import Scheme
    from shoal.engine.loading import find_model
    from shoal.kernels.array_pool import pool_arrays
    from shoal.log import print_json
    from shoal.recipes.convert import ConvertOptions, run_convert

    scheme = Scheme(
        weights=weights,
        group=group,
        calibrated=calibrate is not None,
        power_of_two=power_of_two,
        head=quantise_head,
        embedding=quantise_embedding,
    )
    options = ConvertOptions(
        scheme=scheme,
        calibrate=calibrate,
        measure=measure,
        text_key=text_key,
        calibration_tokens=calibration_tokens,
        measured_tokens=measured_tokens,
    )
    pool_arrays()
    report = run_convert(find_model(model), out, options)
    if json_output:
        print_json(report)
