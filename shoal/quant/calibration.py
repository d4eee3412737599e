"""Int4 codes chosen by the error they make on real inputs, one column at a time (Frantar et al., "GPTQ", 2023).

Round-to-nearest minimises the error of the weights; what matters is the error of the product, `|| (W - Q) X ||^2`, whose
curvature is the gram matrix `X X^T` of the inputs. After a column is rounded, the columns not yet rounded move to make
good what it broke, by the steps that the inverse of the curvature prescribes. The scale of a group is chosen when its
first column is reached, for the weights as they have moved by then.
"""

import torch
from torch import Tensor

from shoal.quant.int4 import best_scale, dequantise, quantise, round_to_codes

DAMPING = 0.01
"""Share of the mean curvature added to every column: few inputs must not move weights without bound."""
BLOCK_COLUMNS = 128
"""Columns whose corrections are applied together to the columns after them; groups divide it."""


def calibrated(weight_FD: Tensor, gram_DD: Tensor, group: int) -> tuple[Tensor, Tensor]:
    """Codes (int8) and bfloat16 scales `[F, D / group]`, as `int4.quantise` gives them.

    Args:
        gram_DD: sum over inputs of `x x^T`, float32 or float64; columns that no input ever reached are rounded alone.
    """
    rows, cols = weight_FD.shape
    moved_FD = torch.nn.functional.pad(weight_FD.float(), (0, -cols % group))
    step_DD = _steps(torch.nn.functional.pad(gram_DD.double(), (0, -cols % group, 0, -cols % group))).float()
    code_FD = torch.zeros_like(moved_FD)
    scale_FG = torch.empty(rows, moved_FD.shape[1] // group, dtype=torch.bfloat16)
    for start in range(0, moved_FD.shape[1], BLOCK_COLUMNS):
        stop = min(start + BLOCK_COLUMNS, moved_FD.shape[1])
        error_FX = torch.zeros(rows, stop - start)
        for column in range(start, stop):
            if column % group == 0:
                # A group lies inside its block, so the corrections of all earlier columns have reached it.
                scale_FG[:, column // group] = best_scale(moved_FD[:, column : column + group])
            value_F = moved_FD[:, column]
            scale_F = scale_FG[:, column // group]
            code_F = round_to_codes(value_F.unsqueeze(1), scale_F).squeeze(1)
            code_FD[:, column] = code_F
            error_F = (value_F - code_F * scale_F.float()) / step_DD[column, column]
            error_FX[:, column - start] = error_F
            moved_FD[:, column + 1 : stop] -= torch.outer(error_F, step_DD[column, column + 1 : stop])
        moved_FD[:, stop:] -= error_FX @ step_DD[start:stop, stop:]
    code_FD = code_FD[:, :cols].to(torch.int8)
    return _no_worse(weight_FD.float(), gram_DD, group, (code_FD, scale_FG))


def output_error(weight_FD: Tensor, code_FD: Tensor, scale_FG: Tensor, gram_DD: Tensor, group: int) -> float:
    """Squared error of the product over the inputs behind the gram matrix."""
    wrong_FD = (weight_FD.float() - dequantise(code_FD, scale_FG, group)).to(gram_DD.dtype)
    return float(((wrong_FD @ gram_DD) * wrong_FD).sum())


def _no_worse(weight_FD: Tensor, gram_DD: Tensor, group: int, found: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Greedy steps carry no guarantee: keep round-to-nearest where it happens to do better."""
    nearest = quantise(weight_FD, group)
    if output_error(weight_FD, *nearest, gram_DD, group) < output_error(weight_FD, *found, gram_DD, group):
        return nearest
    return found


def _steps(gram_DD: Tensor) -> Tensor:
    """Upper Cholesky factor of the inverse curvature: row j says how columns after j make good the error of column j."""
    diagonal = gram_DD.diagonal()
    mean = diagonal.mean().clamp_min(torch.finfo(torch.float64).tiny)
    curved_DD = gram_DD.clone()
    curved_DD.diagonal().add_(torch.where(diagonal == 0, mean, DAMPING * mean))
    inverse_DD = torch.cholesky_inverse(torch.linalg.cholesky(curved_DD))
    return torch.linalg.cholesky(inverse_DD, upper=True)
