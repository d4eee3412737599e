"""What every request used and cost: a ledger that a crash can interrupt but not falsify.

An entry has two phases. `open_entry` writes it as running before the first token is sent, with the price of that moment
and a reservation that keeps a key's many concurrent requests from spending the same balance; `settle` puts in the final
counts, prices them and debits the key in one transaction. In between, `progress` notes every now and then how far the
answer is. A process that dies in between leaves a running entry, and `recover`, called when the server starts, closes it
at its last progress: tokens that were sent and noted are charged exactly once, tokens after the last note are given away,
never charged twice. The life of an entry: running -> settled, or running -> crash -> recovered.

Entries and balances share one file (see `keys.py`), hence for every key, at any moment,
granted money = balance + sum of the entries' costs, to the last pico-USD.

The price of a request is that of the moment it was opened, stored in the entry: whoever asks knows the price beforehand,
and a table changed later changes no old entry. Only one server may write to one ledger file: `recover` takes every
running entry for a dead one's.
"""

import csv
import math
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import TextIO

from shoal.errors import ShoalError
from shoal.planner.prices import PRICES, Price, price_at, token_pico_usd, usd
from shoal.server.keys import Database, KeyStore, now_utc, one_key

MAX_TOKENS = 10**9
"""Bound of one count; with the highest price of `planner/prices.py` a cost stays within SQLite's 64-bit integers."""

_SCHEMA = """
CREATE TABLE IF NOT EXISTS entries (
    request_id TEXT PRIMARY KEY,
    key_id TEXT REFERENCES keys (key_id),
    model TEXT NOT NULL,
    state TEXT NOT NULL CHECK (state IN ('running', 'settled', 'recovered')),
    opened_at TEXT NOT NULL,
    closed_at TEXT,
    hit_rate_pico_usd INTEGER NOT NULL,
    miss_rate_pico_usd INTEGER NOT NULL,
    output_rate_pico_usd INTEGER NOT NULL,
    reserved_pico_usd INTEGER NOT NULL,
    hit_tokens INTEGER NOT NULL DEFAULT 0,
    miss_tokens INTEGER NOT NULL DEFAULT 0,
    output_tokens INTEGER NOT NULL DEFAULT 0,
    reasoning_tokens INTEGER NOT NULL DEFAULT 0,
    joules REAL NOT NULL DEFAULT 0,
    cost_pico_usd INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS entries_running ON entries (key_id, reserved_pico_usd) WHERE state = 'running';
CREATE INDEX IF NOT EXISTS entries_of_key ON entries (key_id)
"""


class LedgerError(ShoalError):
    """An entry that cannot be: unknown, opened twice, or with impossible counts."""


class BalanceError(ShoalError):
    """The key's money does not cover the request; the server answers 402."""


@dataclass(frozen=True, kw_only=True)
class Entry:
    """One request in the ledger."""

    request_id: str
    key_id: str | None
    model: str
    state: str
    """running, settled or recovered."""
    opened_at: datetime
    closed_at: datetime | None
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    reasoning_tokens: int
    """Part of the output tokens."""
    joules: float
    hit_usd_per_token: Decimal
    miss_usd_per_token: Decimal
    output_usd_per_token: Decimal
    reserved_usd: Decimal
    """Held back from the key's balance while running, 0 afterwards."""
    cost_usd: Decimal
    """0 while running."""


@dataclass(frozen=True, kw_only=True)
class Totals:
    """Sums over entries. Tokens and joules count running entries up to their last progress; money only closed ones."""

    num_requests: int
    num_running: int
    num_recovered: int
    hit_tokens: int
    miss_tokens: int
    output_tokens: int
    reasoning_tokens: int
    joules: float
    cost_usd: Decimal


