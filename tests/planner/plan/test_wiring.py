import pytest

from shoal.errors import ConfigError
from shoal.planner.network import FITTED_PRICES, compare_topologies
from shoal.planner.plan.question import ask
from shoal.planner.plan.settings import parse_settings
from shoal.planner.plan.wiring import wire, wiring_json
from shoal.planner.published_models import rival


def settled(*texts: str):
    return ask(rival("v3"), None, parse_settings(texts)).settings


def test_the_default_wiring_is_that_of_the_network_room():
    assert wire(2048, settled()) == compare_topologies(2048, radix=64, planes=8, prices=FITTED_PRICES)


def test_prices_of_your_own_pay_for_every_part():
    own = settled(
        "switch_usd=1000",
        "endpoint_link_usd=10",
        "link_usd=20",
        "transceiver_usd=300",
        "mpo_trunk_usd=50",
        "links_per_trunk=12",
    )
    two_layers = next(one for one in wire(2048, own).topologies if one.name == "two-layer fat tree")
    trunks = two_layers.mpo_trunks
    assert two_layers.cost_usd == 96 * 1000 + 2048 * 10 + 2048 * 20 + 2 * 4096 * 300 + trunks * 50
    assert trunks == -(-2048 // 12) * 2
    prices = {price["name"]: price["source"] for price in wiring_json(wire(2048, own), own)["prices"]}
    assert set(prices.values()) == {"set by you"}


def test_a_fit_is_called_a_fit():
    sources = [price["source"] for price in wiring_json(wire(64, settled()), settled())["prices"]]
    assert all("fit" in source for source in sources)


@pytest.mark.parametrize(
    "endpoints, settings, part", [(1, (), "endpoints=1"), (64, ("switch_ports=7",), "radix=7 is odd")]
)
def test_networks_that_cannot_be_are_refused(endpoints, settings, part):
    with pytest.raises(ConfigError, match=part):
        wire(endpoints, settled(*settings))
