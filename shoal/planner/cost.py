"""What a run costs: money, electricity, carbon. Every assumption is a named value with its source.

Three numbers are often mixed up and are kept apart here: what a rented machine costs (its price covers electricity and
cooling), what the electricity alone would cost whoever owns it, and the energy itself. DeepSeek-V3's "$5.576M" is the
first kind, 2.788M H800 hours at an assumed 2 dollars, official run only (V3 table 1).

Nothing here is a fact about your bill: replace any assumption by your own, `with_value` keeps its name and unit.
"""

from dataclasses import dataclass, replace

from shoal.errors import ConfigError
from shoal.planner.energy import EnergyKind

JOULES_PER_KWH = 3.6e6


@dataclass(frozen=True, kw_only=True)
class Assumption:
    """A number somebody chose, and where it is from."""

    name: str
    value: float
    unit: str
    source: str

    def __post_init__(self) -> None:
        if not 0 <= self.value < float("inf"):
            raise ConfigError(f"{self.name}={self.value} must be zero or a positive number of {self.unit}.")

    def with_value(self, value: float, source: str) -> "Assumption":
        """The same quantity with your own number."""
        return replace(self, value=value, source=source)


@dataclass(frozen=True, kw_only=True)
class CostAssumptions:
    """Prices and factors of one machine."""

    price_usd_per_h: Assumption
    """Rent of the whole machine."""
    power_w: Assumption
    """Of the busy machine; used only where energy was not measured."""
    pue: Assumption
    """Power usage effectiveness: energy of the building over energy of the machine."""
    usd_per_kwh: Assumption
    kg_co2_per_kwh: Assumption

    def __post_init__(self) -> None:
        if self.pue.value < 1:
            raise ConfigError(
                f"pue={self.pue.value} is below 1: a building cannot use less than its machines; use 1 or more."
            )

    def listed(self) -> tuple[Assumption, ...]:
        """All of them, in reading order."""
        return (self.price_usd_per_h, self.power_w, self.pue, self.usd_per_kwh, self.kg_co2_per_kwh)


@dataclass(frozen=True, kw_only=True)
class Cost:
    """The bill of a stretch of work."""

    wall_s: float
    rent_usd: float
    """Renting the machine for that long, electricity included."""
    joules: float
    """At the machine."""
    energy_kind: EnergyKind
    kwh: float
    """At the building's meter: the machine's energy times PUE."""
    electricity_usd: float
    """What an owner would pay for `kwh`; not on top of `rent_usd`."""
    kg_co2: float
    assumptions: CostAssumptions


def cpu_assumptions(num_cores: int, watts_per_core: float = 12.0) -> CostAssumptions:
    """Defaults for a rented machine without accelerator, scaled by its cores."""
    if num_cores < 1:
        raise ConfigError(f"num_cores={num_cores} must be at least 1.")
    return _assumptions(
        Assumption(
            name="machine price",
            value=0.0504 * num_cores,
            unit="USD/h",
            source=f"{num_cores} x 0.0504, list price per virtual core of an AWS m7i.large on demand in us-east-1",
        ),
        Assumption(
            name="machine power",
            value=watts_per_core * num_cores,
            unit="W",
            source=f"{num_cores} busy cores x {watts_per_core:g} W, Green Algorithms default (Lannelongue et al. 2021)",
        ),
    )


def gpu_assumptions(num_gpus: int) -> CostAssumptions:
    """Defaults for rented datacentre GPUs of the H800 class."""
    if num_gpus < 1:
        raise ConfigError(f"num_gpus={num_gpus} must be at least 1.")
    return _assumptions(
        Assumption(
            name="machine price",
            value=2.0 * num_gpus,
            unit="USD/h",
            source=f"{num_gpus} x 2 USD per H800 hour, the assumption of DeepSeek-V3 table 1",
        ),
        Assumption(
            name="machine power",
            value=1275.0 * num_gpus,
            unit="W",
            source=f"{num_gpus} x an eighth of a 10.2 kW eight-GPU node (DGX H100 maximum)",
        ),
    )


def training_cost(
    wall_s: float,
    assumptions: CostAssumptions,
    *,
    joules: float | None = None,
    energy_kind: EnergyKind = "modelled",
) -> Cost:
    """The bill for `wall_s` seconds on one machine.

    Args:
        joules: energy at the machine from `energy.EnergyMeter`; None takes the assumed power for the whole time.
        energy_kind: how `joules` came about.
    """
    if not 0 <= wall_s < float("inf"):
        raise ConfigError(f"wall_s={wall_s} must be zero or a positive number of seconds.")
    if joules is None:
        joules, energy_kind = wall_s * assumptions.power_w.value, "modelled"
    kwh = joules / JOULES_PER_KWH * assumptions.pue.value
    return Cost(
        wall_s=wall_s,
        rent_usd=wall_s / 3600 * assumptions.price_usd_per_h.value,
        joules=joules,
        energy_kind=energy_kind,
        kwh=kwh,
        electricity_usd=kwh * assumptions.usd_per_kwh.value,
        kg_co2=kwh * assumptions.kg_co2_per_kwh.value,
        assumptions=assumptions,
    )


def usd_per_million_tokens(usd: float, num_tokens: float) -> float:
    """Price of a million tokens, for comparing with price lists."""
    if num_tokens <= 0:
        raise ConfigError(f"num_tokens={num_tokens} must be positive to give a price per million.")
    return usd / num_tokens * 1e6


def _assumptions(price: Assumption, power: Assumption) -> CostAssumptions:
    return CostAssumptions(
        price_usd_per_h=price,
        power_w=power,
        pue=Assumption(
            name="power usage effectiveness",
            value=1.56,
            unit="ratio",
            source="average of operators' largest sites, Uptime Institute survey 2024; 1 on a desk",
        ),
        usd_per_kwh=Assumption(
            name="electricity price",
            value=0.128,
            unit="USD/kWh",
            source="commercial customers, United States, 2024 (EIA Electric Power Monthly, table 5.6)",
        ),
        kg_co2_per_kwh=Assumption(
            name="carbon intensity",
            value=0.48,
            unit="kg CO2e/kWh",
            source="world average 2023 (Ember)",
        ),
    )
