"""What machines can do and cost: a small table of devices with sources, and how to name one of your own.

A device is one accelerator, or one machine without any; a cluster is a number of equal devices. Units are bytes, seconds,
watts and dollars without prefixes, so that no formula converts anything. The usual slips (80 for 80e9 bytes, 989 for 989e12
operations per second, 0.7 for 700 W) land far outside what any device can be, and are refused with the unit named.

Three traps of data sheets, avoided here:

- *sparse* figures: vendors print twice what dense matrices reach. All figures here are dense.
- *both directions*: NVLink's 900 GB/s is the sum of in and out. Links here are per direction, as all-to-all needs them.
- *watts of what*: `chip_power_w` is the board's limit, `power_w` the device's share of its whole machine with host, fans
  and network cards, the one that a bill follows. H800 figures on the web between 350 W and 1,275 W differ by just this.

Peak figures are ceilings. What of them is reached is the business of `training.py` (utilisation) and of measurements.
Rents are list prices of one day and move by half within a year: the weakest column, to be replaced by your own.
"""

import json
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args

from shoal.errors import ConfigError, did_you_mean
from shoal.planner.cost import CostAssumptions, cpu_assumptions, gpu_assumptions

Precision = Literal["bf16", "fp8", "int8", "fp32"]
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

GIB = 2**30
_MAX_FILE_BYTES = 1 << 20

_WIDENED: dict[Precision, tuple[Precision, ...]] = {
    "fp8": ("fp8", "bf16", "fp32"),
    "int8": ("int8", "bf16", "fp32"),
    "bf16": ("bf16", "fp32"),
    "fp32": ("fp32",),
}
"""Where a device has no units for a format its numbers are widened to the next one, without loss."""

_PLAUSIBLE: dict[str, tuple[float, float, str, str]] = {
    "memory_bytes": (2**26, 2**46, "bytes", "80 GB is 80e9, 80 GiB is 80 * 2**30"),
    "bandwidth_bytes_per_s": (1e8, 1e15, "bytes per second", "3.35 TB/s is 3.35e12"),
    "flops": (1e9, 1e19, "dense operations per second", "989.5 TFLOP/s is 989.5e12"),
    "power_w": (5, 2e4, "watts", "1.2 kW is 1200"),
    "chip_power_w": (5, 2e4, "watts", "0.7 kW is 700"),
    "price_usd_per_h": (1e-3, 1e3, "US dollars per hour", "0 is an owned device"),
    "link_bytes_per_s": (
        1e8,
        1e13,
        "bytes per second and direction",
        "NVLink's 900 GB/s both ways is 450e9; 0 is none",
    ),
    "network_bytes_per_s": (1e6, 1e13, "bytes per second and direction", "400 Gbit/s is 50e9; 0 is none"),
}
_MAY_BE_ZERO = ("price_usd_per_h", "link_bytes_per_s", "network_bytes_per_s")


@dataclass(frozen=True, kw_only=True)
class Device:
    """One accelerator, or one machine without any."""

    name: str
    memory_bytes: int
    """Of the device, as its driver shows it; vendors' "80 GB" of stacked memory are 80 GiB."""
    bandwidth_bytes_per_s: float
    """Between that memory and the arithmetic."""
    flops: Mapping[Precision, float] = field(hash=False)
    """Dense operations per second by format; formats without units of their own are left out."""
    power_w: float
    """Of the busy device with its share of the machine around it."""
    chip_power_w: float | None = None
    """The board's own limit, where it is another figure."""
    price_usd_per_h: float
    """Rent with electricity; 0 for one that is owned."""
    link_bytes_per_s: float
    """To the other devices of the same machine, one direction; 0 where there is none."""
    network_bytes_per_s: float
    """To other machines, this device's share, one direction; 0 where there is none."""
    devices_per_node: int = 8
    """That share one machine."""
    source: str

    def __post_init__(self) -> None:
        for name in ("name", "source"):
            if not isinstance(getattr(self, name), str) or not getattr(self, name).strip():
                raise ConfigError(
                    f"a device needs a {name}: a text that says what it is and where its figures are from."
                )
        if type(self.devices_per_node) is not int or not 1 <= self.devices_per_node <= 1024:
            raise ConfigError(
                f"{self.name}: devices_per_node={self.devices_per_node!r} must be a whole number from 1 to 1024."
            )
        for name in _PLAUSIBLE:
            if name != "flops" and not (name == "chip_power_w" and self.chip_power_w is None):
                _check_plausible(self.name, name, name, getattr(self, name))
        object.__setattr__(self, "memory_bytes", int(self.memory_bytes))
        object.__setattr__(self, "flops", _checked_flops(self.name, self.flops))

    def runs_in(self, precision: Precision) -> Precision:
        """The format that products of `precision` numbers really run in: their own, or the next wider one with units.

        Raises:
            ConfigError: an unknown format, or a device that has none wide enough.
        """
        if precision not in _WIDENED:
            raise ConfigError(f"precision={precision!r} is unknown; use {', '.join(PRECISIONS)}.")
        for wider in _WIDENED[precision]:
            if wider in self.flops:
                return wider
        raise ConfigError(
            f"{self.name} lists no speed for {precision} nor a wider format, only {', '.join(self.flops)}; "
            "add one to its flops."
        )

    def peak_flops(self, precision: Precision = "bf16") -> float:
        """Dense operations per second on numbers of `precision`, widened where the device has no units for them."""
        return self.flops[self.runs_in(precision)]


