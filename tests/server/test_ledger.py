import csv
import io
import os
import random
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime, timezone
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from shoal.planner.prices import Price, PriceError
from shoal.server.keys import KeyStore, KeyStoreError
from shoal.server.ledger import BalanceError, Ledger, LedgerError

NOON = datetime(2025, 6, 1, 12, tzinfo=timezone.utc)
NIGHT = datetime(2025, 6, 1, 20, tzinfo=timezone.utc)
ROOT = Path(__file__).resolve().parents[2]
# USD per million tokens, as on DeepSeek's page; "mine" gets our default row.
PUBLISHED = {
    ("deepseek-chat", NOON): ("0.07", "0.27", "1.10"),
    ("deepseek-chat", NIGHT): ("0.035", "0.135", "0.55"),
    ("deepseek-reasoner", NOON): ("0.14", "0.55", "2.19"),
    ("deepseek-reasoner", NIGHT): ("0.035", "0.135", "0.55"),
    ("mine", NOON): ("0.01", "0.10", "0.40"),
    ("mine", NIGHT): ("0.01", "0.10", "0.40"),
}


def expected_usd(model: str, at: datetime, counts: tuple[int, int, int]) -> Fraction:
    """An independent price: fractions, and the published table as text."""
    return sum(
        Fraction(count) * Fraction(rate) / 10**6 for count, rate in zip(counts, PUBLISHED[model, at], strict=True)
    )


def new_key(path: Path, balance: str = "10") -> str:
    store = KeyStore(path)
    key_id = store.find(store.add("ann", Decimal(balance))).key_id
    store.close()
    return key_id


@pytest.fixture
def path(tmp_path):
    return tmp_path / "ledger.sqlite"


@pytest.fixture
def ledger(path):
    ledger = Ledger(path)
    yield ledger
    ledger.close()


def test_a_request_is_priced_and_debited_once(path, ledger) -> None:
    key = new_key(path)
    opened = ledger.open_entry("r1", key, "deepseek-chat", NOON, prompt_tokens=300, max_output_tokens=50)
    assert opened.state == "running"
    assert opened.reserved_usd == Decimal("0.000136")  # 300 misses at 0.27 and 50 written at 1.10 per million
    assert (ledger.balance(key), ledger.available(key)) == (Decimal(10), Decimal("9.999864"))
    counts = {"hit_tokens": 128, "miss_tokens": 172, "output_tokens": 41, "reasoning_tokens": 7, "joules": 2.5}
    closed = ledger.settle("r1", **counts)
    assert closed.state == "settled" and closed.reserved_usd == 0 and closed.closed_at is not None
    assert closed.cost_usd == Decimal("0.0001005")  # 8.96 + 46.44 + 45.1 millionths
    assert ledger.settle("r1", hit_tokens=1, miss_tokens=1, output_tokens=1) == closed
    assert ledger.entry("r1") == closed
    assert ledger.balance(key) == ledger.available(key) == Decimal("9.9998995")


def test_the_price_is_that_of_the_moment_of_opening(path) -> None:
    key = new_key(path)
    ledger = Ledger(path)
    ledger.open_entry("night", key, "deepseek-reasoner", NIGHT)
    ledger.close()
    dear = Price(
        model="deepseek-reasoner",
        valid_from=datetime(2024, 1, 1, tzinfo=timezone.utc),
        hit_usd_per_mtok=Decimal(999),
        miss_usd_per_mtok=Decimal(999),
        output_usd_per_mtok=Decimal(999),
        source="a test",
    )
    ledger = Ledger(path, [dear])
    cost = ledger.settle("night", hit_tokens=0, miss_tokens=0, output_tokens=10**6).cost_usd
    assert cost == Decimal("0.55")
    with pytest.raises(PriceError, match="no price for model 'mine'"):
        ledger.open_entry("r2", key, "mine", NOON)
    ledger.close()


def test_reservations_keep_concurrent_requests_from_spending_the_same_money(path, ledger) -> None:
    key = new_key(path, "0.000005")
    ledger.open_entry("r1", key, "mine", NOON, max_output_tokens=8)  # 3.2 millionths
    with pytest.raises(BalanceError, match=r"insufficient balance.*hold 0.0000032.*Top up"):
        ledger.open_entry("r2", key, "mine", NOON, max_output_tokens=5)  # 2 more millionths, 1.8 are left
    ledger.settle("r1", hit_tokens=0, miss_tokens=0, output_tokens=2)
    ledger.open_entry("r2", key, "mine", NOON, max_output_tokens=5)
    with pytest.raises(LedgerError, match="no entry for request 'r3'"):
        ledger.entry("r3")


