import pytest

from shoal.errors import ConfigError
from shoal.planner.hardware import parse_fit
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import parse_settings
from shoal.planner.plan.whole import Plan, make_plan
from shoal.planner.published_models import RIVALS, rival
from shoal.planner.rivals import rival_of
from shoal.presets import PRESETS

EVERY_MODEL = [*RIVALS, *(name for name in PRESETS if name not in RIVALS)]


def plan(model: str, *settings: str, fit: str | None = None) -> Plan:
    return make_plan(ask(rival(model), parse_fit(fit) if fit else None, parse_settings(settings)))


def test_v3_has_the_published_sizes():
    found = plan("v3").to_json()
    assert found["total_params"] == 671_026_419_200 and found["active_params"] == 36_625_618_432
    assert found["kv_bytes_per_token"] == 70_272
    assert found["checkpoint_bytes_fp8"] == 680_571_043_840 + 166_161_984 + 7_837_633_536
    assert found["training_flops_per_token"] == pytest.approx(250.46e9, rel=1e-4)
    assert sum(found["params_by_part"].values()) == found["total_params"] + found["mtp_params"]


def test_v3s_training_costs_what_its_report_says():
    found = plan("v3", "tokens=14.8T").to_json()
    assert found["training_gpu_hours"] == pytest.approx(2_664_000, rel=0.005)
    assert found["training_usd"] == pytest.approx(5_328_000, rel=0.005)
    low, high = found["ranges"]["training_kwh"]
    assert low == pytest.approx(found["training_gpu_hours"] * 0.7) and low < found["training_kwh"] <= high


def test_money_is_hours_times_rent_and_electricity_hours_times_watts():
    found = plan(
        "v2_lite", "tokens=1T", "price_usd_per_device_h=3", "power_w=1kW", "pue=1.5", "usd_per_kwh=0.1"
    ).to_json()
    assert found["training_usd"] == pytest.approx(3 * found["training_gpu_hours"])
    assert found["training_kwh"] == pytest.approx(1.5 * found["training_gpu_hours"])
    assert found["training_electricity_usd"] == pytest.approx(0.1 * found["training_kwh"])


def test_without_tokens_nothing_is_said_about_training():
    assert "training_usd" not in plan("v3").to_json()
    with pytest.raises(ConfigError, match="--tokens"):
        plan("v3").figure("training_usd")


@pytest.mark.parametrize("model", EVERY_MODEL)
def test_every_known_model_can_be_planned_and_every_input_of_a_figure_exists(model):
    made = plan(model, "tokens=1T")
    names = {*made.figures, *made.question.settings.numbers, *made.question.settings.words}
    for figure in made.figures.values():
        assert set(figure.inputs) <= names, figure.name
        assert figure.formula and figure.source and figure.unit and figure.label
        assert figure.value is not None or figure.note, figure.name
        if figure.low is not None and figure.high is not None and not isinstance(figure.value, str | None):
            assert figure.low <= figure.value <= figure.high, figure.name


def test_a_model_that_is_nearly_all_embedding_says_that_it_has_no_dense_twin():
    config = PRESETS["demo"].replace(vocab_size=100_000, moe_intermediate_size=1, intermediate_size=1)
    model = rival_of("thin", config, source="test")
    figure = make_plan(ask(model, None, parse_settings(["tokens=1M"]))).figures["dense_same_loss_gpu_hours"]
    assert figure.value is None and "no such dense model" in figure.note
