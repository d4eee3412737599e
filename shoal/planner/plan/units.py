"""Numbers with units as people type them, `1.2kW`, `39%`, `14.8T`, and the slip of the hand named when they are off.

A setting has one unit. A value may carry another of the same kind, which is converted; a value without unit is taken as
it stands and must lie where such a thing can lie. Watts for kilowatts or percent for a fraction land far outside, and the
refusal then says which unit would have fitted.
"""

import math
import re

from shoal.errors import ConfigError

TOKEN_COUNTS = {"": 1.0, "tokens": 1.0, "K": 1e3, "M": 1e6, "B": 1e9, "T": 1e12}

USUAL = {"tokens": 1e13, "bytes": 1e11, "bytes/s": 1e12, "FLOP/s": 1e15}
"""What is meant where several units fit: of 14.8 K, M, B and T tokens the last."""

UNITS: dict[str, dict[str, float]] = {
    "W": {"W": 1.0, "kW": 1e3, "MW": 1e6},
    "USD/h": {"USD/h": 1.0},
    "USD/kWh": {"USD/kWh": 1.0, "ct/kWh": 0.01, "USD/MWh": 1e-3},
    "kg CO2e/kWh": {"kg/kWh": 1.0, "kg CO2e/kWh": 1.0, "g/kWh": 1e-3, "t/MWh": 1.0},
    "fraction": {"": 1.0, "%": 0.01},
    "tokens": TOKEN_COUNTS,
    "tokens/s": {"tokens/s": 1.0},
    "bytes": {"B": 1.0, "bytes": 1.0, "bits": 0.125, "MB": 1e6, "GB": 1e9, "TB": 1e12, "MiB": 2.0**20, "GiB": 2.0**30},
    "bytes/s": {"B/s": 1.0, "GB/s": 1e9, "TB/s": 1e12, "Gbit/s": 1e9 / 8},
    "FLOP/s": {"FLOP/s": 1.0, "GFLOP/s": 1e9, "TFLOP/s": 1e12, "PFLOP/s": 1e15},
}
"""By the unit of the setting: what may be typed, and its factor. Units that are not here are typed without a unit."""


def parse_quantity(name: str, text: str, unit: str) -> float:
    """The number that `text` stands for, in `unit`.

    Raises:
        ConfigError: no number, not finite, or a unit of another kind.
    """
    match = re.fullmatch(r"([-+]?[0-9][0-9_,]*(?:\.[0-9]*)?(?:[eE][-+]?[0-9]{1,3})?)\s*(\S.*)?", text.strip()[:80])
    if match is None:
        raise ConfigError(f"{name}={text[:40]!r} is not a number; it is in {unit}, write for example {name}=0.5.")
    typed = (match[2] or "").strip()
    known = UNITS.get(unit, {})
    if typed and typed != unit and typed not in known:
        may = ", ".join(word for word in known if word) or unit
        raise ConfigError(f"{name}={text[:40]!r}: {typed!r} is no unit of it; {name} is in {unit}, use {may}.")
    value = float(match[1].replace("_", "").replace(",", "")) * known.get(typed, 1.0)
    if not math.isfinite(value):
        raise ConfigError(f"{name}={text[:40]!r} is not a finite number.")
    return value


def check_plausible(name: str, value: float, unit: str, low: float, high: float) -> None:
    """Refuse what cannot be, and say which unit was probably meant.

    Raises:
        ConfigError: below `low`, above `high` or not a number.
    """
    if low <= value <= high:
        return
    raise ConfigError(
        f"{name}={value:g} cannot be: it is in {unit}, from {low:g} to {high:g}{_probably(name, value, unit, low, high)}."
    )


def _probably(name: str, value: float, unit: str, low: float, high: float) -> str:
    """A hint for a value that would be possible in another unit of the same kind."""
    known = UNITS.get(unit, {})
    fitting = [
        (word, value * factor) for word, factor in known.items() if factor != 1 and low <= value * factor <= high
    ]
    if not fitting:
        return ""
    usual = USUAL.get(unit, math.sqrt(max(low, 0.01 * high) * high))
    word, meant = min(fitting, key=lambda pair: abs(math.log(pair[1] / usual)))
    return f"; {value:g} {word} would be {name}={meant:g}"
