"""The whole recipe, as small as it goes: every stage runs, leaves what the next needs, and is not done twice."""

import json
from dataclasses import replace

import pytest

from shoal.errors import CheckpointError, ConfigError, DataError
from shoal.recipes import run as run_module
from shoal.recipes.demo import demo_config, run_demo
from shoal.recipes.problem_corpus import CorpusConfig, write_corpus
from shoal.recipes.text import run_text, text_config
from shoal.report import write_report
from shoal.rl.rewards import is_right
from shoal.rl.tasks import TASKS
from shoal.text.tokenizer import Tokenizer
from shoal.training.schedule import Schedule


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


def micro_config():
    config = demo_config(quick=True)
    model = config.model.replace(
        hidden_size=32, num_hidden_layers=2, intermediate_size=48, moe_intermediate_size=16, kv_lora_rank=16
    )
    steps = 6
    pretraining = replace(
        config.pretraining,
        steps=steps,
        schedule=Schedule(kind="wsd", warmup_steps=1, total_steps=steps),
        checkpoint_every=3,
        log_every=2,
    )
    return replace(
        config,
        corpus=replace(config.corpus, documents=700),
        model=model,
        batch_rows=4,
        pretraining=pretraining,
        rl=replace(config.rl, steps=2, prompts_per_step=4, group_size=4, max_response_tokens=24),
        rl_problems=16,
        held_out_problems=6,
        samples_per_problem=4,
        max_answer_tokens=24,
        rl_seeds=(0, 1),
    )


@pytest.mark.slow
def test_the_recipe_runs_resumes_and_reports(tmp_path):
    directory = tmp_path / "run"
    result = run_demo(directory, micro_config(), controls=True)
    report = json.loads((directory / "report.json").read_text())
    assert {"wall_s", "kv_bytes_per_token", "kv_bytes_per_token_mha", "maxvio", "rl"} <= set(report)
    assert {"family", "pass_at_1_before", "pass_at_1_after", "length_before", "length_after", "seeds"} <= set(
        report["rl"]
    )
    assert report["rl"]["seeds"] == [0, 1] and len(report["rl"]["pass_at_1_after"]) == 2
    page = result.report.read_text()
    assert "http://" not in page and "https://" not in page and "control: random reward" in page
    assert "seed 0, as a second question" in page
    assert (result.model_dir / "tokenizer.json").is_file() and (result.model_dir / "shoal.json").is_file()
    metrics = (directory / "metrics.jsonl").read_text()
    run_demo(directory, micro_config(), controls=True)
    assert (directory / "metrics.jsonl").read_text() == metrics


def test_a_run_directory_of_another_configuration_is_refused(tmp_path):
    config = micro_config()
    run_module.Run(tmp_path, {"recipe": "demo", "steps": 5})
    with pytest.raises(CheckpointError, match="steps"):
        run_module.Run(tmp_path, {"recipe": "demo", "steps": 6})
    assert config.pretraining.steps == 6


def test_two_runs_on_one_machine_are_refused():
    with run_module.only_run(), pytest.raises(ConfigError, match="another shoal run"), run_module.only_run():
        pass


def test_the_corpus_is_true_and_worked_as_rarely_as_asked():
    config = CorpusConfig(documents=2000, difficulty=4, worked_share=0.2, arithmetic_share=0.1)
    documents = list(write_corpus(config))
    assert documents == list(write_corpus(config))
    asked = [document for document in documents if document.question is not None]
    worked = sum("<think></think>" not in document.response for document in asked) / len(asked)
    assert abs(worked - 0.2) < 0.04 and abs(len(asked) / 2000 - 0.9) < 0.03
    task = TASKS["chain_sum"]
    import random

    from shoal.recipes.problem_corpus import respond

    problem = task.generate(random.Random(0), 4)
    assert is_right(problem, respond(task, problem, worked=True)) and is_right(
        problem, respond(task, problem, worked=False)
    )
    for name in ("worked_share", "easier_share"):
        with pytest.raises(ConfigError, match=name):
            CorpusConfig(**{name: 1.5})
    with pytest.raises(ConfigError, match="known: addition"):
        CorpusConfig(family="astrology")


@pytest.mark.slow
def test_the_text_recipe_trains_moe_and_dense_on_a_file(tmp_path):
    path = tmp_path / "book.txt"
    path.write_text("the shoal swims in a ring and the ring swims in the sea. " * 300)
    overrides = ["steps=4", "width=32", "layers=2", "batch_rows=2", "row_tokens=32", "vocab_size=300"]
    results = run_text(tmp_path / "run", [path], text_config("text", variant="both", overrides=overrides))
    assert set(results) == {"moe", "dense"}
    for figures in results.values():
        assert 0 < figures["nats_per_character"] < 6
        assert figures["bits_per_byte"] == pytest.approx(figures["nats_per_character"] / 0.6931, rel=0.02)
    assert (tmp_path / "run" / "report.html").is_file()
    assert Tokenizer.load(tmp_path / "run" / "model").vocab_size <= 300


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["steps"], "key=value"),
        (["wings=2"], "one of steps"),
        (["steps=many"], "no number"),
        (["steps=-1"], "at least 0"),
    ],
)
def test_bad_settings_are_named(overrides, message):
    with pytest.raises(ConfigError, match=message):
        text_config("text", overrides=overrides)


def test_unknown_recipes_and_variants_are_named():
    with pytest.raises(ConfigError, match="known: text"):
        text_config("poetry", overrides=[])
    with pytest.raises(ConfigError, match="moe, dense, gqa or both"):
        text_config("text", variant="huge", overrides=[])
    with pytest.raises(ConfigError, match="needs precision 'fp8'"):
        text_config("text", overrides=[], fp8_wgrad="bf16")


def test_a_report_needs_a_run(tmp_path):
    with pytest.raises(DataError, match="no run directory"):
        write_report(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(DataError, match="no lines yet"):
        write_report(tmp_path)
