"""What the network of a cluster needs and costs, and how fast experts on other machines let a model speak.

First half: five ways to wire `n` endpoints with switches of `k` ports, counted by their standard formulas.

| family | endpoints | switches | links between switches |
|---|---|---|---|
| two-layer fat tree | k^2/2 | 3k/2 | k^2/2 |
| multi-plane fat tree, P planes | P k^2/2 | 3P k/2 | P k^2/2 |
| three-layer fat tree | k^3/4 | 5k^2/4 | k^3/2 |
| Slim Fly, q = 4w + d, d in -1, 0, 1 | p 2q^2 | 2q^2 | q^2 (3q-d)/2 |
| dragonfly, g groups of a switches, h global links each | p a g | a g | g a(a-1)/2 + g a h/2 |

With 64 ports these reproduce all fifteen counts of "Insights into DeepSeek-V3" (ISCA 2025, arXiv 2505.09343) table 3, see
`published_topologies`. DeepSeek's own choice, the multi-plane fat tree, gives each of a machine's eight GPU and NIC pairs a
plane of its own: two-layer prices at eight times the size, but what changes planes must first cross inside a machine.
Sources: fat tree, Al-Fares et al. 2008; Slim Fly, Besta and Hoefler 2014; dragonfly, Kim et al. 2008.

Differs from the table: its Slim Fly has q=28, which is no prime power, so the published construction (it needs a finite
field of q elements) does not exist. The counts are reproduced only on demand; `slim_fly(28)` is refused.

The table's costs come without unit prices. `FITTED_PRICES` is a fit to the five rounded totals, and no more than that: four
independent equations, three unknowns, and no prices of zero or more meet all five within their rounding, so the table
cannot have been made with one price per part. The fit is within 1%; its single prices mean little. Give your own.

Second half: the limit that all-to-all sets to decoding (same paper, section 2.3.2). Every token goes to K routed and the
shared experts as FP8 (one byte) and comes back as bf16 (two); two micro-batches hide one another's computation, not their
communication. So even with infinitely fast GPUs a layer takes twice the transfer. The paper rounds the hidden size to 7000,
which gives its 120.96 us and 14.76 ms at 50 GB/s; V3's true 7168 gives 123.86 us and 15.11 ms.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from shoal.errors import ConfigError, did_you_mean
from shoal.planner.checks import check_count
from shoal.planner.cost import Assumption

_FIT = "fit (not a price list) to the five totals of ISCA 2025 table 3, within 1%"
_IN_LINK = "contained in the link prices of the fit"


@dataclass(frozen=True, kw_only=True)
class UnitPrices:
    """Prices of the parts. A link's price contains its transceivers and fibre for as long as those are priced at zero."""

    switch: Assumption
    endpoint_link: Assumption
    """One link between an endpoint and its switch; in the fit also whatever else grows with the endpoints."""
    link: Assumption
    """One link between two switches."""
    transceiver: Assumption
    """One end of one optical link (a twin-port module counts as two)."""
    mpo_trunk: Assumption

    def listed(self) -> tuple[Assumption, ...]:
        """All of them, in reading order."""
        return (self.switch, self.endpoint_link, self.link, self.transceiver, self.mpo_trunk)


def unit_prices(
    *,
    switch_usd: float,
    endpoint_link_usd: float,
    link_usd: float,
    transceiver_usd: float = 0.0,
    mpo_trunk_usd: float = 0.0,
    source: str,
) -> UnitPrices:
    """Your own prices, with where they are from."""

    def price(part: str, value: float) -> Assumption:
        return Assumption(name=f"{part} price", value=value, unit="USD", source=source)

    return UnitPrices(
        switch=price("switch", switch_usd),
        endpoint_link=price("endpoint link", endpoint_link_usd),
        link=price("link", link_usd),
        transceiver=price("transceiver", transceiver_usd),
        mpo_trunk=price("MPO trunk", mpo_trunk_usd),
    )


