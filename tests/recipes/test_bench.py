"""The measuring commands at sizes where they take no time: what they count, not how fast it is."""

import pytest

from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.planner.counts import cache_bytes_per_token, expert_parameters, parameter_counts
from shoal.presets import preset
from shoal.recipes import bench

needs_kernels = pytest.mark.skipif(library() is None, reason="no C++ compiler: nothing to measure")


@pytest.fixture(autouse=True)
def brief(monkeypatch):
    monkeypatch.setattr(bench, "MIN_SECONDS", 0.01)
    monkeypatch.setattr(bench, "measured_rate", lambda *_: 1e12)


@needs_kernels
def test_decoding_counts_the_bytes_a_step_reads_and_states_the_fraction():
    config = preset("nano").replace(num_nextn_predict_layers=0)
    model = bench.load_packed(None, "nano", "int8", 80)
    result = bench.bench_decode(model, batch=1, context=70)
    moe_layers = config.num_hidden_layers - config.first_k_dense_replace
    assert result["experts_per_layer"] == config.num_experts_per_tok  # one token reaches exactly so many
    assert result["bytes_per_step"] == parameter_counts(config).active + 70 * cache_bytes_per_token(config)
    two = bench.decode_bytes(model.packed, 1, 70, config.num_experts_per_tok + 1)
    assert two - result["bytes_per_step"] == moe_layers * expert_parameters(config)
    assert result["limit_fraction"] == pytest.approx(result["tokens_per_s"] / result["limit_tokens_per_s"])
    assert result["bandwidth_gb_s"] == pytest.approx(result["tokens_per_s"] * result["bytes_per_step"] / 1e9)


@needs_kernels
def test_scripts_get_five_figures_and_joules_only_where_they_were_measured():
    result = bench.bench_prefill(bench.load_packed(None, "nano", "int4", 40), tokens=40)
    five = {"tokens_per_s", "limit_tokens_per_s", "limit_fraction", "bandwidth_gb_s", "peak_rss_bytes"}
    assert set(bench.published({**result, "joules_kind": "modelled"})) == five
    assert set(bench.published({**result, "joules_kind": "measured"})) == {*five, "joules_per_token"}


def test_unknown_formats_and_models_are_named():
    with pytest.raises(ConfigError, match="int3"):
        bench.load_packed(None, "nano", "int3", 8)
    with pytest.raises(ConfigError, match="one of them"):
        bench.load_packed("a", "nano", "int4", 8)
    for refused in ({"weights": "int8", "group": 64}, {"weights": "int4", "group": 48}):
        with pytest.raises(ConfigError, match="32, 64, 128"):
            bench.load_packed(None, "nano", max_positions=8, **refused)


@needs_kernels
def test_larger_groups_have_fewer_scales_to_read():
    small, large = (bench.load_packed(None, "nano", "int4", 80, group) for group in (32, 128))
    assert bench.decode_bytes(small.packed, 1, 70, 2) > bench.decode_bytes(large.packed, 1, 70, 2)
