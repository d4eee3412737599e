"""Named models, changes typed on a command line, and configurations that cannot be."""

import pytest

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import parameter_counts
from shoal.presets import PRESETS, preset, with_overrides


@pytest.mark.parametrize(
    "name, millions", [("nano", 10.3), ("mini", 103.0), ("small", 1288.0), ("v2_lite", 15_706.0), ("v2", 235_741.0)]
)
def test_presets_have_the_parameters_that_their_descriptions_say(name, millions):
    assert parameter_counts(PRESETS[name]).total == pytest.approx(millions * 1e6, rel=0.01)


def test_an_unknown_preset_is_named_with_the_ones_there_are():
    with pytest.raises(ConfigError, match=r"unknown preset 'nanno'.*nano.*presets are demo, nano, mini"):
        preset("nanno")


@pytest.mark.parametrize(
    "override, message",
    [
        ("hiden_size=4", r"unknown model key 'hiden_size'.*hidden_size"),
        ("hidden_size", "not of the form key=value"),
        ("hidden_size=wide", "not a whole number"),
        ("rope_scaling.wings=2", r"unknown model key 'rope_scaling\.wings'"),
        ("attention=flash", "not one of"),
    ],
)
def test_overrides_that_cannot_be_read_are_named(override, message):
    with pytest.raises(ConfigError, match=message):
        with_overrides(preset("nano"), [override])


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"attention": "gqa", "hidden_size": 250}, "does not split over num_attention_heads=4"),
        ({"attention": "gqa", "num_key_value_heads": 3}, "not a multiple of num_key_value_heads=3"),
        ({"attention": "gqa", "head_dim": 33}, "odd; rotary pairs need an even size, use 34"),
        ({"qk_rope_head_dim": 31}, "odd; rotary pairs need an even size, use 32"),
        (
            {"n_group": 3},
            r"n_routed_experts=16 is not divisible by n_group=3; n_group may be one of \[1, 2, 4, 8, 16\]",
        ),
        ({"n_group": 4, "topk_group": 5}, "topk_group=5 must be in 1..n_group=4"),
        ({"n_group": 8, "topk_group": 1}, "exceeds the 2 experts"),
        ({"num_experts_per_tok": 17}, "num_experts_per_tok=17"),
        ({"first_k_dense_replace": 9}, "leaves no layer"),
        ({"hidden_size": True}, "of type bool"),
        ({"rms_norm_eps": float("nan")}, "not a finite number"),
    ],
)
def test_configurations_that_cannot_be_say_what_would_be(changes, message):
    with pytest.raises(ConfigError, match=message):
        preset("nano").replace(**changes)


def test_unknown_and_missing_keys_of_a_saved_config_are_named():
    values = preset("nano").to_dict()
    with pytest.raises(ConfigError, match="unknown model key 'wings'"):
        ModelConfig.from_dict({**values, "wings": 2})
    del values["hidden_size"]
    with pytest.raises(ConfigError, match="hidden_size must be given"):
        ModelConfig.from_dict(values)
