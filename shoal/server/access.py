"""Who is asking, and how much they may ask at once: keys, requests per minute, requests at a time.

Keys come from `--api-key`, from a key file, or from the key store with balances; a server that has none of them is open
and must then listen on the loopback only (`start.check_address`). Secrets are compared by digest in constant time.

Rates are counted in a bucket per key that refills evenly, so that a minute's requests can come at once but not twice
across a border of minutes.
"""

import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

from shoal.errors import ShoalError
from shoal.server.keys import KeyStore, is_known_secret


class AccessError(ShoalError):
    """A request without a valid key; answered with 401."""


class RateError(ShoalError):
    """More requests than the key's limits allow; answered with 429 and the seconds after which to try again."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What one account may do; None is no limit."""

    requests_per_minute: int | None = None
    max_concurrent: int | None = None


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who asks."""

    name: str
    """Stands in the access log; tells accounts apart for fairness."""
    key_id: str | None = None
    """Of the key store; None is nobody who pays."""
    limits: Limits = Limits()


ANYBODY = Account(name="")
"""The account of a server without keys."""


class Access:
    """Checks keys.

    Args:
        secrets: keys without an account, from the command line or a key file.
        store: keys with balances and limits of their own.
        limits: of keys that have none of their own, and of an open server.
    """

    def __init__(
        self, secrets: Iterable[str] = (), store: KeyStore | None = None, limits: Limits | None = None
    ) -> None:
        self.secrets, self.store, self.limits = tuple(secrets), store, limits or Limits()

    @property
    def is_open(self) -> bool:
        """Whether anybody may ask."""
        return not self.secrets and self.store is None

    def account(self, authorization: str, api_key_header: str = "") -> Account:
        """The account behind `Authorization: Bearer KEY`, or behind `x-api-key: KEY` as Anthropic's clients send it.

        Raises:
            AccessError: no key, or none that is known.
        """
        if self.is_open:
            return Account(name="", limits=self.limits)
        scheme, _, given = authorization.partition(" ")
        secret = given.strip() if scheme.lower() == "bearer" else api_key_header.strip()
        if secret and is_known_secret(secret, self.secrets):
            return Account(name=f"key-{self.secrets.index(secret) + 1}", limits=self.limits)
        record = self.store.find(secret) if secret and self.store else None
        if record is None or record.revoked_at is not None:
            raise AccessError("no valid API key; send it as 'Authorization: Bearer KEY'.")
        own = Limits(
            requests_per_minute=record.requests_per_minute or self.limits.requests_per_minute,
            max_concurrent=record.max_concurrent or self.limits.max_concurrent,
        )
        return Account(name=record.name, key_id=record.key_id, limits=own)


@dataclass
class _Bucket:
    """What an account has left."""

    requests: float
    at_s: float
    open: int = 0


class Turnstile:
    """Counts requests per account. Safe to use from many threads."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock, self._lock = clock, threading.Lock()
        self._buckets: dict[str, _Bucket] = {}

    def enter(self, account: Account) -> None:
        """Count a request in; `leave` must follow.

        Raises:
            RateError: the account is over one of its limits; nothing is counted.
        """
        limits = account.limits
        with self._lock:
            now_s = self._clock()
            bucket = self._buckets.setdefault(account.name, _Bucket(float(limits.requests_per_minute or 0), now_s))
            if limits.max_concurrent is not None and bucket.open >= limits.max_concurrent:
                raise RateError(
                    f"{bucket.open} requests of this key are running, as many as it may have; wait for one to end.", 1.0
                )
            if limits.requests_per_minute is not None:
                per_s = limits.requests_per_minute / 60
                bucket.requests = min(bucket.requests + (now_s - bucket.at_s) * per_s, limits.requests_per_minute)
                bucket.at_s = now_s
                if bucket.requests < 1:
                    wait_s = (1 - bucket.requests) / per_s
                    raise RateError(
                        f"more than {limits.requests_per_minute} requests a minute; try again in {wait_s:.1f} s.",
                        wait_s,
                    )
                bucket.requests -= 1
            bucket.open += 1

    def leave(self, account: Account) -> None:
        """A request has ended."""
        with self._lock:
            bucket = self._buckets.get(account.name)
            if bucket is not None:
                bucket.open = max(bucket.open - 1, 0)

    def num_open(self, account: Account) -> int:
        """Requests of the account that are running."""
        with self._lock:
            bucket = self._buckets.get(account.name)
            return bucket.open if bucket else 0
