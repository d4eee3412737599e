import json
from datetime import datetime, timedelta, timezone
from decimal import Decimal, localcontext
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.planner.prices import (
    DEFAULT_PRICE,
    PRICES,
    Price,
    PriceError,
    charge,
    is_off_peak,
    load_prices,
    pico_usd,
    price_at,
    token_pico_usd,
    usd,
)

MILLION = 10**6


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=timezone.utc)


def row(**changed: object) -> Price:
    values: dict[str, object] = {
        "model": "m",
        "valid_from": utc("2025-01-01"),
        "hit_usd_per_mtok": Decimal("0.1"),
        "miss_usd_per_mtok": Decimal("0.2"),
        "output_usd_per_mtok": Decimal("0.3"),
        "source": "a test",
    }
    return Price(**(values | changed))  # type: ignore[arg-type]


def million_each(model: str, when: str) -> tuple[str, str, str]:
    """What a million hit, miss and output tokens cost, as text."""
    price = price_at(model, utc(when))
    counts = ((MILLION, 0, 0), (0, MILLION, 0), (0, 0, MILLION))
    hit, miss, output = (f"{charge(price, utc(when), *count).normalize():f}" for count in counts)
    return hit, miss, output


@pytest.mark.parametrize(
    ("model", "when", "published"),
    [
        ("deepseek-chat", "2025-02-08T15:59", ("0.014", "0.14", "0.28")),
        ("deepseek-chat", "2025-02-08T16:00", ("0.07", "0.27", "1.1")),
        ("deepseek-chat", "2025-02-26T00:00", ("0.07", "0.27", "1.1")),
        ("deepseek-chat", "2025-06-01T16:29", ("0.07", "0.27", "1.1")),
        ("deepseek-chat", "2025-06-01T16:30", ("0.035", "0.135", "0.55")),
        ("deepseek-chat", "2025-06-01T00:29", ("0.035", "0.135", "0.55")),
        ("deepseek-chat", "2025-06-01T00:30", ("0.07", "0.27", "1.1")),
        ("deepseek-reasoner", "2025-02-01T20:00", ("0.14", "0.55", "2.19")),
        ("deepseek-reasoner", "2025-06-01T12:00", ("0.14", "0.55", "2.19")),
        ("deepseek-reasoner", "2025-06-01T20:00", ("0.035", "0.135", "0.55")),
        ("deepseek-reasoner", "2025-09-05T20:00", ("0.07", "0.56", "1.68")),
        ("deepseek-chat", "2025-12-24T20:00", ("0.028", "0.28", "0.42")),
        ("deepseek-v4-pro", "2026-08-17T02:00", ("0.044", "1.32", "3.96")),
        ("deepseek-v4-pro", "2026-08-17T05:00", ("0.022", "0.66", "1.98")),
        ("deepseek-flash", "2026-09-14T09:59", ("0.006", "0.3", "1.2")),  # a Monday
        ("deepseek-flash", "2026-09-13T09:59", ("0.003", "0.15", "0.6")),  # a Sunday
    ],
)
def test_published_prices_come_out_at_their_moment(model: str, when: str, published: tuple[str, str, str]) -> None:
    assert million_each(model, when) == published


def test_day_6_costs_what_deepseek_published() -> None:
    # open-infra-index day 6: 608 B input tokens, of which 342 B hits, 168 B output at R1's day price: 562,027 USD.
    price = price_at("deepseek-reasoner", utc("2025-02-27T12:00"))
    revenue = charge(price, utc("2025-02-27T12:00"), 342 * 10**9, 266 * 10**9, 168 * 10**9)
    assert revenue == Decimal(562_100)
    assert abs(revenue - 562_027) / 562_027 < Decimal("0.0002")


def test_a_moment_in_another_time_zone_is_the_same_moment() -> None:
    beijing = timezone(timedelta(hours=8))
    price = price_at("deepseek-chat", datetime(2025, 6, 2, 0, 30, tzinfo=beijing))
    assert is_off_peak(price, datetime(2025, 6, 2, 0, 30, tzinfo=beijing))
    assert not is_off_peak(price, datetime(2025, 6, 2, 8, 30, tzinfo=beijing))


