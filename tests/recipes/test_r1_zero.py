import pytest

from shoal.errors import ConfigError
from shoal.recipes.demo import control_arms
from shoal.recipes.r1_zero import PLANS, describe_study, study_config, summarise
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.splits import problems

SKILL = {
    "pass_at": {"1": 0.25, "64": 0.5},
    "pass_at_1_interval": [0.2, 0.3],
    "response_tokens": 12.5,
    "worked_fraction": 0.1,
    "accuracy_worked": None,
    "accuracy_direct": 0.2,
    "examples": ["long"],
}


@pytest.mark.parametrize("family", PLANS)
def test_every_plan_is_a_recipe_whose_family_has_that_many_problems(family):
    config = study_config(family, seeds=(4, 5))
    assert config.rl_seeds == (4, 5) and config.samples_per_problem == 64
    assert config.pretraining.schedule.total_steps == config.pretraining.steps == PLANS[family].pretraining_steps
    difficulty = config.corpus.difficulty
    assert len(problems(TASKS[family], "rl", config.rl_problems, difficulty, seed=0)) == config.rl_problems
    assert len(problems(TASKS[family], "eval", config.held_out_problems, difficulty, seed=0)) == 64


def test_the_controls_are_those_that_reinforcement_learning_must_beat():
    arms = {arm.name: arm for arm in control_arms(0)}
    assert [reward.title for reward in arms["rl-format-only"].rewards] == ["format"]
    assert [reward.title for reward in arms["rl-random-reward"].rewards] == ["coin", "format"]
    assert arms["sft-right-answers"].advantage == "reward" and arms["rl-no-worked"].base == "base-no-worked"


def test_a_study_is_summarised_by_arm():
    evaluation = {"before": SKILL, "after": [{"seed": 0, **SKILL}], "controls": [{"name": "random reward", **SKILL}]}
    summary = summarise(evaluation)
    assert [arm["name"] for arm in summary["arms"]] == ["R1-Zero, seed 0", "random reward"]
    assert "examples" not in summary["base"]
    lines = describe_study({"parity": summary}).splitlines()
    assert lines[1] == "parity / base: 25.0%, 50.0%, 12.5, 10%" and len(lines) == 4


def test_families_without_a_plan_are_named():
    with pytest.raises(ConfigError, match="no plan for family 'chainsum', did you mean 'chain_sum'"):
        study_config("chainsum")
