"""Joules: measured where the machine tells, otherwise modelled and called so.

Intel and AMD processors count the energy of their packages and memory in model-specific registers that Linux shows
under `/sys/class/powercap/intel-rapl:*` (RAPL); NVIDIA's driver counts per card (NVML). Virtual machines and unprivileged
processes usually see neither. Then energy is busy core-seconds times stated watts per core, and the reading carries the
kind "modelled" and the sentence that says with what numbers: a modelled joule is never shown as a measured one.

    with EnergyMeter() as meter:
        work()
    reading = meter.reading()
"""

import ctypes
import os
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

EnergyKind = Literal["measured", "modelled"]

POWERCAP = Path("/sys/class/powercap")

POLL_INTERVAL_S = 30.0
"""RAPL counters wrap after some 262 kJ (twenty minutes at 200 W); reading more often than that never misses one."""


@dataclass(frozen=True, kw_only=True)
class PowerModel:
    """Watts to assume where nothing can be read."""

    watts_per_busy_core: float = 12.0
    source: str = "default of the Green Algorithms calculator for an unnamed core (Lannelongue et al. 2021)"

    def sentence(self) -> str:
        """The assumption, for a reader."""
        return (
            f"no energy counter readable; {self.watts_per_busy_core:g} W per busy core assumed, {self.source}; "
            "idle power, memory, disks and cooling left out"
        )


@dataclass(frozen=True, kw_only=True)
class EnergyReading:
    """What a stretch of work used."""

    joules: float
    kind: EnergyKind
    assumption: str
    """What was read, or assumed; one sentence part without a full stop."""
    wall_s: float
    busy_core_s: float
    """Processor time of this process and its finished children; two busy cores count two per second."""


class EnergyCounter(Protocol):
    """A counter that only grows, until it wraps."""

    name: str
    wraps_at_j: float | None
    """Where the counter starts over; None when it does not."""

    def read_j(self) -> float: ...


class RaplCounter:
    """One powercap domain: a processor package, or the memory beside it."""

    def __init__(self, domain: Path) -> None:
        self.domain = domain
        self.name = f"RAPL {(domain / 'name').read_text(encoding='ascii').strip()}"
        self.wraps_at_j: float | None = int((domain / "max_energy_range_uj").read_text(encoding="ascii")) / 1e6

    def read_j(self) -> float:
        """Joules since some moment."""
        return int((self.domain / "energy_uj").read_text(encoding="ascii")) / 1e6


class NvmlCounter:
    """One NVIDIA card, through the driver's own library; cards before Volta do not count energy."""

    wraps_at_j: float | None = None

    def __init__(self, library: ctypes.CDLL, index: int) -> None:
        self.library, self.name = library, f"NVML GPU {index}"
        self.handle = ctypes.c_void_p()
        _check_nvml(library.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(self.handle)))

    def read_j(self) -> float:
        """Joules since the driver was loaded."""
        millijoules = ctypes.c_ulonglong()
        _check_nvml(self.library.nvmlDeviceGetTotalEnergyConsumption(self.handle, ctypes.byref(millijoules)))
        return millijoules.value / 1e3


def find_counters(powercap: Path = POWERCAP) -> list[EnergyCounter]:
    """Every energy counter this process may read; empty on most virtual machines."""
    return [*_rapl_counters(powercap), *_nvml_counters()]


class EnergyMeter:
    """Measures a `with` block; `reading()` also works inside it, for progress.

    Args:
        power_model: what to assume where no counter can be read.
        counters: to read instead of what `find_counters` finds.
    """

    def __init__(self, power_model: PowerModel | None = None, counters: Sequence[EnergyCounter] | None = None) -> None:
        self.power_model = power_model or PowerModel()
        self.counters = list(find_counters() if counters is None else counters)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._thread: threading.Thread | None = None
        self._start()

    def __enter__(self) -> "EnergyMeter":
        self._stopped.clear()
        self._start()
        if self.counters:
            self._thread = threading.Thread(target=self._poll, name="energy-meter", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._update()
        self._wall_s, self._busy_core_s = self._elapsed()
        self._stopped.set()
        if self._thread:
            self._thread.join()
            self._thread = None

    def reading(self) -> EnergyReading:
        """Energy since the block was entered, up to now or to its end."""
        if self._stopped.is_set():
            wall_s, busy_core_s = self._wall_s, self._busy_core_s
        else:
            self._update()
            wall_s, busy_core_s = self._elapsed()
        if self.counters:
            names = ", ".join(counter.name for counter in self.counters)
            assumption = f"read from {names}; everything else in the machine left out"
            if self._silent:
                assumption += f"; too low, as {', '.join(sorted(self._silent))} did not always answer"
            return EnergyReading(
                joules=self._joules, kind="measured", assumption=assumption, wall_s=wall_s, busy_core_s=busy_core_s
            )
        return EnergyReading(
            joules=busy_core_s * self.power_model.watts_per_busy_core,
            kind="modelled",
            assumption=self.power_model.sentence(),
            wall_s=wall_s,
            busy_core_s=busy_core_s,
        )

    def _start(self) -> None:
        self._joules, self._wall_s, self._busy_core_s = 0.0, 0.0, 0.0
        self._started_s, self._started_busy_s = time.monotonic(), _processor_s()
        self._silent: set[str] = set()
        self._last_j = [counter.read_j() for counter in self.counters]

    def _elapsed(self) -> tuple[float, float]:
        return time.monotonic() - self._started_s, _processor_s() - self._started_busy_s

    def _poll(self) -> None:
        while not self._stopped.wait(POLL_INTERVAL_S):
            self._update()

    def _update(self) -> None:
        with self._lock:
            for index, counter in enumerate(self.counters):
                try:
                    now_j = counter.read_j()
                except (OSError, ValueError):  # a counter that fails must not end the run it measures
                    self._silent.add(counter.name)
                    continue
                step_j = now_j - self._last_j[index]
                if step_j < 0 and counter.wraps_at_j is not None:
                    step_j += counter.wraps_at_j
                self._joules += max(step_j, 0.0)
                self._last_j[index] = now_j


def _rapl_counters(powercap: Path) -> list[EnergyCounter]:
    """Packages and memory. Cores and graphics are inside a package, and psys around all of it: neither is added again."""
    counters: list[EnergyCounter] = []
    for domain in sorted(powercap.glob("intel-rapl:*")):
        try:
            counter = RaplCounter(domain)
            counter.read_j()
        except (OSError, ValueError):
            continue
        if counter.name.startswith(("RAPL package", "RAPL dram")):
            counters.append(counter)
    return counters


def _nvml_counters() -> list[EnergyCounter]:
    try:
        library = ctypes.CDLL("libnvidia-ml.so.1")
        _check_nvml(library.nvmlInit_v2())
        count = ctypes.c_uint()
        _check_nvml(library.nvmlDeviceGetCount_v2(ctypes.byref(count)))
        counters = [NvmlCounter(library, index) for index in range(count.value)]
        for counter in counters:
            counter.read_j()
    except (OSError, AttributeError):
        return []
    return [*counters]


def _check_nvml(status: int) -> None:
    if status:
        raise OSError(f"NVML answered status {status}.")


def _processor_s() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
