"""Drawing the next token of many rows at once, each with its own temperature, cuts and seed.

Randomness is counter-based: the uniform number of a row depends only on its seed, its sample number and how many tokens
it has drawn. Rows joining or leaving the batch therefore change nobody's tokens, and a resumed rollout draws the same.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.kernels.dispatch import sample_rows

HIDDEN = -1e9
"""Finite stand-in for minus infinity: its exponential is zero."""

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


@dataclass
class RowSampling:
    """Sampling parameters of the rows of a batch, one entry per row."""

    temperature_N: Tensor
    top_p_N: Tensor
    top_k_N: Tensor
    seed_N: "np.ndarray[tuple[int], np.dtype[np.uint64]]"

    @property
    def is_plain(self) -> bool:
        """Whether all rows sample from the whole distribution: no cuts, nothing greedy."""
        return not bool(((self.top_k_N > 0) | (self.top_p_N < 1) | (self.temperature_N == 0)).any())

    def uniform_numbers(self, drawn_N: Tensor) -> Tensor:
        """The random number of each row's next token, in [0, 1); `drawn_N` tokens went before."""
        return torch.from_numpy(uniforms(self.seed_N, drawn_N.numpy()))

    def keep(self, row_K: Tensor) -> "RowSampling":
        """Only these rows, in this order."""
        picked = row_K.numpy()
        return RowSampling(self.temperature_N[row_K], self.top_p_N[row_K], self.top_k_N[row_K], self.seed_N[picked])

    @staticmethod
    def join(parts: list["RowSampling"]) -> "RowSampling":
        """Rows of all parts, in order."""
        return RowSampling(
            torch.cat([part.temperature_N for part in parts]),
            torch.cat([part.top_p_N for part in parts]),
            torch.cat([part.top_k_N for part in parts]),
            np.concatenate([part.seed_N for part in parts]),
        )


def sample_tokens(logit_NV: Tensor, rows: RowSampling, drawn_N: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One token per row, its log-probability under the distribution it was drawn from, and whether its scores were finite.

    Args:
        logit_NV: float32 scores.
        drawn_N: tokens each row has drawn before; the counter of its random numbers.
    """
    uniform_N = rows.uniform_numbers(drawn_N)
    cut_N = (rows.top_k_N > 0) | (rows.top_p_N < 1)
    if not bool(cut_N.any()):
        return sample_rows(logit_NV, rows.temperature_N, uniform_N)
    # Row by row the same numbers whoever else is in the batch: cut rows hide their tails, then all are drawn alike.
    hot_N = rows.temperature_N.masked_fill(rows.temperature_N == 0, 1.0)
    finite_N = logit_NV.isfinite().all(dim=-1)
    log_probability_NV = (logit_NV.nan_to_num() / hot_N.unsqueeze(1)).log_softmax(dim=-1)
    score_NV = logit_NV.nan_to_num().clone()
    score_NV[cut_N] = cut_tail(log_probability_NV[cut_N], rows.top_k_N[cut_N], rows.top_p_N[cut_N]).clamp_min(HIDDEN)
    temperature_N = torch.where(cut_N & (rows.temperature_N > 0), torch.ones_like(hot_N), rows.temperature_N)
    token_N, logprob_N, _ = sample_rows(score_NV, temperature_N, uniform_N)
    return token_N, logprob_N, finite_N


def cut_tail(log_probability_NV: Tensor, top_k_N: Tensor, top_p_N: Tensor) -> Tensor:
    """Keep the `top_k` likeliest, then the fewest that reach `top_p` together; renormalise.

    The token that crosses `top_p` stays, so at least one always does.
    """
    vocabulary = log_probability_NV.shape[1]
    sorted_NV, order_NV = log_probability_NV.sort(dim=-1, descending=True)
    rank_V = torch.arange(vocabulary)
    limit_N = torch.where(top_k_N > 0, top_k_N, vocabulary)
    outside_NV = rank_V >= limit_N.unsqueeze(1)
    kept_NV = sorted_NV.masked_fill(outside_NV, float("-inf")).log_softmax(dim=-1)
    before_NV = kept_NV.exp().cumsum(dim=-1) - kept_NV.exp()
    outside_NV |= before_NV >= top_p_N.unsqueeze(1)
    outside_NV[:, 0] = False
    hidden_NV = torch.zeros_like(outside_NV).scatter(1, order_NV, outside_NV)
    return log_probability_NV.masked_fill(hidden_NV, float("-inf")).log_softmax(dim=-1)


def uniforms(
    seed_N: "np.ndarray[tuple[int], np.dtype[np.uint64]]", counter_N: "np.ndarray[tuple[int], np.dtype[np.int64]]"
) -> "np.ndarray[tuple[int], np.dtype[np.float64]]":
    """Uniform numbers in [0, 1), one per row, by SplitMix64 of (seed, counter)."""
    with np.errstate(over="ignore"):
        state_N = _mix(seed_N + _GOLDEN) + _GOLDEN * (counter_N.astype(np.uint64) + np.uint64(1))
        return (_mix(state_N) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_seeds(seed: int, num_samples: int) -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    """Independent row seeds for the samples of one request."""
    with np.errstate(over="ignore"):
        base = np.full(num_samples, seed & 0xFFFFFFFFFFFFFFFF, dtype=np.uint64)
        return _mix(_mix(base) + _GOLDEN * np.arange(1, num_samples + 1, dtype=np.uint64))


def _mix(state_N: "np.ndarray[tuple[int], np.dtype[np.uint64]]") -> "np.ndarray[tuple[int], np.dtype[np.uint64]]":
    state_N = (state_N ^ (state_N >> np.uint64(30))) * _MIX_1
    state_N = (state_N ^ (state_N >> np.uint64(27))) * _MIX_2
    return state_N ^ (state_N >> np.uint64(31))
