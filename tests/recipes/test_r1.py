import json
import random
from dataclasses import replace

import pytest
from typer.testing import CliRunner

from shoal.cli import app
from shoal.errors import ConfigError
from shoal.recipes.bilingual import LanguageShares, in_two_languages, translate
from shoal.recipes.general_talk import (
    GeneralVerifier,
    general_documents,
    general_problems,
    general_reward,
    is_acceptable,
)
from shoal.recipes.problem_corpus import CorpusConfig, write_corpus
from shoal.recipes.r1 import MODELS, is_readable, r1_config, run_r1
from shoal.recipes.r1_findings import PipelineRow, findings
from shoal.rl.language import language_consistency
from shoal.rl.rejection import rejection_sample, repeats_itself
from shoal.rl.rewards import is_right
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.splits import problems

ENGLISH = "<think>has 37\nfinds 8: 37+8=45</think><answer>45</answer>"


def test_translation_touches_the_thinking_alone_and_keeps_every_number():
    chinese = translate(ENGLISH, 1.0, random.Random(0))
    assert chinese == "<think>有 37\n找到 8: 37+8=45</think><answer>45</answer>"
    assert translate(ENGLISH, 0.0, random.Random(0)) == ENGLISH
    assert language_consistency(parse_response(chinese).thinking, "en") == 0.0


def test_the_corpus_holds_all_three_ways_of_writing_and_stays_right():
    config = CorpusConfig(documents=1500, worked_share=1.0, arithmetic_share=0.0, difficulty=4)
    shares = [
        language_consistency(parse_response(document.response).thinking, "en")
        for document in in_two_languages(write_corpus(config), LanguageShares(chinese=0.25, mixed=0.35), 0)
    ]
    pure_chinese, pure_english = (sum(share == whole for share in shares) / len(shares) for whole in (0.0, 1.0))
    # A mixed solution of few lines is of one language by chance now and then.
    assert 0.25 <= pure_chinese < 0.35 and 0.37 <= pure_english < 0.5


def test_impossible_language_shares_are_refused():
    with pytest.raises(ConfigError, match="at most 1"):
        LanguageShares(chinese=0.7, mixed=0.5)


def test_general_replies_are_judged_word_for_word_but_for_the_example():
    for document, problem in zip(general_documents(50, seed=5), general_problems(50, seed=5), strict=True):
        assert is_acceptable(problem, f"<think></think>{problem.answer}")
        assert not is_acceptable(problem, problem.answer)
        assert not is_acceptable(problem, f"<think></think>{problem.answer} and more")
        assert document.response.startswith("<think></think>")


def test_the_general_reward_leaves_reasoning_problems_alone_and_the_verifier_knows_both():
    (talk,), (sums,) = general_problems(1, seed=1), problems(TASKS["addition"], "eval", 1, 2, seed=0)
    texts = [f"<think></think>{talk.answer}", "<think>x</think><answer>1</answer>"]
    assert general_reward(["", ""], texts, [[], []], problem=[talk, sums]) == [1.0, None]
    grades, _ = GeneralVerifier().verify([talk, sums, sums], ["", sums.answer, "0x"])
    assert [grade.score for grade in grades] == [0.0, 1.0, 0.0]


def test_what_is_kept_as_cold_start_is_in_one_language_and_does_not_go_in_circles():
    assert is_readable(ENGLISH)
    assert not is_readable(translate(ENGLISH, 1.0, random.Random(0)))
    assert not is_readable("<think></think><answer>45</answer>")
    assert not is_readable("<think>has 1\nhas 1\nhas 1</think><answer>1</answer>")
    assert repeats_itself("a\nb\na\nc\na") and not repeats_itself("a\nb\na\nc")


def row(pass_at_1: float, *, spread: float = 0.02, english: float | None = 1.0, general: float = 0.0) -> PipelineRow:
    return PipelineRow(
        pass_at_1=pass_at_1,
        pass_at_1_low=pass_at_1 - spread,
        pass_at_1_high=pass_at_1 + spread,
        pass_at_most=1.0,
        samples_per_problem=8,
        response_tokens=50,
        worked_fraction=1.0,
        one_language=english,
        general=general,
    )


