import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError
from shoal.rl.importance import ImportanceConfig, importance_weights, mismatch_divergence

RATIO = torch.tensor([[1.0, 0.25, 3.0, 1.5], [2.0, 2.0, 9.0, 9.0]], dtype=torch.float64)
MASK = torch.tensor([[True, True, True, True], [True, True, False, False]])


def weights(**choices: Any) -> list[list[float]]:
    return importance_weights(
        RATIO.log(), torch.zeros_like(RATIO), MASK, ImportanceConfig(**choices)
    ).weight_MT.tolist()


def test_token_weights_are_cut_to_the_bounds() -> None:
    assert weights(low=0.5, high=2.0) == [
        pytest.approx([1.0, 0.5, 2.0, 1.5]),
        pytest.approx([2.0, 2.0, 0.0, 0.0]),
    ]


def test_token_weights_are_dropped_outside_the_bounds() -> None:
    assert weights(bound="mask", low=0.5, high=2.5) == [
        pytest.approx([1.0, 0.0, 0.0, 1.5]),
        pytest.approx([2.0, 2.0, 0.0, 0.0]),
    ]


def test_sequence_weights_are_the_product_over_the_answer() -> None:
    product = 0.25 * 3.0 * 1.5
    assert weights(level="sequence", high=3.0) == [pytest.approx([product] * 4), pytest.approx([3.0, 3.0, 0.0, 0.0])]
    assert weights(level="sequence", bound="mask", high=3.0)[1] == [0.0] * 4


def test_counts_look_at_response_tokens_only() -> None:
    result = importance_weights(RATIO.log(), torch.zeros_like(RATIO), MASK, ImportanceConfig(low=0.5, high=2.5))
    assert result.bounded_fraction == pytest.approx(2 / 6)
    assert result.mean == pytest.approx((1.0 + 0.5 + 2.5 + 1.5 + 2.0 + 2.0) / 6)


def test_an_engine_that_agrees_gets_weights_of_one_and_no_divergence() -> None:
    logprob_MT = -torch.rand(2, 4, generator=torch.Generator().manual_seed(0))
    for level in ("token", "sequence"):
        result = importance_weights(logprob_MT, logprob_MT, MASK, ImportanceConfig(level=level, bound="mask"))
        assert torch.equal(result.weight_MT, MASK.float())
    assert mismatch_divergence(logprob_MT, logprob_MT, MASK) == 0.0


def test_sequence_weights_repair_the_expectation_and_token_weights_do_not() -> None:
    """Two steps over three symbols, enumerated: the mean of f under the trainer from the engine's own distribution."""
    generator = torch.Generator().manual_seed(5)

    def chain() -> tuple[Tensor, Tensor]:
        first = torch.randn(3, generator=generator, dtype=torch.float64).log_softmax(-1)
        return first, torch.randn(3, 3, generator=generator, dtype=torch.float64).log_softmax(-1)

    def log_probabilities(model: tuple[Tensor, Tensor]) -> Tensor:
        return torch.tensor([[model[0][a], model[1][a, b]] for a in range(3) for b in range(3)], dtype=torch.float64)

    trainer_MT, engine_MT = log_probabilities(chain()), log_probabilities(chain())
    value_M = torch.randn(9, generator=generator, dtype=torch.float64)
    wanted = float((trainer_MT.sum(1).exp() * value_M).sum())
    found = {}
    for level in ("token", "sequence"):
        config = ImportanceConfig(level=level, high=1e6)
        weight_MT = importance_weights(trainer_MT, engine_MT, torch.ones(9, 2), config).weight_MT
        found[level] = float((engine_MT.sum(1).exp() * weight_MT[:, 1] * value_M).sum())
    assert found["sequence"] == pytest.approx(wanted, abs=1e-12)
    assert abs(found["token"] - wanted) > 0.01


def test_divergence_in_the_mean_over_the_engine_is_that_of_the_distributions() -> None:
    generator = torch.Generator().manual_seed(6)
    trainer, engine = (torch.randn(7, generator=generator, dtype=torch.float64).log_softmax(-1) for _ in range(2))
    one = torch.ones(1, 1)
    mean = sum(
        float(engine[token].exp()) * mismatch_divergence(trainer[token].view(1, 1), engine[token].view(1, 1), one)
        for token in range(7)
    )
    assert mean == pytest.approx(float((engine.exp() * (engine - trainer)).sum()), abs=1e-12)


def test_what_the_trainer_finds_impossible_or_the_engine_absurdly_unlikely_stays_finite() -> None:
    trainer_MT = torch.tensor([[-math.inf, 0.0]])
    engine_MT = torch.tensor([[-1.0, -500.0]])
    for bound, wanted in (("truncate", [0.0, 2.0]), ("mask", [0.0, 0.0])):
        result = importance_weights(trainer_MT, engine_MT, torch.ones(1, 2), ImportanceConfig(bound=bound))
        assert result.weight_MT.tolist() == [wanted]


def test_an_empty_batch_has_no_weights_and_no_nan() -> None:
    result = importance_weights(RATIO.log(), RATIO.log(), torch.zeros_like(MASK), ImportanceConfig())
    assert float(result.weight_MT.sum()) == 0.0 and result.mean == 0.0 and result.bounded_fraction == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"level": "word"}, "level='word'"),
        ({"bound": "clip"}, "bound='clip'"),
        ({"high": 0.9}, "high=0.9"),
        ({"low": 1.1}, "low=1.1"),
        ({"low": -0.1}, "low=-0.1"),
        ({"high": math.inf}, "high=inf"),
        ({"high": math.nan}, "high=nan"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ImportanceConfig(**change)


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(TaskError, match=r"\[2, 3\]"):
        importance_weights(RATIO, RATIO[:, :3], MASK, ImportanceConfig())
    missing_MT = RATIO.clone()
    missing_MT[0, 1] = math.nan
    with pytest.raises(TaskError, match="must report every token"):
        importance_weights(RATIO, missing_MT, MASK, ImportanceConfig())
