"""Who may ask: API keys with a balance and limits, in one SQLite file shared with the ledger.

A secret is shown once, when the key is made; the file keeps its SHA-256. A fast hash is enough because the secret is 256
random bits and not a password: there is nothing to guess. A secret is looked up by comparing its digest with every live
one in constant time, so neither the place nor the length of a partial match can be timed.

Balances lie in the same file as the ledger's entries because a debit and its entry must be one transaction: two files
cannot be changed together across a power cut. The file is in WAL mode with synchronous=FULL, so what was committed is on
the disk, and readers never wait for the writer (sqlite.org/wal.html, sqlite.org/pragma.html#pragma_synchronous).

Money is stored as whole pico-USD, see `planner/prices.py`.
"""

import hashlib
import hmac
import os
import secrets
import sqlite3
import stat
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any, Literal

from shoal.errors import DiskFullError, ShoalError
from shoal.log import say
from shoal.planner.prices import pico_usd, usd

SCHEMA_VERSION = 1
BUSY_TIMEOUT_S = 30.0
MAX_BALANCE_USD = Decimal(1_000_000)

_SCHEMA = """
CREATE TABLE IF NOT EXISTS keys (
    key_id TEXT PRIMARY KEY,
    name TEXT NOT NULL,
    secret_sha256 BLOB NOT NULL UNIQUE,
    granted_pico_usd INTEGER NOT NULL,
    balance_pico_usd INTEGER NOT NULL,
    requests_per_minute INTEGER,
    max_concurrent INTEGER,
    created_at TEXT NOT NULL,
    revoked_at TEXT
);
"""


class KeyStoreError(ShoalError):
    """A key, key file or key database that is missing, damaged or out of range."""


@dataclass(frozen=True, kw_only=True)
class KeyRecord:
    """What is known of a key, all but its secret."""

    key_id: str
    name: str
    granted_usd: Decimal
    """All money the key ever got; less the balance, it is what its requests cost."""
    balance_usd: Decimal
    requests_per_minute: int | None
    """None is no limit, here and below."""
    max_concurrent: int | None
    created_at: datetime
    revoked_at: datetime | None


class KeyStore:
    """The keys of one database file. Safe to use from many threads and processes."""

    def __init__(self, path: Path | str) -> None:
        self.database = Database(path)
        self.database.create(_SCHEMA)

    def add(
        self,
        name: str,
        balance_usd: Decimal,
        requests_per_minute: int | None = None,
        max_concurrent: int | None = None,
    ) -> str:
        """Make a key and return its secret, which nobody can read again.

        Raises:
            KeyStoreError: no name, a limit below 1, or a balance below 0 or above a million USD.
            PriceError: the balance is no exact `Decimal` amount.
        """
        if not name.strip():
            raise KeyStoreError("a key needs a name; say whose it is.")
        for field, limit in (("requests_per_minute", requests_per_minute), ("max_concurrent", max_concurrent)):
            if limit is not None and limit < 1:
                raise KeyStoreError(f"{field}={limit} would let nothing through; use 1 or more, or none for no limit.")
        balance = _checked_amount(balance_usd)
        secret = "sk-" + secrets.token_urlsafe(32)
        row = (
            "key-" + secrets.token_hex(6), name, _digest(secret), balance, balance,
            requests_per_minute, max_concurrent, now_utc().isoformat(),
        )  # fmt: skip
        with self.database.transaction() as connection:
            connection.execute("INSERT INTO keys VALUES (?, ?, ?, ?, ?, ?, ?, ?, NULL)", row)
        return secret

    def list(self) -> tuple[KeyRecord, ...]:
        """All keys, revoked ones too, oldest first."""
        return tuple(_record(row) for row in self.database.rows("SELECT * FROM keys ORDER BY created_at, rowid"))

    def find(self, secret: str) -> KeyRecord | None:
        """The live key that has this secret; None for an unknown or revoked one."""
        digest = _digest(secret)
        found = None
        for row in self.database.rows("SELECT * FROM keys WHERE revoked_at IS NULL"):
            if hmac.compare_digest(digest, row["secret_sha256"]):
                found = row  # no early way out: the time taken must not tell which key matched
        return None if found is None else _record(found)

    def revoke(self, key_id: str) -> None:
        """Refuse this key from now on; what it already runs is still settled. Twice is the same as once.

        Raises:
            KeyStoreError: no such key.
        """
        with self.database.transaction() as connection:
            one_key(connection, key_id)
            connection.execute(
                "UPDATE keys SET revoked_at = ? WHERE key_id = ? AND revoked_at IS NULL",
                (now_utc().isoformat(), key_id),
            )

    def top_up(self, key_id: str, amount_usd: Decimal) -> Decimal:
        """Add money to a key and return its new balance.

        Raises:
            KeyStoreError: no such key, or an amount that is not above 0 or takes the key over a million USD in all.
        """
        amount = _checked_amount(amount_usd)
        if amount == 0:
            raise KeyStoreError("amount_usd=0 adds nothing; give an amount above 0.")
        with self.database.transaction() as connection:
            row = one_key(connection, key_id)
            _checked_amount(usd(row["granted_pico_usd"] + amount))
            connection.execute(
                "UPDATE keys SET granted_pico_usd = granted_pico_usd + ?, balance_pico_usd = balance_pico_usd + ? "
                "WHERE key_id = ?",
                (amount, amount, key_id),
            )
            return usd(row["balance_pico_usd"] + amount)

    def close(self) -> None:
        """Close the file."""
        self.database.close()


