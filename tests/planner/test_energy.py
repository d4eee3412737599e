import ctypes
import time
from pathlib import Path
from typing import Any, cast

import pytest

from shoal.planner.energy import EnergyMeter, NvmlCounter, PowerModel, find_counters


class TankCounter:
    """A counter that the test drives, with the interface of RAPL."""

    name = "tank"

    def __init__(self, wraps_at_j: float | None = None) -> None:
        self.wraps_at_j = wraps_at_j
        self.level_j = 0.0

    def read_j(self) -> float:
        return self.level_j


def powercap_tree(root: Path, domains: dict[str, tuple[str, int, int]]) -> Path:
    for directory, (name, energy_uj, range_uj) in domains.items():
        (root / directory).mkdir()
        (root / directory / "name").write_text(f"{name}\n")
        (root / directory / "energy_uj").write_text(f"{energy_uj}\n")
        (root / directory / "max_energy_range_uj").write_text(f"{range_uj}\n")
    return root


def test_packages_and_memory_are_counted_once_and_their_parts_not_again(tmp_path: Path) -> None:
    powercap = powercap_tree(
        tmp_path,
        {
            "intel-rapl:0": ("package-0", 5_000_000, 10_000_000),
            "intel-rapl:0:0": ("core", 1, 10_000_000),
            "intel-rapl:0:1": ("dram", 2_000_000, 10_000_000),
            "intel-rapl:1": ("psys", 9_000_000, 10_000_000),
        },
    )
    rapl = [counter for counter in find_counters(powercap) if counter.name.startswith("RAPL")]
    assert [(counter.name, counter.read_j(), counter.wraps_at_j) for counter in rapl] == [
        ("RAPL package-0", 5.0, 10.0),
        ("RAPL dram", 2.0, 10.0),
    ]


def test_files_of_a_powercap_tree_are_measured_over_a_wrap(tmp_path: Path) -> None:
    powercap = powercap_tree(tmp_path, {"intel-rapl:0": ("package-0", 9_000_000, 10_000_000)})
    rapl = [counter for counter in find_counters(powercap) if counter.name.startswith("RAPL")]
    with EnergyMeter(counters=rapl) as meter:
        (powercap / "intel-rapl:0" / "energy_uj").write_text("1500000\n")
    reading = meter.reading()
    assert reading.joules == pytest.approx(2.5)
    assert reading.kind == "measured"
    assert "RAPL package-0" in reading.assumption


def test_unreadable_and_garbled_counters_are_left_out(tmp_path: Path) -> None:
    powercap = powercap_tree(tmp_path, {"intel-rapl:0": ("package-0", 1, 10), "intel-rapl:1": ("package-1", 1, 10)})
    (powercap / "intel-rapl:0" / "energy_uj").unlink()
    (powercap / "intel-rapl:1" / "energy_uj").write_text("no number\n")
    assert [counter for counter in find_counters(powercap) if counter.name.startswith("RAPL")] == []


def test_counters_add_up_and_a_reading_inside_the_block_does_not_disturb_the_last_one() -> None:
    wrapping, endless = TankCounter(wraps_at_j=100.0), TankCounter()
    with EnergyMeter(counters=[wrapping, endless]) as meter:
        wrapping.level_j, endless.level_j = 90.0, 1.0
        assert meter.reading().joules == 91.0
        wrapping.level_j, endless.level_j = 5.0, 3.0
    assert meter.reading().joules == 90 + 15 + 3
    endless.level_j = 1000.0
    assert meter.reading().joules == 108.0


def test_without_counters_energy_is_busy_time_times_stated_watts_and_says_so() -> None:
    with EnergyMeter(PowerModel(watts_per_busy_core=50.0, source="a plug meter"), counters=[]) as meter:
        until_s = time.process_time() + 0.05
        while time.process_time() < until_s:
            pass
    reading = meter.reading()
    assert reading.kind == "modelled"
    assert "50 W per busy core" in reading.assumption and "a plug meter" in reading.assumption
    assert reading.joules == pytest.approx(50.0 * reading.busy_core_s)
    assert 0.03 <= reading.busy_core_s <= 0.5
    assert reading.wall_s >= reading.busy_core_s / 4


def test_sleeping_is_not_busy() -> None:
    with EnergyMeter(counters=[]) as meter:
        time.sleep(0.1)
    assert meter.reading().busy_core_s < 0.05 < meter.reading().wall_s


def test_a_meter_can_be_used_again_from_zero() -> None:
    tank = TankCounter()
    meter = EnergyMeter(counters=[tank])
    for _ in range(2):
        with meter:
            tank.level_j += 7.0
        assert meter.reading().joules == 7.0


def test_a_counter_that_fails_during_the_run_is_named_and_does_not_end_it() -> None:
    class DyingCounter(TankCounter):
        def read_j(self) -> float:
            if self.level_j > 5:
                raise OSError("gone")
            return self.level_j

    dying, tank = DyingCounter(), TankCounter()
    dying.name = "dying tank"
    with EnergyMeter(counters=[dying, tank]) as meter:
        dying.level_j, tank.level_j = 3.0, 4.0
        meter.reading()
        dying.level_j = 6.0
    assert meter.reading().joules == 7.0
    assert "too low, as dying tank did not always answer" in meter.reading().assumption


def test_nvml_millijoules_become_joules_and_a_bad_status_an_error() -> None:
    class Driver:
        """Answers like the driver library of a machine with one card."""

        def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: object) -> int:
            return 0 if index.value == 0 else 2

        def nvmlDeviceGetTotalEnergyConsumption(self, handle: ctypes.c_void_p, millijoules: Any) -> int:
            millijoules._obj.value = 1_234_567
            return 0

    driver = cast(ctypes.CDLL, Driver())
    assert NvmlCounter(driver, 0).read_j() == 1234.567
    with pytest.raises(OSError, match="status 2"):
        NvmlCounter(driver, 1)
