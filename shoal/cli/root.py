"""The root command, and the arguments that several verbs share."""

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(
    help="The DeepSeek V3/R1 recipe, whole: train, reason, serve, chat, and see what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Model directory or run directory; default: the newest run under runs/."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]
