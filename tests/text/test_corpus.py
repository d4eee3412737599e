import gzip
import json

import pytest

from shoal.errors import DataError
from shoal.text.corpus import read_documents, split_text


def test_folders_are_read_in_order_and_every_format_gives_its_documents(tmp_path):
    import pyarrow
    import pyarrow.parquet

    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.jsonl").write_text(json.dumps({"text": "two"}) + "\n\n" + json.dumps({"text": "three"}) + "\n")
    with gzip.open(tmp_path / "c.jsonl.gz", "wt") as file:
        file.write(json.dumps({"text": "four"}) + "\n")
    (tmp_path / "deep").mkdir()
    pyarrow.parquet.write_table(pyarrow.table({"text": ["five", None, "six"]}), tmp_path / "deep" / "d.parquet")
    (tmp_path / "ignored.bin").write_bytes(b"\xff")
    assert list(read_documents([tmp_path])) == ["one", "two", "three", "four", "five", "six"]


@pytest.mark.parametrize(
    "name, data, message",
    [
        ("a.txt", b"ok \xff\xfe", "byte 3 is not UTF-8"),
        ("a.txt", b"  \n ", "no text"),
        ("a.jsonl", b'{"text": "x"}\n{"text": ', "line 2: not JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n{"text": "\xe9"}\n', r"a\.jsonl, line 3: byte 10 is not UTF-8"),
        ("a.jsonl", b'{"body": "x", "id": 1}\n', "the line has body, id"),
        ("a.jsonl.gz", b"not gzip", "no whole gzip"),
        ("a.parquet", b"PAR1 nonsense", "no readable Parquet"),
    ],
)
def test_bad_files_name_the_place_and_what_to_do(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(DataError, match=message):
        list(read_documents([path]))


def _damaged(how: str) -> bytes:
    whole = gzip.compress(b"".join(json.dumps({"text": f"row {n * n}"}).encode() + b"\n" for n in range(200)), mtime=0)
    middle, end = len(whole) // 2, len(whole) - 8
    return {
        "cut off": whole[:middle],
        "changed": whole[:20] + b"\xff" * 40 + whole[60:],
        "wrong checksum": whole[:end] + bytes(4) + whole[end + 4 :],
        "followed by something": whole + b"tail",
    }[how]


@pytest.mark.parametrize("how", ["cut off", "changed", "wrong checksum", "followed by something"])
def test_damaged_gzip_files_say_so(tmp_path, how):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(_damaged(how))
    with pytest.raises(DataError, match=r"a\.jsonl\.gz is no whole gzip file .*; fetch it again"):
        list(read_documents([path]))


def test_missing_and_empty_places_are_named(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_documents([tmp_path / "nowhere.txt"]))
    with pytest.raises(DataError, match=r"holds no \.txt"):
        list(read_documents([tmp_path]))


def test_the_last_part_is_held_out():
    training, held_out = split_text("abcdefghij", 0.1)
    assert (training, held_out) == ("abcdefghi", "j")
    with pytest.raises(DataError, match="between 0 and 1"):
        split_text("abc", 1.5)
    with pytest.raises(DataError, match="too short"):
        split_text("a", 0.1)
