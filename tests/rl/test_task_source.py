from pathlib import Path

import pytest

from shoal.errors import TaskError
from shoal.rl.task_source import open_task
from shoal.rl.verifier_pool import PoolConfig

FILE = Path(__file__).parent / "files" / "products.py"
ONE = PoolConfig(workers=1)


def _keys(source, split, count=40):
    return {problem.prompt for problem in source.sets.problems(split, count)}


def test_a_users_file_gives_disjoint_sets_and_judges():
    with open_task(str(FILE), pool=ONE) as source:
        sets = [_keys(source, split) for split in ("pretrain", "rl", "eval")]
        assert [len(keys) for keys in sets] == [40] * 3 and not sets[0] & sets[1] | sets[1] & sets[2] | sets[0] & sets[
            2
        ]
        problem = source.sets.problems("rl", 1)[0]
        assert source.verifier.verify([problem], [problem.answer])[0][0].score == 1.0
        assert source.description == "Products of small numbers, and every way in which a verifier can fail."
        assert [(reward.title, reward.weight) for reward in source.rewards] == [("shortness", 0.5), ("broken", 1.0)]
        assert source.exploits == ("", "12 13") and source.worked(problem) is None


def test_a_dataset_is_judged_by_exact_numbers(tmp_path):
    path = tmp_path / "sums.jsonl"
    path.write_text("".join(f'{{"question": "{n}+1?", "answer": "{n} and one.\\n#### {n + 1}"}}\n' for n in range(100)))
    with open_task(f"jsonl:{path}") as source:
        problem = source.sets.problems("rl", 1)[0]
        scores = [g.score for g in source.verifier.verify([problem] * 2, [problem.answer + ".0", "1000"])[0]]
        assert scores == [1.0, 0.0] and source.worked(problem).endswith("and one.")
        assert sum(len(_keys(source, split, 200)) for split in ("pretrain", "rl", "eval")) == 100


def test_a_family_has_a_difficulty_and_others_have_none():
    with open_task("addition", difficulty=2) as source:
        assert source.sets.problems("eval", 1)[0].difficulty == 2 and source.worked(source.sets.problems("rl", 1)[0])
    with pytest.raises(TaskError, match=r"outside addition's 1\.\.6"), open_task("addition", difficulty=9):
        pass
    with pytest.raises(TaskError, match="belongs to built-in families"), open_task(str(FILE), difficulty=2):
        pass


@pytest.mark.parametrize(
    "task, message",
    [
        ("adition", "unknown task 'adition', did you mean 'addition'"),
        ("nowhere.py", "no task file"),
        ("web:page", "jsonl:FILE, math:FILE or gym:NAME"),
    ],
)
def test_unknown_tasks_are_named(task, message):
    with pytest.raises(TaskError, match=message), open_task(task):
        pass


@pytest.mark.parametrize(
    "text, message",
    [
        ("def verify(problem, answer): return True", "no function problems"),
        ("def problems(seed): return [{'prompt': 'p', 'answer': '1'}]", "no function verify"),
        ("def verify(p, a): return True\ndef problems(seed): return [{'prompt': 'p'}]", "must know one right answer"),
        ("def verify(p, a): return True\ndef problems(seed): return [{'answer': '1'}]", "no usable 'prompt'"),
        ("def verify(p, a): return True\ndef problems(seed): return [3]", "is a int; yield mappings"),
        ("def verify(p, a): return True\ndef problems(seed): return []", "yields no problem"),
        ("def verify(p, a): return True\ndef problems(seed): return 1/0", "ZeroDivisionError"),
    ],
)
def test_files_that_are_no_task_say_what_is_missing(tmp_path, text, message):
    path = tmp_path / "task.py"
    path.write_text(text)
    with pytest.raises(TaskError, match=message), open_task(str(path), pool=ONE) as source:
        source.sets.problems("rl", 3)


def test_math_verify_judges_in_a_worker(tmp_path):
    pytest.importorskip("math_verify")
    path = tmp_path / "halves.jsonl"
    path.write_text('{"question": "half of one?", "answer": "1/2"}\n' * 2)
    with open_task(f"math:{path}", pool=PoolConfig(workers=1, timeout_s=10.0)) as source:
        problem = source.sets.every[0]
        grades, _ = source.verifier.verify([problem] * 3, ["\\frac{2}{4}", "0.5", "0.6"])
        assert [grade.score for grade in grades] == [1.0, 1.0, 0.0]
