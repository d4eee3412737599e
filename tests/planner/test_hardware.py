"""Devices: published figures, how people write hardware, and the slips of unit that must not pass."""

import dataclasses
import itertools
import json
import re
from pathlib import Path
from typing import Any

import pytest

from shoal.errors import ConfigError
from shoal.planner.hardware import (
    DEVICES,
    GIB,
    PRECISIONS,
    Cluster,
    Device,
    cpu_device,
    device,
    load_devices,
    parse_fit,
)

MINE: dict[str, Any] = {
    "memory_bytes": 48e9,
    "bandwidth_bytes_per_s": 864e9,
    "flops": {"bf16": 362e12, "fp8": 733e12},
    "power_w": 500,
    "price_usd_per_h": 0.8,
    "link_bytes_per_s": 32e9,
    "network_bytes_per_s": 12.5e9,
    "source": "data sheet",
}


def test_the_h800_is_an_h100_with_less_than_half_its_link() -> None:
    # NVLink 400 against 900 GB/s in both directions together (ISCA 2025, section 2); the arithmetic is the same.
    h800, h100 = device("h800"), device("h100")
    assert h800.flops == h100.flops
    assert h800.link_bytes_per_s / h100.link_bytes_per_s == pytest.approx(400 / 900)
    assert h800.peak_flops("bf16") == 989.5e12
    assert h800.peak_flops("fp8") == 2 * h800.peak_flops("bf16")


def test_decoding_on_an_h800_turns_compute_bound_near_the_published_128_query_heads() -> None:
    # FlashMLA: 865 TFLOP/s sustained against 3.35 TB/s; two operations per byte and head give 129.
    assert 865e12 / device("h800").bandwidth_bytes_per_s / 2 == pytest.approx(129, abs=0.2)


def test_every_device_is_named_by_its_key_and_says_where_its_figures_are_from() -> None:
    for name, one in DEVICES.items():
        assert one.name == name == name.lower()
        assert len(one.source) > 20
        assert one.chip_power_w is None or one.chip_power_w <= one.power_w


def test_numbers_without_units_of_their_own_are_widened_not_sped_up() -> None:
    a100 = device("a100")
    assert a100.runs_in("fp8") == "bf16"
    assert a100.peak_flops("fp8") == 312e12
    assert device("ascend-910c").runs_in("int8") == "int8"
    with pytest.raises(ConfigError, match="lists no speed for fp32"):
        device("ascend-910c").peak_flops("fp32")
    with pytest.raises(ConfigError, match="precision='fp4' is unknown"):
        a100.peak_flops("fp4")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("text", "name", "count"),
    [
        ("8x h800", "h800", 8),
        ("8xH800", "h800", 8),
        ("8 h800", "h800", 8),
        ("2,048 x H800", "h800", 2048),
        ("  h200 ", "h200", 1),
        ("1 rtx4090", "rtx4090", 1),
    ],
)
def test_hardware_reads_as_people_write_it(text: str, name: str, count: int) -> None:
    assert parse_fit(text) == Cluster(device=DEVICES[name], count=count)


@pytest.mark.parametrize("text", ["2 cores, 24 GiB", "2 cores 24GiB", "24 GiB, 2 cores", "2 CPU cores, 24 GiB"])
def test_two_cores_and_24_gib_are_the_machine_of_the_table(text: str) -> None:
    assert parse_fit(text) == Cluster(device=DEVICES["cpu-2core"])


def test_amx_cores_compute_five_times_as_much_and_read_little_faster() -> None:
    plain, amx = device("cpu-2core"), parse_fit("2 AMX cores, 24 GiB").device
    assert amx == DEVICES["amx-2core"]
    # Two machines of this project: 1.75 TFLOP/s measured with matrix units, 0.33 by instruction width without.
    assert amx.peak_flops("bf16") == 1.75e12
    assert 5 < amx.peak_flops("bf16") / plain.peak_flops("bf16") < 5.5
    assert amx.bandwidth_bytes_per_s / plain.bandwidth_bytes_per_s == pytest.approx(26.5 / 19.4)


