import dataclasses

import pytest

from shoal.errors import ConfigError
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.variants import NEVER_STEPS, VARIANTS, variant


def test_r1_has_the_published_numbers() -> None:
    r1 = variant("r1")
    assert (r1.objective.clip_low, r1.objective.clip_high, r1.objective.kl_coefficient) == (10, 10, 0.001)
    assert (r1.group_size, r1.prompts_per_update, r1.answers_per_update) == (16, 32, 512)
    assert r1.prompts_per_rollout * r1.group_size == 8192
    assert (r1.learning_rate, r1.temperature, r1.max_response_tokens) == (3e-6, 1.0, 32768)
    assert r1.reference_refresh_updates == 400 and r1.unpublished == ()


def test_dapo_has_the_published_numbers() -> None:
    dapo = variant("dapo")
    assert (dapo.objective.clip_low, dapo.objective.clip_high, dapo.objective.loss_average) == (0.2, 0.28, "token")
    assert dapo.objective.kl_coefficient == 0 and dapo.dynamic_sampling
    assert (dapo.prompts_per_rollout, dapo.group_size, dapo.answers_per_update) == (512, 16, 512)
    assert (dapo.max_response_tokens, dapo.overlong_cache_tokens) == (16384 + 4096, 4096)


def test_the_others_have_the_published_numbers() -> None:
    math, dr, gspo, rloo = (variant(name) for name in ("deepseekmath", "dr_grpo", "gspo", "rloo"))
    assert (math.group_size, math.answers_per_update, math.minibatches) == (64, 1024, 1)
    assert (math.objective.kl_coefficient, math.learning_rate, math.max_response_tokens) == (0.04, 1e-6, 1024)
    assert (dr.group_size, dr.prompts_per_rollout, dr.answers_per_update, dr.advantage) == (8, 128, 128, "none")
    assert dr.objective.loss_average == "constant" and dr.objective.max_response_tokens == 3000
    assert (gspo.objective.clip_low, gspo.objective.clip_high, gspo.minibatches) == (3e-4, 4e-4, 4)
    assert gspo.objective.level == "sequence"
    assert (rloo.advantage, rloo.answers_per_update, rloo.objective.kl_coefficient) == ("rloo", 512, 0.03)


def test_v3_2_has_all_four_stabilisers() -> None:
    v3_2 = variant("v3_2")
    assert v3_2.objective.kl_estimator == "unbiased" and v3_2.objective.off_policy_threshold is not None
    assert v3_2.keep_routing and v3_2.keep_sampling_mask and v3_2.top_p < 1
    assert v3_2.advantage == "none"


@pytest.mark.parametrize("name", VARIANTS)
def test_settings_make_a_loop_configuration_that_means_the_same(name: str) -> None:
    recipe = variant(name)
    config = GrpoConfig(**recipe.settings())
    assert config.prompts_per_step * config.group_size // config.minibatches == recipe.answers_per_update
    assert config.objective == recipe.objective and config.advantage == recipe.advantage
    assert config.optimizer.learning_rate == recipe.learning_rate
    assert config.max_response_tokens == recipe.max_response_tokens and config.temperature == recipe.temperature
    for name in ("dynamic_sampling", "overlong_cache_tokens", "keep_routing", "keep_sampling_mask", "top_p"):
        assert getattr(config, name) == getattr(recipe, name)


def test_the_reference_is_refreshed_after_the_published_number_of_updates() -> None:
    r1 = variant("r1")
    assert r1.settings()["reference_refresh_steps"] * r1.minibatches == 400
    assert variant("deepseekmath").settings()["reference_refresh_steps"] == NEVER_STEPS


@pytest.mark.parametrize("name", VARIANTS)
def test_unpublished_fields_exist_and_every_variant_says_where_it_is_from(name: str) -> None:
    recipe = variant(name)
    known = {field.name for owner in (type(recipe), ObjectiveConfig) for field in dataclasses.fields(owner)}
    assert set(recipe.unpublished) <= known
    assert recipe.name == name and "arXiv" in recipe.source


def test_scaling_keeps_the_share_of_the_overlong_cache_and_moves_the_constant_divisor() -> None:
    dapo, dr = variant("dapo").scaled_to(100), variant("dr_grpo").scaled_to(100)
    assert (dapo.max_response_tokens, dapo.overlong_cache_tokens) == (100, 20)
    assert dr.objective.max_response_tokens == 100 and dr.overlong_cache_tokens == 0
    assert variant("dapo").scaled_to(1).overlong_cache_tokens == 1
    assert dataclasses.replace(dapo, max_response_tokens=20480, overlong_cache_tokens=4096) == variant("dapo")


def test_recipes_cannot_be_changed_in_place() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        variant("r1").group_size = 8  # type: ignore[misc]


def test_an_unknown_name_gets_a_suggestion_and_the_list() -> None:
    with pytest.raises(
        ConfigError, match=r"unknown variant 'dappo', did you mean 'dapo'\?; variants are deepseekmath, r1"
    ):
        variant("dappo")
    with pytest.raises(ConfigError, match="max_response_tokens=0"):
        variant("r1").scaled_to(0)