def test_an_empty_balance_serves_nothing_and_a_dear_answer_is_debited_in_full(path, ledger) -> None:
    key = new_key(path, "0.000001")
    ledger.open_entry("r1", key, "mine", NOON)
    ledger.settle("r1", hit_tokens=0, miss_tokens=0, output_tokens=10)
    assert ledger.balance(key) == Decimal("-0.000003")
    with pytest.raises(BalanceError):
        ledger.open_entry("r2", key, "mine", NOON)


def test_requests_without_a_key_are_counted_and_nobody_pays(path, ledger) -> None:
    key = new_key(path)
    ledger.open_entry("r1", None, "mine", NOON, max_output_tokens=10**9)
    assert ledger.settle("r1", hit_tokens=0, miss_tokens=7, output_tokens=3).cost_usd == Decimal("0.0000019")
    assert ledger.balance(key) == 10
    assert ledger.totals().num_requests == 1 and ledger.totals(key).num_requests == 0


def test_revoked_and_unknown_keys_open_nothing_but_running_answers_are_settled(path, ledger) -> None:
    key = new_key(path)
    ledger.open_entry("r1", key, "mine", NOON)
    store = KeyStore(path)
    store.revoke(key)
    store.close()
    with pytest.raises(LedgerError, match="revoked"):
        ledger.open_entry("r2", key, "mine", NOON)
    with pytest.raises(KeyStoreError, match="no key has the id 'key-x'"):
        ledger.open_entry("r2", "key-x", "mine", NOON)
    with pytest.raises(KeyStoreError, match="no key has the id 'key-x'"):
        ledger.balance("key-x")
    ledger.settle("r1", hit_tokens=0, miss_tokens=0, output_tokens=5)
    assert ledger.balance(key) == Decimal("9.999998")


def test_impossible_entries_are_refused_and_change_nothing(path, ledger) -> None:
    key = new_key(path)
    ledger.open_entry("r1", key, "mine", NOON)
    with pytest.raises(LedgerError, match="'r1' has an entry already"):
        ledger.open_entry("r1", key, "mine", NOON)
    with pytest.raises(LedgerError, match="'r9'"):
        ledger.settle("r9", hit_tokens=0, miss_tokens=0, output_tokens=0)
    with pytest.raises(LedgerError, match="'r9'"):
        ledger.progress("r9", 1)
    with pytest.raises(LedgerError, match="hit_tokens=-1"):
        ledger.settle("r1", hit_tokens=-1, miss_tokens=0, output_tokens=0)
    with pytest.raises(LedgerError, match="reasoning_tokens=3 is more"):
        ledger.settle("r1", hit_tokens=0, miss_tokens=0, output_tokens=2, reasoning_tokens=3)
    with pytest.raises(LedgerError, match="joules=nan"):
        ledger.settle("r1", hit_tokens=0, miss_tokens=0, output_tokens=0, joules=float("nan"))
    with pytest.raises(PriceError, match="time zone"):
        ledger.open_entry("r2", key, "mine", datetime(2025, 6, 1))
    assert ledger.entry("r1").state == "running" and ledger.balance(key) == 10


def test_progress_never_goes_back_and_a_late_note_changes_nothing(path, ledger) -> None:
    key = new_key(path)
    ledger.open_entry("r1", key, "mine", NOON)
    ledger.progress("r1", 5, hit_tokens=64, miss_tokens=3, reasoning_tokens=2, joules=1.5)
    ledger.progress("r1", 4)
    entry = ledger.entry("r1")
    assert (entry.hit_tokens, entry.miss_tokens, entry.output_tokens) == (64, 3, 5)
    assert (entry.reasoning_tokens, entry.joules, entry.cost_usd) == (2, 1.5, 0)
    closed = ledger.settle("r1", hit_tokens=64, miss_tokens=3, output_tokens=6)
    ledger.progress("r1", 99)
    assert ledger.entry("r1") == closed


