import itertools
import tracemalloc

import numpy as np
import pytest

from shoal.errors import CheckpointError, DataError
from shoal.text.loader import Loader, evaluation_batches
from shoal.text.packing import IGNORE_LABEL, batch_of_documents, pack_documents
from shoal.text.shards import Shards, ShardWriter


@pytest.fixture
def shards(tmp_path):
    generator = np.random.default_rng(0)
    writer = ShardWriter(tmp_path, vocab_size=1000, tokenizer_digest="abc")
    for number in range(60):
        writer.add(np.full(generator.integers(3, 12), number), None)
    writer.close()
    return Shards.open(tmp_path)


def _loader(shards, mode="pack", **changes):
    return Loader(shards, **{"batch_rows": 3, "row_tokens": 16, "seed": 5, "mode": mode, "pad_token": 999, **changes})


def _same(first, second):
    names = ("token_BS", "label_BS", "document_BS", "position_BS")
    return all(np.array_equal(getattr(first, name), getattr(second, name)) for name in names)


@pytest.mark.parametrize("mode", ["pack", "stream"])
def test_a_resumed_loader_goes_on_as_if_never_stopped(shards, mode):
    whole = list(itertools.islice(_loader(shards, mode), 40))
    stopped = _loader(shards, mode)
    list(itertools.islice(stopped, 23))
    resumed = _loader(shards, mode)
    resumed.load_state_dict(stopped.state_dict())
    assert all(_same(a, b) for a, b in zip(whole[23:], itertools.islice(resumed, 17)))


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"seed": 6}, "seed=5, here 6"),
        ({"mode": "stream"}, "mode='pack', here 'stream'"),
        ({"row_tokens": 17}, "row_tokens=16, here 17"),
        ({"batch_rows": 2}, "batch_rows=3, here 2"),
    ],
)
def test_the_place_of_another_loader_is_refused(shards, changes, message):
    state = _loader(shards).state_dict()
    loader = _loader(shards, **changes)
    list(itertools.islice(loader, 2))
    with pytest.raises(CheckpointError, match=f"{message}.*or start a new run"):
        loader.load_state_dict(state)
    assert (loader.epoch, loader.batch_in_epoch) == (0, 2)


def test_the_place_in_other_data_is_refused(shards, tmp_path):
    writer = ShardWriter(tmp_path / "other", vocab_size=1000, tokenizer_digest="abc")
    for number in range(60):
        writer.add(shards.document(number)[0] + 1)
    writer.close()
    with pytest.raises(CheckpointError, match="dataset_sha256="):
        _loader(Shards.open(tmp_path / "other")).load_state_dict(_loader(shards).state_dict())


@pytest.mark.parametrize(
    "place", [{}, {"epoch": 1}, {"epoch": -1, "batch_in_epoch": 0}, {"epoch": 0, "batch_in_epoch": "2"}]
)
def test_a_damaged_place_is_refused(shards, place):
    with pytest.raises(CheckpointError, match="is damaged"):
        _loader(shards).load_state_dict(place)


def test_a_place_behind_the_end_of_an_epoch_is_refused(shards):
    with pytest.raises(CheckpointError, match="batch 999 of"):
        _loader(shards).load_state_dict({"epoch": 0, "batch_in_epoch": 999})


def test_the_place_alone_is_enough_as_earlier_versions_wrote_it(shards):
    stopped, resumed = _loader(shards), _loader(shards)
    list(itertools.islice(stopped, 4))
    resumed.load_state_dict({"epoch": stopped.epoch, "batch_in_epoch": stopped.batch_in_epoch})
    assert _same(next(iter(stopped)), next(iter(resumed)))


def test_every_document_appears_once_per_epoch_and_orders_differ(shards):
    rows = pack_documents(shards.document_lengths().tolist(), 16, seed=0)
    assert sorted(number for row in rows for number in row) == list(range(60))
    lengths = shards.document_lengths()
    assert all(sum(lengths[number] for number in row) <= 16 for row in rows)
    assert sum(lengths) / (16 * len(rows)) > 0.9
    assert pack_documents(lengths.tolist(), 16, seed=0) == rows != pack_documents(lengths.tolist(), 16, seed=1)


