"""The claims about training cost, to the tolerances of the claims table; what cannot be recomputed says so."""

import pytest

from shoal.planner.published_figure import PublishedFigure
from shoal.planner.published_runs import PUBLISHED_RUNS, published_figures

FIGURES = {figure.name: figure for figure in published_figures()}


@pytest.mark.parametrize(
    ("name", "ours", "tolerance"),
    [
        ("training hours of V2 against DeepSeek-67B, saved", 42.51, 0.005),
        ("V3 tokens per day", 272.80e9, 0.005e9),
        ("V3 utilisation, causal", 39.02, 0.005),
        ("V3 utilisation, not causal", 43.81, 0.005),
        ("V3 pretraining hours, from hours per trillion tokens", 2_664_000, 0),
        ("V3 pretraining hours, from tokens per day", 2_666_600, 50),
        ("V3 days per trillion tokens", 3.662, 0.0005),
        ("deepseek-v3 pretraining, cost", 5_328_000, 0),
        ("deepseek-v3 context extension, cost", 238_000, 0),
        ("deepseek-v3 post-training, cost", 10_000, 0),
        ("V3 hours in all", 2_788_000, 0),
        ("V3 cost in all, official run only", 5_576_000, 0),
        ("R1-Zero hours", 101_376, 0),
        ("R1 RL hours", 40_960, 0),
        ("R1 hours in all", 147_336, 0),
        ("r1-zero rl, cost", 202_000, 0),
        ("r1 sft data, cost", 10_000, 0),
        ("r1 rl, cost", 82_000, 0),
        ("R1 cost in all", 294_000, 0),
        ("V3 electricity, boards alone", 1.9516e6, 1),
    ],
)
def test_a_published_figure_recomputes_to_the_worked_check(name: str, ours: float, tolerance: float) -> None:
    found = FIGURES[name].ours
    assert found is not None
    assert abs(found - ours) <= tolerance


def test_no_figure_lies_further_off_than_its_own_tolerance() -> None:
    compared = [figure for figure in FIGURES.values() if figure.error_fraction is not None]
    assert len(compared) >= 19
    for figure in compared:
        assert figure.verdict == "equal" or figure.verdict.startswith("agrees"), figure.name
        assert figure.tolerance_fraction <= 0.05


def test_a_figure_with_one_side_missing_says_why_and_only_such_a_one() -> None:
    for figure in FIGURES.values():
        is_missing = figure.published is None or figure.ours is None
        assert bool(figure.not_recomputable) is is_missing, figure.name
        assert figure.formula
        assert figure.source


def test_rl_and_post_training_hours_are_not_recomputable_from_what_was_published() -> None:
    silent = {name for name, run in PUBLISHED_RUNS.items() if run.utilisation is None}
    assert silent == {"deepseek-v3 post-training", "r1-zero rl", "r1 sft data", "r1 rl"}
    for name in silent:
        assert "published" in PUBLISHED_RUNS[name].not_recomputable
        assert FIGURES[f"{name}, hours from the work done"].verdict == "not recomputable"


def test_electricity_was_never_published_and_has_two_ends() -> None:
    low, high = FIGURES["V3 electricity, boards alone"], FIGURES["V3 electricity, machines and building"]
    assert low.verdict == high.verdict == "nothing published"
    assert "no official figure" in low.not_recomputable
    assert low.ours is not None
    assert high.ours is not None
    assert high.ours == pytest.approx(2788e3 * 1.275 * 1.56)
    assert high.ours > 2 * low.ours


def test_implied_utilisations_by_hand() -> None:
    # 1e12 tokens of 155.31 GFLOPs in 172.8K hours of 989.5 TFLOP/s; V3 by 250.46 GFLOPs in 180K hours.
    expected = {
        "deepseek-v2": 155.31e21 / (172.8e3 * 3600 * 989.5e12),
        "deepseek-v3 pretraining": 250.46e21 / (180e3 * 3600 * 989.5e12),
    }
    for name, fraction in expected.items():
        assert PUBLISHED_RUNS[name].utilisation == pytest.approx(fraction, rel=1e-4)


def test_long_rows_cost_v3_its_context_extension() -> None:
    # Attention is 30.70 GFLOPs of 250.46 at 4K rows, eight times that at 32K and 32 times at 128K; 62.9 B tokens each.
    run = PUBLISHED_RUNS["deepseek-v3 context extension"]
    assert run.tokens == pytest.approx(125.83e9, rel=1e-4)
    flops = 62.9146e9 * ((219.75 + 8 * 30.70) + (219.75 + 32 * 30.70)) * 1e9
    assert run.utilisation == pytest.approx(flops / (119e3 * 3600 * 989.5e12), rel=1e-3)


def test_llama_took_eleven_times_v3s_hours() -> None:
    figure = FIGURES["LLaMA-3.1-405B hours over V3's, in all"]
    assert figure.ours == pytest.approx(11.06, abs=0.005)


def test_a_figure_that_misses_says_by_how_much() -> None:
    figure = PublishedFigure(
        name="x", unit="h", published=100, ours=103, formula="f", source="s", tolerance_fraction=0.02
    )
    assert figure.verdict == "differs by +3 %"