def test_export_and_totals_agree(path, ledger) -> None:
    key = new_key(path)
    for number in range(4):
        ledger.open_entry(f"r{number}", key, "deepseek-chat", NOON)
        ledger.progress(f"r{number}", number)
    for number in range(3):
        ledger.settle(f"r{number}", hit_tokens=64, miss_tokens=5, output_tokens=number + 1, joules=0.25)
    out = io.StringIO(newline="")
    assert ledger.export_csv(out) == 4
    rows = list(csv.DictReader(io.StringIO(out.getvalue())))
    totals = ledger.totals()
    assert [row["state"] for row in rows] == ["settled"] * 3 + ["running"]
    assert sum(Decimal(row["cost_usd"]) for row in rows) == totals.cost_usd == 10 - ledger.balance(key)
    assert sum(int(row["output_tokens"]) for row in rows) == totals.output_tokens == 1 + 2 + 3 + 3
    assert (totals.num_requests, totals.num_running, totals.num_recovered, totals.joules) == (4, 1, 0, 0.75)
    assert "E" not in rows[0]["cost_usd"]


def test_totals_do_not_overflow(path, ledger) -> None:
    dear = {"hit_tokens": 10**9, "miss_tokens": 10**9, "output_tokens": 10**9}
    ledger.prices = (
        Price(
            model="default",
            valid_from=datetime(2025, 1, 1, tzinfo=timezone.utc),
            hit_usd_per_mtok=Decimal(1000),
            miss_usd_per_mtok=Decimal(1000),
            output_usd_per_mtok=Decimal("999.999999"),
            source="a test",
        ),
    )
    for number in range(5):
        ledger.open_entry(f"r{number}", None, "m", NOON)
        ledger.settle(f"r{number}", **dear)
    assert ledger.totals().cost_usd == 5 * Decimal("2999999.999")


def test_many_threads_settle_one_request_once(path, ledger) -> None:
    key = new_key(path)
    for number in range(5):
        ledger.open_entry(f"r{number}", key, "mine", NOON)

    def work() -> None:
        for number in range(5):
            ledger.progress(f"r{number}", 10)
            ledger.settle(f"r{number}", hit_tokens=0, miss_tokens=0, output_tokens=10)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert ledger.balance(key) == 10 - 5 * Decimal("0.000004")


COUNTS = st.tuples(st.integers(0, 10**6), st.integers(0, 10**6), st.integers(0, 10**6))
STEPS = st.one_of(
    st.tuples(st.just("open"), st.integers(0, 1), st.sampled_from(sorted({model for model, _ in PUBLISHED}))),
    st.tuples(st.just("progress"), st.integers(0, 7), COUNTS),
    st.tuples(st.just("settle"), st.integers(0, 7), COUNTS),
    st.tuples(st.just("crash"), st.just(0), st.none()),
)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(steps=st.lists(STEPS, max_size=20), grants=st.tuples(*[st.integers(0, 10**13)] * 2))
def test_entries_and_balance_always_add_up_to_the_money_given(steps, grants) -> None:
    with tempfile.TemporaryDirectory() as folder:
        check_history(Path(folder) / "ledger.sqlite", steps, grants)


def check_history(path: Path, steps: list[tuple], grants: tuple[int, int]) -> None:
    """Play a random history, keep an independent account of it in fractions, and compare after every step."""
    keys = [new_key(path, f"{grant}e-12") for grant in grants]
    ledger = Ledger(path)
    running: dict[str, tuple[int, str, datetime, list[int]]] = {}
    balance = [Fraction(grant, 10**12) for grant in grants]
    names: list[str] = []
    for kind, number, detail in steps:
        name = names[number % len(names)] if names else "nobody"
        if kind == "open":
            name, at = f"r{len(names)}", (NOON, NIGHT)[len(names) % 2]
            try:
                ledger.open_entry(name, keys[number], detail, at, prompt_tokens=9, max_output_tokens=5)
            except BalanceError:
                continue
            running[name] = (number, detail, at, [0, 0, 0])
            names.append(name)
        elif kind == "progress" and names:
            ledger.progress(name, detail[2], hit_tokens=detail[0], miss_tokens=detail[1])
            if name in running:
                running[name][3][:] = map(max, running[name][3], detail)
        elif kind == "settle" and names:
            ledger.settle(name, hit_tokens=detail[0], miss_tokens=detail[1], output_tokens=detail[2])
            if name in running:
                owner, model, at, _ = running.pop(name)
                balance[owner] -= expected_usd(model, at, detail)
        elif kind == "crash":
            ledger.close()
            ledger = Ledger(path)
            assert [entry.request_id for entry in ledger.recover()] == list(running)
            for owner, model, at, counts in running.values():
                balance[owner] -= expected_usd(model, at, counts)
            running.clear()
        for owner, key in enumerate(keys):
            assert Fraction(ledger.balance(key)) == balance[owner]
            assert ledger.totals(key).cost_usd + ledger.balance(key) == Decimal(f"{grants[owner]}e-12")
    ledger.close()