def test_labels_stay_inside_their_document_and_positions_restart():
    documents = [(np.array([1, 2, 3]), None), (np.array([4, 5]), np.array([False, True]))]
    batch = batch_of_documents(documents, [[0, 1]], row_tokens=7, pad_token=9)
    assert batch.token_BS.tolist() == [[1, 2, 3, 4, 5, 9, 9]]
    assert batch.label_BS.tolist() == [[2, 3, IGNORE_LABEL, 5, *[IGNORE_LABEL] * 3]]
    assert batch.document_BS.tolist() == [[0, 0, 0, 1, 1, -1, -1]]
    assert batch.position_BS.tolist() == [[0, 1, 2, 0, 1, 0, 0]]


def test_masked_tokens_are_no_labels():
    batch = batch_of_documents([(np.array([1, 2, 3, 4]), np.array([False, False, True, True]))], [[0]], 4, 0)
    assert batch.label_BS.tolist() == [[IGNORE_LABEL, 3, 4, IGNORE_LABEL]]


def test_stream_windows_cover_the_text_without_repeating_in_an_epoch(shards):
    loader = _loader(shards, "stream", batch_rows=1)
    starts = loader._rows
    assert len(set(starts)) == len(starts)
    assert all((b - a) % 16 == 0 for a, b in zip(sorted(starts), sorted(starts)[1:]))


def test_evaluation_takes_every_label_once(shards):
    for mode in ("stream", "pack"):
        batches = list(evaluation_batches(shards, batch_rows=4, row_tokens=16, mode=mode))
        labels = sum((batch.label_BS != IGNORE_LABEL).sum() for batch in batches)
        assert labels == shards.num_tokens - shards.num_documents


def test_documents_in_a_stream_window_are_kept_apart(shards):
    """Every document of this corpus repeats its own number, so tokens tell where the borders are."""
    for batch in itertools.islice(_loader(shards, "stream"), 10):
        for tokens, labels, documents, positions in zip(
            batch.token_BS, batch.label_BS, batch.document_BS, batch.position_BS
        ):
            borders = [0, *(at for at in range(1, 16) if tokens[at] != tokens[at - 1]), 16]
            for number, (begin, end) in enumerate(itertools.pairwise(borders)):
                assert documents[begin:end].tolist() == [number] * (end - begin)
                assert positions[begin:end].tolist() == list(range(end - begin))
                assert labels[begin : end - 1].tolist() == tokens[begin + 1 : end].tolist()
                assert labels[end - 1] in (IGNORE_LABEL, *([tokens[15]] if end == 16 else []))


def test_a_single_text_is_read_as_one_document(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=1000, tokenizer_digest="abc")
    writer.add(np.arange(500))
    writer.close()
    batch = next(iter(_loader(Shards.open(tmp_path), "stream")))
    assert (batch.label_BS == batch.token_BS + 1).all() and not batch.document_BS.any()
    assert (batch.position_BS == np.arange(16)).all()


def test_masked_tokens_of_a_stream_are_no_labels(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=1000, tokenizer_digest="abc")
    writer.add(np.arange(500), [token % 2 == 0 for token in range(500)])
    writer.close()
    batch = next(iter(_loader(Shards.open(tmp_path), "stream")))
    wanted = np.where(batch.token_BS % 2 == 1, batch.token_BS + 1, IGNORE_LABEL)
    assert (batch.label_BS == wanted).all()


def test_a_batch_of_windows_reads_no_more_than_its_windows(tmp_path):
    writer = ShardWriter(tmp_path, vocab_size=1000, tokenizer_digest="abc", shard_tokens=500_000)
    for _ in range(8):
        writer.add(np.arange(500_000) % 1000)
    writer.close()
    batches = iter(_loader(Shards.open(tmp_path, verify=False), "stream"))
    next(batches)
    tracemalloc.start()
    next(batches)
    peak_bytes = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak_bytes < 200_000


def test_documents_longer_than_a_row_and_tiny_corpora_are_refused(shards):
    with pytest.raises(DataError, match="does not fit a row of 8"):
        _loader(shards, row_tokens=8)
    with pytest.raises(DataError, match="a batch needs 500"):
        _loader(shards, batch_rows=500)
