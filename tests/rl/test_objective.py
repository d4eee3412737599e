import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.errors import ConfigError, TaskError
from shoal.rl.importance import ImportanceConfig
from shoal.rl.objective import ObjectiveConfig, off_policy_sequences, policy_objective, token_entropy

VARIANTS: dict[str, ObjectiveConfig] = {
    "grpo": ObjectiveConfig(loss_average="sequence", kl_coefficient=0.04),
    "dapo": ObjectiveConfig(loss_average="token", clip_low=0.2, clip_high=0.28),
    "dr_grpo": ObjectiveConfig(loss_average="constant", max_response_tokens=9),
    "r1": ObjectiveConfig(loss_average="sequence", clip_low=10, clip_high=10, kl_coefficient=0.001),
    "gspo": ObjectiveConfig(loss_average="sequence", level="sequence", clip_low=0.05, clip_high=0.05),
    "v3_2": ObjectiveConfig(
        loss_average="sequence", kl_coefficient=0.3, kl_estimator="unbiased", off_policy_threshold=0.01
    ),
    "gspo_unbiased_kl": ObjectiveConfig(level="sequence", kl_coefficient=0.3, kl_estimator="unbiased"),
    "token_truncated": ObjectiveConfig(kl_coefficient=0.1, importance=ImportanceConfig(low=0.5, high=1.2)),
    "sequence_masked": ObjectiveConfig(
        loss_average="sequence", importance=ImportanceConfig(level="sequence", bound="mask", low=0.7, high=1.5)
    ),
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
        "engine_logprob_MT": old_MT + 0.2 * draw(answers, length),
    }


def by_loops(
    logprob_MT: Tensor,
    old_logprob_MT: Tensor,
    advantage_M: Tensor,
    mask_MT: Tensor,
    reference_logprob_MT: Tensor,
    engine_logprob_MT: Tensor,
    config: ObjectiveConfig,
) -> float:
    """The published formulas, one number at a time."""
    sums, lengths = [], []
    for i in range(len(advantage_M)):
        places = [t for t in range(mask_MT.shape[1]) if mask_MT[i, t]]
        new, old, reference, engine = (
            [float(tensor[i, t].detach()) for t in places]
            for tensor in (logprob_MT, old_logprob_MT, reference_logprob_MT, engine_logprob_MT)
        )
        a = float(advantage_M[i])
        ratios = [math.exp(x - y) for x, y in zip(new, old)]
        weights = [math.exp(x - y) for x, y in zip(old, engine)]
        policy_ratios = [math.prod(ratios) ** (1 / len(places))] * len(places) if config.level == "sequence" else ratios
        counts = not (
            config.off_policy_threshold is not None
            and a < 0
            and sum(x - y for x, y in zip(engine, new)) / len(places) > config.off_policy_threshold
        )
        total = 0.0
        for t, ratio in enumerate(policy_ratios):
            gain = min(ratio * a, max(1 - config.clip_low, min(1 + config.clip_high, ratio)) * a) if counts else 0.0
            if config.importance is not None:
                weight = math.prod(weights) if config.importance.level == "sequence" else weights[t]
                is_inside = config.importance.low <= weight <= config.importance.high
                if config.importance.bound == "mask":
                    weight = weight if is_inside else 0.0
                gain *= max(config.importance.low, min(config.importance.high, weight)) if weight else 0.0
            difference = reference[t] - new[t]
            divergence = math.exp(difference) - difference - 1
            if config.kl_estimator == "unbiased":
                divergence *= ratios[t]
            total += gain - config.kl_coefficient * divergence
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


def test_clips_on_the_high_side_are_counted_apart() -> None:
    result = policy_objective(
        torch.tensor([[1.5, 1.5, 1.0], [0.5, 1.5, 1.5]], dtype=torch.float64).log(),
        torch.zeros(2, 3, dtype=torch.float64),
        torch.tensor([1.0, -1.0]),
        torch.ones(2, 3),
        ObjectiveConfig(),
    )
    assert (result.clip_fraction, result.clip_high_fraction) == (3 / 6, 2 / 6)


