"""What a token costs, by model, moment and kind: dated price tables with their sources, and exact arithmetic.

A served token has one of three prices: a prompt token found in the cache (hit), a prompt token computed anew (miss), a
written token (output; reasoning counts as output). DeepSeek publishes the three in USD per million tokens, has changed
them several times, and at times sold the quiet hours cheaper. So a price is a row that holds from a moment on, `price_at`
picks the row in force, and `charge` multiplies. Reproducing DeepSeek's published bill (open-infra-index day 6) is then a
look-up, not a constant in the code.

Money never meets a float. One USD per million tokens is a millionth of a USD per token, a price has at most six decimals,
hence every token costs a whole number of pico-USD (10^-12 USD): sums are sums of integers and are exact.

Differs from the published tables: Chinese public holidays, which DeepSeek has counted as quiet since September 2026, are
not known here. Where a source says "facts", it is the project's own collection of excerpts.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path
from typing import Any

from shoal.errors import ConfigError, did_you_mean

PICO_USD_PER_USD = 10**12
MAX_USD_PER_MTOK = 1000
DEFAULT_MODEL = "default"


class PriceError(ConfigError):
    """A price row or table that cannot be, or a model without a price at that moment."""


@dataclass(frozen=True, kw_only=True)
class Price:
    """What one model's tokens cost from `valid_from` until the model's next row."""

    model: str
    valid_from: datetime
    """With its time zone: published changes happen at an hour, not at a date's beginning."""
    hit_usd_per_mtok: Decimal
    miss_usd_per_mtok: Decimal
    output_usd_per_mtok: Decimal
    off_peak_discount_fraction: Decimal = Decimal(0)
    """Part of all three prices that falls away in the off-peak hours: 0.5 is half price."""
    off_peak_usd_per_mtok: tuple[Decimal, Decimal, Decimal] | None = None
    """Hit, miss and output in the off-peak hours, where the published ones are no single fraction of the others."""
    off_peak_hours_utc: tuple[tuple[str, str], ...] = ()
    """Spans of 'HH:MM', the start included, the end not; a span may run past midnight."""
    off_peak_weekends: bool = False
    """Whether Saturday and Sunday (UTC) are off-peak all day."""
    source: str

    def __post_init__(self) -> None:
        if not self.model or not self.source:
            raise PriceError("a price row needs a model and a source; say where the number is from.")
        _in_utc(self.valid_from, "valid_from")
        for name in ("hit_usd_per_mtok", "miss_usd_per_mtok", "output_usd_per_mtok"):
            _check_usd_per_mtok(name, getattr(self, name))
        for value in self.off_peak_usd_per_mtok or ():
            _check_usd_per_mtok("off_peak_usd_per_mtok", value)
        for start, end in self.off_peak_hours_utc:
            if _minute_of_day(start) == _minute_of_day(end):
                raise PriceError(f"off_peak_hours_utc {start}-{end} is empty; give a start and a different end.")
        self._check_off_peak()

    def _check_off_peak(self) -> None:
        """A discount without hours, or hours without a discount, would be silently ignored: refuse both."""
        _check_number("off_peak_discount_fraction", self.off_peak_discount_fraction, Decimal(1))
        has_fraction, has_prices = self.off_peak_discount_fraction != 0, self.off_peak_usd_per_mtok is not None
        if has_fraction and has_prices:
            raise PriceError(
                f"{self.model}: give off_peak_discount_fraction or off_peak_usd_per_mtok, not both; they would disagree."
            )
        if has_prices and len(self.off_peak_usd_per_mtok or ()) != 3:
            raise PriceError(f"{self.model}: off_peak_usd_per_mtok needs three prices: hit, miss, output.")
        if (has_fraction or has_prices) != bool(self.off_peak_hours_utc or self.off_peak_weekends):
            raise PriceError(
                f"{self.model}: an off-peak price needs off_peak_hours_utc (or off_peak_weekends) and these need "
                "an off-peak price; give both or neither."
            )
        if has_fraction:
            for value in (self.hit_usd_per_mtok, self.miss_usd_per_mtok, self.output_usd_per_mtok):
                _pico_usd_per_token(Fraction(value) * (1 - Fraction(self.off_peak_discount_fraction)), self.model)