FITTED_PRICES = UnitPrices(
    switch=Assumption(name="switch price", value=10_761, unit="USD", source=_FIT),
    endpoint_link=Assumption(name="endpoint link price", value=1_168, unit="USD", source=_FIT),
    link=Assumption(name="link price", value=2_729, unit="USD", source=_FIT),
    transceiver=Assumption(name="transceiver price", value=0, unit="USD", source=_IN_LINK),
    mpo_trunk=Assumption(name="MPO trunk price", value=0, unit="USD", source=_IN_LINK),
)
"""A fit, so good for comparing the five families and for nothing else."""


@dataclass(frozen=True, kw_only=True)
class Cabling:
    """How links become fibre. The default is 400G over parallel single-mode fibre, every link optical.

    NVIDIA's NDR transceivers: four lanes each way, hence 8 fibres, in one MPO-12/APC connector per 400G link (docs.nvidia.com,
    MMS4X00). "Insights into DeepSeek-V3" itself says nothing about fibre counts.
    """

    fibres_per_link: int = 8
    """Lit ones; an MPO-12 connector holds twelve."""
    links_per_trunk: int = 1
    """1 runs a cable of its own for each link; 12 bundles them into 144-fibre trunks of twelve MPO-12."""
    has_optical_endpoints: bool = True
    """False where a short copper cable joins endpoint and switch."""

    def __post_init__(self) -> None:
        check_count("fibres_per_link", self.fibres_per_link, low=1)
        check_count("links_per_trunk", self.links_per_trunk, low=1)


OPTICAL_400G = Cabling()


@dataclass(frozen=True, kw_only=True)
class Topology:
    """The bill of materials of one network."""

    name: str
    endpoints: int
    """NICs; one per GPU in DeepSeek's machines."""
    switches: int
    radix: int
    """Ports that are used on the busiest switch."""
    links: int
    """Between switches."""
    endpoint_links: int
    """Between endpoints and switches; not in `links`."""
    transceivers: int
    """Two per optical link."""
    fibres: int
    mpo_trunks: int
    """At least: a trunk is taken to be full, though its links may in truth lead to different racks."""
    cost_usd: float

    @property
    def cost_usd_per_endpoint(self) -> float:
        """The figure by which families of different size compare."""
        return self.cost_usd / self.endpoints


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """One network of each family for the same wish."""

    wanted_endpoints: int
    topologies: tuple[Topology, ...]
    """Cheapest first."""
    too_small: tuple[tuple[str, int], ...]
    """Families that cannot be made so large with these switches, each with the most endpoints it holds."""


def two_layer_fat_tree(
    radix: int, *, num_leaves: int | None = None, prices: UnitPrices = FITTED_PRICES, cabling: Cabling = OPTICAL_400G
) -> Topology:
    """Leaves with half their ports up, every leaf joined to every spine; full bisection.

    Args:
        num_leaves: build only so many leaves, and half as many spines; None builds all `radix`.
    """
    return multi_plane_fat_tree(radix, 1, num_leaves=num_leaves, prices=prices, cabling=cabling)


def multi_plane_fat_tree(
    radix: int,
    planes: int,
    *,
    num_leaves: int | None = None,
    prices: UnitPrices = FITTED_PRICES,
    cabling: Cabling = OPTICAL_400G,
) -> Topology:
    """`planes` two-layer fat trees side by side with no link between them; `num_leaves` counts one plane's."""
    _check_radix(radix)
    check_count("planes", planes, low=1)
    leaves = radix if num_leaves is None else num_leaves
    check_count("num_leaves", leaves, low=2, high=radix)
    return _priced(
        name="two-layer fat tree" if planes == 1 else f"multi-plane fat tree ({planes} planes)",
        endpoints=planes * leaves * radix // 2,
        switches=planes * (leaves + math.ceil(leaves / 2)),
        radix=radix,
        links=planes * leaves * radix // 2,
        prices=prices,
        cabling=cabling,
    )


