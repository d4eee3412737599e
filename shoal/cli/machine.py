"""What is this, and where does it run: `shoal doctor`, `shoal version`."""

import sys

from shoal import __version__
from shoal.cli.root import JsonOption, app


@app.command()
def doctor(json_output: JsonOption = False) -> None:
    """Say what this machine can do and what is missing.

    Example: shoal doctor
    """
    from shoal.log import print_json
    from shoal.recipes.doctor import examine

    findings = examine()
    if json_output:
        print_json(findings)
    else:
        for name, value in findings.items():
            sys.stdout.write(f"{name:<22} {value}\n")


@app.command()
def version() -> None:
    """Print the version.

    Example: shoal version
    """
    sys.stdout.write(__version__ + "\n")
