import errno
import json
import os
import resource
from pathlib import Path

import numpy as np
import pytest

from shoal.errors import DataError, DiskFullError
from shoal.text import shards as shards_module
from shoal.text.shards import Shards, ShardWriter


def _write(directory: Path, documents, *, vocab_size=100, shard_tokens=7, masks=None) -> None:
    writer = ShardWriter(directory, vocab_size=vocab_size, tokenizer_digest="abc", shard_tokens=shard_tokens)
    for number, document in enumerate(documents):
        writer.add(document, None if masks is None else masks[number])
    writer.close()


def test_documents_come_back_as_written_over_several_shards(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [99]]
    masks = [[False, True, True], [True], [False, False, True, True], [True, True], [False]]
    _write(tmp_path, documents, masks=masks)
    opened = Shards.open(tmp_path, expected_digest="abc")
    assert opened.num_documents == 5 and opened.num_tokens == 11
    assert len(list(tmp_path.glob("*.tokens"))) == 2
    for number, (document, mask) in enumerate(zip(documents, masks)):
        tokens, labels = opened.document(number)
        assert tokens.tolist() == document and labels.tolist() == mask
    assert opened.document_lengths().tolist() == [3, 1, 4, 2, 1]


def test_windows_run_across_documents_and_shards(tmp_path):
    documents = [[1, 2, 3], [4], [5, 6, 7, 8], [9, 10], [11, 12, 13, 14, 15, 16, 17, 18]]
    _write(tmp_path, documents, shard_tokens=4)
    opened = Shards.open(tmp_path)
    assert len(list(tmp_path.glob("*.tokens"))) == 3
    numbers = [number for number, document in enumerate(documents) for _ in document]
    for start in range(18):
        for stop in range(start + 1, 19):
            window = opened.window(start, stop)
            assert window.tokens.tolist() == list(range(start + 1, stop + 1))
            assert window.documents.tolist() == numbers[start:stop]
            assert window.counts.all() and len(window.counts) == stop - start


def test_windows_say_which_tokens_count_in_the_loss(tmp_path):
    _write(tmp_path, [[1, 2], [3, 4]], shard_tokens=2, masks=[[False, True], None])
    assert Shards.open(tmp_path).window(0, 4).counts.tolist() == [False, True, True, True]


def test_large_vocabularies_are_stored_in_four_bytes(tmp_path):
    _write(tmp_path, [[1, 129_279]], vocab_size=129_280)
    tokens, labels = Shards.open(tmp_path).document(0)
    assert tokens.tolist() == [1, 129_279] and labels is None


def test_a_tampered_shard_is_refused(tmp_path):
    _write(tmp_path, [[1, 2, 3, 4]])
    path = next(tmp_path.glob("*.tokens"))
    data = bytearray(path.read_bytes())
    data[0] ^= 1
    path.write_bytes(data)
    with pytest.raises(DataError, match="checksum"):
        Shards.open(tmp_path)


def test_a_truncated_shard_is_refused_even_without_checksums(tmp_path):
    _write(tmp_path, [[1, 2, 3, 4]])
    path = next(tmp_path.glob("*.tokens"))
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match="cut off"):
        Shards.open(tmp_path, verify=False)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(DataError, match=r"index\.json"):
        Shards.open(tmp_path)
    _write(tmp_path, [[1, 2]])
    next(tmp_path.glob("*.offsets")).unlink()
    with pytest.raises(DataError, match="offsets is missing"):
        Shards.open(tmp_path)


def test_shards_of_another_tokenizer_are_refused(tmp_path):
    _write(tmp_path, [[1, 2]])
    with pytest.raises(DataError, match="another tokenizer"):
        Shards.open(tmp_path, expected_digest="other")


def test_a_damaged_index_is_refused(tmp_path):
    _write(tmp_path, [[1, 2]])
    (tmp_path / "index.json").write_text(json.dumps({"format": 1}))
    with pytest.raises(DataError, match="damaged"):
        Shards.open(tmp_path)


def _rewrite_index(directory: Path, change) -> None:
    path = directory / "index.json"
    index = json.loads(path.read_text())
    change(index)
    path.write_text(json.dumps(index))


@pytest.mark.parametrize("suffix", [".offsets", ".tokens"])
def test_an_index_that_leaves_out_a_needed_file_is_refused(tmp_path, suffix):
    _write(tmp_path, [[1, 2]])
    _rewrite_index(tmp_path, lambda index: index["shards"][0]["files"].pop("shard-00000" + suffix))
    (tmp_path / ("shard-00000" + suffix)).unlink()
    with pytest.raises(DataError, match=r"shard-00000 lists .*\. Prepare the shards again"):
        Shards.open(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda index: index.pop("vocab_size"),
        lambda index: index.update(num_tokens="2"),
        lambda index: index.update(dtype="O"),
        lambda index: index.update(shards=[]),
        lambda index: index.update(shards=3),
        lambda index: index["shards"][0].update(files=["shard-00000.tokens"]),
        lambda index: index["shards"][0]["files"]["shard-00000.tokens"].pop("bytes"),
    ],
)
def test_every_part_of_the_index_is_checked(tmp_path, change):
    _write(tmp_path, [[1, 2]])
    _rewrite_index(tmp_path, change)
    with pytest.raises(DataError, match=r"damaged .*prepare the shards again"):
        Shards.open(tmp_path)


