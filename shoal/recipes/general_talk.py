"""General prompts beside the reasoning ones: R1's last stages must not forget how to talk.

The questions and acceptable replies are those of `small_talk`; a reply is right when it is one of them, word for word, which
a rule can tell. The paper judges such answers with a reward model.
"""

import random
from collections.abc import Sequence
from typing import Any

from shoal.recipes.problem_corpus import Document
from shoal.recipes.small_talk import EXAMPLES, small_talk
from shoal.rl.grading import FamilyVerifier, Grade
from shoal.rl.tasks.task import Problem

FAMILY = "general"


def general_documents(count: int, seed: int) -> list[Document]:
    """Questions with replies, to learn from."""
    rng = random.Random(f"general-documents-{seed}")
    talk = (small_talk(rng) for _ in range(count))
    return [Document(question=question, response=f"<think></think>{reply}") for question, reply in talk]


def general_problems(count: int, seed: int) -> list[Problem]:
    """Different questions, to be asked."""
    rng = random.Random(f"general-problems-{seed}")
    asked: dict[str, Problem] = {}
    while len(asked) < count:
        question, reply = small_talk(rng)
        asked[question] = Problem(family=FAMILY, difficulty=1, prompt=question, answer=reply)
    return list(asked.values())


def is_acceptable(problem: Problem, text: str) -> bool:
    """Whether a response replies as it should to this kind of question; any of the examples will do."""
    head, closed, spoken = text.partition("</think>")
    if not closed or head.strip() != "<think>":
        return False
    return _without_example(spoken) == _without_example(problem.answer)


def general_reward(
    prompts: Sequence[str], completions: Sequence[str], completion_ids: Sequence[Any], **columns: Any
) -> list[float | None]:
    """1 for an acceptable reply to a general prompt, 0 for another; None for reasoning problems."""
    del prompts, completion_ids
    return [
        float(is_acceptable(problem, text)) if problem.family == FAMILY else None
        for problem, text in zip(columns["problem"], completions)
    ]


class GeneralVerifier:
    """The built-in families; a general prompt has no answer block to be right in."""

    def verify(self, problems: Sequence[Problem], answers: Sequence[str]) -> tuple[list[Grade], float]:
        """Grades as `grading.Verifier` gives them."""
        asked = [place for place, problem in enumerate(problems) if problem.family != FAMILY]
        found, slowest_s = FamilyVerifier().verify([problems[i] for i in asked], [answers[i] for i in asked])
        grades = [Grade(score=0.0)] * len(problems)
        for place, grade in zip(asked, found):
            grades[place] = grade
        return grades, slowest_s


def _without_example(reply: str) -> str:
    for example in EXAMPLES:
        reply = reply.removesuffix(example)
    return reply.strip()
