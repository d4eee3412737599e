"""The network of a cluster: what five ways to wire it need and cost, under the settings of a plan."""

from dataclasses import asdict
from typing import Any

from shoal.planner.cost import Assumption
from shoal.planner.network import FITTED_PRICES, Cabling, Comparison, UnitPrices, compare_topologies
from shoal.planner.plan.settings import Settings


def wire(endpoints: int, settings: Settings) -> Comparison:
    """The smallest network of each family that joins so many endpoints, cheapest first.

    Raises:
        ConfigError: fewer than two endpoints, or switches that cannot be.
    """
    return compare_topologies(
        endpoints,
        radix=settings.whole("switch_ports"),
        planes=settings.whole("planes"),
        prices=prices_of(settings),
        cabling=Cabling(
            fibres_per_link=settings.whole("fibres_per_link"), links_per_trunk=settings.whole("links_per_trunk")
        ),
    )


def prices_of(settings: Settings) -> UnitPrices:
    """Unit prices with their sources: a fit where nobody set one."""
    numbers = settings.numbers

    def price(of_fit: Assumption, key: str) -> Assumption:
        return of_fit.with_value(numbers[key].value, numbers[key].source)

    return UnitPrices(
        switch=price(FITTED_PRICES.switch, "switch_usd"),
        endpoint_link=price(FITTED_PRICES.endpoint_link, "endpoint_link_usd"),
        link=price(FITTED_PRICES.link, "link_usd"),
        transceiver=price(FITTED_PRICES.transceiver, "transceiver_usd"),
        mpo_trunk=price(FITTED_PRICES.mpo_trunk, "mpo_trunk_usd"),
    )


def wiring_json(found: Comparison, settings: Settings) -> dict[str, Any]:
    """Plain values, with the unit prices and what they are."""
    return {
        "wanted_endpoints": found.wanted_endpoints,
        "topologies": [{**asdict(one), "cost_usd_per_endpoint": one.cost_usd_per_endpoint} for one in found.topologies],
        "too_small": [{"name": name, "most_endpoints": most} for name, most in found.too_small],
        "prices": [asdict(one) for one in prices_of(settings).listed()],
    }
