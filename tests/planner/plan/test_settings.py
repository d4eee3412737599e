import pytest

from shoal.errors import ConfigError
from shoal.planner.hardware import parse_fit
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import CHOICES, REGIONS, SETTINGS, YOURS, parse_settings
from shoal.planner.published_models import rival


@pytest.mark.parametrize(
    "text, key, value",
    [
        ("power_w=1.2kW", "power_w", 1200),
        ("power_w=700 W", "power_w", 700),
        ("tokens=14.8T", "tokens", 14.8e12),
        ("tokens=14.8e12", "tokens", 14.8e12),
        ("utilisation_fraction=39%", "utilisation_fraction", 0.39),
        ("usd_per_kwh=8 ct/kWh", "usd_per_kwh", 0.08),
        ("kg_co2_per_kwh=582g/kWh", "kg_co2_per_kwh", 0.582),
        ("cache_bytes_per_number=6bits", "cache_bytes_per_number", 0.75),
    ],
)
def test_units_of_the_same_kind_are_converted(text, key, value):
    assert parse_settings([text]).numbers[key] == pytest.approx(value)


@pytest.mark.parametrize(
    "text, part",
    [
        ("power_w=1.2", "1.2 kW would be power_w=1200"),
        ("power_w=1.2kWh", "'kWh' is no unit of it"),
        ("utilisation_fraction=39", "39 % would be utilisation_fraction=0.39"),
        ("usd_per_kwh=12.8", "12.8 ct/kWh would be usd_per_kwh=0.128"),
        ("kg_co2_per_kwh=480", "480 g/kWh would be kg_co2_per_kwh=0.48"),
        ("tokens=14.8", "14.8 T would be tokens=1.48e+13"),
        ("device_bytes=80", "80 GiB would be device_bytes=8.58993e+10"),
        ("memory_bytes_per_s=3.35", "3.35 TB/s would be"),
        ("peak_bf16_flops_per_s=989", "989 TFLOP/s would be"),
        ("tokens=-5", "from 1000 to 1e+18"),
        ("pue=0.9", "cannot use less than its machines"),
        ("pue=nan", "is not a number"),
        ("power_w=1e999", "not a finite number"),
        ("micro_batch=1.5", "whole number"),
        ("powr_w=700", "did you mean 'power_w'?"),
        ("region=chna", "did you mean 'china'?"),
        ("power_w", "not of the form key=value"),
    ],
)
def test_a_mistake_is_named_with_what_was_probably_meant(text, part):
    with pytest.raises(ConfigError, match=part.replace("+", r"\+").replace("?", r"\?")):
        parse_settings([text])


def test_a_key_set_twice_is_refused():
    with pytest.raises(ConfigError, match="set twice"):
        parse_settings(["power_w=700", "power_w=800"])


def test_every_default_lies_within_what_is_accepted_and_has_a_source():
    for config in ("demo", "v3", "llama-3.1-405b", "v4-pro"):
        for hardware in (None, parse_fit("2 cores, 24 GiB"), parse_fit("8x b200")):
            settings = ask(rival(config), hardware, parse_settings([])).settings
            for key, assumed in settings.numbers.items():
                assert SETTINGS[key].low <= assumed.value <= SETTINGS[key].high, key
                assert assumed.source and assumed.unit == SETTINGS[key].unit
            assert set(settings.words) == set(CHOICES)


def test_what_is_set_is_called_yours_and_the_rest_is_not():
    settings = ask(rival("v3"), None, parse_settings(["region=france", "usd_per_kwh=0.1"])).settings
    assert settings.numbers["usd_per_kwh"].source == YOURS and settings.value("usd_per_kwh") == 0.1
    assert settings.value("kg_co2_per_kwh") == REGIONS["france"].kg_co2_per_kwh
    assert settings.numbers["kg_co2_per_kwh"].source == REGIONS["france"].source
