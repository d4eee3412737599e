import pytest

from shoal.errors import ConfigError
from shoal.planner.hardware import parse_fit
from shoal.planner.plan.charts import training_flops_by_part
from shoal.planner.plan.compare import compare
from shoal.planner.plan.explain import explain
from shoal.planner.plan.question import ask
from shoal.planner.plan.sensitivity import sensitivity
from shoal.planner.plan.settings import parse_settings
from shoal.planner.plan.whole import Plan, make_plan
from shoal.planner.published_models import rival


def plan(model: str, *settings: str, fit: str | None = None) -> Plan:
    return make_plan(ask(rival(model), parse_fit(fit) if fit else None, parse_settings(settings)))


def test_an_explanation_goes_down_to_every_assumption():
    found = explain(plan("v3", "tokens=14.8T", "pue=1.3"), "training_kg_co2")
    assumed = {one.name: one for one in found.inputs if one.is_assumption}
    hardware = {"peak_bf16_flops_per_s", "power_w"}
    assert set(assumed) == {"tokens", "utilisation_fraction", "sequence_tokens", "pue", "kg_co2_per_kwh", *hardware}
    assert assumed["pue"].source == "set by you" and all(one.source for one in found.inputs)
    names = [one.name for one in found.inputs]
    assert names[:2] == ["training_kwh", "kg_co2_per_kwh"] and len(names) == len(set(names))


def test_an_explained_formula_gives_the_figure():
    found = explain(plan("v2", "tokens=8.1T"), "training_usd")
    inputs = {one.name: one.value for one in found.inputs}
    assert found.value == pytest.approx(inputs["training_gpu_hours"] * inputs["price_usd_per_device_h"])


def test_sensitivity_moves_the_figure_as_a_plan_made_anew_does():
    made = plan("v3", "tokens=1T")
    for name in (
        "training_kwh",
        "decode_tokens_per_s_per_device",
        "usd_per_million_output_tokens",
        "most_sequences",
        "kv_bytes_per_sequence",
    ):
        for effect in sensitivity(made, name).effects[:3]:
            anew = plan("v3", *(["tokens=1T"] if effect.key != "tokens" else []), f"{effect.key}={effect.high!r}")
            assert effect.at_high == pytest.approx(anew.figure(name).value), (name, effect.key)


def test_sensitivity_ranks_by_span_and_leaves_out_what_does_nothing():
    found = sensitivity(plan("v3", "tokens=1T"), "training_usd")
    spans = [effect.span_fraction for effect in found.effects]
    assert spans == sorted(spans, reverse=True) and min(spans) > 0
    assert found.effects[0].key == "utilisation_fraction"
    assert not {"pue", "power_w"} & {effect.key for effect in found.effects}


def test_words_have_no_sensitivity():
    with pytest.raises(ConfigError, match="no number"):
        sensitivity(plan("v3"), "decode_limited_by")


def test_a_comparison_divides_by_the_first_and_shows_gaps():
    rows = {row.name: row for row in compare([plan("v3"), plan("llama-3.1-405b"), plan("v4-pro")]).rows}
    assert rows["kv_bytes_per_token"].values == (70_272, 516_096, pytest.approx(5031.4375))
    assert rows["kv_bytes_per_token"].times[1] == pytest.approx(516_096 / 70_272)
    assert rows["checkpoint_bytes_fp8"].values[2] is None and rows["checkpoint_bytes_fp8"].times[2] is None


def test_operations_by_part_are_those_of_a_hand_count():
    parts = training_flops_by_part(rival("v3").config, 4096)
    assert parts["routed experts"] == 6 * 58 * 8 * 44_040_192
    assert parts["attention projections"] == 6 * 61 * 187_107_328
    assert parts["attention scores"] == pytest.approx(3 * 2 * 128 * (192 + 128) * 2048 * 61)


def test_two_cores_hold_v2_lite_in_eight_bits_and_cannot_train_it():
    figures = plan("v2_lite", fit="2 cores, 24 GiB").figures
    assert figures["serving_fits"].value == "yes" and figures["training_fits"].value == "no"
    assert figures["training_devices_min"].value is None and "does not fit" in figures["training_devices_min"].note
    assert figures["serving_memory_bytes"].value <= 0.9 * 24 * 2**30
    # Sixteen bits would not fit, so eight were taken; one more sequence would not fit either.
    more = plan("v2_lite", "num_sequences=" + str(figures["most_sequences"].value + 1), fit="2 cores, 24 GiB").figures
    assert more["serving_fits"].value == "no"


def test_what_does_not_fit_has_no_speed_and_says_what_is_missing():
    figures = plan("v3", fit="2 cores, 24 GiB").figures
    assert "decode_tokens_per_s" not in figures and "does not fit" in figures["serving_devices_min"].note


def test_training_that_is_too_wide_for_selective_recompute_takes_full():
    figures = plan("llama-3.1-405b").figures
    assert figures["training_fits"].value == "yes" and "full recompute" in figures["training_memory_bytes"].label


def test_a_thinner_cache_holds_more_sequences():
    plain, thin = plan("v2", fit="8x h800").figures, plan("v2", "cache_bytes_per_number=6bits", fit="8x h800").figures
    assert thin["most_sequences"].value > 2.5 * plain["most_sequences"].value


def test_a_model_with_a_selecting_indexer_has_no_speed_that_would_be_wrong():
    figures = plan("v3.2", "tokens=1T").figures
    assert "decode_tokens_per_s" not in figures and "serving_memory_bytes" not in figures
    assert "indexer" in figures["training_flops_per_token"].note
    assert figures["kv_bytes_per_token"].value == 61 * (656 + 132)
