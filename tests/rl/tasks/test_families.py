"""What every family must hold, whoever writes the next one."""

import itertools
import random
import re
import time
from collections import Counter
from fractions import Fraction

import pytest

from shoal.errors import TaskError
from shoal.rl.rewards import is_right
from shoal.rl.tasks import TASKS, Problem
from shoal.rl.tasks.answers import parse_arithmetic, parse_integer, parse_response
from shoal.rl.tasks.grid_path import MOVES, shortest_path
from shoal.rl.tasks.knights import solve
from shoal.rl.tasks.splits import problems, split_of

FAMILIES = sorted(TASKS)


def _some(name: str, count: int = 25, seed: int = 0):
    task, rng = TASKS[name], random.Random(f"{name}{seed}")
    return [
        task.generate(rng, difficulty)
        for difficulty in task.difficulties
        for _ in range(max(1, count // len(task.difficulties)))
    ]


def _in_format(answer: str, thinking: str = "") -> str:
    return f"<think>{thinking}</think><answer>{answer}</answer>"


@pytest.mark.parametrize("name", FAMILIES)
def test_gold_scores_one_with_and_without_work(name):
    for problem in _some(name):
        assert is_right(problem, _in_format(problem.answer))
        assert is_right(problem, _in_format(problem.answer, TASKS[name].worked(problem)))


@pytest.mark.parametrize("name", FAMILIES)
def test_exploits_score_zero_within_fifty_milliseconds(name):
    problem = _some(name)[-1]
    others = " ".join(p.answer for p in _some(name, seed=1))
    deep = "(" * 100_000 + "1" + ")" * 100_000
    exploits = {
        "empty": "",
        "empty answer": _in_format(""),
        "white space": _in_format(" \n\t"),
        "prompt copy": _in_format(problem.prompt),
        "all options": _in_format(f"{others} {problem.answer}"),
        "counting up": _in_format(" ".join(str(number) for number in range(1000))),
        "two answer blocks": _in_format(problem.answer) + f"<answer>{problem.answer}</answer>",
        "two think blocks": "<think></think>" + _in_format(problem.answer),
        "answer outside the block": f"<think></think>{problem.answer}<answer></answer>",
        "answer in the thinking": f"<think>{problem.answer}</think><answer>?</answer>",
        "nested tags": f"<think></think><answer><answer>{problem.answer}</answer></answer>",
        "no format": problem.answer,
        "unclosed": f"<think></think><answer>{problem.answer}",
        "text after": _in_format(problem.answer) + "x",
        "unicode digits": _in_format(problem.answer.translate({48 + d: 0x660 + d for d in range(10)}) + "\u0660"),
        "power tower": _in_format("9**9**9**9"),
        "caret tower": _in_format("9^9^9^9"),
        "long number": _in_format("9" * 15_000),
        "deep parentheses": _in_format(deep),
        "ten megabytes": _in_format("1" * 10_000_000),
        "ten megabytes of tags": "<answer>" * 1_250_000,
        "code": _in_format("__import__('os').system('true')"),
    }
    for what, text in exploits.items():
        started = time.perf_counter()
        assert not is_right(problem, text), what
        assert time.perf_counter() - started < 0.05, what


@pytest.mark.parametrize("name", FAMILIES)
def test_verifiers_are_total(name):
    rng = random.Random(0)
    problem = _some(name)[0]
    for _ in range(300):
        text = "".join(
            chr(rng.choice([rng.randrange(32, 127), rng.randrange(0x110000 - 0x900)])) for _ in range(rng.randrange(40))
        )
        assert TASKS[name].verify(problem, text) in (True, False)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_best_constant_answer_stays_below_its_stated_bound(name):
    task, rng = TASKS[name], random.Random(7)
    sample = [task.generate(rng, task.default_difficulty) for _ in range(500)]
    candidates = [answer for answer, _ in Counter(problem.answer for problem in sample).most_common(5)]
    best = max(sum(task.verify(problem, answer) for problem in sample) / len(sample) for answer in candidates)
    assert best < task.constant_answer_bound


@pytest.mark.parametrize("name", FAMILIES)
def test_every_equation_of_the_work_is_true(name):
    for problem in _some(name):
        work = TASKS[name].worked(problem)
        for left, right in re.findall(r"([0-9+\-*/()]+)=(-?[0-9]+)", work):
            parsed = parse_arithmetic(left)
            assert parsed is not None and parsed[0] == Fraction(right), (left, right)


@pytest.mark.parametrize("name", ["cups", "arrows"])
def test_letters_are_followed_one_line_a_step(name):
    for problem in _some(name):
        lines = TASKS[name].worked(problem).splitlines()
        assert len(lines) == problem.difficulty and lines[-1].endswith(f": {problem.answer}")
        assert TASKS[name].verify(problem, problem.answer.lower()) and not TASKS[name].verify(problem, "AB")


def test_cups_and_arrows_by_hand():
    cups = Problem(family="cups", difficulty=2, prompt="", answer="C", facts={"start": "A", "swaps": ("BA", "CB")})
    assert TASKS["cups"].worked(cups) == "B and A: B\nC and B: C"
    ring = dict(zip("ABCDEFGHIJ", "BCDEFGHIJA"))
    arrows = Problem(family="arrows", difficulty=3, prompt="", answer="B", facts={"start": "I", "arrows": ring})
    assert TASKS["arrows"].worked(arrows) == "1: J\n2: A\n3: B"


def test_dial_and_remainder_by_hand():
    dial = Problem(family="dial", difficulty=3, prompt="", answer="2", facts={"start": 3, "moves": "DTD"})
    assert TASKS["dial"].worked(dial) == "D:6 T:2 D:4"
    for problem in _some("remainder"):
        bits = problem.facts["bits"]
        assert TASKS["remainder"].worked(problem).rpartition(":")[2] == problem.answer == str(int(bits, 2) % 11)


@pytest.mark.parametrize("name", ["chain_sum", "addition", "multiplication"])
def test_the_work_ends_at_the_answer(name):
    for problem in _some(name):
        assert TASKS[name].worked(problem).rpartition("=")[2] == problem.answer


@pytest.mark.parametrize("name", FAMILIES)
def test_splits_are_disjoint_and_reproducible(name):
    task = TASKS[name]
    parts = {split: problems(task, split, 12, task.default_difficulty, seed=0) for split in ("pretrain", "rl", "eval")}
    keys = {split: {task.key(problem) for problem in found} for split, found in parts.items()}
    for first, second in itertools.combinations(keys, 2):
        assert not keys[first] & keys[second]
    assert all(len(found) == 12 for found in keys.values())
    assert problems(task, "rl", 12, task.default_difficulty, seed=0) == parts["rl"]


def test_a_real_hash_splits_by_the_stated_shares():
    counts = Counter(split_of(f"key {number}") for number in range(5000))
    assert abs(counts["pretrain"] / 5000 - 0.6) < 0.03 and abs(counts["eval"] / 5000 - 0.1) < 0.02


def test_impossible_requests_say_what_to_do():
    task = TASKS["multiplication"]
    with pytest.raises(TaskError, match=r"outside multiplication's 1\.\.4"):
        problems(task, "rl", 5, 9, seed=0)
    with pytest.raises(TaskError, match="raise the difficulty"):
        problems(task, "eval", 500, 1, seed=0)


def test_equal_problems_share_a_key_in_every_order():
    rng = random.Random(0)
    task = TASKS["multiplication"]
    problem = task.generate(rng, 2)
    swapped = type(problem)(
        **{**vars(problem), "facts": {"first": problem.facts["second"], "second": problem.facts["first"]}}
    )
    assert task.key(problem) == task.key(swapped)


def test_countdown_accepts_any_right_expression_and_no_other():
    task = TASKS["countdown"]
    problem = next(p for p in _some("countdown", 400) if len(p.facts["numbers"]) == 3)
    numbers, target = problem.facts["numbers"], problem.facts["target"]
    for order in itertools.permutations(numbers):
        for first, second in itertools.product("+-*", repeat=2):
            text = f"({order[0]}{first}{order[1]}){second}{order[2]}"
            value = parse_arithmetic(text)
            assert task.verify(problem, text) == (value is not None and value[0] == target)
    assert not task.verify(problem, str(target))
    assert not task.verify(problem, f"{problem.answer}+0")


def test_grid_answers_agree_with_exhaustive_search():
    task = TASKS["grid_path"]
    for problem in [p for p in _some("grid_path", 60) if p.difficulty == 3]:
        rows = problem.facts["rows"]
        length = len(shortest_path(rows))
        for moves in itertools.product(MOVES, repeat=length):
            row = column = 0
            legal = True
            for move in moves:
                row, column = row + MOVES[move][0], column + MOVES[move][1]
                legal &= 0 <= row < 3 and 0 <= column < 3 and rows[row][column] == "."
                if not legal:
                    break
            assert task.verify(problem, "".join(moves)) == (legal and (row, column) == (2, 2))
        if length > 6:
            break


def test_knight_puzzles_have_one_solution():
    for problem in _some("knights"):
        assert len(solve(problem.facts["statements"])) == 1


def test_numbers_are_parsed_strictly():
    assert parse_integer("-12") == -12 and parse_integer("0") == 0
    for text in ("", "-", "+1", "007", "1.0", "1e3", " 1", "1_000", "٣", "²", "9" * 13):
        assert parse_integer(text) is None
    assert parse_arithmetic("2*(3+4)/7-1") == (Fraction(1), [2, 3, 4, 7, 1])
    for text in ("1/0", "2**3", "1+", "(1", "1)", "a", "", "1//2", "-1", "(" * 30 + "1" + ")" * 30):
        assert parse_arithmetic(text) is None


def test_responses_are_parsed_strictly():
    parsed = parse_response(" <think>a=b</think>\n<answer> 4 </answer>\n")
    assert parsed is not None and (parsed.thinking, parsed.answer) == ("a=b", "4")
    assert parse_response("<answer>4</answer><think></think>") is None
