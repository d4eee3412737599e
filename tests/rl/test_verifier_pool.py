from pathlib import Path

import pytest

from shoal.errors import ConfigError, TaskError
from shoal.rl.grading import grade_answers, stop_if_blind
from shoal.rl.tasks import Problem
from shoal.rl.verifier_pool import PoolConfig, TaskSpec, VerifierPool

FILE = Path(__file__).parent / "files" / "products.py"
PROBLEM = Problem(family="products", difficulty=0, prompt="?", answer="42", facts={"first": 6, "second": 7})


@pytest.fixture(scope="module")
def pool():
    with VerifierPool(TaskSpec(path=FILE), PoolConfig(workers=2, timeout_s=0.4, memory_bytes=2 << 30)) as started:
        yield started


def _verify(pool, *answers):
    return pool.verify([PROBLEM] * len(answers), answers)[0]


def test_answers_are_judged_in_order(pool):
    assert [grade.score for grade in _verify(pool, "42", "41", "42", "0")] == [1.0, 0.0, 1.0, 0.0]


@pytest.mark.parametrize(
    "answer, kind",
    [
        ("hang", "timeout"),
        ("exit", "crash"),
        ("segment", "crash"),
        ("memory", "memory"),
        ("raise", "raised"),
        ("quit", "raised"),
        ("bad", "bad_score"),
        ("nan", "bad_score"),
    ],
)
def test_a_failure_has_a_kind_and_no_score_and_the_next_answer_is_judged(pool, answer, kind):
    failed, after = _verify(pool, answer, "42")
    assert failed.score is None and failed.failure == kind and failed.detail
    assert after.score == 1.0
    assert _verify(pool, "42", "42")[1].score == 1.0


def test_an_answer_that_cannot_be_read_scores_zero_and_is_counted(pool):
    texts = [f"<think></think><answer>{answer}</answer>" for answer in ("42", "forty-two", "41")] + ["no format"]
    graded = grade_answers(pool, [PROBLEM] * 4, texts)
    assert graded.scores == [1.0, 0.0, 0.0, 0.0] and graded.failures == {"unparsed": 1}
    assert graded.right == [True, False, False, False] and 0 < graded.slowest_s < graded.wall_s


def test_what_a_task_prints_is_no_answer(pool):
    assert _verify(pool, "print")[0].score == 0.25


def test_workers_see_nothing_of_the_environment(pool, monkeypatch):
    monkeypatch.setenv("SHOAL_TEST_SECRET", "1")
    assert _verify(pool, "exit", "exit")[0].failure == "crash"  # replaced by workers that start after it was set
    assert [grade.score for grade in _verify(pool, "secret", "secret")] == [0.0, 0.0]


def test_streams_of_problems_do_not_depend_on_the_worker(pool):
    whole, ended = pool.problems(3, 0, 8)
    parts = [pool.problems(3, start, 2)[0] for start in (0, 2, 4, 6)]
    assert [row for part in parts for row in part] == whole and not ended
    assert pool.problems(4, 0, 8)[0] != whole


def test_a_tasks_own_rewards_and_brute_force_run_in_its_worker(pool):
    values = pool.reward("shortness")(["p"], ["abcd"], [[1, 2]], answer=["42"], problem=[PROBLEM])
    assert values == [-0.04] and pool.brute_force(PROBLEM) == ["42"]
    with pytest.raises(TaskError, match="ZeroDivisionError: no"):
        pool.reward("broken")(["p"], ["abcd"], [[1, 2]])


def test_too_many_failures_stop_the_run(pool):
    texts = [f"<think></think><answer>{answer}</answer>" for answer in ("raise", "raise", "42")]
    graded = grade_answers(pool, [PROBLEM] * 3, texts)
    stop_if_blind(graded, 0.7)
    with pytest.raises(TaskError, match=r"failed on 2 of 3 answers \(2 raised; first: KeyError: 'oh'\)"):
        stop_if_blind(graded, 0.5)


@pytest.mark.parametrize(
    "text, message",
    [
        ("import nowhere_at_all", "ModuleNotFoundError"),
        ("def problems(:", "SyntaxError"),
        ("raise SystemExit(0)", "SystemExit"),
        ("rewards = {'nothing': 1}", "no functions of the task"),
        ("import os; os._exit(7)", "exit 7"),
    ],
)
def test_a_file_that_cannot_be_loaded_says_why(tmp_path, text, message):
    path = tmp_path / "broken.py"
    path.write_text(text)
    with pytest.raises(TaskError, match=message):
        VerifierPool(TaskSpec(path=path), PoolConfig(workers=1))


@pytest.mark.parametrize("changes", [{"workers": 0}, {"timeout_s": 0.0}, {"memory_bytes": 5}, {"start_timeout_s": -1}])
def test_impossible_limits_are_refused(changes):
    with pytest.raises(ConfigError):
        PoolConfig(**changes)
