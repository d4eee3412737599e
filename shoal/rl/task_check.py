"""`shoal task check`: what a task pays for, before a model finds out.

A model trained by reward becomes very good at whatever the verifier accepts. So the verifier is tried first: right answers
must score 1, answers that no honest solver would give must score 0, the best constant answer must not pay much, and it must
be quick and agree with a slow way of solving where the task has one. What fails here would be learned in training.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from shoal.rl.grading import grade_answers
from shoal.rl.task_source import TaskSource, open_task
from shoal.rl.tasks.task import Problem
from shoal.rl.verifier_pool import PoolConfig

MAX_CONSTANT_SCORE = 0.34
"""A constant answer that is right more often makes guessing a strategy; a task with three options cannot do better."""
SLOW_S = 0.05
BRUTE_FORCE_PROBLEMS = 20
TRICK_PROBLEMS = 10


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One check."""

    name: str
    passed: bool
    value: str
    advice: str = ""


@dataclass(frozen=True, kw_only=True)
class TaskReport:
    """All checks of a task."""

    task: str
    description: str
    problems: int
    findings: list[Finding]
    examples: list[dict[str, str]] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return all(finding.passed for finding in self.findings)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return {**asdict(self), "passed": self.passed}

    def table(self) -> str:
        """Lines for people."""
        width = max(len(finding.name) for finding in self.findings)
        lines = [f"{self.task}: {self.description}", f"{self.problems} problems, for example:"]
        lines += [f"  {example['prompt'][:100]!r} -> {example['answer'][:40]!r}" for example in self.examples]
        for finding in self.findings:
            lines.append(f"{'ok  ' if finding.passed else 'FAIL'} {finding.name:<{width}}  {finding.value}")
            if not finding.passed and finding.advice:
                lines.append(f"     {finding.advice}")
        return "\n".join(lines)


def check_task(
    task: str, *, difficulty: int | None = None, count: int = 100, pool: PoolConfig | None = None
) -> TaskReport:
    """Run every check on up to `count` problems.

    Raises:
        TaskError, DataError: the task cannot be opened.
    """
    with open_task(task, difficulty=difficulty, pool=pool) as source:
        problems = source.sets.problems("rl", count)
        findings = [
            _gold(source, problems),
            *_tricks(source, problems[:TRICK_PROBLEMS]),
            _constant(source, problems),
            _repeated(problems),
            _speed(source, problems),
            *_brute_force(source, problems),
        ]
        examples = [{"prompt": problem.prompt, "answer": problem.answer} for problem in problems[:2]]
        return TaskReport(
            task=source.name,
            description=source.description,
            problems=len(problems),
            findings=findings,
            examples=examples,
        )


def _gold(source: TaskSource, problems: Sequence[Problem]) -> Finding:
    grades, _ = source.verifier.verify(problems, [problem.answer for problem in problems])
    wrong = [(problem, grade) for problem, grade in zip(problems, grades) if grade.score != 1.0]
    value = f"{len(problems) - len(wrong)} of {len(problems)} score 1"
    if not wrong:
        return Finding(name="right answers", passed=True, value=value)
    problem, grade = wrong[0]
    said = grade.detail or grade.failure or f"score {grade.score}"
    advice = f"the verifier rejects the task's own answer {problem.answer[:60]!r} to {problem.prompt[:80]!r}: {said}"
    return Finding(name="right answers", passed=False, value=value, advice=advice)


def tricks_of(problem: Problem, others: Sequence[Problem]) -> Iterator[tuple[str, str]]:
    """Whole responses that deserve nothing, by what they try. Those that happen to be right are the caller's to notice."""

    def answer(text: str) -> str:
        return f"<think></think><answer>{text}</answer>"

    gold = problem.answer
    every = " ".join(dict.fromkeys(other.answer for other in others if other.answer != gold))
    yield "empty answer", answer("")
    yield "white space", answer(" \n\t")
    yield "copy of the question", answer(problem.prompt)
    yield "every answer at once", answer(f"{every} {gold}")
    yield "counting up", answer(" ".join(str(number) for number in range(1000)))
    yield "two answer blocks", answer(gold) + f"<answer>{gold}</answer>"
    yield "answer only in the thinking", f"<think>{gold}</think><answer>?</answer>"
    yield "no format", gold
    yield "other digits", answer(gold.translate({48 + digit: 0x660 + digit for digit in range(10)}) + "\u0660")
    yield "power tower", answer("9**9**9**9")
    yield "deep parentheses", answer("(" * 9000 + "1" + ")" * 9000)
    yield "long number", answer("9" * 15_000)
    yield "code", answer("__import__('os')._exit(0)")