def price_at(model: str, when_utc: datetime, prices: Iterable[Price] | None = None) -> Price:
    """The row in force for a model at a moment; a model the table does not name gets its row "default".

    Args:
        prices: a table from `load_prices`, in the place of `PRICES`. Of two rows with one moment the later one wins.
    Raises:
        PriceError: the model has no price yet at that moment, or the table has neither the model nor a default row.
    """
    table = PRICES if prices is None else tuple(prices)
    when = _in_utc(when_utc, "when_utc")
    known = sorted({row.model for row in table})
    name = model if model in known else DEFAULT_MODEL
    rows = sorted((row for row in table if row.model == name), key=lambda row: row.valid_from)
    if not rows:
        raise PriceError(
            f"no price for model {model!r}{did_you_mean(model, known)}; add a row for it or for 'default'."
        )
    in_force = [row for row in rows if row.valid_from <= when]
    if not in_force:
        raise PriceError(
            f"no price for model {model!r} at {when:%Y-%m-%d %H:%M} UTC: its first row is from "
            f"{rows[0].valid_from:%Y-%m-%d %H:%M}; add an earlier row."
        )
    return in_force[-1]


def charge(price: Price, when_utc: datetime, hit_tokens: int, miss_tokens: int, output_tokens: int) -> Decimal:
    """What these tokens cost in USD at a moment, exactly. Reasoning tokens are output tokens.

    Raises:
        PriceError: a negative count, or a moment without a time zone.
    """
    counts = (hit_tokens, miss_tokens, output_tokens)
    if any(count < 0 for count in counts):
        raise PriceError(f"token counts {counts} must be zero or more.")
    rates = token_pico_usd(price, when_utc)
    return usd(sum(count * rate for count, rate in zip(counts, rates, strict=True)))


def token_pico_usd(price: Price, when_utc: datetime) -> tuple[int, int, int]:
    """What one hit, miss and output token costs at a moment, in pico-USD."""
    standard = (price.hit_usd_per_mtok, price.miss_usd_per_mtok, price.output_usd_per_mtok)
    if is_off_peak(price, when_utc):
        if price.off_peak_usd_per_mtok is not None:
            standard = price.off_peak_usd_per_mtok
        kept = 1 - Fraction(price.off_peak_discount_fraction)
    else:
        kept = Fraction(1)
    hit, miss, output = (_pico_usd_per_token(Fraction(value) * kept, price.model) for value in standard)
    return hit, miss, output


def is_off_peak(price: Price, when_utc: datetime) -> bool:
    """Whether the off-peak price holds at that moment."""
    when = _in_utc(when_utc, "when_utc")
    if price.off_peak_weekends and when.isoweekday() >= 6:
        return True
    minute = when.hour * 60 + when.minute
    return any(_within(minute, _minute_of_day(start), _minute_of_day(end)) for start, end in price.off_peak_hours_utc)


def pico_usd(amount_usd: Decimal) -> int:
    """An amount as a whole number of pico-USD.

    Raises:
        PriceError: not a finite `Decimal`, or finer than 10^-12 USD.
    """
    if not isinstance(_as_object(amount_usd), Decimal) or not amount_usd.is_finite():
        raise PriceError(f"{amount_usd!r} is no amount of money; pass a finite decimal.Decimal, never a float.")
    exact = Fraction(amount_usd) * PICO_USD_PER_USD
    if exact.denominator != 1:
        raise PriceError(f"{amount_usd} USD is finer than 10^-12 USD; round it to twelve decimals.")
    return exact.numerator


def usd(amount_pico_usd: int) -> Decimal:
    """Pico-USD as USD, exact at any size: built from text, which no decimal context rounds."""
    return Decimal(f"{amount_pico_usd}e-12")


def parse_usd(text: str) -> Decimal:
    """An amount of money as somebody types it: `5`, `0.25`.

    Raises:
        PriceError: not a plain decimal number.
    """
    if not re.fullmatch(r"[0-9]{1,9}(\.[0-9]{1,12})?", text):
        raise PriceError(f"{text!r} is not an amount in USD; write it like 5 or 0.25.")
    return Decimal(text)