@dataclass(frozen=True, kw_only=True)
class Cluster:
    """`count` equal devices."""

    device: Device
    count: int = 1

    def __post_init__(self) -> None:
        if type(self.count) is not int or not 1 <= self.count <= 10_000_000:
            raise ConfigError(
                f"count={self.count!r} must be a whole number of devices, 1 to 10 million; write '8x {self.device.name}'."
            )

    @property
    def name(self) -> str:
        """As `parse_fit` takes it, where the device is in the table."""
        return f"{self.count}x {self.device.name}"

    @property
    def num_nodes(self) -> int:
        """Machines, the last one perhaps not full."""
        return math.ceil(self.count / self.device.devices_per_node)

    @property
    def memory_bytes(self) -> int:
        """Of all devices together."""
        return self.count * self.device.memory_bytes

    def peak_flops(self, precision: Precision = "bf16") -> float:
        """Of all devices together."""
        return self.count * self.device.peak_flops(precision)

    def cost_assumptions(self) -> CostAssumptions:
        """Rent and watts of the cluster; building, electricity and carbon as `cost.gpu_assumptions` has them."""
        defaults, device = gpu_assumptions(1), self.device
        source = f"{self.count} x {{:g}} per {device.name}; {device.source}"
        return replace(
            defaults,
            price_usd_per_h=defaults.price_usd_per_h.with_value(
                self.count * device.price_usd_per_h, source.format(device.price_usd_per_h)
            ),
            power_w=defaults.power_w.with_value(self.count * device.power_w, source.format(device.power_w)),
        )


def cpu_device(num_cores: int, memory_bytes: int, *, has_amx: bool = False) -> Device:
    """A machine without accelerator, by what two of its cores do; figures grow with the cores up to a socket's.

    Args:
        has_amx: matrix units, on Intel since Sapphire Rapids: five times the bf16 of other cores, and little else.
    Raises:
        ConfigError: no such machine: cores outside 1..1024 or implausible memory.
    """
    if type(num_cores) is not int or not 1 <= num_cores <= 1024:
        raise ConfigError(f"num_cores={num_cores!r} must be a whole number from 1 to 1024.")
    rent, core = cpu_assumptions(num_cores), _AMX_CORE if has_amx else _CORE
    return Device(
        name=f"{'amx' if has_amx else 'cpu'}-{num_cores}core",
        memory_bytes=memory_bytes,
        # A full server socket (eight DDR5-4800 channels, 307 GB/s) is where adding cores stops adding bandwidth.
        bandwidth_bytes_per_s=min(core.bandwidth_bytes_per_s * num_cores, 307e9),
        flops={precision: speed * num_cores for precision, speed in core.flops.items()},
        power_w=rent.power_w.value,
        price_usd_per_h=rent.price_usd_per_h.value,
        link_bytes_per_s=0,
        network_bytes_per_s=1.25e9,
        devices_per_node=1,
        source=f"{core.source}; rent: {rent.price_usd_per_h.source}; power: {rent.power_w.source}; network: 10 Gbit/s assumed",
    )


def device(name: str, known: Mapping[str, Device] | None = None) -> Device:
    """The device of that name, in any case.

    Args:
        known: what `load_devices` returned; None takes `DEVICES`.
    Raises:
        ConfigError: there is none; lists the names there are and says how to add one.
    """
    table = DEVICES if known is None else known
    key = name.strip().lower()
    if key in table:
        return table[key]
    raise ConfigError(
        f"unknown hardware {name!r}{did_you_mean(key, table)}; known: {', '.join(table)}, or '2 cores, 24 GiB' ('2 AMX cores') for "
        f"a machine without accelerator. To add one, write a JSON file like {_example()} and pass its path as the hardware file."
    )