ANSWERED_BUT_NOT_SETTLED = """
import sys, time
from datetime import datetime, timezone
from shoal.server.ledger import Ledger
ledger = Ledger(sys.argv[1])
at = datetime(2025, 6, 1, 12, tzinfo=timezone.utc)
ledger.open_entry("done", sys.argv[2], "deepseek-chat", at, prompt_tokens=100, max_output_tokens=50)
ledger.settle("done", hit_tokens=64, miss_tokens=36, output_tokens=20)
ledger.open_entry("cut", sys.argv[2], "deepseek-chat", at, prompt_tokens=100, max_output_tokens=50)
ledger.progress("cut", 10, hit_tokens=0, miss_tokens=100, reasoning_tokens=4, joules=1.25)
ledger.progress("cut", 42)
ledger.open_entry("silent", sys.argv[2], "deepseek-chat", at, prompt_tokens=100, max_output_tokens=50)
print("the answer is sent", flush=True)
time.sleep(60)
ledger.settle("cut", hit_tokens=0, miss_tokens=100, output_tokens=42)
"""

BUSY_SERVER = """
import sys
from datetime import datetime, timezone
from shoal.server.ledger import Ledger
ledger = Ledger(sys.argv[1])
at = datetime(2025, 6, 1, 12, tzinfo=timezone.utc)
for number in range(10**6):
    name = f"{sys.argv[3]}-{number}"
    ledger.open_entry(name, sys.argv[2], "deepseek-chat", at, prompt_tokens=9, max_output_tokens=7)
    for written in (3, 7):
        ledger.progress(name, written, hit_tokens=0, miss_tokens=9)
        print("noted", name, written, flush=True)
    ledger.settle(name, hit_tokens=0, miss_tokens=9, output_tokens=7)
    print("settled", name, 7, flush=True)
"""


def start(program: str, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", program, *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, env={**os.environ, "COLUMNS": "200"})


def kill(process: subprocess.Popen[str]) -> str:
    process.send_signal(signal.SIGKILL)
    rest, _ = process.communicate()
    assert process.returncode == -signal.SIGKILL
    return rest


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_a_server_killed_between_answer_and_settlement_loses_neither_money_nor_tokens(path) -> None:
    key = new_key(path)
    process = start(ANSWERED_BUT_NOT_SETTLED, str(path), key)
    assert process.stdout.readline() == "the answer is sent\n"
    kill(process)
    ledger = Ledger(path)
    done_usd = Decimal("0.0000362")  # 4.48 + 9.72 + 22 millionths
    assert ledger.balance(key) == 10 - done_usd
    recovered = {entry.request_id: entry for entry in ledger.recover()}
    assert sorted(recovered) == ["cut", "silent"]
    cut = recovered["cut"]
    assert (cut.state, cut.hit_tokens, cut.miss_tokens, cut.output_tokens) == ("recovered", 0, 100, 42)
    assert (cut.reasoning_tokens, cut.joules, cut.cost_usd) == (4, 1.25, Decimal("0.0000732"))  # 27 + 46.2 millionths
    assert recovered["silent"].cost_usd == 0
    assert ledger.recover() == ()
    assert ledger.settle("cut", hit_tokens=0, miss_tokens=100, output_tokens=42) == cut
    assert ledger.balance(key) == ledger.available(key) == 10 - done_usd - cut.cost_usd
    assert ledger.totals(key).num_recovered == 2
    ledger.close()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is a POSIX signal")
def test_kills_at_random_moments_never_falsify_the_books(path) -> None:
    key = new_key(path)
    rng = random.Random(5)
    said: dict[str, int] = {}
    for life in range(4):
        process = start(BUSY_SERVER, str(path), key, str(life))
        lines = [process.stdout.readline()]
        time.sleep(rng.uniform(0.02, 0.15))
        lines += kill(process).splitlines(keepends=True)
        for line in lines:
            if line.endswith("\n"):  # the last line may be torn
                _, name, written = line.split()
                said[name] = int(written)
        ledger = Ledger(path)
        assert len(ledger.recover()) <= 1
        for name, written in said.items():
            entry = ledger.entry(name)
            assert entry.state != "running" and entry.output_tokens >= written
            assert entry.cost_usd == (9 * Decimal("0.27") + entry.output_tokens * Decimal("1.10")) / 10**6
        assert ledger.totals(key).cost_usd + ledger.balance(key) == 10
        ledger.close()
    assert len(said) >= 4
