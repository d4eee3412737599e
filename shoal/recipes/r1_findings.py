"""What each model of the R1 pipeline can do, and whether the paper's claims held for these models."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from shoal.engine.engine import Engine
from shoal.recipes.general_talk import general_problems, is_acceptable
from shoal.rl.evaluation import measure_skill
from shoal.rl.language import language_consistency
from shoal.rl.rollout import Prompter, sample_rollouts
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.task import Problem

GENERAL_QUESTIONS = 64
LANGUAGE_PROBLEMS = 64


@dataclass(frozen=True, kw_only=True)
class PipelineRow:
    """One line of the table."""

    pass_at_1: float
    pass_at_1_low: float
    pass_at_1_high: float
    pass_at_most: float
    """pass@k at the number of samples drawn."""
    samples_per_problem: int
    response_tokens: float
    worked_fraction: float
    one_language: float | None
    """Share of the thinking's words that are English; None where nothing is thought."""
    general: float
    """Share of general prompts with an acceptable reply."""

    def __str__(self) -> str:
        language = "no thinking" if self.one_language is None else f"{self.one_language:.0%} English"
        return (
            f"pass@1 {self.pass_at_1:.1%} ({self.pass_at_1_low:.1%} to {self.pass_at_1_high:.1%}), "
            f"{self.response_tokens:.0f} tokens, {language}, general {self.general:.0%}"
        )


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A claim of the paper, asked of this run."""

    claim: str
    evidence: str
    verdict: str
    """"agrees", "disagrees", or "too close to call" where intervals overlap."""


def measure_row(
    engine: Engine, prompter: Prompter, asked: Sequence[Problem], *, samples_per_problem: int, max_tokens: int
) -> PipelineRow:
    """Sample held-out problems at temperature 1, and general prompts at 0.7."""
    skill = measure_skill(engine, prompter, asked, samples_per_problem=samples_per_problem, max_tokens=max_tokens)
    low, high = skill.pass_at_1_interval
    return PipelineRow(
        pass_at_1=skill.pass_at["1"],
        pass_at_1_low=low,
        pass_at_1_high=high,
        pass_at_most=list(skill.pass_at.values())[-1],
        samples_per_problem=samples_per_problem,
        response_tokens=skill.response_tokens,
        worked_fraction=skill.worked_fraction,
        one_language=_one_language(engine, prompter, asked[:LANGUAGE_PROBLEMS], max_tokens),
        general=_general(engine, prompter, max_tokens),
    )


def findings(rows: Mapping[str, PipelineRow]) -> list[Finding]:
    """The paper's claims about its stages, each with what was seen here."""
    return [
        _compare("reinforcement learning alone lifts the base", rows, "base", "zero"),
        _compare("fine-tuning on the cold start costs accuracy (Dev1 below Zero)", rows, "dev1", "zero"),
        _language(
            "the language reward makes the thinking keep to one language (Dev2 above Zero)", rows, "zero", "dev2"
        ),
        _compare("reasoning RL wins the accuracy back (Dev2 above Dev1)", rows, "dev1", "dev2"),
        _general_finding("general data brings general answers (R1 above Zero)", rows, "zero", "r1"),
        _compare("the last RL does not lose accuracy (R1 at least Dev3)", rows, "dev3", "r1", ties_agree=True),
        _compare("distillation beats reinforcement learning of the small model", rows, "small-rl", "distilled"),
    ]


def _compare(
    claim: str, rows: Mapping[str, PipelineRow], lower: str, higher: str, *, ties_agree: bool = False
) -> Finding:
    a, b = rows[lower], rows[higher]
    evidence = f"{lower} {a.pass_at_1:.1%}, {higher} {b.pass_at_1:.1%}"
    if b.pass_at_1_low > a.pass_at_1_high:
        verdict = "agrees"
    elif a.pass_at_1_low > b.pass_at_1_high:
        verdict = "disagrees"
    else:
        verdict = "agrees" if ties_agree else "too close to call"
    return Finding(claim=claim, evidence=evidence, verdict=verdict)


def _language(claim: str, rows: Mapping[str, PipelineRow], lower: str, higher: str) -> Finding:
    a, b = rows[lower].one_language, rows[higher].one_language
    if a is None or b is None:
        return Finding(claim=claim, evidence="one of them does not think in words", verdict="too close to call")
    verdict = "agrees" if b > a + 0.02 else "disagrees" if a > b + 0.02 else "too close to call"
    return Finding(claim=claim, evidence=f"{lower} {a:.1%} English, {higher} {b:.1%}", verdict=verdict)


def _general_finding(claim: str, rows: Mapping[str, PipelineRow], lower: str, higher: str) -> Finding:
    a, b = rows[lower].general, rows[higher].general
    verdict = "agrees" if b > a + 0.1 else "disagrees"
    return Finding(claim=claim, evidence=f"{lower} {a:.0%}, {higher} {b:.0%}", verdict=verdict)


def _one_language(engine: Engine, prompter: Prompter, asked: Sequence[Problem], max_tokens: int) -> float | None:
    rollouts = sample_rollouts(engine, prompter, asked, group_size=2, max_tokens=max_tokens, seed=77)
    parsed = [parse_response(text) for text in rollouts.texts]
    shares = [language_consistency(each.thinking, "en") for each in parsed if each is not None]
    known = [share for share in shares if share is not None]
    return fmean(known) if known else None


def _general(engine: Engine, prompter: Prompter, max_tokens: int) -> float:
    asked = general_problems(GENERAL_QUESTIONS, seed=99)
    rollouts = sample_rollouts(engine, prompter, asked, group_size=2, max_tokens=max_tokens, temperature=0.7, seed=78)
    return fmean(is_acceptable(problem, text) for problem, text in zip(rollouts.problems, rollouts.texts))