def parse_fit(text: str, known: Mapping[str, Device] | None = None) -> Cluster:
    """Hardware as people write it: `8x h800`, `h200`, `2 cores, 24 GiB`, `2 AMX cores, 24 GiB`.

    Args:
        known: what `load_devices` returned; None takes `DEVICES`.
    Raises:
        ConfigError: an unknown device, a count below 1, cores without memory, memory without a unit.
    """
    plain = " ".join(text.split())
    if re.search(r"\bcores?\b", plain, re.IGNORECASE):
        return Cluster(device=_parse_cores(plain))
    counted = re.fullmatch(r"(-?\d[\d_,]*)\s*[xX×*]?\s+(.+)|(-?\d[\d_,]*)[xX×*](.+)", plain)
    if counted is None:
        return Cluster(device=device(plain, known))
    number, name = (counted[1], counted[2]) if counted[1] else (counted[3], counted[4])
    digits = re.sub("[_,]", "", number)
    if len(digits) > 8:
        raise ConfigError(f"{number} devices in {text!r} are more than were ever built; use 1 to 10 million.")
    return Cluster(device=device(name, known), count=int(digits))


def load_devices(path: str | Path) -> dict[str, Device]:
    """The table with the devices of a JSON file added; a name that exists is replaced.

    The file is one object: names to objects with `Device`'s fields, without `name`.

    Raises:
        ConfigError: no such file, no JSON, a field that is unknown, missing or implausible.
    """
    where = Path(path)
    try:
        with where.open("rb") as file:
            content = file.read(_MAX_FILE_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"cannot read the hardware file {where}: {error.strerror}; give the path of a JSON file."
        ) from None
    if len(content) > _MAX_FILE_BYTES:
        raise ConfigError(f"{where} is larger than 1 MiB; a hardware file holds a few objects like {_example()}.")
    try:
        rows = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON ({error}); write an object like {_example()}.") from None
    if not isinstance(rows, dict) or not all(isinstance(row, dict) for row in rows.values()):
        raise ConfigError(f"{where} must hold one object of devices by name, like {_example()}.")
    return {**DEVICES, **{name.strip().lower(): _from_json(name.strip().lower(), row) for name, row in rows.items()}}


def _from_json(name: str, row: dict[str, Any]) -> Device:
    known = [one.name for one in fields(Device) if one.name != "name"]
    for key in row:
        if key not in known:
            raise ConfigError(
                f"{name}: unknown field {key!r}{did_you_mean(key, known)}; fields are {', '.join(known)}."
            )
    needed = [one.name for one in fields(Device) if one.name != "name" and one.default is MISSING]
    missing = [key for key in needed if key not in row]
    if missing:
        raise ConfigError(f"{name}: {', '.join(missing)} must be given too; a whole device looks like {_example()}.")
    return Device(name=name, **row)


def _parse_cores(text: str) -> Device:
    wanted = "write for example '2 cores, 24 GiB'"
    cores = re.search(r"(\d{1,6})\s*(amx\s+|v?cpu\s+)?cores?\b", text, re.IGNORECASE)
    if cores is None:
        raise ConfigError(f"no number of cores in {text!r}; {wanted}.")
    rest = (text[: cores.start()] + text[cores.end() :]).strip(" ,+")
    memory = re.fullmatch(r"(\d{1,9}(?:\.\d{1,6})?)\s*([A-Za-z]*)", rest)
    if memory is None:
        found = f"{rest!r} is no amount of memory" if rest else "no memory"
        raise ConfigError(f"{found} in {text!r}; {wanted}.")
    amount, unit = memory.groups()
    if unit not in _MEMORY_UNITS:
        bits = " (a small b means bits)" if unit.endswith("b") else ""
        raise ConfigError(
            f"memory of {amount} {unit or 'without a unit'} in {text!r} is unclear{bits}; "
            f"use {', '.join(_MEMORY_UNITS)}: {wanted}."
        )
    has_amx = (cores[2] or "").strip().lower() == "amx"
    return cpu_device(int(cores[1]), int(float(amount) * _MEMORY_UNITS[unit]), has_amx=has_amx)


