"""Every assumption of a plan, by the key it is set with: unit, what it may be, a default with its source, an honest range.

    shoal plan v3 --tokens 14.8T --set utilisation_fraction=0.3 --set power_w=1.1kW --set region=china

A number is an `Assumption` whose source says whether it is a default, the hardware's, or yours. Some have a range that
published sources span; a plan then gives figures as ranges too, and `--sensitivity` moves them over just that.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean
from shoal.planner.activations import RECIPES
from shoal.planner.cost import Assumption, CostAssumptions
from shoal.planner.deployment import WEIGHT_FORMATS
from shoal.planner.hardware import Cluster, Device
from shoal.planner.network import FITTED_PRICES
from shoal.planner.plan.units import check_plausible, parse_quantity
from shoal.planner.prices import PRICES
from shoal.planner.training import V3_UTILISATION

YOURS = "set by you"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """A number that may be set."""

    key: str
    label: str
    unit: str
    low: float
    high: float
    """What it can be at all; outside is refused."""
    default: float | None
    """None where it depends on model or hardware."""
    source: str
    doubt: tuple[float, float] | None = None
    """What published sources span, where that is known; sensitivity moves over it, else over a fifth less and a quarter more."""
    is_whole: bool = False


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A word that may be set."""

    key: str
    label: str
    words: tuple[str, ...]
    default: str
    source: str


@dataclass(frozen=True, kw_only=True)
class Region:
    """Where the machines stand."""

    usd_per_kwh: float
    kg_co2_per_kwh: float
    source: str


REGIONS: dict[str, Region] = {
    "world": Region(
        usd_per_kwh=0.128,
        kg_co2_per_kwh=0.48,
        source="carbon: world average 2023 (Ember); price: commercial customers, United States, 2024 (EIA), for want of a world price",
    ),
    "usa": Region(
        usd_per_kwh=0.128,
        kg_co2_per_kwh=0.37,
        source="price: commercial customers 2024 (EIA Electric Power Monthly, table 5.6); carbon: 2023 (Ember), from memory, not verified",
    ),
    "china": Region(
        usd_per_kwh=0.08,
        kg_co2_per_kwh=0.582,
        source="price: large consumers, an estimate, not verified; carbon: 0.582 kg/kWh of 2023 (Ember) as estimates of V3's "
        "training use it, second-hand",
    ),
    "eu": Region(
        usd_per_kwh=0.2,
        kg_co2_per_kwh=0.24,
        source="price: non-household consumers 2024 (Eurostat, about 0.19 EUR); carbon: 2023 (Ember); both from memory, not verified",
    ),
    "france": Region(
        usd_per_kwh=0.17,
        kg_co2_per_kwh=0.056,
        source="price: non-household consumers 2024 (Eurostat); carbon: 2023 (Ember); both from memory, not verified",
    ),
}
"""Electricity by region; replace either number by your own with usd_per_kwh and kg_co2_per_kwh."""


def _number(
    key: str,
    label: str,
    unit: str,
    low: float,
    high: float,
    default: float | None,
    source: str,
    *,
    doubt: tuple[float, float] | None = None,
    is_whole: bool = False,
) -> Setting:
    return Setting(
        key=key,
        label=label,
        unit=unit,
        low=low,
        high=high,
        default=default,
        source=source,
        doubt=doubt,
        is_whole=is_whole,
    )


_DAY_6 = "DeepSeek open-infra-index, day 6"

