"""Rows of equal length from documents of any length.

A packed row holds several whole documents; attention stays inside each (`document_BS`), positions restart, and labels
never cross a border (V3 §4.1 packs documents; unlike V3, other documents are hidden from each other here, because short
synthetic documents would otherwise mostly see strangers). Padding is what best fit leaves over.
"""

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from shoal.errors import DataError
from shoal.text.shards import Window

IGNORE_LABEL = -100

LOOKAHEAD = 4096
"""Documents that best fit chooses among; more fills rows better and costs time."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """One micro-batch, int64 arrays `[rows, row_tokens]`."""

    token_BS: NDArray[np.int64]
    label_BS: NDArray[np.int64]
    """Next token, or `IGNORE_LABEL` where no loss is taken."""
    document_BS: NDArray[np.int64]
    """Number of the document inside its row; -1 for padding."""
    position_BS: NDArray[np.int64]
    """Place inside the document."""


def pack_documents(lengths: Sequence[int], row_tokens: int, seed: int) -> list[list[int]]:
    """Which documents share a row: best fit, none cut.

    Args:
        seed: order in which documents are taken up.
    Raises:
        DataError: a document is longer than a row.
    """
    order = np.random.default_rng(seed).permutation(len(lengths)).tolist()
    rows: list[list[int]] = []
    for start in range(0, len(order), LOOKAHEAD):
        rows += _pack_window(order[start : start + LOOKAHEAD], lengths, row_tokens)
    return rows


def _pack_window(items: list[int], lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Longest first, each row filled with the longest document that still fits."""
    by_length = sorted(items, key=lambda item: lengths[item])
    sizes = [lengths[item] for item in by_length]
    if sizes and sizes[-1] > row_tokens:
        raise DataError(
            f"a document of {sizes[-1]} tokens does not fit a row of {row_tokens}; raise row_tokens or split the document."
        )
    rows = []
    while by_length:
        row, room = [], row_tokens
        while (at := bisect.bisect_right(sizes, room) - 1) >= 0:
            row.append(by_length.pop(at))
            room -= sizes.pop(at)
        rows.append(row)
    return rows


def batch_of_documents(
    documents: Sequence[tuple[NDArray[np.integer], NDArray[np.bool_] | None]],
    rows: Sequence[Sequence[int]],
    row_tokens: int,
    pad_token: int,
) -> Batch:
    """Lay documents out in rows.

    Args:
        documents: token ids, and True where the token counts as a label (None: everywhere).
        rows: document indices of each row, from `pack_documents`.
    """
    shape = (len(rows), row_tokens)
    token, label = np.full(shape, pad_token, np.int64), np.full(shape, IGNORE_LABEL, np.int64)
    document, position = np.full(shape, -1, np.int64), np.zeros(shape, np.int64)
    for row, members in enumerate(rows):
        at = 0
        for number, member in enumerate(members):
            ids, counts = documents[member]
            end = at + len(ids)
            token[row, at:end], document[row, at:end], position[row, at:end] = ids, number, np.arange(len(ids))
            following = ids[1:].astype(np.int64)
            label[row, at : end - 1] = following if counts is None else np.where(counts[1:], following, IGNORE_LABEL)
            at = end
    return Batch(token_BS=token, label_BS=label, document_BS=document, position_BS=position)


def batch_of_windows(windows: Sequence[Window]) -> Batch:
    """Rows of consecutive tokens; the last token of each window is only a label.

    As in packed rows, documents are kept apart: numbered from 0 in each row, positions restarting, no label across a
    border. A document that began before the window counts its positions from the window's start.
    """
    tokens = np.stack([window.tokens for window in windows])
    counts = np.stack([window.counts for window in windows])
    numbers = np.stack([window.documents for window in windows])
    is_label_BS = counts[:, 1:] & (numbers[:, 1:] == numbers[:, :-1])
    index_BS = np.broadcast_to(np.arange(tokens.shape[1] - 1), is_label_BS.shape)
    is_begin_BS = np.zeros(is_label_BS.shape, np.bool_)
    is_begin_BS[:, 1:] = numbers[:, 1:-1] != numbers[:, :-2]
    begin_BS = np.maximum.accumulate(np.where(is_begin_BS, index_BS, 0), axis=1)
    return Batch(
        token_BS=tokens[:, :-1],
        label_BS=np.where(is_label_BS, tokens[:, 1:], IGNORE_LABEL),
        document_BS=np.cumsum(is_begin_BS, axis=1),
        position_BS=index_BS - begin_BS,
    )