class Ledger:
    """The entries of one database file, the same one that the `KeyStore` has. Safe to use from many threads.

    Args:
        prices: the table that prices requests, in the place of DeepSeek's and our own.
    """

    def __init__(self, path: Path | str, prices: Iterable[Price] = PRICES) -> None:
        self.prices = tuple(prices)
        KeyStore(path).close()
        self.database = Database(path)
        self.database.create(_SCHEMA)
        # Progress comes often and is worth little: it does not wait for the disk, and a killed process loses none of it.
        self.progress_database = Database(path, synchronous="NORMAL")
        # SQLite has one writer at a time: waiting for our own lock is quicker than polling its.
        self.progress_database.lock = self.database.lock

    def open_entry(
        self,
        request_id: str,
        key_id: str | None,
        model: str,
        at: datetime,
        *,
        prompt_tokens: int = 0,
        max_output_tokens: int = 0,
    ) -> Entry:
        """Write the entry as running and reserve its highest cost: every prompt token a miss, all output used.

        Args:
            key_id: None for a server without keys: such requests are counted and priced, and nobody pays.
            at: fixes the price.
        Raises:
            BalanceError: the key's balance, less its other reservations, does not cover the estimate or is used up.
            LedgerError: the request has an entry already, or the key was revoked.
            KeyStoreError: no such key.
            PriceError: the model has no price at that moment.
        """
        counts = _checked_counts(prompt_tokens=prompt_tokens, max_output_tokens=max_output_tokens)
        rates = token_pico_usd(price_at(model, at, self.prices), at)
        reserve = counts["prompt_tokens"] * max(rates[0], rates[1]) + counts["max_output_tokens"] * rates[2]
        with self.database.transaction() as connection:
            if _find(connection, request_id) is not None:
                raise LedgerError(f"request {request_id!r} has an entry already; give every request an id of its own.")
            if key_id is not None:
                _check_funds(connection, key_id, reserve, is_free=not any(rates))
            connection.execute(
                "INSERT INTO entries (request_id, key_id, model, state, opened_at, hit_rate_pico_usd, "
                "miss_rate_pico_usd, output_rate_pico_usd, reserved_pico_usd) VALUES (?, ?, ?, 'running', ?, ?, ?, ?, ?)",
                (request_id, key_id, model, at.astimezone(timezone.utc).isoformat(), *rates, reserve),
            )
            return _entry(_known(connection, request_id))

    def progress(
        self,
        request_id: str,
        output_tokens: int,
        *,
        hit_tokens: int | None = None,
        miss_tokens: int | None = None,
        reasoning_tokens: int | None = None,
        joules: float | None = None,
    ) -> None:
        """Note how far a running answer is: totals so far, which never go back; None leaves a count as it was.

        Cheap (no wait for the disk). A note that comes after the entry was closed changes nothing.

        Raises:
            LedgerError: no such entry, or impossible counts.
        """
        given = {"output_tokens": output_tokens, "hit_tokens": hit_tokens, "miss_tokens": miss_tokens}
        given["reasoning_tokens"] = reasoning_tokens
        counts = _checked_counts(**{name: count for name, count in given.items() if count is not None})
        assignments = [f"{name} = max({name}, ?)" for name in counts]
        values: list[int | float | str] = list(counts.values())
        if joules is not None:
            assignments.append("joules = max(joules, ?)")
            values.append(_checked_joules(joules))
        with self.progress_database.transaction() as connection:
            updated = connection.execute(
                f"UPDATE entries SET {', '.join(assignments)} WHERE request_id = ? AND state = 'running'",
                (*values, request_id),
            )
            if updated.rowcount == 0:
                _known(connection, request_id)

    def settle(
        self,
        request_id: str,
        *,
        hit_tokens: int,
        miss_tokens: int,
        output_tokens: int,
        reasoning_tokens: int = 0,
        joules: float = 0.0,
    ) -> Entry:
        """Close an entry with its final counts and debit its key, in one transaction.

        The first closing stands: settling again, or after `recover`, returns the entry as it was closed and takes no
        money. A cost above the reservation is debited in full, below zero if need be: the tokens were used.

        Raises:
            LedgerError: no such entry, or impossible counts.
        """
        counts = _checked_counts(
            hit_tokens=hit_tokens,
            miss_tokens=miss_tokens,
            output_tokens=output_tokens,
            reasoning_tokens=reasoning_tokens,
        )
        if reasoning_tokens > output_tokens:
            raise LedgerError(
                f"reasoning_tokens={reasoning_tokens} is more than output_tokens={output_tokens}, of which it is a part."
            )
        _checked_joules(joules)
        with self.database.transaction() as connection:
            row = _known(connection, request_id)
            if row["state"] == "running":
                connection.execute(
                    "UPDATE entries SET hit_tokens = ?, miss_tokens = ?, output_tokens = ?, reasoning_tokens = ?, "
                    "joules = ? WHERE request_id = ?",
                    (*counts.values(), joules, request_id),
                )
                _close(connection, request_id, "settled")
            return _entry(_known(connection, request_id))

    def recover(self) -> tuple[Entry, ...]:
        """Close what a crash left running, each at its last progress; call it once, before the server takes requests."""
        with self.database.transaction() as connection:
            left = connection.execute(
                "SELECT request_id FROM entries WHERE state = 'running' ORDER BY rowid"
            ).fetchall()
            for row in left:
                _close(connection, row["request_id"], "recovered")
            return tuple(_entry(_known(connection, row["request_id"])) for row in left)

    def entry(self, request_id: str) -> Entry:
        """One entry.

        Raises:
            LedgerError: no such entry.
        """
        with self.database.lock:
            return _entry(_known(self.database.connection, request_id))

    def balance(self, key_id: str) -> Decimal:
        """The key's money in USD, reservations of running requests not taken off.

        Raises:
            KeyStoreError: no such key.
        """
        with self.database.lock:
            return usd(one_key(self.database.connection, key_id)["balance_pico_usd"])

    def available(self, key_id: str) -> Decimal:
        """The key's money that no running request holds back.

        Raises:
            KeyStoreError: no such key.
        """
        with self.database.transaction() as connection:
            return usd(one_key(connection, key_id)["balance_pico_usd"] - _reserved(connection, key_id))

    def totals(self, key_id: str | None = None) -> Totals:
        """Sums over all entries, or over one key's."""
        where, values = ("", ()) if key_id is None else (" WHERE key_id = ?", (key_id,))
        row = self.database.rows(
            "SELECT count(*) AS num_requests, coalesce(sum(state = 'running'), 0) AS num_running, "
            "coalesce(sum(state = 'recovered'), 0) AS num_recovered, coalesce(sum(hit_tokens), 0) AS hit_tokens, "
            "coalesce(sum(miss_tokens), 0) AS miss_tokens, coalesce(sum(output_tokens), 0) AS output_tokens, "
            "coalesce(sum(reasoning_tokens), 0) AS reasoning_tokens, coalesce(sum(joules), 0.0) AS joules, "
            # Two sums, because one of pico-USD would run over 64 bits at nine million USD.
            "coalesce(sum(cost_pico_usd / 1000000), 0) AS cost_micro_usd, "
            f"coalesce(sum(cost_pico_usd % 1000000), 0) AS cost_rest_pico_usd FROM entries{where}",
            values,
        )[0]
        cost_usd = usd(row["cost_micro_usd"] * 10**6 + row["cost_rest_pico_usd"])
        counted = {field.name: row[field.name] for field in fields(Totals) if field.name != "cost_usd"}
        return Totals(**counted, cost_usd=cost_usd)

    def export_csv(self, out: TextIO) -> int:
        """Write every entry as a line of CSV, oldest first, and return how many. Open files with `newline=""`.

        Money is written in full, without an exponent. Reads through a connection of its own: requests go on meanwhile.
        """
        names = [field.name for field in fields(Entry)]
        writer = csv.writer(out)
        writer.writerow(names)
        num_entries = 0
        reader = Database(self.database.path)
        try:
            for row in reader.connection.execute("SELECT * FROM entries ORDER BY rowid"):
                entry = _entry(row)
                writer.writerow([_cell(getattr(entry, name)) for name in names])
                num_entries += 1
        finally:
            reader.close()
        return num_entries

    def close(self) -> None:
        """Close the file. Running entries stay as they are, for `recover`."""
        self.progress_database.close()
        self.database.close()


