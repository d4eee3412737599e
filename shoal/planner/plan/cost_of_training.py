"""Figures of a training run: hours, money, electricity and carbon, and the dense models that would do the same."""

from collections.abc import Iterator

from shoal.errors import ConfigError
from shoal.planner.cost import training_cost
from shoal.planner.counts import training_flops_per_token
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.fitting import Trained
from shoal.planner.plan.question import Question
from shoal.planner.plan.settings import SETTINGS
from shoal.planner.plan.sizes import training_operations
from shoal.planner.training import V3_UTILISATION, dense_twin, same_loss_params

_TABLE_1 = (
    "DeepSeek-V3 table 1 counts the official run alone, without research, data, staff and failed runs; so does this"
)


def training_figures(question: Question, found: Trained | None) -> Iterator[Figure]:
    """None where no number of tokens was given."""
    if "tokens" not in question.settings.numbers:
        return
    count = question.cluster.count
    if not question.is_hardware_given and found is not None:
        count = found.plan.split.num_devices
    yield from _run_figures(question, count)
    yield from _electricity_figures(question)
    yield from _dense_figures(question)


def device_hours(question: Question, flops_per_token: float) -> float:
    """Of all devices together."""
    settings = question.settings
    peak = question.cluster.device.peak_flops("bf16") * settings.value("utilisation_fraction")
    return settings.value("tokens") * flops_per_token / peak / 3600


def _run_figures(question: Question, count: int) -> Iterator[Figure]:
    settings = question.settings
    operations = training_operations(question.model, settings.whole("sequence_tokens"))
    assert isinstance(operations.value, float | int)
    hours = device_hours(question, operations.value)
    name, rent = question.cluster.device.name, settings.value("price_usd_per_device_h")
    low, high = _hours_span(question, hours)
    yield Figure(
        name="training_flops",
        label="operations in all",
        value=settings.value("tokens") * operations.value,
        unit="FLOP",
        formula="tokens x training_flops_per_token",
        inputs=("tokens", "training_flops_per_token"),
        source=operations.source,
        note=operations.note,
    )
    yield Figure(
        name="training_gpu_hours",
        label=f"hours of {name}, all devices together",
        value=hours,
        unit="h",
        formula="training_flops / (peak_bf16_flops_per_s x utilisation_fraction x 3600)",
        inputs=("training_flops", "peak_bf16_flops_per_s", "utilisation_fraction"),
        source=question.cluster.device.source,
        note=operations.note,
        low=low,
        high=high,
    )
    yield Figure(
        name="training_hours",
        label=f"on the clock, on {count} x {name}",
        value=hours / count,
        unit="h",
        formula=f"training_gpu_hours / {count}",
        inputs=("training_gpu_hours",),
        source="arithmetic",
    )
    yield Figure(
        name="training_usd",
        label="rent",
        value=hours * rent,
        unit="USD",
        formula="training_gpu_hours x price_usd_per_device_h",
        inputs=("training_gpu_hours", "price_usd_per_device_h"),
        source=_TABLE_1,
        low=None if low is None else low * rent,
        high=None if high is None else high * rent,
    )


def _electricity_figures(question: Question) -> Iterator[Figure]:
    settings, chip_w = question.settings, question.cluster.device.chip_power_w
    operations = training_operations(question.model, settings.whole("sequence_tokens")).value
    assert isinstance(operations, float | int)
    hours = device_hours(question, operations)
    bill = training_cost(hours * 3600, settings.cost_assumptions(1))
    boards = None if chip_w is None else min(hours * chip_w / 1000, bill.kwh)
    source = "no official figure exists for any DeepSeek run; published estimates from 350 W to 1,275 W differ in what they count"
    yield Figure(
        name="training_kwh",
        label="electricity",
        value=bill.kwh,
        unit="kWh",
        formula="training_gpu_hours x power_w / 1000 x pue; the low end is the boards alone, without machines and building"
        if boards
        else "training_gpu_hours x power_w / 1000 x pue",
        inputs=("training_gpu_hours", "power_w", "pue"),
        source=source,
        low=boards,
        high=None if boards is None else bill.kwh,
    )
    yield Figure(
        name="training_electricity_usd",
        label="what an owner pays for it; rent contains it",
        value=bill.electricity_usd,
        unit="USD",
        formula="training_kwh x usd_per_kwh",
        inputs=("training_kwh", "usd_per_kwh"),
        source="arithmetic",
    )
    yield Figure(
        name="training_kg_co2",
        label="carbon",
        value=bill.kg_co2,
        unit="kg CO2e",
        formula="training_kwh x kg_co2_per_kwh; making the machines is not in it",
        inputs=("training_kwh", "kg_co2_per_kwh"),
        source="arithmetic",
    )


def _dense_figures(question: Question) -> Iterator[Figure]:
    """What a dense model of the same loss, and one of the same size, would take on the same tokens."""
    config, settings = question.model.config, question.settings
    if config is None or config.n_routed_experts is None:
        return
    row = settings.whole("sequence_tokens")
    guess = same_loss_params(config)
    for name, label, params, source in (
        ("dense_same_loss", "a dense model of about the same loss", guess.value, guess.source),
        ("dense_same_size", "a dense model of the same size", None, "every parameter multiplies every token"),
    ):
        hours, why_not = None, ""
        try:
            hours = device_hours(question, training_flops_per_token(dense_twin(config, params), row))
        except (
            ConfigError
        ) as error:  # one that is nearly all embedding and attention has no dense twin of so few parameters
            why_not = f"no such dense model: {error}"
        yield Figure(
            name=f"{name}_gpu_hours",
            label=f"hours of {label} ({_short(params or question.model.total_params)} parameters)",
            value=hours,
            unit="h",
            formula="tokens x training_flops_per_token of the dense model / (peak_bf16_flops_per_s x utilisation_fraction x 3600)",
            inputs=("tokens", "peak_bf16_flops_per_s", "utilisation_fraction"),
            source=source,
            note=why_not,
        )


def _hours_span(question: Question, hours: float) -> tuple[float | None, float | None]:
    """Hours over the utilisations that published runs span; no range where the utilisation was set or measured."""
    doubt, assumed = SETTINGS["utilisation_fraction"].doubt, question.settings.numbers["utilisation_fraction"]
    if doubt is None or assumed.source != V3_UTILISATION.source:
        return None, None
    ends = [hours * assumed.value / end for end in doubt]
    return min(*ends, hours), max(*ends, hours)


def _short(count: float) -> str:
    for unit, size in (("T", 1e12), ("B", 1e9), ("M", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f}"