@pytest.mark.parametrize("prefix", ["../elsewhere/", "/", "..", "", ".", "a\\", "a\0", "a/../../elsewhere/", "a\n"])
def test_names_that_lead_out_of_the_directory_are_refused(tmp_path, prefix):
    """Also when what they lead to is there and matches its checksum."""
    directory, elsewhere = tmp_path / "shards", tmp_path / "elsewhere"
    _write(directory, [[1, 2]])
    _write(elsewhere, [[3, 4]])

    def lead_out(index):
        shard = index["shards"][0]
        name = prefix + shard["name"] if prefix.endswith(("/", "\\", "\0", "\n")) else prefix
        shard["files"] = {name + file[len(shard["name"]) :]: facts for file, facts in shard["files"].items()}
        shard["name"] = name

    _rewrite_index(directory, lead_out)
    with pytest.raises(DataError, match="no plain file name"):
        Shards.open(directory, verify=False)
    with pytest.raises(DataError, match="no plain file name"):
        Shards(json.loads((directory / "index.json").read_text()), directory)


def test_offsets_that_do_not_fit_the_tokens_are_refused(tmp_path):
    _write(tmp_path, [[1, 2], [3]])
    (tmp_path / "shard-00000.offsets").write_bytes(np.array([0, 2, 9], "<u8").tobytes())
    with pytest.raises(DataError, match="do not fit each other"):
        Shards.open(tmp_path, verify=False)
    (tmp_path / "shard-00000.offsets").write_bytes(b"")
    index = json.loads((tmp_path / "index.json").read_text())
    with pytest.raises(DataError, match=r"offsets cannot be read .*; prepare the shards again"):
        Shards(index, tmp_path)


def test_ids_outside_the_vocabulary_and_empty_corpora_are_refused(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=10, tokenizer_digest="abc")
    with pytest.raises(DataError, match=r"0\.\.9"):
        writer.add([3, 10])
    with pytest.raises(DataError, match="no tokens"):
        writer.close()


FAILURES = {
    errno.ENOSPC: (DiskFullError, "free some space"),
    errno.EDQUOT: (DiskFullError, "quota"),
    errno.EFBIG: (DiskFullError, "no file this large"),
    errno.EROFS: (DataError, "read-only"),
    errno.EACCES: (DataError, "no permission"),
    errno.EPERM: (DataError, "no permission"),
    errno.EIO: (DataError, "the disk fails"),
    errno.ENODEV: (DataError, "No such device"),
}


@pytest.mark.parametrize("number", FAILURES, ids=errno.errorcode.get)
@pytest.mark.parametrize("num_good_writes", [0, 1, 2, 4])
def test_a_failed_write_says_why_and_leaves_nothing(tmp_path, monkeypatch, number, num_good_writes):
    """Two shards and the index are five files; the one after `num_good_writes` fails."""
    fsync, num_calls = os.fsync, 0

    def fail(descriptor: int) -> None:
        nonlocal num_calls
        num_calls += 1
        if num_calls > num_good_writes:
            raise OSError(number, os.strerror(number))
        fsync(descriptor)

    monkeypatch.setattr(shards_module.os, "fsync", fail)
    kind, message = FAILURES[number]
    writer = ShardWriter(tmp_path, vocab_size=10, tokenizer_digest="abc", shard_tokens=5)
    with pytest.raises(kind, match=f"cannot write .*{message}.* and run again"):
        writer.add(np.arange(5))
        writer.add(np.arange(5))
        writer.close()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(DataError, match="begin again"):
        writer.close()
    with pytest.raises(DataError, match="begin again"):
        writer.add([1])


def test_a_limit_on_file_sizes_is_named(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = ShardWriter(tmp_path, vocab_size=10, tokenizer_digest="abc")
    writer.add(np.zeros(10_000, np.int64))
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFullError, match="no file this large"):
            writer.close()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(descriptor: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shards_module.os, "fsync", interrupt)
    writer = ShardWriter(tmp_path, vocab_size=10, tokenizer_digest="abc")
    writer.add([1])
    with pytest.raises(KeyboardInterrupt):
        writer.close()
    assert list(tmp_path.iterdir()) == []


def test_a_directory_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match="use another directory"):
        ShardWriter(tmp_path / "file" / "shards", vocab_size=10, tokenizer_digest="abc")


def test_a_mask_of_another_length_is_refused(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=10, tokenizer_digest="abc")
    with pytest.raises(DataError, match="one entry per token"):
        writer.add([1, 2, 3], [True])