def three_layer_fat_tree(
    radix: int, *, num_pods: int | None = None, prices: UnitPrices = FITTED_PRICES, cabling: Cabling = OPTICAL_400G
) -> Topology:
    """Pods of `radix` switches in two layers under a layer of core switches; full bisection.

    Args:
        num_pods: build only so many pods and the core switches they fill; None builds all `radix`.
    """
    _check_radix(radix)
    pods = radix if num_pods is None else num_pods
    check_count("num_pods", pods, low=2, high=radix)
    endpoints_per_pod = (radix // 2) ** 2
    return _priced(
        name="three-layer fat tree",
        endpoints=pods * endpoints_per_pod,
        switches=pods * radix + math.ceil(pods * endpoints_per_pod / radix),
        radix=radix,
        links=2 * pods * endpoints_per_pod,
        prices=prices,
        cabling=cabling,
    )


def slim_fly(
    q: int,
    *,
    endpoints_per_switch: int | None = None,
    must_exist: bool = True,
    prices: UnitPrices = FITTED_PRICES,
    cabling: Cabling = OPTICAL_400G,
) -> Topology:
    """2 q^2 switches, any two at most two hops apart (McKay-Miller-Siran graphs).

    Args:
        q: a prime power of the form 4w - 1, 4w or 4w + 1.
        endpoints_per_switch: None takes half the ports between switches, rounded up, for full bandwidth.
        must_exist: False counts by formula also where q is no prime power and the graph cannot be constructed.
    """
    check_count("q", q, low=3)
    if q % 4 == 2 or (must_exist and not _is_prime_power(q)):
        near = [other for other in range(max(3, q - 6), q + 7) if other % 4 != 2 and _is_prime_power(other)]
        raise ConfigError(
            f"q={q} gives no Slim Fly: q must be a prime power that leaves 0, 1 or 3 when divided by 4; near it are "
            f"{', '.join(map(str, near))}."
        )
    degree = _slim_fly_degree(q)
    hosts = (degree + 1) // 2 if endpoints_per_switch is None else endpoints_per_switch
    check_count("endpoints_per_switch", hosts, low=1)
    return _priced(
        name="Slim Fly",
        endpoints=2 * q * q * hosts,
        switches=2 * q * q,
        radix=degree + hosts,
        links=q * q * degree,
        prices=prices,
        cabling=cabling,
    )


def dragonfly(
    *,
    num_groups: int,
    switches_per_group: int,
    global_links_per_switch: int,
    endpoints_per_switch: int,
    prices: UnitPrices = FITTED_PRICES,
    cabling: Cabling = OPTICAL_400G,
) -> Topology:
    """Groups wired all to all inside, and joined to one another by long links; balanced where a = 2p = 2h.

    Every global port is counted as linked, also where there are fewer groups than ports and some pairs get a second link.
    """
    check_count("switches_per_group", switches_per_group, low=2)
    check_count("global_links_per_switch", global_links_per_switch, low=1)
    check_count("endpoints_per_switch", endpoints_per_switch, low=1)
    global_ports = switches_per_group * global_links_per_switch
    check_count("num_groups", num_groups, low=2, high=global_ports + 1)
    if num_groups * global_ports % 2:
        raise ConfigError(
            f"{num_groups} groups of {global_ports} global ports leave one port without a partner; make the number of "
            "groups, of switches per group or of global links per switch even."
        )
    switches = num_groups * switches_per_group
    return _priced(
        name="dragonfly",
        endpoints=switches * endpoints_per_switch,
        switches=switches,
        radix=endpoints_per_switch + switches_per_group - 1 + global_links_per_switch,
        links=switches * (switches_per_group - 1) // 2 + num_groups * global_ports // 2,
        prices=prices,
        cabling=cabling,
    )


def published_topologies(*, prices: UnitPrices = FITTED_PRICES, cabling: Cabling = OPTICAL_400G) -> dict[str, Topology]:
    """The five columns of ISCA 2025 table 3 under their names there, all of 64-port switches."""
    return {
        "FT2": two_layer_fat_tree(64, prices=prices, cabling=cabling),
        "MPFT": multi_plane_fat_tree(64, 8, prices=prices, cabling=cabling),
        "FT3": three_layer_fat_tree(64, prices=prices, cabling=cabling),
        "SF": slim_fly(28, must_exist=False, prices=prices, cabling=cabling),
        # A balanced dragonfly of 64-port switches could have 513 groups; the table has 511.
        "DF": dragonfly(
            num_groups=511,
            switches_per_group=32,
            global_links_per_switch=16,
            endpoints_per_switch=16,
            prices=prices,
            cabling=cabling,
        ),
    }


def compare_topologies(
    endpoints: int,
    *,
    radix: int = 64,
    planes: int = 8,
    names: Sequence[str] = ("FT2", "MPFT", "FT3", "SF", "DF"),
    prices: UnitPrices = FITTED_PRICES,
    cabling: Cabling = OPTICAL_400G,
) -> Comparison:
    """The smallest network of each family that holds `endpoints`, built of switches with `radix` ports.

    Fat trees grow by leaves or pods and dragonflies by groups; a Slim Fly exists only in certain sizes.
    """
    check_count("endpoints", endpoints, low=2)
    _check_radix(radix)
    check_count("planes", planes, low=2)
    fit, too_small = [], []
    for name in names:
        if name not in _FAMILIES:
            raise ConfigError(
                f"unknown topology {name!r}{did_you_mean(name, _FAMILIES)}; use any of {', '.join(_FAMILIES)}."
            )
        topology = _FAMILIES[name](endpoints, radix, planes, prices, cabling)
        if topology.endpoints >= endpoints:
            fit.append(topology)
        else:
            too_small.append((topology.name, topology.endpoints))
    fit.sort(key=lambda topology: topology.cost_usd)
    return Comparison(wanted_endpoints=endpoints, topologies=tuple(fit), too_small=tuple(too_small))


@dataclass(frozen=True, kw_only=True)
class DecodeLimit:
    """What communication alone leaves of decoding speed, computation taking no time."""

    all_to_all_us: float
    """Dispatch and combine of one micro-batch in one layer."""
    tpot_ms: float
    """Time per output token."""

    @property
    def tokens_per_s(self) -> float:
        """Of one sequence."""
        return 1000 / self.tpot_ms


def all_to_all_time_us(
    *,
    num_tokens: int,
    hidden_size: int,
    num_experts_per_tok: int,
    n_shared_experts: int = 1,
    link_gb_per_s: float,
    dispatch_bytes: float = 1.0,
    combine_bytes: float = 2.0,
) -> float:
    """Time one GPU's link needs to send a micro-batch to its experts and to get the answers, latency left out.

    Args:
        num_tokens: of one micro-batch on one GPU; DeepSeek's example has 32, which fills the tensor cores at its scale.
        link_gb_per_s: 10^9 bytes per second and direction: 50 for 400G InfiniBand, 900 for NVLink in a GB200 NVL72.
        dispatch_bytes: per number on the way out; 1 is FP8.
        combine_bytes: per number on the way back; 2 is bf16.
    """
    check_count("num_tokens", num_tokens, low=1)
    check_count("hidden_size", hidden_size, low=1)
    check_count("num_experts_per_tok", num_experts_per_tok, low=1)
    check_count("n_shared_experts", n_shared_experts, low=0)
    for name, value in (
        ("link_gb_per_s", link_gb_per_s),
        ("dispatch_bytes", dispatch_bytes),
        ("combine_bytes", combine_bytes),
    ):
        if not 0 < value < math.inf:
            raise ConfigError(f"{name}={value} must be a positive number.")
    copies = num_tokens * (num_experts_per_tok + n_shared_experts)
    return copies * hidden_size * (dispatch_bytes + combine_bytes) / (link_gb_per_s * 1e3)


def decode_limit(all_to_all_us: float, *, num_layers: int, num_micro_batches: int = 2) -> DecodeLimit:
    """The speed that `all_to_all_time_us` allows.

    Args:
        num_layers: those with experts. DeepSeek's example counts all 61, though the first three of V3 are dense.
        num_micro_batches: that take turns on the link; two overlap computation with communication.
    """
    if not 0 < all_to_all_us < math.inf:
        raise ConfigError(f"all_to_all_us={all_to_all_us} must be a positive number of microseconds.")
    check_count("num_layers", num_layers, low=1)
    check_count("num_micro_batches", num_micro_batches, low=1)
    return DecodeLimit(all_to_all_us=all_to_all_us, tpot_ms=num_micro_batches * num_layers * all_to_all_us / 1000)


def _priced(
    *, name: str, endpoints: int, switches: int, radix: int, links: int, prices: UnitPrices, cabling: Cabling
) -> Topology:
    optical_links = links + (endpoints if cabling.has_optical_endpoints else 0)
    trunks = math.ceil(optical_links / cabling.links_per_trunk)
    cost_usd = (
        switches * prices.switch.value
        + endpoints * prices.endpoint_link.value
        + links * prices.link.value
        + 2 * optical_links * prices.transceiver.value
        + trunks * prices.mpo_trunk.value
    )
    return Topology(
        name=name,
        endpoints=endpoints,
        switches=switches,
        radix=radix,
        links=links,
        endpoint_links=endpoints,
        transceivers=2 * optical_links,
        fibres=optical_links * cabling.fibres_per_link,
        mpo_trunks=trunks,
        cost_usd=cost_usd,
    )


def _fit_two_layer(endpoints: int, radix: int, planes: int, prices: UnitPrices, cabling: Cabling) -> Topology:
    return _fit_multi_plane(endpoints, radix, 1, prices, cabling)


def _fit_multi_plane(endpoints: int, radix: int, planes: int, prices: UnitPrices, cabling: Cabling) -> Topology:
    leaves = min(radix, max(2, math.ceil(endpoints / (planes * (radix // 2)))))
    return multi_plane_fat_tree(radix, planes, num_leaves=leaves, prices=prices, cabling=cabling)


def _fit_three_layer(endpoints: int, radix: int, planes: int, prices: UnitPrices, cabling: Cabling) -> Topology:
    pods = min(radix, max(2, math.ceil(endpoints / (radix // 2) ** 2)))
    return three_layer_fat_tree(radix, num_pods=pods, prices=prices, cabling=cabling)


def _fit_slim_fly(endpoints: int, radix: int, planes: int, prices: UnitPrices, cabling: Cabling) -> Topology:
    """The first size that is large enough, else the largest; takes fewer endpoints per switch where ports run out."""
    sizes = []
    for q in range(3, radix):
        degree = _slim_fly_degree(q)
        hosts = min((degree + 1) // 2, radix - degree)
        if hosts >= 1 and q % 4 != 2 and _is_prime_power(q):
            sizes.append((2 * q * q * hosts, q, hosts))
    if not sizes:
        raise ConfigError(f"radix={radix} is too small for a Slim Fly: the smallest needs 6 ports.")
    _, q, hosts = next((size for size in sizes if size[0] >= endpoints), max(sizes))
    return slim_fly(q, endpoints_per_switch=hosts, prices=prices, cabling=cabling)


def _fit_dragonfly(endpoints: int, radix: int, planes: int, prices: UnitPrices, cabling: Cabling) -> Topology:
    """The balanced dragonfly, p = h = a/2, which needs 4h - 1 ports."""
    half = (radix + 1) // 4
    if half < 1:
        raise ConfigError(f"radix={radix} is too small for a balanced dragonfly: the smallest needs 3 ports.")
    groups = max(2, math.ceil(endpoints / (2 * half * half)))
    return dragonfly(
        num_groups=min(groups, 2 * half * half + 1),
        switches_per_group=2 * half,
        global_links_per_switch=half,
        endpoints_per_switch=half,
        prices=prices,
        cabling=cabling,
    )


_FAMILIES: dict[str, Callable[[int, int, int, UnitPrices, Cabling], Topology]] = {
    "FT2": _fit_two_layer,
    "MPFT": _fit_multi_plane,
    "FT3": _fit_three_layer,
    "SF": _fit_slim_fly,
    "DF": _fit_dragonfly,
}


def _slim_fly_degree(q: int) -> int:
    """Ports to other switches, (3q - d)/2 with d = -1, 0 or 1 the distance of q from a multiple of four."""
    distance = {0: 0, 1: 1, 3: -1}.get(q % 4, 0)
    return (3 * q - distance) // 2


def _is_prime_power(number: int) -> bool:
    prime = next((factor for factor in range(2, math.isqrt(number) + 1) if number % factor == 0), number)
    while number % prime == 0:
        number //= prime
    return number == 1


def _check_radix(radix: int) -> None:
    check_count("radix", radix, low=4)
    if radix % 2:
        raise ConfigError(
            f"radix={radix} is odd, but a fat tree takes half of a switch's ports up; use {radix - 1} or {radix + 1}."
        )