def test_memory_units_are_taken_by_their_letter() -> None:
    assert parse_fit("4 cores, 1.5 TB").device.memory_bytes == 1_500_000_000_000
    assert parse_fit("4 cores, 512 MiB").device.memory_bytes == 2**29
    assert parse_fit("4 cores, 16 GB").device.memory_bytes == 16 * 10**9


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2 cores", "no memory"),
        ("2 cores, much GiB", "'much GiB' is no amount of memory"),
        ("2 cores, 24", "without a unit"),
        ("2 cores, 24 Gb", "a small b means bits"),
        ("cores, 24 GiB", "no number of cores"),
        ("0 cores, 24 GiB", "from 1 to 1024"),
        ("2 cores, 1 MiB", "memory_bytes=1.04858e+06 cannot be"),
        ("0x h800", "count=0"),
        ("-3x h800", "count=-3"),
        ("123456789012x h800", "more than were ever built"),
        ("8x", "unknown hardware"),
        ("", "unknown hardware"),
    ],
)
def test_hardware_that_cannot_be_read_says_how_to_write_it(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        parse_fit(text)


def test_unknown_hardware_lists_what_is_known_and_how_to_add_one() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_fit("8x h80")
    message = str(caught.value)
    assert "did you mean 'h800'?" in message
    assert all(name in message for name in DEVICES)
    example = json.loads(re.search(r"\{.*\}", message)[0])  # type: ignore[index]
    assert Device(name="my-gpu", **example["my-gpu"]).peak_flops() == 989.5e12


@pytest.mark.parametrize(
    ("field", "value", "unit"),
    [
        ("power_w", 700_000, "watts"),
        ("power_w", 1.2, "watts"),
        ("chip_power_w", 0.7, "watts"),
        ("memory_bytes", 80, "bytes"),
        ("memory_bytes", 80e3, "bytes"),
        ("bandwidth_bytes_per_s", 3350, "bytes per second"),
        ("flops", {"bf16": 989.5}, "operations per second"),
        ("flops", {"bf16": 989.5e24}, "operations per second"),
        ("price_usd_per_h", 2e6, "US dollars per hour"),
        ("price_usd_per_h", -2, "US dollars per hour"),
        ("link_bytes_per_s", 450, "bytes per second and direction"),
        ("network_bytes_per_s", 400, "400 Gbit/s is 50e9"),
        ("power_w", float("nan"), "watts"),
        ("power_w", float("inf"), "watts"),
        ("power_w", "700", "number of watts"),
        ("power_w", True, "number of watts"),
        ("flops", {}, "must map formats"),
        ("flops", {"bf61": 1e12}, "did you mean 'bf16'?"),
        ("devices_per_node", 0, "whole number"),
        ("source", "", "where its figures are from"),
    ],
)
def test_slips_of_unit_are_refused_with_the_unit_named(field: str, value: Any, unit: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(unit)):
        Device(name="mine", **{**MINE, field: value})


def test_an_owned_device_without_network_is_allowed() -> None:
    one = Device(name="mine", **{**MINE, "price_usd_per_h": 0, "link_bytes_per_s": 0, "network_bytes_per_s": 0})
    assert Cluster(device=one, count=3).cost_assumptions().price_usd_per_h.value == 0


def test_devices_of_a_file_join_the_table(tmp_path: Path) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps({"L40S": MINE}))
    known = load_devices(path)
    assert set(known) == {*DEVICES, "l40s"}
    assert parse_fit("4x l40s", known).memory_bytes == 4 * 48 * 10**9
    assert type(device("L40S", known).memory_bytes) is int
    assert "l40s" not in DEVICES


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1]", "one object of devices by name"),
        ('{"mine": 3}', "one object of devices by name"),
        (json.dumps({"mine": {**MINE, "memory_gb": 80}}), "unknown field 'memory_gb'"),
        (json.dumps({"mine": {"source": "x"}}), "memory_bytes, bandwidth_bytes_per_s, flops, power_w"),
        (json.dumps({"mine": {**MINE, "power_w": 0.5}}), "watts"),
        (" " * (2**20 + 1), "larger than 1 MiB"),
    ],
)
def test_a_damaged_hardware_file_is_named_with_what_to_do(tmp_path: Path, content: str, message: str) -> None:
    path = tmp_path / "hardware.json"
    path.write_text(content)
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_devices(path)


def test_a_missing_hardware_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=re.escape("cannot read the hardware file")):
        load_devices(tmp_path / "none.json")


def test_a_cluster_adds_up_its_devices() -> None:
    cluster = parse_fit("20x h800")
    assert cluster.num_nodes == 3
    assert cluster.memory_bytes == 20 * 80 * GIB
    assert cluster.peak_flops("fp8") == 20 * 1979e12
    assumptions = cluster.cost_assumptions()
    assert assumptions.price_usd_per_h.value == 40.0
    assert assumptions.power_w.value == 20 * 1275
    assert "DeepSeek-V3 table 1" in assumptions.price_usd_per_h.source


def test_more_cores_never_do_less_and_bandwidth_stops_at_a_socket() -> None:
    sizes = [cpu_device(cores, 24 * GIB) for cores in (1, 2, 7, 32, 200)]
    for smaller, larger in itertools.pairwise(sizes):
        assert smaller.bandwidth_bytes_per_s <= larger.bandwidth_bytes_per_s
        assert all(smaller.peak_flops(precision) < larger.peak_flops(precision) for precision in PRECISIONS)
    assert sizes[-1].bandwidth_bytes_per_s == 307e9


def test_devices_can_be_keys_and_become_json() -> None:
    h800 = device("h800")
    assert {h800: 1}[device("H800")] == 1
    assert json.loads(json.dumps(dataclasses.asdict(h800)))["flops"]["bf16"] == 989.5e12