_MEMORY_UNITS = {"MiB": 2**20, "MB": 10**6, "GiB": GIB, "GB": 10**9, "TiB": 2**40, "TB": 10**12}


def _checked_flops(device_name: str, flops: Any) -> dict[Precision, float]:
    if not isinstance(flops, Mapping) or not flops:
        raise ConfigError(
            f"{device_name}: flops={flops!r} must map formats to speeds, for example {{'bf16': 989.5e12}}."
        )
    for precision, value in flops.items():
        if precision not in PRECISIONS:
            raise ConfigError(
                f"{device_name}: flops has the unknown format {precision!r}{did_you_mean(str(precision), PRECISIONS)}; "
                f"use {', '.join(PRECISIONS)}."
            )
        _check_plausible(device_name, "flops", f"flops[{precision!r}]", value)
    return {precision: float(flops[precision]) for precision in PRECISIONS if precision in flops}


def _check_plausible(device_name: str, name: str, label: str, value: Any) -> None:
    low, high, unit, example = _PLAUSIBLE[name]
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        raise ConfigError(f"{device_name}: {label}={value!r} must be a number of {unit}.")
    if value == 0 and name in _MAY_BE_ZERO:
        return
    if not low <= value <= high:
        raise ConfigError(
            f"{device_name}: {label}={value:g} cannot be: it is in {unit}, plausible from {low:g} to {high:g} ({example})."
        )


def _example() -> str:
    return (
        '{"my-gpu": {"memory_bytes": 80e9, "bandwidth_bytes_per_s": 3.35e12, "flops": {"bf16": 989.5e12}, "power_w": 1275, '
        '"price_usd_per_h": 2, "link_bytes_per_s": 450e9, "network_bytes_per_s": 50e9, "source": "data sheet"}}'
    )


@dataclass(frozen=True, kw_only=True)
class _Core:
    """One of two virtual cores that were measured together."""

    bandwidth_bytes_per_s: float
    flops: dict[Precision, float]
    source: str


_CORE = _Core(
    bandwidth_bytes_per_s=9.7e9,
    flops={"bf16": 166e9, "int8": 333e9, "fp32": 83e9},
    source="two virtual cores of an AMD EPYC (Zen 4): 19.4 GB/s from memory, measured; arithmetic by instruction width at "
    "2.6 GHz (AVX-512 BF16 and VNNI), of which 0.23 of 0.33 TFLOP/s were measured in bf16 on a shared machine",
)
_AMX_CORE = _Core(
    bandwidth_bytes_per_s=13.25e9,
    flops={"bf16": 875e9, "int8": 1750e9, "fp32": 75e9},
    source="two virtual cores of an Intel Sapphire Rapids: 26.5 GB/s from memory, 1.75 TFLOP/s in bf16 (AMX) and 0.15 in fp32, "
    "all measured; int8 taken as twice bf16 by instruction width",
)
_HOPPER: dict[Precision, float] = {"bf16": 989.5e12, "fp8": 1979e12, "int8": 1979e12, "fp32": 67e12}
_DGX_H100_W = 10_200 / 8

