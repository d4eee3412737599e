"""`shoal rl --task`, as small as it goes: the documented example trains, resumes, and a hopeless base ends early."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from shoal.cli.rl import task_slug
from shoal.errors import ConfigError, TaskError
from shoal.recipes.reinforce import _Reinforce, reinforce_config, run_reinforce
from shoal.rl.algorithms import ALGORITHMS, fit_algorithm, small_rate
from shoal.rl.task_check import check_task
from shoal.rl.task_source import open_task
from shoal.rl.variants import VARIANTS
from shoal.rl.verifier_pool import PoolConfig
from shoal.text.tokenizer import Tokenizer

EXAMPLE = Path(__file__).parents[2] / "docs" / "examples" / "change_task.py"


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def _micro(task, **choices):
    config = reinforce_config(
        str(task),
        **{
            "steps": 2,
            "prompts_per_step": 4,
            "group_size": 4,
            "max_response_tokens": 24,
            "base_steps": 40,
            "base_documents": 300,
            "rl_problems": 16,
            "held_out_problems": 6,
            "samples_per_problem": 16,
            "workers": 1,
            **choices,
        },
    )
    small = config.base.model.replace(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16, kv_lora_rank=16
    )
    return replace(config, base=replace(config.base, model=small, batch_tokens=1000))


@pytest.mark.slow
def test_the_documented_example_trains_resumes_and_leaves_a_model(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.recipes.reinforce._Reinforce._stop_if_hopeless", lambda self: None)  # 40 steps are few
    config = _micro(EXAMPLE, algorithm="dapo")
    result = run_reinforce(tmp_path / "run", config)
    assert result.report.is_file() and (result.model_dir / "tokenizer.json").is_file()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    (last,) = [line for line in lines if line["stage"] == "rl-0" and line["step"] == 2]
    assert {"informative_groups", "clip_fraction", "entropy", "mismatch_kl", "verifier_s", "verifier_failures"} <= set(
        last
    )
    assert last["groups_sampled"] >= 4 and 0 <= last["accuracy"] <= 1
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert {"stage", "step", "prompt", "text", "reward", "right"} <= set(samples[0])
    again = run_reinforce(tmp_path / "run", config)
    assert again.after == result.after


def test_problems_that_leave_no_room_for_an_answer_are_left_out_and_not_met_in_mid_run(tmp_path):
    lines = [
        {"question": f"What is {n} + {n}?" + " Think!" * (400 if n % 3 == 0 else 0), "answer": f"#### {2 * n}"}
        for n in range(90)
    ]
    file = tmp_path / "sums.jsonl"
    file.write_text("\n".join(map(json.dumps, lines)))
    config = _micro(f"jsonl:{file}", max_response_tokens=200)
    with open_task(config.task, pool=config.pool) as source:
        run = _Reinforce(tmp_path / "run", config, source, None)
        Tokenizer.train(["What is 3 + 4?"] * 3, 280).save(run.dir / "tokenizer")
        for split in ("rl", "eval"):
            kept, found = run._problems(split, 90), source.sets.problems(split, 90)
            assert 0 < len(kept) < len(found) and not any("Think" in problem.prompt for problem in kept)
        run.context = 210
        with pytest.raises(TaskError, match="leaves room for an answer of 200 tokens in a context of 210"):
            run._problems("rl", 90)


def test_the_documented_example_passes_its_own_check():
    report = check_task(str(EXAMPLE), count=40, pool=PoolConfig(workers=1))
    assert report.passed, report.table()
    assert any(finding.name == "brute force" for finding in report.findings)


def test_a_base_that_never_succeeds_ends_the_run_early_with_pass_at_64(tmp_path):
    path = tmp_path / "never.jsonl"
    path.write_text(
        "".join(f'{{"question": "what is {n}", "answer": "{n} x\\n#### {n}{n}"}}\n' for n in range(100, 300))
    )
    config = _micro(f"jsonl:{path}", base_steps=2, samples_per_problem=64, held_out_problems=3)
    with pytest.raises(TaskError, match=r"never succeeds: pass@64 is 0 % over 3 held-out .*--difficulty"):
        run_reinforce(tmp_path / "run", config)
    assert not (tmp_path / "run" / "rl-0").exists()


CHEATABLE = """
def problems(seed):
    for number in range(200):
        yield {"prompt": f"Is {number} even?", "answer": "yes" if number % 2 == 0 else "no"}


def verify(problem, answer):
    return problem["answer"] in answer
"""


def test_a_task_that_pays_for_tricks_fails_its_check(tmp_path):
    path = tmp_path / "cheatable.py"
    path.write_text(CHEATABLE)
    report = check_task(str(path), count=40, pool=PoolConfig(workers=1))
    failed = {finding.name for finding in report.findings if not finding.passed}
    assert failed == {"tricks", "best constant answer"} and not report.passed
    assert "every answer at once" in report.table() and "FAIL" in report.table()
    path.write_text(CHEATABLE.replace('problem["answer"] in answer', "None"))
    report = check_task(str(path), count=40, pool=PoolConfig(workers=1))
    assert not report.findings[0].passed and "verify returned None" in report.table()


@pytest.mark.parametrize("name", ALGORITHMS)
def test_every_algorithm_fits_a_small_model_and_says_what_it_changed(name):
    fitted = fit_algorithm(name, parameters=1_400_000, max_response_tokens=100, steps=7)
    published = VARIANTS[ALGORITHMS[name]]
    assert fitted.config.steps == 7 and fitted.source == published.source
    assert fitted.config.objective.clip_high == published.objective.clip_high
    assert fitted.changed["max_response_tokens"] == (published.max_response_tokens, 100)
    assert fitted.changed["learning_rate"] == (published.learning_rate, small_rate(1_400_000))
    whole = fit_algorithm(name, parameters=1, max_response_tokens=100, published_sizes=True)
    assert not whole.changed and whole.config.group_size == published.group_size


def test_unknown_algorithms_are_named_and_rates_fall_with_size():
    with pytest.raises(ConfigError, match="unknown algorithm 'dappo', did you mean 'dapo'"):
        fit_algorithm("dappo", parameters=1, max_response_tokens=9)
    assert small_rate(1_000_000) == 2e-4 and small_rate(100_000_000) == pytest.approx(2e-5)


def test_a_run_directory_is_named_after_its_task():
    assert task_slug("chain_sum") == "chain_sum" and task_slug("jsonl:data/gsm8k-train.jsonl") == "gsm8k-train"
    assert task_slug("my tasks/a b.py") == "a-b"
