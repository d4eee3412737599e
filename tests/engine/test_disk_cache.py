"""Units on disk: what is read is what was written, or nothing, whatever happened to the files."""

import os
import resource
import signal
import subprocess
import sys
import textwrap
import time

import pytest

from shoal.engine.disk_cache import HEADER_BYTES, DiskCache

UNIT = 4096


def key(number):
    return number.to_bytes(16, "big")


def payload(number):
    return bytes([number % 251]) * UNIT


@pytest.fixture
def cache(tmp_path):
    made = opened(tmp_path)
    yield made
    made.close()


def opened(path, **settings):
    return DiskCache(path, **({"max_bytes": 1 << 30, "max_age_s": 1000, "unit_bytes": UNIT} | settings))


def files(path):
    return sorted(file for file in path.rglob("*") if file.is_file())


def test_what_was_written_is_read_back_by_another_cache(cache, tmp_path):
    for number in range(20):
        cache.put(key(number), payload(number))
    assert cache.get(key(3)) == payload(3), "also while it is on its way"
    assert cache.flush()
    other = opened(tmp_path)
    assert [other.get(key(number)) for number in range(20)] == [payload(number) for number in range(20)]
    assert other.get(key(99)) is None
    assert (other.stats.hits, other.stats.misses) == (20, 1)
    other.close()


@pytest.mark.parametrize("place", [0, 9, 17, 50, HEADER_BYTES, HEADER_BYTES + UNIT - 1])
def test_a_flipped_bit_anywhere_is_a_miss_and_the_file_goes(cache, tmp_path, place):
    cache.put(key(1), payload(1))
    cache.flush()
    (file,) = files(tmp_path)
    data = bytearray(file.read_bytes())
    data[place] ^= 1
    file.write_bytes(data)
    assert cache.get(key(1)) is None
    assert not file.exists()
    cache.put(key(1), payload(1))
    cache.flush()
    assert cache.get(key(1)) == payload(1)


@pytest.mark.parametrize("size", [0, 10, HEADER_BYTES, HEADER_BYTES + UNIT - 1, HEADER_BYTES + UNIT + 1])
def test_a_file_of_another_length_is_a_miss_and_goes(cache, tmp_path, size):
    cache.put(key(1), payload(1))
    cache.flush()
    (file,) = files(tmp_path)
    data = file.read_bytes() + b"\0"
    file.write_bytes(data[:size])
    assert cache.get(key(1)) is None
    assert not file.exists()


def test_a_unit_under_another_key_is_a_miss(cache, tmp_path):
    cache.put(key(1), payload(1))
    cache.flush()
    (file,) = files(tmp_path)
    file.rename(file.parent / key(2).hex())
    assert cache.get(key(2)) is None


def test_the_oldest_units_go_when_there_are_too_many_bytes(tmp_path):
    first = opened(tmp_path)
    for number in range(10):
        first.put(key(number), payload(number))
    first.close()
    for age, file in enumerate(files(tmp_path)):
        os.utime(file, (time.time() - age * 10,) * 2)
    by_age = files(tmp_path)
    second = opened(tmp_path, max_bytes=3 * (UNIT + HEADER_BYTES))
    second.sweep()
    second.close()
    # The cache's own thread sweeps too, to a little below the bound: two or three are left, the youngest.
    left = files(tmp_path)
    assert len(left) in (2, 3) and left == by_age[: len(left)]


def test_units_unused_for_too_long_go_and_a_hit_makes_them_young(tmp_path):
    first = opened(tmp_path)
    for number in (1, 2):
        first.put(key(number), payload(number))
    first.flush()
    for file in files(tmp_path):
        os.utime(file, (time.time() - 500,) * 2)
    assert first.get(key(1))
    first.close()
    second = opened(tmp_path, max_age_s=100)
    second.sweep()
    assert (second.get(key(1)), second.get(key(2))) == (payload(1), None)
    second.close()


def test_half_written_files_of_dead_processes_go_after_a_while(cache, tmp_path):
    cache.put(key(1), payload(1))
    cache.flush()
    (file,) = files(tmp_path)
    old, young = (file.with_name(f"{file.name}.{number}.tmp") for number in (1, 2))
    for stray, age_s in ((old, 7200), (young, 5)):
        stray.write_bytes(b"half")
        os.utime(stray, (time.time() - age_s,) * 2)
    cache.sweep()
    assert not old.exists()
    assert young.exists()


def test_a_disk_that_refuses_turns_the_cache_off_and_nothing_fails(tmp_path):
    (tmp_path / "file").write_text("no directory")
    cache = opened(tmp_path / "file")
    assert cache.is_off
    cache.put(key(1), payload(1))
    assert cache.get(key(1)) is None
    assert cache.stats.dropped == 1
    cache.close()


WRITER = """
    import sys
    from pathlib import Path
    from shoal.engine.disk_cache import DiskCache
    cache = DiskCache(Path(sys.argv[1]), max_bytes=1 << 30, max_age_s=1000, unit_bytes=4096)
    print("ready", flush=True)
    number = int(sys.argv[2])
    while True:
        cache.put(number.to_bytes(16, "big"), bytes([number % 251]) * 4096)
        cache.flush()
        number += 1
"""


def test_a_process_killed_while_writing_leaves_whole_units_only(tmp_path):
    writers = [
        subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(WRITER), str(tmp_path), str(start)], stdout=subprocess.PIPE
        )
        for start in (0, 100_000)
    ]
    for writer in writers:
        assert writer.stdout.readline() == b"ready\n"
    time.sleep(0.3)
    for writer in writers:
        writer.send_signal(signal.SIGKILL)
        writer.wait()
    cache = opened(tmp_path)
    whole = [file for file in files(tmp_path) if not file.name.endswith(".tmp")]
    assert len(whole) > 10
    for file in whole:
        number = int(file.name, 16)
        assert cache.get(key(number)) == payload(number)
    assert cache.stats.damaged == 0
    cache.close()


def test_a_full_disk_is_survived(tmp_path):
    """A limit on file sizes makes every write fail half-way, as a full disk does."""
    script = WRITER.replace('print("ready", flush=True)', "import resource, signal").split("number = int")[0]
    script = textwrap.dedent(script) + textwrap.dedent("""
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
        cache.put(b"k" * 16, b"x" * 4096)
        cache.flush()
        assert cache.is_off and cache.get(b"k" * 16) is None
        cache.close()
    """)
    assert resource.RLIMIT_FSIZE is not None
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "EFBIG" in done.stderr
    assert files(tmp_path) == []
