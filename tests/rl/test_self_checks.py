from functools import partial

from shoal.rl.self_checks import count_checks
from shoal.rl.tasks import TASKS, Problem

COUNTDOWN = Problem(
    family="countdown", difficulty=3, prompt="", answer="(3+4)*2", facts={"numbers": (2, 3, 4), "target": 14}
)
JUDGE = partial(TASKS["countdown"].verify, COUNTDOWN)


def _count(thinking):
    return count_checks([f"<think>{thinking}</think><answer>1</answer>"], [JUDGE])


def test_precision_and_recall_of_verdicts_are_counted_by_hand():
    # right tries: (3+4)*2 twice, once called no; wrong tries called yes: one
    counts = _count("2+3+4=9 no\n(3+4)*2=14 no\n3*4+2=14 yes\n2*3+4=10 yes\n(3+4)*2=14 yes")
    assert (counts.said_yes, counts.yes_and_right, counts.right_tries) == (3, 2, 3)
    assert counts.precision == 2 / 3 and counts.recall == 2 / 3 and counts.true_fraction == 1.0


def test_equations_without_a_verdict_are_only_true_or_false():
    counts = _count("finds 4: 50+4=54\nloses 8: 54-8=47")
    assert counts.true_fraction == 0.5 and counts.precision is None and counts.recall is None


def test_what_is_no_response_holds_no_checks():
    assert count_checks(["3+4=7 yes", "<think>3+4=7 yes"], [JUDGE] * 2).equations == 0


def test_endless_repetition_is_read_only_so_far():
    assert _count("1+1=2 yes " * 1500).equations == 200
