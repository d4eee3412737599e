"""The tokens of one pass as arrays, whoever they belong to."""

from collections.abc import Sequence as Many
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.engine.scheduler import Work


@dataclass(frozen=True)
class Batch:
    """One row per token; `first_row` says where each work's rows begin."""

    token_M: Tensor
    position_M: Tensor
    sequence_M: Tensor
    table_BX: Tensor
    """Pages of each work's sequence."""
    first_row: list[int]

    @classmethod
    def of(cls, planned: Many[Work]) -> "Batch":
        """The planned tokens and the guesses after them."""
        token: list[int] = []
        position: list[int] = []
        row: list[int] = []
        first_row: list[int] = []
        table_BX = np.zeros((len(planned), max(len(work.sequence.pages) for work in planned)), dtype=np.int32)
        for index, work in enumerate(planned):
            first_row.append(len(token))
            token += work.sequence.token_ids[work.start : work.start + work.count]
            token += work.draft
            position += range(work.start, work.start + work.rows)
            row += [index] * work.rows
            table_BX[index, : len(work.sequence.pages)] = work.sequence.pages
        return cls(
            torch.tensor(token),
            torch.tensor(position, dtype=torch.int32),
            torch.tensor(row, dtype=torch.int32),
            torch.from_numpy(table_BX),
            first_row,
        )

    def pick(self, row_N: Tensor, *, further: int = 0) -> "Batch":
        """Some of the rows, so many positions further on in their sequences."""
        return Batch(
            self.token_M[row_N], self.position_M[row_N] + further, self.sequence_M[row_N], self.table_BX, self.first_row
        )