def test_models_trained_here_get_the_default_row_which_says_it_is_ours() -> None:
    assert price_at("my-shoal", utc("2031-01-01")) is DEFAULT_PRICE
    assert DEFAULT_PRICE.source.startswith("ours")
    with pytest.raises(PriceError, match=r"'deepseek-chatt', did you mean 'deepseek-chat'"):
        price_at("deepseek-chatt", utc("2025-06-01"), [price for price in PRICES if price is not DEFAULT_PRICE])


def test_a_model_without_a_price_yet_is_refused() -> None:
    with pytest.raises(PriceError, match=r"2020-01-01 00:00 UTC: its first row is from 2024-12-26"):
        price_at("deepseek-chat", utc("2020-01-01"))


@given(
    counts=st.tuples(*[st.integers(0, 10**15)] * 3),
    micro_usd=st.tuples(*[st.integers(0, 10**9)] * 3),
    hour=st.integers(0, 23),
)
def test_a_charge_is_exact_at_any_size_and_decimal_precision(counts, micro_usd, hour) -> None:
    hit, miss, output = (Decimal(number).scaleb(-6) for number in micro_usd)
    price = row(hit_usd_per_mtok=hit, miss_usd_per_mtok=miss, output_usd_per_mtok=output)
    expected = sum(Fraction(c) * Fraction(m, 10**12) for c, m in zip(counts, micro_usd, strict=True))
    with localcontext() as context:
        context.prec = 3
        cost = charge(price, utc(f"2025-06-01T{hour:02}:00"), *counts)
    assert Fraction(cost) == expected
    assert usd(pico_usd(cost)) == cost


def test_one_token_costs_a_whole_number_of_pico_usd() -> None:
    assert token_pico_usd(row(hit_usd_per_mtok=Decimal("0.003625")), utc("2025-06-01"))[0] == 3625
    with pytest.raises(PriceError, match="six decimals"):
        row(hit_usd_per_mtok=Decimal("0.0036255"))
    with pytest.raises(PriceError, match="six decimals"):
        row(
            hit_usd_per_mtok=Decimal("0.003625"),
            off_peak_discount_fraction=Decimal("0.5"),
            off_peak_hours_utc=(("01:00", "02:00"),),
        )


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hit_usd_per_mtok": 0.1}, "never a float"),
        ({"hit_usd_per_mtok": Decimal("NaN")}, "from 0 to 1000"),
        ({"output_usd_per_mtok": Decimal(-1)}, "from 0 to 1000"),
        ({"valid_from": datetime(2025, 1, 1)}, "time zone"),
        ({"source": ""}, "source"),
        ({"off_peak_discount_fraction": Decimal("0.5")}, "both or neither"),
        ({"off_peak_hours_utc": (("01:00", "02:00"),)}, "both or neither"),
        ({"off_peak_discount_fraction": Decimal("1.5")}, "from 0 to 1"),
        ({"off_peak_discount_fraction": Decimal("0.5"), "off_peak_hours_utc": (("24:00", "02:00"),)}, "24:00"),
        ({"off_peak_discount_fraction": Decimal("0.5"), "off_peak_hours_utc": (("02:00", "02:00"),)}, "empty"),
        ({"off_peak_usd_per_mtok": (Decimal(1),), "off_peak_weekends": True}, "three prices"),
        (
            {
                "off_peak_usd_per_mtok": (Decimal(1),) * 3,
                "off_peak_discount_fraction": Decimal("0.5"),
                "off_peak_weekends": True,
            },
            "not both",
        ),
    ],
)
def test_rows_that_cannot_be_are_refused(changed: dict[str, object], message: str) -> None:
    with pytest.raises(PriceError, match=message):
        row(**changed)