SETTINGS: dict[str, Setting] = {
    one.key: one
    for one in (
        _number("tokens", "training tokens", "tokens", 1e3, 1e18, None, "given with --tokens"),
        _number("sequence_tokens", "length of a training row", "tokens", 1, 2**30, None,
                "4096 as in DeepSeek-V3 §4.2, or the model's own limit where that is shorter", is_whole=True),
        _number("utilisation_fraction", "utilisation (MFU), of the dense bf16 peak", "fraction", 1e-6, 1, None,
                V3_UTILISATION.source, doubt=(0.20, 0.40)),
        _number("price_usd_per_device_h", "rent of one device", "USD/h", 0, 1e3, None, "the hardware's"),
        _number("device_bytes", "memory of one device", "bytes", 2**26, 2**46, None, "the hardware's", is_whole=True),
        _number("memory_bytes_per_s", "bandwidth of one device's memory", "bytes/s", 1e8, 1e15, None, "the hardware's"),
        _number("peak_bf16_flops_per_s", "dense bf16 peak of one device; other formats move with it", "FLOP/s", 1e9, 1e19, None,
                "the hardware's"),
        _number("link_bytes_per_s", "link to other devices of the machine, one direction", "bytes/s", 0, 1e13, None, "the hardware's"),
        _number("network_bytes_per_s", "one device's link to other machines, one direction", "bytes/s", 0, 1e13, None, "the hardware's"),
        _number("power_w", "power of one device with its share of the machine", "W", 5, 2e4, None, "the hardware's"),
        _number("pue", "energy of the building over that of its machines (PUE)", "ratio", 1, 3, 1.56,
                "average of operators' largest sites, Uptime Institute survey 2024; 1 on a desk", doubt=(1.1, 1.58)),
        _number("usd_per_kwh", "price of electricity", "USD/kWh", 0, 2, None, "the region's", doubt=(0.05, 0.20)),
        _number("kg_co2_per_kwh", "carbon intensity of electricity", "kg CO2e/kWh", 0, 1.5, None, "the region's", doubt=(0.03, 0.6)),
        _number("micro_batch", "sequences one device trains on at once", "sequences", 1, 2**20, 1, "the least", is_whole=True),
        _number("reserve_fraction", "memory kept free on each device", "fraction", 0, 0.9, 0.1,
                "ours, for buffers, fragmentation and the driver"),
        _number("context_tokens", "cached tokens of one sequence when served", "tokens", 1, 2**40, None,
                "4,989 is the average of DeepSeek's service (day 6); less where the model knows fewer positions", is_whole=True),
        _number("num_sequences", "sequences served at once over all devices", "sequences", 1, 2**30, None,
                "as many as fit, at most 256 for each device", is_whole=True),
        _number("prompt_tokens", "tokens of a prompt that is read", "tokens", 1, 2**40, None, "as context_tokens", is_whole=True),
        _number("cache_bytes_per_number", "bytes of one cached number", "bytes", 0.125, 8, 2,
                "bf16; 656/576 is V3.2's FP8 layout, 0.75 the six bits V2 was served with"),
        _number("bandwidth_fraction", "share of memory bandwidth reached", "fraction", 1e-3, 1, 1, "1 is the roofline: a bound",
                doubt=(0.5, 0.9)),
        _number("flops_fraction", "share of peak arithmetic reached when serving", "fraction", 1e-3, 1, 1,
                "1 is the roofline: a bound", doubt=(0.4, 0.8)),
        _number("network_fraction", "share of the link reached", "fraction", 1e-3, 1, 1, "1 is the roofline: a bound",
                doubt=(0.5, 0.9)),
        _number("acceptance_fraction", "drafted tokens that are kept", "fraction", 0, 1, 0.85,
                "DeepSeek-V3 §5.4.3: 85 to 90 %", doubt=(0.8, 0.9)),
        _number("hit_fraction", "prompt tokens found in the cache", "fraction", 0, 1, 0.5625, f"342 of 608 billion tokens, {_DAY_6}",
                doubt=(0.3, 0.8)),
        _number("input_per_output", "prompt tokens for each written token", "ratio", 0.001, 1e4, 608 / 168,
                f"608 to 168 billion tokens, {_DAY_6}", doubt=(1, 10)),
        _number("output_tokens_per_day", "written tokens to serve in a day", "tokens", 1, 1e16, None,
                f"{_DAY_6}; a million where there is no accelerator"),
        _number("micro_batch_tokens", "tokens of one micro-batch in the expert-parallel limit", "tokens", 1, 2**20, 32,
                "ISCA 2025 §2.3.2", is_whole=True),
        _number("switch_ports", "ports of a network switch", "ports", 4, 4096, 64, "ISCA 2025 table 3", is_whole=True),
        _number("planes", "planes of a multi-plane fat tree", "planes", 2, 64, 8, "ISCA 2025 §5.1: one for each GPU of a node", is_whole=True),
        _number("fibres_per_link", "fibres of one optical link", "fibres", 1, 64, 8, "400G over parallel single-mode fibre", is_whole=True),
        _number("links_per_trunk", "links in one multi-fibre (MPO) trunk", "links", 1, 64, 1, "1 runs a cable for each link", is_whole=True),
        _number("switch_usd", "price of a switch", "USD", 0, 1e6, FITTED_PRICES.switch.value, FITTED_PRICES.switch.source),
        _number("endpoint_link_usd", "price of a link to an endpoint", "USD", 0, 1e5, FITTED_PRICES.endpoint_link.value,
                FITTED_PRICES.endpoint_link.source),
        _number("link_usd", "price of a link between switches", "USD", 0, 1e5, FITTED_PRICES.link.value, FITTED_PRICES.link.source),
        _number("transceiver_usd", "price of a transceiver", "USD", 0, 1e5, FITTED_PRICES.transceiver.value, FITTED_PRICES.transceiver.source),
        _number("mpo_trunk_usd", "price of a multi-fibre trunk", "USD", 0, 1e5, FITTED_PRICES.mpo_trunk.value, FITTED_PRICES.mpo_trunk.source),
        _number("expert_skew", "how unevenly experts are asked for (Zipf)", "exponent", 0, 10, 1, "0 is even; measured loads are better"),
        _number("expert_devices", "devices that one layer's experts are placed on", "devices", 1, 65536, 32, "EP32, DeepSeek's prefill (day 6)",
                is_whole=True),
        _number("expert_nodes", "machines they stand in", "machines", 1, 8192, 4, "4 nodes, DeepSeek's prefill (day 6)", is_whole=True),
        _number("spare_slots", "slots for further copies of busy experts", "slots", 0, 65536, 32, "32 redundant experts, DeepSeek-V3 §3.4.1",
                is_whole=True),
    )
}  # fmt: skip
"""Numbers by key. The one table in this file that reads better with two lines an entry."""

