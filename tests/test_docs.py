"""The documents tell the truth: commands exist, links lead somewhere."""

import re
from pathlib import Path

import pytest
import typer

from shoal.cli import app

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])


def commands(path: Path) -> list[str]:
    """Command lines of the ```sh blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", path.read_text(encoding="utf-8"), flags=re.DOTALL)
    return [
        line.strip() for block in blocks for line in block.splitlines() if line.strip() and not line.startswith("#")
    ]


ALL_COMMANDS = [(path.name, line) for path in DOCUMENTS for line in commands(path)]


@pytest.mark.parametrize("document, line", ALL_COMMANDS)
def test_every_command_in_the_documents_exists(document, line):
    program, *rest = line.split()
    if program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        assert rest[0] in targets
        return
    assert program in ("shoal", "python"), f"{document}: {line}"
    if program == "python":
        assert (ROOT / rest[0]).is_file()
        return
    command = typer.main.get_command(app)
    while hasattr(command, "commands"):
        assert rest and rest[0] in command.commands, f"{document}: {line}"
        command = command.commands[rest.pop(0)]
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    for flag in (word.partition("=")[0] for word in rest if word.startswith("--")):
        assert flag in flags | {"--help"}, f"{document}: {line}: {flag}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^)#]+)\)", path.read_text(encoding="utf-8")):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_placeholder_is_left(path):
    assert not re.findall(r"@[A-Z_]+@|TODO|FIXME", path.read_text(encoding="utf-8"))