def test_findings_compare_intervals_and_say_when_they_overlap():
    rows = dict.fromkeys(MODELS, row(0.5))
    rows |= {
        "base": row(0.3),
        "zero": row(0.9, english=0.6),
        "dev1": row(0.7),
        "dev2": row(0.71),
        "distilled": row(0.2),
    }
    rows |= {"dev3": row(0.9), "r1": row(0.91, general=0.8)}
    verdicts = [finding.verdict for finding in findings(rows)]
    assert verdicts == ["agrees", "agrees", "agrees", "too close to call", "agrees", "agrees", "disagrees"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """Every stage, as small as it goes."""
    quick = r1_config(quick=True)
    tiny = quick.model.replace(hidden_size=32, num_hidden_layers=2, intermediate_size=32, moe_intermediate_size=16)
    rl = replace(quick.zero, steps=1, prompts_per_step=4, group_size=4, max_response_tokens=16)
    training = replace(
        quick.pretraining, steps=3, schedule=replace(quick.pretraining.schedule, warmup_steps=1, total_steps=3)
    )
    fine = replace(
        quick.fine_tuning, steps=2, schedule=replace(quick.fine_tuning.schedule, warmup_steps=1, total_steps=2)
    )
    config = replace(
        quick,
        corpus=replace(quick.corpus, documents=600, difficulty=2, worked_share=0.5),
        model=tiny,
        small_model=tiny.replace(n_routed_experts=None, num_nextn_predict_layers=0),
        pretraining=training,
        small_pretraining=training,
        fine_tuning=fine,
        zero=rl,
        reasoning_rl=rl,
        final_rl=replace(rl, temperature=0.7),
        small_rl=rl,
        batch_rows=4,
        rl_problems=40,
        cold_start_problems=8,
        rejection_problems=8,
        held_out_problems=4,
        samples_per_problem=2,
        max_answer_tokens=16,
    )
    directory = tmp_path_factory.mktemp("r1")
    return directory, config


def test_the_pipeline_stops_with_advice_when_there_is_nothing_to_learn_from(finished, monkeypatch):
    directory, config = finished
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    with pytest.raises(ConfigError, match="readable"):
        run_r1(directory, config)


def test_every_stage_runs_resumes_and_ends_in_a_table(finished, monkeypatch):
    directory, config = finished
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(directory))
    sums = problems(TASKS["chain_sum"], "rl", 8, 2, seed=3)

    def worked(engine, prompter, asked, **options):
        from shoal.rl.rejection import KeptAnswer, RejectionCounts

        task = TASKS["chain_sum"]
        kept = [KeptAnswer(problem=p, text=f"<think>{task.worked(p)}</think><answer>{p.answer}</answer>") for p in sums]
        return kept, RejectionCounts(sampled=32, right=8, readable=8, kept=8)

    # A model of three steps solves nothing; right answers are put in its place so that the later stages have work.
    monkeypatch.setattr("shoal.recipes.r1.rejection_sample", worked)
    page = run_r1(directory, config)
    table = json.loads((directory / "r1.json").read_text())
    assert set(table["models"]) == set(MODELS) and len(table["findings"]) == 7
    assert "R1 pipeline" in page.read_text()
    stamp = (directory / "r1" / "config.json").stat().st_mtime_ns
    run_r1(directory, config)
    assert (directory / "r1" / "config.json").stat().st_mtime_ns == stamp


def test_rejection_sampling_keeps_right_readable_different_answers_of_each_problem():
    class Scripted:
        """Answers as they come from the engine's interface."""

        def __init__(self, texts):
            self.texts = texts

        def generate(self, requests):
            from shoal.engine.request import Completion

            return [
                [
                    Completion(token_ids=[index], logprobs=[0.0], finish_reason="stop")
                    for index in range(len(self.texts))
                ]
                for _ in requests
            ]

    problem = problems(TASKS["addition"], "rl", 1, 1, seed=0)[0]
    right = f"<think>{TASKS['addition'].worked(problem)}</think><answer>{problem.answer}</answer>"
    other = f"<think>so it is</think><answer>{problem.answer}</answer>"
    texts = [
        right,
        right,
        "<think>bad</think><answer>999</answer>",
        other,
        "no format",
        f"<think>ugly</think><answer>{problem.answer}</answer>",
    ]
    assert is_right(problem, right)

    class Words:
        class tokenizer:
            eos_token_id = 10**6

        def prompt_ids(self, problem):
            return (1,)

        def text(self, ids):
            return texts[ids[0]]

    kept, counts = rejection_sample(
        Scripted(texts),
        Words(),
        [problem],
        samples_per_problem=len(texts),
        keep_per_problem=2,
        is_readable=lambda text: "ugly" not in text,
        max_tokens=8,
    )
    assert [each.text for each in kept] == [right, other]
    assert (counts.sampled, counts.right, counts.readable, counts.kept) == (6, 4, 3, 2)


def test_the_verbs_explain_themselves():
    for verb in ("r1", "train-bundled"):
        result = CliRunner().invoke(app, [verb, "--help"])
        assert result.exit_code == 0 and f"shoal {verb}" in result.output