CHOICES: dict[str, Choice] = {
    one.key: one
    for one in (
        Choice(key="region", label="where the machines stand", words=tuple(REGIONS), default="world",
               source="sets usd_per_kwh and kg_co2_per_kwh unless they are set themselves"),
        Choice(key="recipe", label="formats of training", words=("auto", *RECIPES), default="auto",
               source="auto: deepseek_fp8 where the device multiplies FP8, bf16 elsewhere, cpu without accelerator"),
        Choice(key="recompute", label="what training computes again", words=("auto", "none", "selective", "full"), default="auto",
               source="auto: selective as in DeepSeek-V3 §3.2.3, or full where that does not fit"),
        Choice(key="shard", label="what data parallelism shares", words=("none", "optimizer", "all"), default="all",
               source="all is FSDP (ZeRO-3), optimizer ZeRO-1, which DeepSeek-V3 used"),
        Choice(key="weights", label="format of served weights", words=("auto", *WEIGHT_FORMATS), default="auto",
               source="auto: fp8 where the device multiplies it, else bf16, int8 or int4, the first that fits"),
        Choice(key="price_model", label="whose price list the margin is at", words=tuple(sorted({row.model for row in PRICES})),
               default="deepseek-reasoner", source="the rows of shoal/planner/prices.py"),
    )
}  # fmt: skip
"""Words by key."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """The assumptions of one plan, all of them decided."""

    numbers: Mapping[str, Assumption] = field(hash=False)
    """By key; `tokens` and `num_sequences` are missing where nobody gave them."""
    words: Mapping[str, str] = field(hash=False)

    def value(self, key: str) -> float:
        """A number's value."""
        return self.numbers[key].value

    def whole(self, key: str) -> int:
        """A whole number's value."""
        return round(self.numbers[key].value)

    def changed(self, key: str, value: float) -> "Settings":
        """The same with one number moved."""
        moved = self.numbers[key].with_value(value, "moved")
        return replace(self, numbers={**self.numbers, key: moved})

    def device(self, named: Device) -> Device:
        """The named device as these numbers have it."""
        times = self.value("peak_bf16_flops_per_s") / named.peak_flops("bf16")
        return replace(
            named,
            memory_bytes=self.whole("device_bytes"),
            bandwidth_bytes_per_s=self.value("memory_bytes_per_s"),
            flops={precision: times * flops for precision, flops in named.flops.items()},
            link_bytes_per_s=self.value("link_bytes_per_s"),
            network_bytes_per_s=self.value("network_bytes_per_s"),
        )

    def cost_assumptions(self, count: int) -> CostAssumptions:
        """Prices and factors of `count` devices."""
        numbers = self.numbers
        rent, power = numbers["price_usd_per_device_h"], numbers["power_w"]
        return CostAssumptions(
            price_usd_per_h=replace(rent, name="machine price", value=count * rent.value),
            power_w=replace(power, name="machine power", value=count * power.value),
            pue=numbers["pue"],
            usd_per_kwh=numbers["usd_per_kwh"],
            kg_co2_per_kwh=numbers["kg_co2_per_kwh"],
        )


