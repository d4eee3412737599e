import numpy as np
import torch

from shoal.engine.sampling import RowSampling, cut_tail, sample_seeds, sample_tokens, uniforms

LOG_PROBABILITY = torch.tensor([[0.5, 0.25, 0.15, 0.07, 0.03]]).log()


def _rows(count, temperature=1.0, top_p=1.0, top_k=0, seed=0):
    return RowSampling(
        torch.full((count,), temperature),
        torch.full((count,), top_p),
        torch.full((count,), top_k),
        sample_seeds(seed, count),
    )


def test_frequencies_match_the_distribution():
    token_N, logprob_N, _ = sample_tokens(
        LOG_PROBABILITY.expand(20_000, -1), _rows(20_000), torch.zeros(20_000, dtype=torch.long)
    )
    counts = torch.bincount(token_N, minlength=5).double()
    expected = LOG_PROBABILITY[0].exp().double() * 20_000
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert chi_square < 18.5  # 0.999 quantile, 4 degrees of freedom
    assert torch.allclose(logprob_N, LOG_PROBABILITY[0][token_N])


def test_cuts_keep_exactly_the_head():
    def kept(top_k, top_p):
        cut = cut_tail(LOG_PROBABILITY, torch.tensor([top_k]), torch.tensor([top_p]))[0]
        return [round(float(p), 4) for p in cut.exp()]

    assert kept(2, 1.0) == [0.6667, 0.3333, 0, 0, 0]
    assert kept(0, 0.75) == [0.6667, 0.3333, 0, 0, 0]
    assert kept(0, 0.76) == [0.5556, 0.2778, 0.1667, 0, 0]
    assert kept(0, 1e-9) == [1, 0, 0, 0, 0]
    assert kept(0, 1.0) == [0.5, 0.25, 0.15, 0.07, 0.03]


def test_cut_tokens_are_never_drawn():
    token_N, _, _ = sample_tokens(
        LOG_PROBABILITY.expand(5000, -1), _rows(5000, top_k=3), torch.zeros(5000, dtype=torch.long)
    )
    assert int(token_N.max()) == 2


def test_temperature_zero_is_greedy_beside_sampling_rows():
    rows = _rows(2)
    rows.temperature_N[0] = 0
    logits = torch.tensor([[0.0, 5.0, 1.0], [0.0, 0.0, 0.0]])
    assert int(sample_tokens(logits, rows, torch.zeros(2, dtype=torch.long))[0][0]) == 1


def test_uniforms_depend_on_seed_and_counter_alone_and_look_uniform():
    seeds = sample_seeds(7, 1000)
    values = uniforms(seeds, np.arange(1000))
    assert np.array_equal(values[::-1], uniforms(seeds[::-1], np.arange(1000)[::-1]))
    assert values.min() >= 0 and values.max() < 1
    assert abs(values.mean() - 0.5) < 0.03 and abs(values.std() - 12**-0.5) < 0.02
    assert abs(np.corrcoef(values[:-1], values[1:])[0, 1]) < 0.1
    assert len(np.unique(seeds)) == 1000