def load_prices(path: Path | str) -> tuple[Price, ...]:
    """Read a price table: a JSON list of objects with the fields of `Price`, instead of `PRICES`, not on top of it.

    Money may be written as text or as a number, both are read exactly; `valid_from` is a date or a moment in ISO 8601,
    UTC unless it says otherwise; `off_peak_hours_utc` is a list of pairs, `[["16:30", "00:30"]]`.

    Raises:
        PriceError: no such file, no JSON, or a row that cannot be, named by its number.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        rows = json.loads(text, parse_float=Decimal, parse_int=Decimal, parse_constant=Decimal)
    except OSError as error:
        raise PriceError(f"cannot read the price table {path}: {error.strerror}; check the path.") from error
    except ValueError as error:
        raise PriceError(f"the price table {path} is no JSON: {error}.") from error
    if not isinstance(rows, list) or not rows:
        raise PriceError(f"the price table {path} must be a JSON list with at least one row, '[{{...}}]'.")
    table = tuple(_row_from_json(row, f"{path}, row {number}") for number, row in enumerate(rows, start=1))
    moments = [(row.model, row.valid_from) for row in table]
    for moment in moments:
        if moments.count(moment) > 1:
            raise PriceError(f"{path} has two rows for {moment[0]} from {moment[1]:%Y-%m-%d %H:%M}; remove one.")
    return table


def _row_from_json(row: object, where: str) -> Price:
    """One row, each mistake named with its place."""
    if not isinstance(row, Mapping):
        raise PriceError(f'{where}: a row must be an object like {{"model": ...}}, not {row!r}.')
    known = [field.name for field in fields(Price)]
    for key in row:
        if key not in known:
            raise PriceError(f"{where}: unknown key {key!r}{did_you_mean(key, known)}; known are {', '.join(known)}.")
    missing = [name for name in known if name not in row and not name.startswith("off_peak")]
    if missing:
        raise PriceError(f"{where}: {', '.join(missing)} missing; every row needs them.")
    try:
        return Price(**{key: _value_from_json(key, value) for key, value in row.items()})
    except PriceError as error:
        raise PriceError(f"{where}: {error}") from error


def _value_from_json(key: str, value: Any) -> Any:
    """A JSON value as the type that the field of `Price` has."""
    if key in ("model", "source"):
        if not isinstance(value, str):
            raise PriceError(f"{key}={value!r} must be text.")
        return value
    if key == "off_peak_weekends":
        if not isinstance(value, bool):
            raise PriceError(f"{key}={value!r} must be true or false.")
        return value
    if key == "valid_from":
        return _moment_from_text(value)
    if key == "off_peak_hours_utc":
        if not isinstance(value, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in value):
            raise PriceError(f'{key}={value!r} must be a list of pairs like [["16:30", "00:30"]].')
        return tuple((start, end) for start, end in value)
    if key == "off_peak_usd_per_mtok" and value is not None:
        if not isinstance(value, list):
            raise PriceError(f"{key}={value!r} must be a list of three prices: hit, miss, output.")
        return tuple(_decimal_from_json(key, number) for number in value)
    return None if key == "off_peak_usd_per_mtok" else _decimal_from_json(key, value)


def _decimal_from_json(key: str, value: object) -> Decimal:
    try:
        if isinstance(value, (str, Decimal)):
            return Decimal(value)
    except ArithmeticError:
        pass
    raise PriceError(f'{key}={value!r} is no number; write it like "0.27".')


def _moment_from_text(text: object) -> datetime:
    try:
        if isinstance(text, str):
            moment = datetime.fromisoformat(text.strip().replace("Z", "+00:00"))
            return moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)
    except ValueError:
        pass
    raise PriceError(f"valid_from={text!r} is no date; write it like 2025-09-05 or 2025-09-05T16:00+00:00.")


def _check_usd_per_mtok(name: str, value: Decimal) -> None:
    _check_number(name, value, Decimal(MAX_USD_PER_MTOK))
    _pico_usd_per_token(Fraction(value), name)


def _check_number(name: str, value: object, highest: Decimal) -> None:
    if not isinstance(value, Decimal) or not value.is_finite() or not 0 <= value <= highest:
        raise PriceError(f"{name}={value!r} must be a decimal.Decimal from 0 to {highest}, never a float.")


def _pico_usd_per_token(usd_per_mtok: Fraction, name: str) -> int:
    exact = usd_per_mtok * (PICO_USD_PER_USD // 10**6)
    if exact.denominator != 1:
        raise PriceError(f"{name}: a price in USD per million tokens may have six decimals, off-peak too; round it.")
    return exact.numerator


def _in_utc(moment: datetime, name: str) -> datetime:
    if not isinstance(_as_object(moment), datetime) or moment.tzinfo is None:
        raise PriceError(f"{name}={moment!r} must be a datetime with its time zone, like datetime.now(timezone.utc).")
    return moment.astimezone(timezone.utc)


def _as_object(value: object) -> object:
    """The value without its promised type: callers without a type checker pass floats and dates all the same."""
    return value


def _minute_of_day(text: object) -> int:
    if not isinstance(text, str) or not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", text):
        raise PriceError(f"off_peak_hours_utc: {text!r} is no time of day; write it like 16:30.")
    return int(text[:2]) * 60 + int(text[3:])


def _within(minute: int, start: int, end: int) -> bool:
    """Whether a minute lies in a span that may run past midnight."""
    return start <= minute < end if start < end else minute >= start or minute < end


def _deepseek(model: str, valid_from: str, prices: tuple[str, str, str], source: str, **off_peak: Any) -> Price:
    """A published row: hit, miss and output as on the page."""
    hit, miss, output = (Decimal(text) for text in prices)
    return Price(
        model=model,
        valid_from=_moment_from_text(valid_from),
        hit_usd_per_mtok=hit,
        miss_usd_per_mtok=miss,
        output_usd_per_mtok=output,
        source=source,
        **off_peak,
    )


_PAGE = "api-docs.deepseek.com/quick_start/pricing"
_NIGHT: tuple[tuple[str, str], ...] = (("16:30", "00:30"),)
_OUTSIDE_OFFICE_HOURS: tuple[tuple[str, str], ...] = (("04:00", "06:00"), ("10:00", "01:00"))
_HALF = Decimal("0.5")
# The page's R1 prices at night are the V3 ones, 0.035/0.135/0.550: the announced 75 % off in CNY, rounded in USD.
_R1_AT_NIGHT = (Decimal("0.035"), Decimal("0.135"), Decimal("0.550"))

DEFAULT_PRICE = Price(
    model=DEFAULT_MODEL,
    valid_from=datetime(1970, 1, 1, tzinfo=timezone.utc),
    hit_usd_per_mtok=Decimal("0.01"),
    miss_usd_per_mtok=Decimal("0.10"),
    output_usd_per_mtok=Decimal("0.40"),
    source="ours: a round number with DeepSeek-V3's proportions (hit 1/10, output 4 times a miss); nobody published it. "
    "What your machine really costs is in planner/cost.py.",
)

PRICES: tuple[Price, ...] = (
    DEFAULT_PRICE,
    _deepseek(
        "deepseek-chat",
        "2024-12-26",
        ("0.014", "0.14", "0.28"),
        "V3 at V2's price until 2025-02-08 16:00 UTC: the pricing page's footnote for the end, news0802 for hit and miss; "
        "output from memory (facts/deepseek.md)",
    ),
    _deepseek("deepseek-chat", "2025-02-08T16:00", ("0.07", "0.27", "1.10"), f"V3, {_PAGE}-details-usd"),
    _deepseek(
        "deepseek-chat",
        "2025-02-26T16:30",
        ("0.07", "0.27", "1.10"),
        f"V3, half price at night, {_PAGE}; the night prices announced 26 February 2025",
        off_peak_discount_fraction=_HALF,
        off_peak_hours_utc=_NIGHT,
    ),
    _deepseek("deepseek-chat", "2025-09-05T16:00", ("0.07", "0.56", "1.68"), f"V3.1, no night price, {_PAGE}"),
    _deepseek(
        "deepseek-chat", "2025-09-29", ("0.028", "0.28", "0.42"), "V3.2-Exp and V3.2, announcement of 29 September 2025"
    ),
    _deepseek("deepseek-reasoner", "2025-01-20", ("0.14", "0.55", "2.19"), f"R1, {_PAGE}-details-usd"),
    _deepseek(
        "deepseek-reasoner",
        "2025-02-26T16:30",
        ("0.14", "0.55", "2.19"),
        f"R1, about a quarter at night, {_PAGE}; the night prices announced 26 February 2025",
        off_peak_usd_per_mtok=_R1_AT_NIGHT,
        off_peak_hours_utc=_NIGHT,
    ),
    _deepseek("deepseek-reasoner", "2025-09-05T16:00", ("0.07", "0.56", "1.68"), f"V3.1, no night price, {_PAGE}"),
    _deepseek(
        "deepseek-reasoner",
        "2025-09-29",
        ("0.028", "0.28", "0.42"),
        "V3.2-Exp and V3.2, announcement of 29 September 2025",
    ),
    _deepseek(
        "deepseek-v4-flash",
        "2026-08-16T16:00",
        ("0.014", "0.44", "1.32"),
        f"V4-Flash, peak 01:00-04:00 and 06:00-10:00 UTC, {_PAGE}",
        off_peak_discount_fraction=_HALF,
        off_peak_hours_utc=_OUTSIDE_OFFICE_HOURS,
    ),
    _deepseek(
        "deepseek-v4-pro",
        "2026-08-16T16:00",
        ("0.044", "1.32", "3.96"),
        f"V4-Pro, peak 01:00-04:00 and 06:00-10:00 UTC, {_PAGE}",
        off_peak_discount_fraction=_HALF,
        off_peak_hours_utc=_OUTSIDE_OFFICE_HOURS,
    ),
    _deepseek(
        "deepseek-flash",
        "2026-09-10T04:00",
        ("0.006", "0.30", "1.20"),
        f"V4.1-Flash, peak 01:00-04:00 and 06:00-10:00 UTC on weekdays, {_PAGE}; holidays are not modelled",
        off_peak_discount_fraction=_HALF,
        off_peak_hours_utc=_OUTSIDE_OFFICE_HOURS,
        off_peak_weekends=True,
    ),
)
"""DeepSeek's published tables under the names its API takes, and our own default row. Rows before a model's first one
here, such as V4's launch prices, are left out where only second-hand numbers were at hand."""
