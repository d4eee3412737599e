import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError
from shoal.rl.objective import ObjectiveConfig, policy_objective, token_entropy

VARIANTS: dict[str, ObjectiveConfig] = {
    "grpo": ObjectiveConfig(loss_average="sequence", kl_coefficient=0.04),
    "dapo": ObjectiveConfig(loss_average="token", clip_low=0.2, clip_high=0.28),
    "dr_grpo": ObjectiveConfig(loss_average="constant", max_response_tokens=9),
    "r1": ObjectiveConfig(loss_average="sequence", clip_low=10, clip_high=10, kl_coefficient=0.001),
    "gspo": ObjectiveConfig(loss_average="sequence", level="sequence", clip_low=0.05, clip_high=0.05),
}


def example(answers: int = 6, length: int = 5) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(7)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    old_MT = -draw(answers, length).abs()
    length_M = torch.tensor([5, 1, 3, 4, 2, 5])[:answers]
    return {
        "logprob_MT": (old_MT + 0.3 * draw(answers, length)).requires_grad_(),
        "old_logprob_MT": old_MT,
        "advantage_M": draw(answers),
        "mask_MT": torch.arange(length) < length_M[:, None],
        "reference_logprob_MT": old_MT + 0.2 * draw(answers, length),
    }


def by_loops(
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    advantage_M: Tensor,
    mask_MT: Tensor,
    reference_logprob_MT: Tensor,
    config: ObjectiveConfig,
) -> float:
    """The published formulas, one number at a time."""
    sums, lengths = [], []
    for i in range(len(advantage_M)):
        places = [t for t in range(mask_MT.shape[1]) if mask_MT[i, t]]
        log_ratios = [float(logprob_MT[i, t].detach() - old_logprob_MT[i, t]) for t in places]
        if config.level == "sequence":
            log_ratios = [sum(log_ratios) / len(places)] * len(places)
        total = 0.0
        for t, log_ratio in zip(places, log_ratios):
            ratio, a = math.exp(log_ratio), float(advantage_M[i])
            total += min(ratio * a, max(1 - config.clip_low, min(1 + config.clip_high, ratio)) * a)
            difference = float(reference_logprob_MT[i, t] - logprob_MT[i, t].detach())
            total -= config.kl_coefficient * (math.exp(difference) - difference - 1)
        sums.append(total)
        lengths.append(len(places))
    if config.loss_average == "token":
        return -sum(sums) / sum(lengths)
    if config.loss_average == "sequence":
        return -sum(s / n for s, n in zip(sums, lengths)) / len(sums)
    assert config.max_response_tokens is not None
    return -sum(sums) / len(sums) / config.max_response_tokens


