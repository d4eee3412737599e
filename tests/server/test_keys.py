import os
import sqlite3
import stat
import threading
from decimal import Decimal

import pytest

from shoal.planner.prices import PriceError
from shoal.server.keys import KeyStore, KeyStoreError, is_known_secret, load_key_file


@pytest.fixture
def store(tmp_path):
    store = KeyStore(tmp_path / "keys.sqlite")
    yield store
    store.close()


def test_a_key_is_found_by_its_secret_alone(store) -> None:
    ann = store.add("ann", Decimal("5.25"), 60, 3)
    bob = store.add("bob", Decimal(0))
    assert ann.startswith("sk-") and len(ann) >= 46 and ann != bob
    record = store.find(ann)
    assert (record.name, record.balance_usd, record.granted_usd) == ("ann", Decimal("5.25"), Decimal("5.25"))
    assert (record.requests_per_minute, record.max_concurrent, record.revoked_at) == (60, 3, None)
    assert store.find(bob).requests_per_minute is None
    assert [key.name for key in store.list()] == ["ann", "bob"]
    for wrong in ("", ann[:-1], ann + "x", ann.upper(), record.key_id, "schlüssel", "\udce4"):
        assert store.find(wrong) is None


def test_no_secret_is_in_the_file_which_only_the_owner_reads(tmp_path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite")
    secret = store.add("ann", Decimal(1))
    for path in tmp_path.iterdir():
        assert secret.encode() not in path.read_bytes()
        assert secret.removeprefix("sk-").encode() not in path.read_bytes()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    store.close()


def test_a_revoked_key_is_no_longer_found_and_stays_listed(store) -> None:
    secret = store.add("ann", Decimal(1))
    key_id = store.find(secret).key_id
    store.revoke(key_id)
    first = store.list()[0].revoked_at
    store.revoke(key_id)
    assert store.find(secret) is None
    assert first is not None and store.list()[0].revoked_at == first
    with pytest.raises(KeyStoreError, match="'key-none'"):
        store.revoke("key-none")


def test_keys_outlive_the_process_and_are_synced_to_disk(tmp_path) -> None:
    store = KeyStore(tmp_path / "keys.sqlite")
    secret = store.add("ann", Decimal("0.000000000001"))
    store.close()
    again = KeyStore(tmp_path / "keys.sqlite")
    assert again.find(secret).balance_usd == Decimal("1e-12")
    assert again.database.rows("PRAGMA journal_mode")[0][0] == "wal"
    assert again.database.rows("PRAGMA synchronous")[0][0] == 2  # FULL
    again.close()


def test_money_is_added_exactly(store) -> None:
    key_id = store.find(store.add("ann", Decimal("0.1"))).key_id
    assert store.top_up(key_id, Decimal("0.2")) == Decimal("0.3")
    record = store.list()[0]
    assert (record.balance_usd, record.granted_usd) == (Decimal("0.3"), Decimal("0.3"))
    for amount in (Decimal(0), Decimal(-1), Decimal(1_000_000)):
        with pytest.raises(KeyStoreError):
            store.top_up(key_id, amount)
    with pytest.raises(KeyStoreError, match="no key"):
        store.top_up("key-none", Decimal(1))
    assert store.list()[0].balance_usd == Decimal("0.3")


def test_impossible_keys_are_refused(store) -> None:
    with pytest.raises(KeyStoreError, match="name"):
        store.add(" ", Decimal(1))
    with pytest.raises(KeyStoreError, match="requests_per_minute=0"):
        store.add("ann", Decimal(1), 0)
    with pytest.raises(KeyStoreError, match="max_concurrent=-1"):
        store.add("ann", Decimal(1), None, -1)
    with pytest.raises(KeyStoreError, match="-1 USD"):
        store.add("ann", Decimal(-1))
    with pytest.raises(PriceError, match="never a float"):
        store.add("ann", 1.5)
    assert store.list() == ()


def test_many_threads_add_and_find(store) -> None:
    failures = []

    def work(number: int) -> None:
        for turn in range(5):
            secret = store.add(f"{number}-{turn}", Decimal(number))
            record = store.find(secret)
            if record is None or record.name != f"{number}-{turn}":
                failures.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and len(store.list()) == 30


def test_a_damaged_foreign_or_unreachable_file_is_named(tmp_path) -> None:
    (tmp_path / "text").write_text("no database " * 100)
    with pytest.raises(KeyStoreError, match="no usable key database"):
        KeyStore(tmp_path / "text")
    with pytest.raises(KeyStoreError, match="cannot open"):
        KeyStore(tmp_path / "nowhere" / "keys.sqlite")
    newer = sqlite3.connect(tmp_path / "newer")
    newer.execute("PRAGMA user_version = 7")
    newer.close()
    with pytest.raises(KeyStoreError, match="schema version 7"):
        KeyStore(tmp_path / "newer")


def test_a_key_file_is_read_line_by_line(tmp_path, capsys) -> None:
    path = tmp_path / "keys"
    path.write_text("# ours\n\n  sk-one  \nsk-two\r\n#sk-three\n")
    path.chmod(0o600)
    keys = load_key_file(path)
    assert keys == ("sk-one", "sk-two")
    assert is_known_secret("sk-two", keys) and is_known_secret("sk-one", keys)
    assert not is_known_secret("sk-three", keys) and not is_known_secret("", keys)
    assert capsys.readouterr().err == ""


@pytest.mark.skipif(os.name != "posix", reason="rights are a POSIX matter")
def test_a_key_file_that_others_can_read_is_warned_of(tmp_path, capsys) -> None:
    path = tmp_path / "keys"
    path.write_text("sk-one\n")
    path.chmod(0o644)
    assert load_key_file(path) == ("sk-one",)
    warning = capsys.readouterr().err
    assert "chmod 600" in warning and "sk-one" not in warning


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"# nothing\n\n", "holds no key"),
        (b"", "holds no key"),
        (b"sk-one\nsk-secret two\n", "line 2: a key is printable ASCII"),
        ("sk-secret-ä\n".encode(), "line 1"),
        (b"sk-secret\n#\nsk-secret\n", "line 3: the same key as in line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_a_key_file_that_cannot_be_is_refused_without_showing_keys(tmp_path, content: bytes, message: str) -> None:
    path = tmp_path / "keys"
    path.write_bytes(content)
    with pytest.raises(KeyStoreError, match=message) as caught:
        load_key_file(path)
    assert "sk-secret" not in str(caught.value)


def test_a_missing_key_file_is_named(tmp_path) -> None:
    with pytest.raises(KeyStoreError, match=r"cannot read the key file .*none"):
        load_key_file(tmp_path / "none")