def _tricks(source: TaskSource, problems: Sequence[Problem]) -> list[Finding]:
    paid: dict[str, str] = {}
    failed: Counter[str] = Counter()
    count = 0
    for problem in problems:
        listed = [*tricks_of(problem, problems), *_own_exploits(source, problem)]
        graded = grade_answers(source.verifier, [problem] * len(listed), [text for _, text in listed])
        count += len(listed)
        for (name, text), grade in zip(listed, graded.grades):
            if grade.score is None:
                failed[f"{name}: {grade.failure}"] += 1
            elif grade.score > 0:
                paid.setdefault(name, text)
    value = f"{count} tried, " + (f"paid for: {', '.join(paid)}" if paid else "none paid")
    first = next(iter(paid.items()), None)
    advice = f"a model will learn to answer {first[1][:80]!r}" if first else ""
    findings = [Finding(name="tricks", passed=not paid, value=value, advice=advice)]
    if failed:
        kinds = ", ".join(f"{name} x{number}" for name, number in failed.most_common(4))
        advice = "such answers are left out of training and counted; a verifier that says 0 at once is better"
        findings.append(Finding(name="tricks that broke the verifier", passed=False, value=kinds, advice=advice))
    return findings


def _own_exploits(source: TaskSource, problem: Problem) -> Iterator[tuple[str, str]]:
    for number, text in enumerate(source.exploits):
        if text.strip() != problem.answer.strip():
            yield f"the task's exploit {number}", f"<think></think><answer>{text}</answer>"


def _constant(source: TaskSource, problems: Sequence[Problem]) -> Finding:
    common = [answer for answer, _ in Counter(problem.answer for problem in problems).most_common(5)]
    scores = {}
    for answer in common:
        grades, _ = source.verifier.verify(problems, [answer] * len(problems))
        scores[answer] = sum(grade.score or 0.0 for grade in grades) / len(problems)
    best = max(scores, key=lambda answer: scores[answer])
    bound = MAX_CONSTANT_SCORE if source.family is None else source.family.constant_answer_bound
    # Few problems make a lucky constant: allow what chance adds at two standard errors.
    allowed = bound + 2 * (bound * (1 - bound) / len(problems)) ** 0.5
    value = f"{best[:30]!r} scores {scores[best]:.1%} (allowed {allowed:.0%})"
    advice = "guessing pays: ask for answers with more possible values"
    return Finding(name="best constant answer", passed=scores[best] <= allowed, value=value, advice=advice)


def _repeated(problems: Sequence[Problem]) -> Finding:
    different = len({problem.prompt for problem in problems})
    few = different < 20
    advice = "a model learns few problems by heart; yield more different ones"
    return Finding(name="different problems", passed=not few, value=f"{different}", advice=advice)


def _speed(source: TaskSource, problems: Sequence[Problem]) -> Finding:
    answers = [problem.answer for problem in problems]
    source.verifier.verify(problems[:1], answers[:1])  # what the first answer loads is not what an answer costs
    _, slowest_s = source.verifier.verify(problems, answers)
    value = f"slowest right answer {1e3 * slowest_s:.2f} ms (allowed {1e3 * SLOW_S:.0f} ms)"
    advice = "512 answers a step wait for this; simplify the verifier, or give it more workers (--workers)"
    return Finding(name="speed", passed=slowest_s <= SLOW_S, value=value, advice=advice)


def _brute_force(source: TaskSource, problems: Sequence[Problem]) -> list[Finding]:
    """Nothing where the task has no slow way of its own."""
    solve = _solver(source)
    if solve is None:
        return []
    tried = disagree = 0
    for problem in problems[:BRUTE_FORCE_PROBLEMS]:
        answers = solve(problem)
        if not answers:
            disagree += 1
            continue
        grades, _ = source.verifier.verify([problem] * len(answers), answers)
        tried += 1
        disagree += any(grade.score != 1.0 for grade in grades)
    value = f"{tried} problems solved the slow way, {disagree} disagree"
    advice = "verify and brute_force contradict each other; one of them is wrong"
    return [Finding(name="brute force", passed=not disagree, value=value, advice=advice)]


def _solver(source: TaskSource) -> Callable[[Problem], list[str] | None] | None:
    pool = source.pool
    if pool is None or not pool.about.get("has_brute_force"):
        return None
    return pool.brute_force
