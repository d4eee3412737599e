"""The report's section on an R1 pipeline: a table like the paper's, and which of its claims held."""

import html
from collections.abc import Mapping
from typing import Any

from shoal.report.figures import bar_chart

TITLES = {
    "base": "base",
    "zero": "Zero: RL alone",
    "dev1": "Dev1: cold start",
    "dev2": "Dev2: + reasoning RL",
    "dev3": "Dev3: rejection sampling",
    "r1": "R1: + RL on all",
    "small-base": "small dense base",
    "small-rl": "small: RL alone",
    "distilled": "small: distilled",
}


def pipeline_section(pipeline: Mapping[str, Any]) -> str:
    """Table, bars and findings of `r1.json`."""
    models: Mapping[str, Mapping[str, Any]] = pipeline["models"]
    rows = "".join(_row(TITLES.get(name, name), row) for name, row in models.items())
    heads = (
        "model",
        "pass@1 (95 % interval)",
        "pass@k",
        "tokens per answer",
        "show work",
        "English thinking",
        "general replies",
    )
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    bars = [
        (name, [row["pass_at_1"], 0.0 if row["one_language"] is None else row["one_language"], row["general"]])
        for name, row in models.items()
    ]
    chart = bar_chart(
        "What each model of the pipeline can do", "share", bars, ["pass@1", "English thinking", "general replies"]
    )
    said = "".join(
        f"<li><b>{html.escape(each['verdict'])}</b>: {html.escape(each['claim'])} <span class=quiet>{html.escape(each['evidence'])}</span></li>"
        for each in pipeline["findings"]
    )
    return (
        "<h2>The R1 pipeline</h2><p>What DeepSeek-R1 reports of its stages, asked of these models. A verdict needs intervals that do not "
        f"overlap.</p><ul>{said}</ul><div class=plots><figure>{chart}</figure></div>"
        f"<div class=scroll><table><tr>{head}</tr>{rows}</table></div>"
    )


def _row(title: str, row: Mapping[str, Any]) -> str:
    language = "no thinking" if row["one_language"] is None else f"{row['one_language']:.0%}"
    cells = (
        title,
        f"{row['pass_at_1']:.1%} ({row['pass_at_1_low']:.1%} to {row['pass_at_1_high']:.1%})",
        f"{row['pass_at_most']:.1%} at {row['samples_per_problem']}",
        f"{row['response_tokens']:.0f}",
        f"{row['worked_fraction']:.0%}",
        language,
        f"{row['general']:.0%}",
    )
    return "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in cells) + "</tr>"