def _check_funds(connection: sqlite3.Connection, key_id: str, reserve: int, *, is_free: bool) -> None:
    """Refuse a revoked key, and one whose money is spent or held by its other requests."""
    key = one_key(connection, key_id)
    if key["revoked_at"] is not None:
        raise LedgerError(f"key {key_id} was revoked on {key['revoked_at'][:10]}; use another key.")
    reserved = _reserved(connection, key_id)
    available = key["balance_pico_usd"] - reserved
    if is_free or 0 < available >= reserve:
        return
    raise BalanceError(
        f"insufficient balance: key {key_id} has {usd(key['balance_pico_usd']):f} USD, of which its running requests hold "
        f"{usd(reserved):f}; this request may cost {usd(reserve):f}. Top up the key, lower max_tokens, or wait."
    )


def _reserved(connection: sqlite3.Connection, key_id: str) -> int:
    query = "SELECT coalesce(sum(reserved_pico_usd), 0) FROM entries WHERE state = 'running' AND key_id = ?"
    return int(connection.execute(query, (key_id,)).fetchone()[0])


def _close(connection: sqlite3.Connection, request_id: str, state: str) -> None:
    """Price a running entry by the counts it holds, and debit its key."""
    row = _known(connection, request_id)
    cost = sum(row[f"{kind}_tokens"] * row[f"{kind}_rate_pico_usd"] for kind in ("hit", "miss", "output"))
    connection.execute(
        "UPDATE entries SET state = ?, closed_at = ?, cost_pico_usd = ?, reserved_pico_usd = 0 WHERE request_id = ?",
        (state, now_utc().isoformat(), cost, request_id),
    )
    connection.execute(
        "UPDATE keys SET balance_pico_usd = balance_pico_usd - ? WHERE key_id = ?", (cost, row["key_id"])
    )