@pytest.mark.parametrize("name", VARIANTS)
def test_loss_equals_the_published_formula_written_as_loops(name: str) -> None:
    inputs = example()
    assert float(policy_objective(**inputs, config=VARIANTS[name]).loss.detach()) == pytest.approx(
        by_loops(**inputs, config=VARIANTS[name]), abs=1e-12
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_gradient_equals_finite_differences(name: str) -> None:
    inputs = example()
    logprob_MT = inputs.pop("logprob_MT")

    def loss(x_MT: Tensor) -> Tensor:
        return policy_objective(x_MT, **inputs, config=VARIANTS[name]).loss

    assert torch.autograd.gradcheck(loss, (logprob_MT,))


@pytest.mark.parametrize("name", VARIANTS)
def test_cutting_a_step_into_micro_batches_leaves_loss_and_gradient_alone(name: str) -> None:
    inputs = example()
    leaf = inputs["logprob_MT"]
    whole = policy_objective(**inputs, config=VARIANTS[name])
    whole.loss.backward()
    whole_grad, leaf.grad = leaf.grad.clone(), None
    total = 0.0
    for part in (slice(0, 1), slice(1, 4), slice(4, 6)):
        piece = policy_objective(
            **{key: value[part] for key, value in inputs.items()},
            config=VARIANTS[name],
            num_tokens_total=int(inputs["mask_MT"].sum()),
            num_sequences_total=6,
        )
        piece.loss.backward()
        total += float(piece.loss.detach())
    assert total == pytest.approx(float(whole.loss.detach()), abs=1e-12)
    torch.testing.assert_close(leaf.grad, whole_grad)


def test_on_policy_gradient_is_advantage_over_tokens() -> None:
    logprob_MT = torch.tensor([[-1.0, -2.0], [-0.5, -0.1]], dtype=torch.float64, requires_grad=True)
    mask_MT = torch.tensor([[True, True], [True, False]])
    result = policy_objective(
        logprob_MT, logprob_MT.detach(), torch.tensor([2.0, -1.0]), mask_MT, ObjectiveConfig(loss_average="token")
    )
    result.loss.backward()
    assert logprob_MT.grad is not None
    assert logprob_MT.grad.tolist() == [[-2 / 3, -2 / 3], [1 / 3, 0.0]]
    assert (result.clip_fraction, result.kl, result.ratio_mean) == (0.0, 0.0, 1.0)


def test_clip_removes_the_gradient_only_on_the_side_that_the_advantage_pushes_to() -> None:
    ratio = torch.tensor([[1.5], [1.5], [0.5], [0.5]], dtype=torch.float64)
    logprob_MT = ratio.log().requires_grad_()
    result = policy_objective(
        logprob_MT,
        torch.zeros(4, 1, dtype=torch.float64),
        torch.tensor([1.0, -1.0, 1.0, -1.0]),
        torch.ones(4, 1, dtype=torch.bool),
        ObjectiveConfig(),
    )
    result.loss.backward()
    assert logprob_MT.grad is not None
    assert [bool(value) for value in logprob_MT.grad.flatten()] == [False, True, True, False]
    assert result.clip_fraction == 0.5
    assert float(result.loss.detach()) == pytest.approx(-(1.2 - 1.5 + 0.5 - 0.8) / 4)


def test_clip_of_ten_lets_everything_but_absurd_ratios_through() -> None:
    log_ratio_MT = torch.tensor([[math.log(10.9), math.log(11.1), math.log(1e-6)]], dtype=torch.float64)
    for advantage, wanted in ((1.0, 1 / 3), (-1.0, 0.0)):
        result = policy_objective(
            log_ratio_MT,
            torch.zeros(1, 3, dtype=torch.float64),
            torch.tensor([advantage]),
            torch.ones(1, 3),
            ObjectiveConfig(clip_low=10, clip_high=10),
        )
        assert result.clip_fraction == pytest.approx(wanted)


def test_divergence_is_measured_even_when_it_has_no_weight() -> None:
    logprob_MT = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    reference_MT = torch.tensor([[math.log(0.25)]], dtype=torch.float64)
    result = policy_objective(
        logprob_MT, logprob_MT, torch.ones(1), torch.ones(1, 1), ObjectiveConfig(), reference_logprob_MT=reference_MT
    )
    assert result.kl == pytest.approx(0.5 - math.log(0.5) - 1)


def test_what_stands_outside_the_mask_is_never_looked_at() -> None:
    inputs = example()
    clean = policy_objective(**inputs, config=VARIANTS["grpo"])
    clean.loss.backward()
    wanted = inputs["logprob_MT"].grad
    dirty_MT = torch.where(inputs["mask_MT"], inputs["logprob_MT"].detach(), -math.inf).requires_grad_()
    inputs |= {
        "logprob_MT": dirty_MT,
        "old_logprob_MT": torch.where(inputs["mask_MT"], inputs["old_logprob_MT"], -math.inf),
    }
    dirty = policy_objective(**inputs, config=VARIANTS["grpo"])
    dirty.loss.backward()
    assert float(dirty.loss.detach()) == float(clean.loss.detach())
    assert dirty_MT.grad is not None and wanted is not None
    torch.testing.assert_close(dirty_MT.grad, wanted)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_batch_without_response_tokens_gives_zero_and_no_nan(name: str) -> None:
    inputs = example()
    inputs["mask_MT"] = torch.zeros_like(inputs["mask_MT"])
    result = policy_objective(**inputs, config=VARIANTS[name])
    result.loss.backward()
    assert float(result.loss.detach()) == 0.0
    assert inputs["logprob_MT"].grad.abs().max() == 0.0


def test_an_absurd_ratio_stays_finite_in_float32() -> None:
    logprob_MT = torch.tensor([[-1.0]], requires_grad=True)
    result = policy_objective(
        logprob_MT, torch.tensor([[-500.0]]), torch.tensor([-1.0]), torch.ones(1, 1), ObjectiveConfig()
    )
    result.loss.backward()
    assert logprob_MT.grad is not None
    assert math.isfinite(float(result.loss.detach())) and math.isfinite(float(logprob_MT.grad))


def test_entropy_in_chunks_equals_the_definition_and_knows_impossible_tokens() -> None:
    logits = torch.randn(3, 5, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits[..., 4] = -math.inf
    probability = logits.softmax(-1)
    wanted = -(probability * probability.clamp_min(1e-300).log()).sum(-1)
    torch.testing.assert_close(token_entropy(logits, chunk_rows=4), wanted)
    assert float(token_entropy(torch.zeros(1, 8))) == pytest.approx(math.log(8))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"loss_average": "mean"}, "loss_average='mean'"),
        ({"loss_average": "constant"}, "max_response_tokens"),
        ({"level": "word"}, "level='word'"),
        ({"clip_low": -0.1}, "clip_low=-0.1"),
        ({"kl_coefficient": math.nan}, "kl_coefficient=nan"),
    ],
)
def test_impossible_configurations_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ObjectiveConfig(**change)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda x: x.update(advantage_M=torch.ones(5)), r"one advantage per answer, got \[5\]"),
        (lambda x: x.update(mask_MT=torch.ones(6, 4)), r"\[6, 4\]"),
        (lambda x: x.update(advantage_M=torch.full((6,), math.nan)), "not a finite number"),
        (lambda x: x.update(reference_logprob_MT=None), "needs the reference"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    inputs = example()
    spoil(inputs)
    with pytest.raises(TaskError, match=message):
        policy_objective(**inputs, config=VARIANTS["grpo"])