@dataclass(frozen=True, kw_only=True)
class Given:
    """What a person set, checked but not yet joined with defaults."""

    numbers: Mapping[str, float] = field(default_factory=dict, hash=False)
    words: Mapping[str, str] = field(default_factory=dict, hash=False)


def parse_settings(texts: Sequence[str]) -> Given:
    """`key=value` texts as typed.

    Raises:
        ConfigError: no `=`, an unknown key, a key given twice, a value that cannot be.
    """
    numbers: dict[str, float] = {}
    words: dict[str, str] = {}
    for text in texts:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(
                f"{text[:60]!r} is not of the form key=value; write for example utilisation_fraction=0.3."
            )
        if key in numbers or key in words:
            raise ConfigError(f"{key} is set twice; keep one of the two.")
        if key in SETTINGS:
            numbers[key] = parse_number(key, value)
        elif key in CHOICES:
            words[key] = _checked_word(CHOICES[key], value)
        else:
            known = [*SETTINGS, *CHOICES]
            raise ConfigError(
                f"unknown assumption {key[:40]!r}{did_you_mean(key, known)}; known are {', '.join(known)}."
            )
    return Given(numbers=numbers, words=words)


def parse_number(key: str, text: str) -> float:
    """A value for one of `SETTINGS`, in its unit.

    Raises:
        ConfigError: see `parse_settings`.
    """
    setting = SETTINGS[key]
    value = parse_quantity(key, text, setting.unit)
    if key == "pue" and value < 1:
        raise ConfigError(f"pue={value:g} is below 1: a building cannot use less than its machines; use 1 or more.")
    check_plausible(key, value, setting.unit, setting.low, setting.high)
    if setting.is_whole and value != round(value):
        raise ConfigError(f"{key}={value:g} must be a whole number of {setting.unit}; use {round(value)}.")
    return value


def settle(given: Given, config: ModelConfig | None, cluster: Cluster, utilisation: Assumption) -> Settings:
    """Join what was given with the defaults of model and hardware.

    Args:
        utilisation: what to assume for the hardware where it was not set.
    """
    words = {choice.key: given.words.get(choice.key, choice.default) for choice in CHOICES.values()}
    defaults = dict(_defaults(config, cluster, REGIONS[words["region"]], utilisation))
    numbers = {}
    for setting in SETTINGS.values():
        if setting.key in given.numbers:
            value, source = given.numbers[setting.key], YOURS
        elif setting.key in defaults:
            value, source = defaults[setting.key]
        elif setting.default is not None:
            value, source = setting.default, setting.source
        else:
            continue
        numbers[setting.key] = Assumption(name=setting.key, value=value, unit=setting.unit, source=source)
    return Settings(numbers=numbers, words=words)


def _defaults(
    config: ModelConfig | None, cluster: Cluster, region: Region, utilisation: Assumption
) -> Iterator[tuple[str, tuple[float, str]]]:
    """Values that depend on something, with their sources."""
    device, positions = cluster.device, config.max_position_embeddings if config else 2**40
    yield "utilisation_fraction", (utilisation.value, utilisation.source)
    yield "price_usd_per_device_h", (device.price_usd_per_h, device.source)
    yield "power_w", (device.power_w, device.source)
    yield "device_bytes", (device.memory_bytes, device.source)
    yield "memory_bytes_per_s", (device.bandwidth_bytes_per_s, device.source)
    yield "peak_bf16_flops_per_s", (device.peak_flops("bf16"), device.source)
    yield "link_bytes_per_s", (device.link_bytes_per_s, device.source)
    yield "network_bytes_per_s", (device.network_bytes_per_s, device.source)
    yield "usd_per_kwh", (region.usd_per_kwh, region.source)
    yield "kg_co2_per_kwh", (region.kg_co2_per_kwh, region.source)
    yield "sequence_tokens", (min(4096, positions), SETTINGS["sequence_tokens"].source)
    yield "context_tokens", (min(4989, positions), SETTINGS["context_tokens"].source)
    yield (
        "output_tokens_per_day",
        (168e9 if device.link_bytes_per_s else 1e6, SETTINGS["output_tokens_per_day"].source),
    )
    yield "prompt_tokens", (min(4989, positions), SETTINGS["prompt_tokens"].source)


def _checked_word(choice: Choice, word: str) -> str:
    if word not in choice.words:
        raise ConfigError(
            f"{choice.key}={word[:40]!r} is unknown{did_you_mean(word, choice.words)}; use {', '.join(choice.words)}."
        )
    return word