def _find(connection: sqlite3.Connection, request_id: str) -> sqlite3.Row | None:
    row: sqlite3.Row | None = connection.execute("SELECT * FROM entries WHERE request_id = ?", (request_id,)).fetchone()
    return row


def _known(connection: sqlite3.Connection, request_id: str) -> sqlite3.Row:
    row = _find(connection, request_id)
    if row is None:
        raise LedgerError(f"no entry for request {request_id!r}; open one before the first token is sent.")
    return row


def _entry(row: sqlite3.Row) -> Entry:
    return Entry(
        request_id=row["request_id"],
        key_id=row["key_id"],
        model=row["model"],
        state=row["state"],
        opened_at=datetime.fromisoformat(row["opened_at"]),
        closed_at=None if row["closed_at"] is None else datetime.fromisoformat(row["closed_at"]),
        hit_tokens=row["hit_tokens"],
        miss_tokens=row["miss_tokens"],
        output_tokens=row["output_tokens"],
        reasoning_tokens=row["reasoning_tokens"],
        joules=row["joules"],
        hit_usd_per_token=usd(row["hit_rate_pico_usd"]),
        miss_usd_per_token=usd(row["miss_rate_pico_usd"]),
        output_usd_per_token=usd(row["output_rate_pico_usd"]),
        reserved_usd=usd(row["reserved_pico_usd"]),
        cost_usd=usd(row["cost_pico_usd"]),
    )


def _cell(value: object) -> object:
    if isinstance(value, Decimal):
        return f"{value:f}"
    return value.isoformat() if isinstance(value, datetime) else value


def _checked_counts(**counts: int) -> dict[str, int]:
    for name, count in counts.items():
        if not 0 <= count <= MAX_TOKENS:
            raise LedgerError(f"{name}={count} is no count of one request's tokens; it must be from 0 to {MAX_TOKENS}.")
    return counts


def _checked_joules(joules: float) -> float:
    if not 0 <= joules < math.inf:
        raise LedgerError(f"joules={joules} must be zero or a positive number.")
    return joules