DEVICES: dict[str, Device] = {
    one.name: one
    for one in (
        Device(
            name="h800",
            memory_bytes=80 * GIB,
            bandwidth_bytes_per_s=3.35e12,
            flops=_HOPPER,
            power_w=_DGX_H100_W,
            chip_power_w=700,
            price_usd_per_h=2.0,
            link_bytes_per_s=200e9,
            network_bytes_per_s=50e9,
            source="H100 SXM5 data sheet with NVLink cut to 400 GB/s both ways (ISCA 2025 §2, arXiv 2505.09343); one 400G NIC per "
            "GPU (same); rent: DeepSeek-V3 table 1; power: an eighth of a DGX H100's 10.2 kW maximum, 700 W for the board",
        ),
        Device(
            name="h100",
            memory_bytes=80 * GIB,
            bandwidth_bytes_per_s=3.35e12,
            flops=_HOPPER,
            power_w=_DGX_H100_W,
            chip_power_w=700,
            price_usd_per_h=3.0,
            link_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            source="NVIDIA H100 SXM5 data sheet, dense half of the sparse figures; power: an eighth of a DGX H100's 10.2 kW "
            "maximum; rent: about 3 USD at specialised clouds, from memory, not verified",
        ),
        Device(
            name="h200",
            memory_bytes=141 * GIB,
            bandwidth_bytes_per_s=4.8e12,
            flops=_HOPPER,
            power_w=_DGX_H100_W,
            chip_power_w=700,
            price_usd_per_h=3.5,
            link_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            source="NVIDIA H200 SXM data sheet, dense half of the sparse figures; power: an eighth of a DGX H200's 10.2 kW "
            "maximum; rent: about 3.5 USD at specialised clouds, from memory, not verified",
        ),
        Device(
            name="h20",
            memory_bytes=96 * GIB,
            bandwidth_bytes_per_s=4.0e12,
            flops={"bf16": 148e12, "fp8": 296e12, "int8": 296e12, "fp32": 44e12},
            power_w=400 + 575,
            chip_power_w=400,
            price_usd_per_h=1.2,
            link_bytes_per_s=450e9,
            network_bytes_per_s=50e9,
            source="NVIDIA H20 figures as widely reprinted, from memory, not verified; power: 400 W board and the 575 W of host, "
            "fans and network that a DGX H100 adds per GPU; rent: assumed",
        ),
        Device(
            name="a100",
            memory_bytes=80 * GIB,
            bandwidth_bytes_per_s=2.039e12,
            flops={"bf16": 312e12, "int8": 624e12, "fp32": 19.5e12},
            power_w=6_500 / 8,
            chip_power_w=400,
            price_usd_per_h=1.5,
            link_bytes_per_s=300e9,
            network_bytes_per_s=25e9,
            source="NVIDIA A100 80GB SXM data sheet; one 200G NIC per GPU and an eighth of 6.5 kW: DGX A100; rent: about 1.5 USD "
            "at specialised clouds, from memory, not verified",
        ),
        Device(
            name="b200",
            memory_bytes=180 * GIB,
            bandwidth_bytes_per_s=8e12,
            flops={"bf16": 2250e12, "fp8": 4500e12, "int8": 4500e12, "fp32": 75e12},
            power_w=14_300 / 8,
            chip_power_w=1000,
            price_usd_per_h=5.5,
            link_bytes_per_s=900e9,
            network_bytes_per_s=50e9,
            source="NVIDIA DGX B200 data sheet (1.44 TB, 64 TB/s, 72 PFLOPS sparse FP8 over eight GPUs, 14.3 kW); rent: about 5.5 "
            "USD at specialised clouds, from memory, not verified",
        ),
        Device(
            name="ascend-910b",
            memory_bytes=64 * GIB,
            bandwidth_bytes_per_s=1.6e12,
            flops={"bf16": 313e12, "int8": 626e12, "fp32": 75e12},
            power_w=400 + 250,
            chip_power_w=400,
            price_usd_per_h=0.9,
            link_bytes_per_s=196e9,
            network_bytes_per_s=25e9,
            source="Ascend 910B3 as third parties report it (no public data sheet; 280 to 376 TFLOP/s by variant), from memory, "
            "not verified; the 250 W of host per card and the rent are assumed",
        ),
        Device(
            name="ascend-910c",
            memory_bytes=128 * GIB,
            bandwidth_bytes_per_s=3.2e12,
            flops={"bf16": 752e12, "int8": 1504e12},
            power_w=559_000 / 384,
            price_usd_per_h=1.5,
            link_bytes_per_s=392e9,
            network_bytes_per_s=50e9,
            devices_per_node=384,
            source="Huawei's CloudMatrix384 paper (arXiv 2506.12708), two dies; power: 559 kW over 384, third-party estimate; both "
            "from memory, not verified; rent assumed",
        ),
        Device(
            name="rtx4090",
            memory_bytes=24 * GIB,
            bandwidth_bytes_per_s=1.008e12,
            flops={"bf16": 165.2e12, "fp8": 330.3e12, "int8": 660.6e12, "fp32": 82.6e12},
            power_w=450 + 150,
            chip_power_w=450,
            price_usd_per_h=0.4,
            link_bytes_per_s=32e9,
            network_bytes_per_s=1.25e9,
            devices_per_node=4,
            source="NVIDIA Ada whitepaper, dense with fp32 accumulation; link is PCIe 4.0 x16; the 150 W of host per card, 10 Gbit/s "
            "and four cards to a machine are assumed; rent: about 0.4 USD at marketplaces, from memory, not verified",
        ),
        cpu_device(2, 24 * GIB),
        cpu_device(2, 24 * GIB, has_amx=True),
    )
}
"""By name, lower case. `cpu-2core` is the machine of this project's own figures: two cores, 24 GiB."""