class Database:
    """One SQLite connection behind a lock, with explicit transactions and our errors in the place of sqlite3's.

    Args:
        synchronous: FULL puts every commit on the disk; NORMAL survives a killed process but may lose the last commits
            in a power cut, and costs no wait for the disk.
    """

    def __init__(self, path: Path | str, *, synchronous: Literal["FULL", "NORMAL"] = "FULL") -> None:
        self.path = Path(path)
        self.lock = threading.RLock()
        with self._our_errors():
            # Digests and money are nobody else's business: only the owner may read the file and its journals.
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))
            self.connection = sqlite3.connect(
                self.path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )
            self.connection.row_factory = sqlite3.Row
        try:
            self._configure(synchronous)
        except BaseException:
            self.connection.close()
            raise

    def _configure(self, synchronous: str) -> None:
        with self._our_errors():
            mode = self.connection.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            self.connection.execute(f"PRAGMA synchronous = {synchronous}")
            version = self.connection.execute("PRAGMA user_version").fetchone()[0]
        if mode != "wal":
            raise KeyStoreError(f"{self.path}: this file system cannot hold a database in WAL mode; use a local disk.")
        if version not in (0, SCHEMA_VERSION):
            raise KeyStoreError(
                f"{self.path} has schema version {version}, this Shoal knows {SCHEMA_VERSION}; use the Shoal that wrote "
                "it, or another file."
            )

    def create(self, schema: str) -> None:
        """Make the tables that are not there yet."""
        with self.transaction() as connection:
            for statement in schema.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """All or nothing: committed at the end, rolled back on any exception."""
        with self.lock, self._our_errors():
            self.connection.execute("BEGIN IMMEDIATE")
            try:
                yield self.connection
                self.connection.execute("COMMIT")
            except BaseException:
                if self.connection.in_transaction:
                    self.connection.execute("ROLLBACK")
                raise

    def rows(self, query: str, values: Iterable[Any] = ()) -> list[sqlite3.Row]:
        """The rows of a query."""
        with self.lock, self._our_errors():
            return self.connection.execute(query, tuple(values)).fetchall()

    def close(self) -> None:
        """Close the connection; a closed one cannot be used again."""
        with self.lock:
            self.connection.close()

    @contextmanager
    def _our_errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise KeyStoreError(f"cannot open {self.path}: {error.strerror}; check the path and its rights.") from error
        except sqlite3.DatabaseError as error:
            raise _refusal(self.path, error) from error


