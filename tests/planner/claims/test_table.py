import json
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ConfigError
from shoal.planner.claims.claim import Claim
from shoal.planner.claims.table import BEGIN, END, all_claims, claim, markdown

DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "claims.md"
EXACT = (1, 2, 3, 4, 5, 6, 7, 11, 13, 15, 16, 17, 18, 19, 24, 38, 40, 41, 42, 43, 44, 45, 46, 52, 53, 54, 55, 56)
"""Rows of kind "exact" that concern counts, cost, serving, network or energy."""
OPEN = (6, 12, 14, 57)
"""Rows with a figure that the published inputs do not give."""


@pytest.mark.parametrize("row", all_claims(), ids=lambda row: str(row.number))
def test_every_figure_that_can_be_recomputed_agrees_to_its_tolerance(row: Claim) -> None:
    for figure in row.figures:
        if not figure.not_recomputable:
            assert figure.agrees, f"{figure.name}: published {figure.published}, ours {figure.ours} {figure.unit}"
        assert figure.source and figure.formula and figure.unit


def test_all_exact_rows_are_there_and_rest_on_a_recomputed_figure() -> None:
    numbers = [row.number for row in all_claims()]
    assert len(numbers) == len(set(numbers)) and set(EXACT) <= set(numbers)
    for number in EXACT:
        assert any(figure.agrees for figure in claim(number).figures), number


@pytest.mark.parametrize("number", OPEN)
def test_what_cannot_be_recomputed_says_so_in_words_beside_the_figure(number: int) -> None:
    row = claim(number)
    assert any(figure.not_recomputable for figure in row.figures)
    assert "not recomputable" in row.words or "nothing to recompute" in row.words


def test_the_document_holds_exactly_the_table_that_the_planner_writes() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    table = text[text.index(BEGIN) : text.index(END) + len(END)]
    assert table == markdown(all_claims()), "write it anew: shoal plan --claims --markdown"


@pytest.mark.parametrize("row", all_claims(), ids=lambda row: str(row.number))
def test_the_command_of_every_row_runs(row: Claim) -> None:
    program, verb, *arguments = shlex.split(row.command)
    assert (program, verb) == ("shoal", "plan")
    result = CliRunner().invoke(app, [verb, *arguments, "--json"], catch_exceptions=False)
    assert result.exit_code == 0 and json.loads(result.stdout)


def test_a_number_without_a_row_lists_those_that_have_one() -> None:
    with pytest.raises(ConfigError, match="no claim 9 here; the planner recomputes 1, 2, 3"):
        claim(9)
