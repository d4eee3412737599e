"""Published cache sizes of DeepSeek's generations and of the models they are compared with, from their shapes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import cache_bytes_per_token, decode_flops_per_token, parameter_counts
from shoal.planner.published_models import RIVALS, kv_bytes_over_context, not_recomputed, rival
from shoal.planner.rivals import Rival, fp8_checkpoint, rival_of
from shoal.presets import PRESETS

MILLION = 2**20
GIB = 2**30
names = st.sampled_from(sorted(RIVALS))


@pytest.mark.parametrize(
    ("name", "bytes_per_token"),
    [
        ("v3", 70_272),  # ISCA 2025 table 1
        ("qwen2.5-72b", 327_680),
        ("llama-3.1-405b", 516_096),
        ("v2", 69_120),
        ("v2_lite", 2 * 15_552),
        ("llama-2-7b", 2 * 2 * 32 * 128 * 32),
        ("deepseek-67b", 2 * 194_560),
        ("v3.2", 61 * (656 + 132)),
        ("v4.1-flash", 890),
    ],
)
def test_published_cache_sizes_are_reproduced(name, bytes_per_token):
    assert rival(name).kv_bytes_per_token() == bytes_per_token
    assert rival(name).kv_bytes(MILLION) == bytes_per_token * MILLION


@pytest.mark.parametrize(
    ("name", "parameters"),
    [("llama-3.1-405b", 405_853_388_800), ("qwen2.5-72b", 72_706_203_648), ("llama-2-7b", 6_738_415_616)],
)
def test_dense_models_have_their_published_parameters_and_are_released_in_bf16(name, parameters):
    assert rival(name).total_params == parameters
    assert rival(name).checkpoint_bytes == 2 * parameters


def test_67b_is_67_billion():
    assert rival("deepseek-67b").total_params == pytest.approx(67.4e9, rel=1e-3)


def test_v3_is_released_in_the_bytes_that_its_files_have():
    released = fp8_checkpoint(PRESETS["v3"])
    assert released.fp8_bytes == 680_571_043_840
    assert released.scale_bytes == 166_161_984
    assert released.bf16_bytes + released.fp32_bytes == 7_837_633_536
    assert rival("v3").checkpoint_bytes == released.total_bytes
    elements = released.fp8_bytes + released.scale_bytes // 4 + released.bf16_bytes // 2 + released.fp32_bytes // 4
    assert elements - released.scale_bytes // 4 == 684_489_845_504


@pytest.mark.parametrize("name", ["v2_lite", "demo", "mini"])
def test_a_release_holds_every_parameter_once_and_mtp_brings_its_own_embedding_and_head(name):
    config = PRESETS[name]
    released, counts = fp8_checkpoint(config), parameter_counts(config)
    held = released.fp8_bytes + released.bf16_bytes // 2 + released.fp32_bytes // 4
    assert held == counts.stored + config.num_nextn_predict_layers * 2 * config.vocab_size * config.hidden_size


def test_v4_caches_a_tenth_and_a_fourteenth_of_v3_2():
    whole = rival("v3.2").kv_bytes(MILLION)
    assert rival("v4-pro").kv_bytes(MILLION) / whole == pytest.approx(0.1048, abs=5e-5)
    assert rival("v4-flash").kv_bytes(MILLION) / whole == pytest.approx(0.0732, abs=5e-5)
    assert rival("v4.1-flash").kv_bytes(MILLION) / rival("v4-flash").kv_bytes(MILLION) == pytest.approx(0.253, abs=5e-4)
    grouped = 61 * MILLION * 2 * 8 * 128 * 2
    assert rival("v4-pro").kv_bytes(MILLION) / grouped == pytest.approx(0.0202, abs=1e-4)


def test_bf16_caches_of_a_million_tokens_are_as_published():
    assert rival("v3.2").kv_elements(MILLION) * 2 / GIB == pytest.approx(83.875, rel=1e-9)
    assert rival("v4-pro").kv_elements(MILLION) * 2 / GIB == pytest.approx(9.62, rel=1e-3)


def test_v4_decodes_with_the_published_share_of_v3_2s_work():
    whole = rival("v3.2").decode_flops(MILLION)
    assert (whole.linear / 1e9, whole.attention / 1e9, whole.indexer / 1e9) == pytest.approx(
        (73.3, 34.8, 1048), rel=2e-3
    )
    pro, flash = rival("v4-pro").decode_flops(MILLION), rival("v4-flash").decode_flops(MILLION)
    assert (pro.linear / 1e9, pro.attention / 1e9, pro.indexer / 1e9) == pytest.approx((98.0, 76.7, 128.8), rel=1e-3)
    assert (flash.linear / 1e9, flash.attention / 1e9, flash.indexer / 1e9) == pytest.approx(
        (26.0, 23.6, 90.2), rel=1e-3
    )
    assert pro.bf16_equivalent / whole.bf16_equivalent == pytest.approx(0.27, abs=0.01)
    assert flash.bf16_equivalent / whole.bf16_equivalent == pytest.approx(0.10, abs=0.005)


def test_the_indexer_reads_little_and_selection_bounds_the_rest():
    sparse = rival("v3.2")
    assert sparse.kv_bytes_read(2048) == sparse.kv_bytes(2048)
    assert sparse.kv_bytes_read(MILLION) == 61 * (2048 * 656 + MILLION * 132)


def test_a_window_stops_growing_and_groups_count_when_full():
    pro = rival("v4-pro")
    assert pro.kv_bytes_by_part(3) == {
        "compressed sparse": 0,
        "index keys": 0,
        "heavily compressed": 0,
        "window": 61 * 3 * 584,
    }
    assert pro.kv_bytes_by_part(4)["compressed sparse"] == 30 * 584
    assert pro.kv_bytes_by_part(1000)["window"] == pro.kv_bytes_by_part(10**6)["window"] == 61 * 128 * 584


@pytest.mark.parametrize("name", ["v3", "v2_lite", "qwen2.5-72b", "demo"])
def test_ordinary_models_agree_with_the_counts_of_their_config(name):
    model = rival(name)
    assert model.config is not None
    assert model.kv_bytes_per_token() == cache_bytes_per_token(model.config)
    flops = model.decode_flops(5000)
    extra = 2 * (model.active_params - parameter_counts(model.config).active)
    assert flops.total - extra == pytest.approx(decode_flops_per_token(model.config, 5000), rel=1e-12)


def test_six_bits_are_what_minus_93_percent_needs():
    v2 = rival_of("v2", PRESETS["v2"], source="test", cache_bytes_per_element=0.75)
    other = rival("deepseek-67b")
    assert 1 - v2.kv_bytes_per_token() / other.kv_bytes_per_token() == pytest.approx(0.933, abs=5e-4)
    texts = {one.figure: one.ours for one in not_recomputed()}
    assert texts["KV cache of DeepSeek-V2 against DeepSeek 67B"].startswith("-82.2 %")
    assert texts["training FLOPs per token of Qwen2.5-72B and LLaMA-3.1-405B"] == "444.9 and 2473.2 GFLOPs"
    assert texts["KV cache of LLaMA-3.1-405B against DeepSeek-V3"] == "7.34 times"


def test_curves_come_in_the_order_asked_for():
    mine = rival_of("mine", PRESETS["demo"], source="test")
    curves = kv_bytes_over_context(["v3", mine, "qwen2.5-72b"], [0, 1024])
    assert [curve.name for curve in curves] == ["v3", "mine", "qwen2.5-72b"]
    assert curves[0].kv_bytes == (0, 1024 * 70_272)
    assert curves[1].kv_bytes == (0, 1024 * 3 * (64 + 16) * 2)


@given(names, st.integers(0, 10**6), st.integers(0, 10**6))
def test_more_context_never_takes_less(name, one, other):
    model, short, long = RIVALS[name], min(one, other), max(one, other)
    assert model.kv_bytes(short) <= model.kv_bytes(long)
    assert model.kv_bytes_read(short) <= model.kv_bytes_read(long)
    assert model.kv_bytes_read(long) <= model.kv_bytes(long)
    assert model.kv_bytes(long) == pytest.approx(sum(model.kv_bytes_by_part(long).values()))


def test_every_entry_names_its_source_and_says_why_a_figure_is_missing():
    for model in RIVALS.values():
        assert model.source
        assert model.checkpoint_bytes is not None or model.note


def test_unknown_names_and_lengths_are_refused():
    with pytest.raises(ConfigError, match=r"unknown model 'lama-3.1-405b', did you mean 'llama-3.1-405b'"):
        rival("lama-3.1-405b")
    with pytest.raises(ConfigError, match="context_tokens=-1"):
        rival("v3").kv_bytes(-1)
    with pytest.raises(ConfigError, match="no context lengths"):
        kv_bytes_over_context(["v3"], [])
    with pytest.raises(ConfigError, match="heads that read 'pairs of tokens' are not known"):
        rival("v4.1-flash").decode_flops(1)
    with pytest.raises(ConfigError, match="cache_bytes_per_element=0"):
        rival_of("v2", PRESETS["v2"], source="test", cache_bytes_per_element=0)


def test_any_config_can_stand_beside_the_published_ones():
    config = ModelConfig(
        vocab_size=11, hidden_size=24, num_hidden_layers=2, num_attention_heads=4, intermediate_size=5, attention="gqa"
    )
    model: Rival = rival_of("tiny", config, source="test")
    assert model.kv_elements(7) == 7 * 2 * 2 * 24