def load_key_file(path: Path | str) -> tuple[str, ...]:
    """The secrets in a file for `--api-key-file`: one a line, blank lines and lines with # left out.

    Warns where others may read the file.

    Raises:
        KeyStoreError: no such file, no key in it, or a line that is no key. No message ever shows a secret.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
        mode = path.stat().st_mode
    except OSError as error:
        raise KeyStoreError(f"cannot read the key file {path}: {error.strerror}; check the path.") from error
    except UnicodeDecodeError as error:
        raise KeyStoreError(f"the key file {path} is no UTF-8 text; write one key a line.") from error
    if os.name == "posix" and mode & (stat.S_IRGRP | stat.S_IROTH):
        say(f"warning: other users of this machine can read the keys in {path}; run: chmod 600 {path}")
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        key = line.strip()
        if not key or key.startswith("#"):
            continue
        if not key.isascii() or not key.isprintable() or " " in key:
            raise KeyStoreError(
                f"{path}, line {number}: a key is printable ASCII without spaces; write one key a line."
            )
        if key in found:
            raise KeyStoreError(f"{path}, line {number}: the same key as in line {found[key]}; remove one of them.")
        found[key] = number
    if not found:
        raise KeyStoreError(f"the key file {path} holds no key, so nobody could ask; write one key a line.")
    return tuple(found)


def is_known_secret(secret: str, known: Iterable[str]) -> bool:
    """Whether a secret is one of a key file's, told in a time that does not depend on which or how nearly."""
    digest = _digest(secret)
    # A sum and not any(), which would stop at the first match.
    return sum(hmac.compare_digest(digest, _digest(other)) for other in known) > 0


def one_key(connection: sqlite3.Connection, key_id: str) -> sqlite3.Row:
    """The row of a key, read inside the caller's transaction.

    Raises:
        KeyStoreError: no such key.
    """
    row: sqlite3.Row | None = connection.execute("SELECT * FROM keys WHERE key_id = ?", (key_id,)).fetchone()
    if row is None:
        raise KeyStoreError(f"no key has the id {key_id!r}; list the keys to see their ids.")
    return row


def now_utc() -> datetime:
    """This moment, with its time zone."""
    return datetime.now(timezone.utc)


def _digest(secret: str) -> bytes:
    return hashlib.sha256(secret.encode("utf-8", "surrogatepass")).digest()


def _checked_amount(amount_usd: Decimal) -> int:
    """In pico-USD; bounded so that balances stay far within SQLite's 64-bit integers."""
    amount = pico_usd(amount_usd)
    if not 0 <= amount_usd <= MAX_BALANCE_USD:
        raise KeyStoreError(f"an amount of {amount_usd} USD is refused; a key holds from 0 to {MAX_BALANCE_USD} USD.")
    return amount


def _record(row: sqlite3.Row) -> KeyRecord:
    return KeyRecord(
        key_id=row["key_id"],
        name=row["name"],
        granted_usd=usd(row["granted_pico_usd"]),
        balance_usd=usd(row["balance_pico_usd"]),
        requests_per_minute=row["requests_per_minute"],
        max_concurrent=row["max_concurrent"],
        created_at=datetime.fromisoformat(row["created_at"]),
        revoked_at=None if row["revoked_at"] is None else datetime.fromisoformat(row["revoked_at"]),
    )


def _refusal(path: Path, error: sqlite3.DatabaseError) -> ShoalError:
    """What sqlite3 says, as what the user can do. Matched by message: error codes came with Python 3.11."""
    message = str(error)
    if "disk is full" in message:
        return DiskFullError(f"no room to write {path}; free some space. Nothing half-written was left behind.")
    if "locked" in message:
        return KeyStoreError(
            f"{path} is held by another process for {BUSY_TIMEOUT_S:.0f} s now; stop it and try again."
        )
    if "readonly" in message:
        return KeyStoreError(f"{path} cannot be written; check its rights and those of its folder.")
    return KeyStoreError(f"{path} is no usable key database ({message}); use another file or restore a copy.")
