"""Speeds into machines, money and joules: what a load of tokens needs, costs and earns.

Prefill throughput is quoted by DeepSeek with cached tokens counted in; `nodes_needed` asks which of the two is meant.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from decimal import Decimal

from shoal.errors import ConfigError
from shoal.planner.checks import check_count, check_fraction
from shoal.planner.cost import Cost, CostAssumptions, training_cost, usd_per_million_tokens
from shoal.planner.prices import Price, charge

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Load:
    """Tokens to serve in a stretch of time."""

    hit_tokens: int
    """Of prompts, found in the context cache."""
    miss_tokens: int
    """Of prompts, computed."""
    output_tokens: int
    period_s: float = DAY_S

    def __post_init__(self) -> None:
        for name in ("hit_tokens", "miss_tokens", "output_tokens"):
            check_count(name, getattr(self, name), low=0)
        if not 0 < self.period_s < math.inf:
            raise ConfigError(f"period_s={self.period_s} must be a positive number of seconds; a day is 86400.")
        if not self.input_tokens or not self.output_tokens:
            raise ConfigError("a load needs at least one prompt token and one output token.")

    @property
    def input_tokens(self) -> int:
        """All prompt tokens."""
        return self.hit_tokens + self.miss_tokens

    @property
    def hit_fraction(self) -> float:
        """Share of the prompt tokens that the cache held."""
        return self.hit_tokens / self.input_tokens


@dataclass(frozen=True, kw_only=True)
class Fleet:
    """Machines on average over the period; whole ones for the peak are the operator's choice."""

    prefill_nodes: float
    decode_nodes: float

    @property
    def nodes(self) -> float:
        """Both kinds."""
        return self.prefill_nodes + self.decode_nodes


@dataclass(frozen=True, kw_only=True)
class ServiceCost:
    """The bill of a load; the two parts add up to it."""

    load: Load
    prefill: Cost
    decode: Cost

    @property
    def usd(self) -> float:
        """Rent of all machines."""
        return self.prefill.rent_usd + self.decode.rent_usd

    @property
    def joules(self) -> float:
        """At the building's meter."""
        return (self.prefill.kwh + self.decode.kwh) * 3.6e6

    @property
    def usd_per_million_input_tokens(self) -> float:
        """Prefill alone; hits cost no computation but count as tokens."""
        return usd_per_million_tokens(self.prefill.rent_usd, self.load.input_tokens)

    @property
    def usd_per_million_output_tokens(self) -> float:
        """Decoding alone."""
        return usd_per_million_tokens(self.decode.rent_usd, self.load.output_tokens)

    @property
    def joules_per_million_tokens(self) -> float:
        """Over input and output."""
        return self.joules / (self.load.input_tokens + self.load.output_tokens) * 1e6

    @property
    def joules_per_output_token(self) -> float:
        """With all prefill put on the output."""
        return self.joules / self.load.output_tokens


@dataclass(frozen=True, kw_only=True)
class Margin:
    """What a load earns at a price list against what it costs."""

    hit_usd: Decimal
    miss_usd: Decimal
    output_usd: Decimal
    cost_usd: float

    @property
    def revenue_usd(self) -> Decimal:
        """The three together."""
        return self.hit_usd + self.miss_usd + self.output_usd

    @property
    def profit_usd(self) -> float:
        """Revenue less cost; research, staff and idle machines are not in it."""
        return float(self.revenue_usd) - self.cost_usd

    @property
    def profit_over_cost_fraction(self) -> float:
        """DeepSeek's "cost profit margin": 5.45 is 545 %."""
        return self.profit_usd / self.cost_usd

    @property
    def profit_over_revenue_fraction(self) -> float:
        """What accountants call a margin: at most 1; minus infinity when everything is given away."""
        if not self.revenue_usd:
            return -math.inf
        return self.profit_usd / float(self.revenue_usd)


@dataclass(frozen=True, kw_only=True)
class HitRatePoint:
    """A million prompt tokens of which the cache holds a share."""

    hit_fraction: float
    price_usd: float
    """To the customer."""
    saved_fraction: float
    """Of the customer's price without any hit."""
    cost_usd: float
    """To the operator."""


def nodes_needed(
    load: Load, *, input_tokens_per_s_per_node: float, output_tokens_per_s_per_node: float, counts_hits: bool
) -> Fleet:
    """Machines that carry a load at the given speeds.

    Args:
        counts_hits: whether the input speed counts cached tokens as done, as DeepSeek's 73.7k does; False for a speed of
            computing, such as `prefill_pass` gives.
    """
    for name, value in (
        ("input_tokens_per_s_per_node", input_tokens_per_s_per_node),
        ("output_tokens_per_s_per_node", output_tokens_per_s_per_node),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} must be a positive number of tokens per second.")
    read = load.input_tokens if counts_hits else load.miss_tokens
    return Fleet(
        prefill_nodes=read / input_tokens_per_s_per_node / load.period_s,
        decode_nodes=load.output_tokens / output_tokens_per_s_per_node / load.period_s,
    )


def service_cost(load: Load, fleet: Fleet, node: CostAssumptions) -> ServiceCost:
    """Rent and energy of a fleet over the load's period.

    Args:
        node: of one machine, such as `Cluster(device=..., count=8).cost_assumptions()`.
    """
    return ServiceCost(
        load=load,
        prefill=training_cost(fleet.prefill_nodes * load.period_s, node),
        decode=training_cost(fleet.decode_nodes * load.period_s, node),
    )


def margin(load: Load, price: Price, when_utc: datetime, cost_usd: float) -> Margin:
    """Revenue at the price of one moment, exact, against a cost."""
    if not 0 < cost_usd < math.inf:
        raise ConfigError(f"cost_usd={cost_usd} must be a positive number of dollars.")
    return Margin(
        hit_usd=charge(price, when_utc, load.hit_tokens, 0, 0),
        miss_usd=charge(price, when_utc, 0, load.miss_tokens, 0),
        output_usd=charge(price, when_utc, 0, 0, load.output_tokens),
        cost_usd=cost_usd,
    )


def over_hit_rate(
    price: Price, when_utc: datetime, miss_cost_usd_per_million: float, hit_fractions: Sequence[float]
) -> tuple[HitRatePoint, ...]:
    """A million prompt tokens as the hit rate grows, for the customer and for the operator.

    Args:
        miss_cost_usd_per_million: computing a million tokens; a hit is read instead, disks and their network are not priced.
    """
    if not 0 <= miss_cost_usd_per_million < math.inf:
        raise ConfigError(f"miss_cost_usd_per_million={miss_cost_usd_per_million} must be zero or more dollars.")
    million = 10**6
    hit_usd = float(charge(price, when_utc, million, 0, 0))
    miss_usd = float(charge(price, when_utc, 0, million, 0))
    points = []
    for hit in hit_fractions:
        check_fraction("hit_fraction", hit)
        paid = hit * hit_usd + (1 - hit) * miss_usd
        points.append(
            HitRatePoint(
                hit_fraction=hit,
                price_usd=paid,
                saved_fraction=1 - paid / miss_usd if miss_usd else 0.0,
                cost_usd=(1 - hit) * miss_cost_usd_per_million,
            )
        )
    return tuple(points)