def test_negative_counts_naive_moments_and_floats_are_refused() -> None:
    with pytest.raises(PriceError, match="zero or more"):
        charge(row(), utc("2025-06-01"), -1, 0, 0)
    with pytest.raises(PriceError, match="time zone"):
        charge(row(), datetime(2025, 6, 1), 1, 0, 0)
    with pytest.raises(PriceError, match="never a float"):
        pico_usd(0.1)  # type: ignore[arg-type]
    with pytest.raises(PriceError, match="twelve decimals"):
        pico_usd(Decimal("1e-13"))


def test_a_users_table_is_read_exactly(tmp_path) -> None:
    path = tmp_path / "prices.json"
    path.write_text(
        """[{"model": "default", "valid_from": "2025-01-01", "hit_usd_per_mtok": 0.1, "miss_usd_per_mtok": "0.3",
        "output_usd_per_mtok": 1, "off_peak_discount_fraction": 0.2, "off_peak_hours_utc": [["22:00", "06:00"]],
        "source": "our contract"},
        {"model": "m", "valid_from": "2025-03-01T12:00Z", "hit_usd_per_mtok": 1, "miss_usd_per_mtok": 1,
        "output_usd_per_mtok": 1, "off_peak_usd_per_mtok": [0, 0, "0.5"], "off_peak_weekends": true, "source": "x"}]"""
    )
    table = load_prices(path)
    by_day, by_night = utc("2025-06-02T12:00"), utc("2025-06-02T23:00")
    assert charge(price_at("anything", by_day, table), by_day, 3, 0, 0) == Decimal("3e-7")
    assert charge(price_at("anything", by_night, table), by_night, 3, 5, 7) == Decimal("0.8") * Decimal("8.8e-6")
    sunday = utc("2025-06-01T12:00")
    assert charge(price_at("m", sunday, table), sunday, 9, 9, 2) == Decimal("1e-6")
    assert table[1].valid_from == utc("2025-03-01T12:00")


GOOD = {
    "model": "m",
    "valid_from": "2025-01-01",
    "hit_usd_per_mtok": "1",
    "miss_usd_per_mtok": "1",
    "output_usd_per_mtok": "1",
    "source": "x",
}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("[", "no JSON"),
        ([], "at least one row"),
        ({"model": "m"}, "JSON list"),
        ([3], "row 1: a row must be an object"),
        ([GOOD, {**GOOD, "hit_usd_per_mtock": "1"}], "row 2: unknown key.*did you mean 'hit_usd_per_mtok'"),
        ([{"model": "m"}], "row 1: valid_from, .* missing"),
        ([{**GOOD, "hit_usd_per_mtok": "cheap"}], "hit_usd_per_mtok='cheap' is no number"),
        ([{**GOOD, "hit_usd_per_mtok": True}], "is no number"),
        ([{**GOOD, "hit_usd_per_mtok": float("nan")}], "from 0 to 1000"),
        ([{**GOOD, "valid_from": "soon"}], "valid_from='soon' is no date"),
        ([{**GOOD, "off_peak_hours_utc": ["16:30-00:30"]}], "list of pairs"),
        ([{**GOOD, "off_peak_hours_utc": [[1, 2]]}], "no time of day"),
        ([{**GOOD, "off_peak_weekends": "yes"}], "true or false"),
        ([{**GOOD, "off_peak_usd_per_mtok": 3}], "three prices"),
        ([{**GOOD, "model": 3}], "must be text"),
        ([GOOD, GOOD], "two rows for m from 2025-01-01"),
    ],
)
def test_mistakes_in_a_users_table_are_named_with_their_row(tmp_path, rows: object, message: str) -> None:
    path = tmp_path / "prices.json"
    path.write_text(rows if isinstance(rows, str) else json.dumps(rows))
    with pytest.raises(PriceError, match=message):
        load_prices(path)


def test_a_missing_table_is_named(tmp_path) -> None:
    with pytest.raises(PriceError, match=r"cannot read the price table .*none.json"):
        load_prices(tmp_path / "none.json")
