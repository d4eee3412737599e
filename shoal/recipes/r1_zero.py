"""The R1-Zero figure, family by family: what reward alone does to a small base, beside everything it must be compared with.

Each family has its own base, trained from scratch on true documents of which few show their work, three seeds of
reinforcement learning, and four controls (`demo.control_arms`). Held-out problems are answered 64 times before and after,
so that pass@1 (how often) and pass@64 (whether at all) can be told apart: reinforcement learning is known to raise the
first much more than the second. What is found is written down whatever it is.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, did_you_mean
from shoal.recipes.demo import DemoConfig, demo_config, run_demo
from shoal.recipes.run import write_json
from shoal.training.schedule import Schedule


@dataclass(frozen=True, kw_only=True)
class FamilyPlan:
    """How a base of a family is made that is neither hopeless nor finished."""

    difficulty: int
    pretraining_steps: int
    rl_steps: int
    worked_share: float = 0.15
    arithmetic_share: float = 0.15
    rl_problems: int = 1200
    learning_rate: float = 5e-4
    """What took the demo's base from 39 to 91 % (docs/log.md); twice as much, on bases trained less, cost them their skill."""


PLANS = {
    "chain_sum": FamilyPlan(difficulty=6, pretraining_steps=1400, rl_steps=48),
    "dial": FamilyPlan(difficulty=16, pretraining_steps=500, rl_steps=40, worked_share=0.2, arithmetic_share=0.0),
    "remainder": FamilyPlan(difficulty=16, pretraining_steps=500, rl_steps=40, worked_share=0.2, arithmetic_share=0.0),
    "multiplication": FamilyPlan(difficulty=2, pretraining_steps=2400, rl_steps=48, worked_share=0.2),
}
"""The base decides what reinforcement learning can do: there must be a way of working that is right far more often than a
guess (`docs/log.md` has the families where there was none). The last has not been run."""


def study_config(family: str, seeds: Sequence[int] = (0, 1, 2)) -> DemoConfig:
    """The recipe of one family.

    Raises:
        ConfigError: no plan for this family.
    """
    if family not in PLANS:
        raise ConfigError(f"no plan for family {family!r}{did_you_mean(family, PLANS)}; there are {', '.join(PLANS)}.")
    plan, base = PLANS[family], demo_config()
    schedule = Schedule(kind="wsd", warmup_steps=20, total_steps=plan.pretraining_steps, decay_fraction=0.6)
    return replace(
        base,
        corpus=replace(
            base.corpus,
            family=family,
            difficulty=plan.difficulty,
            worked_share=plan.worked_share,
            arithmetic_share=plan.arithmetic_share,
            history_share=0.0,
        ),
        pretraining=replace(base.pretraining, steps=plan.pretraining_steps, schedule=schedule),
        rl=replace(
            base.rl, steps=plan.rl_steps, optimizer=replace(base.rl.optimizer, learning_rate=plan.learning_rate)
        ),
        rl_seeds=tuple(seeds),
        second_question_share=0.0,
        rl_problems=plan.rl_problems,
        held_out_problems=64,
        samples_per_problem=64,
        estimates_s={},
    )


def run_study(run_dir: Path, families: Sequence[str], seeds: Sequence[int] = (0, 1, 2)) -> dict[str, Any]:
    """Run the families one after another, each in its own run directory below `run_dir`; done stages are not repeated.

    Returns the summary, which is also written to `run_dir/summary.json` after each family.
    """
    configs = {family: study_config(family, seeds) for family in families}
    summary: dict[str, Any] = {}
    for family, config in configs.items():
        run_demo(run_dir / family, config, controls=True)
        evaluation = json.loads((run_dir / family / "evaluation.json").read_text(encoding="utf-8"))
        summary[family] = summarise(evaluation)
        write_json(run_dir / "summary.json", summary)
    return summary


def summarise(evaluation: dict[str, Any]) -> dict[str, Any]:
    """The figures of a family's `evaluation.json` that go into a table."""
    arms = [{"name": f"R1-Zero, seed {after['seed']}", **after} for after in evaluation["after"]]
    return {
        "base": _row(evaluation["before"]),
        "arms": [{"name": arm["name"], **_row(arm)} for arm in [*arms, *evaluation["controls"]]],
    }


def describe_study(summary: dict[str, Any]) -> str:
    """The figures as lines of a table."""
    lines = ["family / arm: pass@1, pass@64, tokens, share that shows work"]
    for family, found in summary.items():
        for arm in [{"name": "base", **found["base"]}, *found["arms"]]:
            most = max(arm["pass_at"], key=int)
            lines.append(
                f"{family} / {arm['name']}: {arm['pass_at']['1']:.1%}, {arm['pass_at'][most]:.1%}, "
                f"{arm['response_tokens']:.1f}, {arm['worked_fraction']:.0%}"
            )
    return "\n".join(lines)


def _row(skill: dict[str, Any]) -> dict[str, Any]:
    names = (
        "pass_at",
        "pass_at_1_interval",
        "response_tokens",
        "worked_fraction",
        "accuracy_worked",
        "accuracy_direct",
    )
    return {name: skill[name] for name in names}