def categorical(seed: int) -> Tensor:
    return torch.randn(1, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def expected_divergence(logits: Tensor, sampler_logits: Tensor, reference: Tensor, estimator: Any) -> Tensor:
    """The estimate's exact mean: every token of the vocabulary once, weighted as the sampler draws it."""
    sampler = sampler_logits.log_softmax(-1)
    result = 0.0 * logits.sum()
    for token in range(7):
        config = ObjectiveConfig(kl_coefficient=1.0, kl_estimator=estimator)
        piece = policy_objective(
            logits.log_softmax(-1)[:, token : token + 1],
            sampler[:, token : token + 1],
            torch.zeros(1),
            torch.ones(1, 1),
            config,
            reference_logprob_MT=reference.log_softmax(-1)[:, token : token + 1],
        )
        result = result + float(sampler[0, token].exp()) * piece.loss
    return result


def test_unbiased_divergence_has_the_value_and_the_gradient_of_the_divergence_itself() -> None:
    logits, sampler, reference = categorical(1).requires_grad_(), categorical(2), categorical(3)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference.log_softmax(-1))).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    estimate = expected_divergence(logits, sampler, reference, "unbiased")
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert float(estimate.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    torch.testing.assert_close(gradient, wanted, atol=1e-12, rtol=0)


def test_plain_k3_has_the_value_on_policy_and_never_the_gradient() -> None:
    logits, reference = categorical(1).requires_grad_(), categorical(3)
    policy = logits.log_softmax(-1)
    exact = (policy.exp() * (policy - reference.log_softmax(-1))).sum()
    (wanted,) = torch.autograd.grad(exact, logits)
    estimate = expected_divergence(logits, logits.detach(), reference, "k3")
    (gradient,) = torch.autograd.grad(estimate, logits)
    assert float(estimate.detach()) == pytest.approx(float(exact.detach()), abs=1e-12)
    assert (gradient - wanted).abs().max() > 0.05


def test_gradient_of_the_unbiased_divergence_is_ratio_times_log_policy_over_reference() -> None:
    logprob_MT = torch.tensor([[-1.0, -0.5]], dtype=torch.float64, requires_grad=True)
    old_MT = torch.tensor([[-1.2, -0.4]], dtype=torch.float64)
    reference_MT = torch.tensor([[-0.7, -0.9]], dtype=torch.float64)
    config = ObjectiveConfig(kl_coefficient=1.0, kl_estimator="unbiased")
    result = policy_objective(
        logprob_MT, old_MT, torch.zeros(1), torch.ones(1, 2), config, reference_logprob_MT=reference_MT
    )
    result.loss.backward()
    assert logprob_MT.grad is not None
    wanted = [math.exp(0.2) * -0.3 / 2, math.exp(-0.1) * 0.4 / 2]
    assert logprob_MT.grad.flatten().tolist() == pytest.approx(wanted, abs=1e-12)


def test_only_wrong_answers_that_drifted_are_left_out() -> None:
    sampler_MT = torch.full((4, 3), -1.0, dtype=torch.float64)
    logprob_MT = torch.tensor([[-1.6] * 3, [-1.6] * 3, [-1.4] * 3, [-0.4] * 3], dtype=torch.float64)
    mask_MT = torch.tensor([[1, 1, 0], [1, 1, 1], [1, 1, 1], [1, 1, 1]])
    advantage_M = torch.tensor([-1.0, 1.0, -1.0, -1.0])
    left_out_M = off_policy_sequences(logprob_MT, sampler_MT, advantage_M, mask_MT, 0.5)
    assert left_out_M.tolist() == [True, False, False, False]
    assert off_policy_sequences(logprob_MT, sampler_MT, advantage_M, mask_MT, 0.39).tolist() == [1, 0, 1, 0]
    # What stands outside the mask must not count: 0.6 over two tokens, whatever the third would say.
    logprob_MT[0, 2] = math.inf
    assert off_policy_sequences(logprob_MT, sampler_MT, advantage_M, mask_MT, 0.5).tolist()[0]


def test_an_answer_left_out_keeps_its_divergence_and_its_place_in_the_average() -> None:
    logprob_MT = torch.tensor([[-2.0, -2.0], [-1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    old_MT = torch.full((2, 2), -1.0, dtype=torch.float64)
    config = ObjectiveConfig(loss_average="sequence", kl_coefficient=0.1, off_policy_threshold=0.5)
    result = policy_objective(
        logprob_MT, old_MT, torch.tensor([-1.0, 2.0]), torch.ones(2, 2), config, reference_logprob_MT=old_MT
    )
    result.loss.backward()
    assert result.off_policy_fraction == 0.5
    assert float(result.loss.detach()) == pytest.approx(-(2.0 - 0.1 * (math.e - 2)) / 2)
    assert logprob_MT.grad is not None
    assert logprob_MT.grad.tolist()[0] == pytest.approx([0.1 * (1 - math.e) / 4] * 2)
    assert logprob_MT.grad.tolist()[1] == pytest.approx([-2.0 / 4] * 2)


def test_the_off_policy_mask_measures_from_the_engine_where_its_log_probabilities_are_known() -> None:
    logprob_MT = torch.full((1, 2), -1.0, dtype=torch.float64)
    config = ObjectiveConfig(off_policy_threshold=0.1)
    arguments = (logprob_MT, logprob_MT, torch.tensor([-1.0]), torch.ones(1, 2), config)
    assert policy_objective(*arguments).off_policy_fraction == 0.0
    assert policy_objective(*arguments, engine_logprob_MT=logprob_MT + 0.2).off_policy_fraction == 1.0


def test_importance_weights_scale_the_policy_gradient_of_their_token() -> None:
    logprob_MT = torch.tensor([[-1.0, -1.0, -1.0]], dtype=torch.float64, requires_grad=True)
    engine_MT = torch.tensor([[-1.0, -1.0 - math.log(1.5), -1.0 - math.log(4.0)]], dtype=torch.float64)
    result = policy_objective(
        logprob_MT,
        logprob_MT.detach(),
        torch.tensor([1.0]),
        torch.ones(1, 3),
        ObjectiveConfig(importance=ImportanceConfig(high=2.0)),
        engine_logprob_MT=engine_MT,
    )
    result.loss.backward()
    assert logprob_MT.grad is not None
    assert logprob_MT.grad.flatten().tolist() == pytest.approx([-1 / 3, -1.5 / 3, -2.0 / 3])
    assert result.importance_mean == pytest.approx(1.5)
    assert result.importance_bounded_fraction == pytest.approx(1 / 3)


def test_the_new_choices_are_exercised_by_the_example() -> None:
    inputs = example()
    assert 0 < policy_objective(**inputs, config=VARIANTS["v3_2"]).off_policy_fraction < 1
    for name in ("token_truncated", "sequence_masked"):
        assert 0 < policy_objective(**inputs, config=VARIANTS[name]).importance_bounded_fraction < 1


def test_divergence_is_measured_even_when_it_has_no_weight() -> None:
    logprob_MT = torch.tensor([[math.log(0.5)]], dtype=torch.float64)
    reference_MT = torch.tensor([[math.log(0.25)]], dtype=torch.float64)
    result = policy_objective(
        logprob_MT, logprob_MT, torch.ones(1), torch.ones(1, 1), ObjectiveConfig(), reference_logprob_MT=reference_MT
    )
    assert result.kl == pytest.approx(0.5 - math.log(0.5) - 1)


@pytest.mark.parametrize("name", ["grpo", "v3_2", "token_truncated", "sequence_masked"])
def test_what_stands_outside_the_mask_is_never_looked_at(name: str) -> None:
    inputs = example()
    clean = policy_objective(**inputs, config=VARIANTS[name])
    clean.loss.backward()
    wanted = inputs["logprob_MT"].grad
    dirty_MT = torch.where(inputs["mask_MT"], inputs["logprob_MT"].detach(), -math.inf).requires_grad_()
    inputs |= {
        "logprob_MT": dirty_MT,
        "old_logprob_MT": torch.where(inputs["mask_MT"], inputs["old_logprob_MT"], -math.inf),
        "engine_logprob_MT": torch.where(inputs["mask_MT"], inputs["engine_logprob_MT"], math.nan),
    }
    dirty = policy_objective(**inputs, config=VARIANTS[name])
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
        ({"kl_estimator": "k2"}, "kl_estimator='k2'"),
        ({"off_policy_threshold": 0.0}, "off_policy_threshold=0.0"),
        ({"off_policy_threshold": math.nan}, "off_policy_threshold=nan"),
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
        (lambda x: x.update(engine_logprob_MT=None), "pass engine_logprob_MT"),
        (lambda x: x.update(engine_logprob_MT=torch.ones(6, 4)), r"\[6, 4\]"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(spoil: Callable[[dict[str, Any]], None], message: str) -> None:
    inputs = example()
    spoil(inputs)
    with pytest.raises(TaskError, match=message):
        policy_objective(**inputs, config=VARIANTS["token_truncated"])
