import math
import random

import pytest
import torch

from shoal.engine.engine import Engine
from shoal.errors import ConfigError, TaskError
from shoal.model.transformer import Transformer, initialise
from shoal.rl.advantage import group_advantages
from shoal.rl.grading import Grade
from shoal.rl.grpo import train_grpo
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.importance import ImportanceConfig
from shoal.rl.objective import ObjectiveConfig, policy_objective
from shoal.rl.rewards import WeightedReward
from shoal.rl.rollout import Prompter, sample_rollouts
from shoal.rl.sampling import StepSampler, problem_places
from shoal.rl.step_metrics import shows_work
from shoal.rl.tasks import TASKS
from shoal.rl.update import UpdateBatch, UpdateOptions, plan_update, policy_log_probabilities, update_policy
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from tests.model.test_mla import TINY

TOKENIZER = Tokenizer.train(["What is 3 + 4? The sum is 7."] * 3, 280)
PROMPTER = Prompter(TOKENIZER, ChatTemplate.default(TOKENIZER))
PROBLEMS = [TASKS["addition"].generate(random.Random(number), 1) for number in range(12)]


def _model(**changes):
    model = Transformer(TINY.replace(vocab_size=TOKENIZER.vocab_size, max_position_embeddings=128, **changes))
    initialise(model, 0)
    return model


def _rollouts(model, seed=0):
    return sample_rollouts(Engine(model), PROMPTER, PROBLEMS[:3], group_size=4, max_tokens=9, seed=seed)


def _advantages(rollouts):
    reward = torch.tensor([float(sum(completion.token_ids) % 2) for completion in rollouts.completions])
    reward[8:] = 1.0  # the last group is all alike
    return group_advantages(reward, 4)


def _update(model, rollouts, advantage, objective=None, *, replay=None, old_logprobs=None, **options):
    settings = UpdateOptions(**{"row_tokens": 64, "micro_batch_answers": 100, **options})
    captured = {}
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-3, clip_norm=0.0))
    optimizers.step = lambda: (
        captured.update({n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}) or 0.0
    )
    objective = objective or ObjectiveConfig()
    given = {"right": [True] * len(advantage), "replay": replay, "old_logprobs": old_logprobs}
    batch = UpdateBatch(rollouts=rollouts, advantage_M=advantage, **given)
    (plan,) = plan_update(batch, objective, settings, vocab_size=model.config.vocab_size)
    return update_policy(model, optimizers, plan, objective, settings), captured


def test_the_packed_gradient_equals_one_answer_at_a_time():
    model = _model()
    rollouts = _rollouts(model)
    advantage = _advantages(rollouts)
    _, packed = _update(model, rollouts, advantage)
    model.zero_grad()
    total = rollouts.num_response_tokens
    for index, completion in enumerate(rollouts.completions):
        prompt = rollouts.prompt_ids[index]
        ids = torch.tensor([[*prompt, *completion.token_ids]])
        every = model.logits(model(ids)).log_softmax(-1)[0, len(prompt) - 1 : -1]
        logprob = every.gather(1, ids[0, len(prompt) :].unsqueeze(1)).t()
        outcome = policy_objective(
            logprob,
            torch.tensor([completion.logprobs]),
            advantage[index : index + 1],
            torch.ones_like(logprob, dtype=torch.bool),
            ObjectiveConfig(),
            num_tokens_total=total,
            num_sequences_total=12,
        )
        outcome.loss.backward()
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.allclose(packed[name], parameter.grad, atol=1e-5), name


@pytest.mark.parametrize(
    "options", [{"row_tokens": 200}, {"micro_batch_answers": 2}, {"micro_batch_answers": 5, "row_tokens": 40}]
)
def test_the_gradient_does_not_depend_on_packing(options):
    model = _model()
    rollouts = _rollouts(model)
    _, plain = _update(model, rollouts, _advantages(rollouts))
    model.zero_grad()
    _, other = _update(model, rollouts, _advantages(rollouts), **options)
    for name, gradient in plain.items():
        if gradient is not None:
            assert torch.allclose(gradient, other[name], atol=1e-5), name


def test_on_policy_the_engine_and_the_trainer_agree():
    model = _model()
    rollouts = _rollouts(model)
    result, _ = _update(model, rollouts, _advantages(rollouts))
    assert result.mismatch < 1e-4 and result.clip_fraction == 0


def test_answers_without_advantage_are_left_out():
    model = _model()
    rollouts = _rollouts(model)
    advantage = _advantages(rollouts)
    result, _ = _update(model, rollouts, advantage)
    assert result.num_tokens == sum(len(c.token_ids) for c, a in zip(rollouts.completions, advantage) if float(a) != 0)
    nothing, _ = _update(model, rollouts, torch.zeros(12))
    assert nothing.grad_norm is None and nothing.num_tokens == 0


def test_drafts_learn_behind_a_detached_trunk():
    model = _model(num_nextn_predict_layers=1)
    rollouts = _rollouts(model)
    _, with_drafts = _update(model, rollouts, _advantages(rollouts), mtp_weight=1.0)
    model.zero_grad()
    _, without = _update(model, rollouts, _advantages(rollouts))
    for name, gradient in with_drafts.items():
        if name.startswith("mtp."):
            assert without[name] is None and (gradient is None or gradient.isfinite().all())
        else:
            assert torch.allclose(gradient, without[name], atol=1e-6), name
    assert any(
        gradient is not None and float(gradient.abs().max()) > 0
        for name, gradient in with_drafts.items()
        if name.startswith("mtp.")
    )


def test_importance_weights_come_from_the_trainers_own_log_probabilities_before_the_update():
    """An engine that reports every token as twice as likely gets the weight a half on each: half the gradient."""
    model = _model()
    rollouts = _rollouts(model)
    options = UpdateOptions(row_tokens=64)
    old = policy_log_probabilities(model, rollouts, options)
    _, plain = _update(model, rollouts, _advantages(rollouts))
    model.zero_grad()
    for completion in rollouts.completions:
        completion.logprobs = [value + math.log(2) for value in completion.logprobs]
    objective = ObjectiveConfig(importance=ImportanceConfig(high=5.0))
    result, halved = _update(model, rollouts, _advantages(rollouts), objective, old_logprobs=old)
    assert abs(result.importance_mean - 0.5) < 1e-4 and abs(result.mismatch - math.log(2)) < 1e-4
    for name, gradient in plain.items():
        assert gradient is None or torch.allclose(gradient / 2, halved[name], atol=1e-6), name


@pytest.mark.parametrize("objective", [{"loss_average": "sequence", "kl_coefficient": 0.05}, {"level": "sequence"}])
def test_the_gradient_of_other_objectives_does_not_depend_on_micro_batches_either(objective):
    model, reference = _model(), _model()
    initialise(reference, 1)
    rollouts = _rollouts(model)
    found = []
    for size in (100, 3):
        model.zero_grad()
        captured = {}
        optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-3, clip_norm=0.0))
        optimizers.step = lambda into=captured: into.update(
            {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}
        )
        options = UpdateOptions(row_tokens=64, micro_batch_answers=size)
        chosen = ObjectiveConfig(**objective)
        batch = UpdateBatch(rollouts=rollouts, advantage_M=_advantages(rollouts), right=[True] * 12)
        (plan,) = plan_update(batch, chosen, options, vocab_size=300)
        update_policy(model, optimizers, plan, chosen, options, reference=reference)
        found.append(captured)
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-5) for name in found[0])


def _config(**changes):
    return GrpoConfig(
        **{
            "steps": 4,
            "prompts_per_step": 3,
            "group_size": 4,
            "max_response_tokens": 8,
            "checkpoint_every": 2,
            **changes,
        }
    )


def test_a_stopped_stage_resumes_to_the_same_weights_bit_for_bit(tmp_path):
    class Stop(Exception):
        pass

    def stop(step):
        if step == 3:
            raise Stop

    objective = ObjectiveConfig(kl_coefficient=0.01)
    whole, broken = _model(), _model()
    train_grpo(whole, _config(objective=objective), PROBLEMS, PROMPTER, tmp_path / "whole")
    with pytest.raises(Stop):
        train_grpo(broken, _config(objective=objective), PROBLEMS, PROMPTER, tmp_path / "broken", after_step=stop)
    resumed = _model()
    train_grpo(resumed, _config(objective=objective), PROBLEMS, PROMPTER, tmp_path / "broken")
    for name, tensor in whole.state_dict().items():
        assert torch.equal(tensor, resumed.state_dict()[name]), name


@pytest.mark.slow
def test_reward_alone_teaches_and_a_coin_does_not(tmp_path):
    """Answers that begin with an even token become the rule under the reward, not under a coin."""

    def reward(prompts, completions, completion_ids, **columns):
        return [float(ids[0] % 2 == 0) for ids in completion_ids]

    def coin(prompts, completions, completion_ids, **columns):
        return [float(random.Random(f"{place}{ids}").random() < 0.5) for place, ids in enumerate(completion_ids)]

    def share(model):
        rollouts = sample_rollouts(Engine(model), PROMPTER, PROBLEMS, group_size=16, max_tokens=1, seed=99)
        return sum(c.token_ids[0] % 2 == 0 for c in rollouts.completions) / len(rollouts.completions)

    learning = OptimizerConfig(learning_rate=3e-3, weight_decay=0.0)
    config = _config(steps=30, prompts_per_step=6, group_size=16, max_response_tokens=2, optimizer=learning)
    model, control = _model(), _model()
    before = share(model)
    train_grpo(model, config, PROBLEMS, PROMPTER, tmp_path / "reward", rewards=[WeightedReward(function=reward)])
    train_grpo(control, config, PROBLEMS, PROMPTER, tmp_path / "coin", rewards=[WeightedReward(function=coin)])
    assert before < 0.7 and share(model) > 0.9 and share(control) < 0.75


@pytest.mark.parametrize("values", [lambda n: [0.0] * (n - 1), lambda n: [float("nan")] * n])
def test_a_reward_that_breaks_its_contract_stops_the_run(tmp_path, values):
    with pytest.raises(TaskError, match="broken"):

        def broken(prompts, completions, completion_ids, **columns):
            return values(len(prompts))

        train_grpo(_model(), _config(), PROBLEMS, PROMPTER, tmp_path, rewards=[WeightedReward(function=broken)])


def test_dynamic_sampling_replaces_groups_that_are_all_alike():
    """A verifier under which only every other problem ever differs: the step is filled from the others."""

    class Verifier:
        def verify(self, problems, answers):
            return [
                Grade(score=float(PROBLEMS.index(problem) % 2 and len(answer) % 2))
                for problem, answer in zip(problems, answers)
            ], 0.0

    class Prompter:
        tokenizer, template = PROMPTER.tokenizer, PROMPTER.template
        prompt_ids = PROMPTER.prompt_ids

        def text(self, ids):
            return f"<think></think><answer>{'x' * (1 + sum(ids) % 2)}</answer>"

    model = _model()
    config = _config(dynamic_sampling=True, max_sampling_rounds=6, prompts_per_step=4)
    sample = StepSampler(config, PROBLEMS, Prompter(), Verifier()).draw(Engine(model), 0, 0)
    assert all(place % 2 for place in sample.place) and len(sample.rollouts.texts) == 16
    assert sample.groups_sampled == sample.next_problem > 4
    plain = StepSampler(_config(prompts_per_step=4), PROBLEMS, Prompter(), Verifier()).draw(Engine(model), 0, 0)
    assert plain.groups_sampled == 4 and any(place % 2 == 0 for place in plain.place)


def test_stale_rollouts_come_from_weights_exactly_so_many_steps_old(tmp_path):
    """One step of staleness: the second step's samples are those of the first weights, whatever the first update did."""

    def first(prompts, completions, completion_ids, step, **columns):
        seen.setdefault(step, completion_ids)
        return [float(sum(ids) % 2) for ids in completion_ids]

    def run(name, staleness, rate):
        seen.clear()
        learning = OptimizerConfig(learning_rate=rate, weight_decay=0.0)
        config = _config(steps=3, staleness=staleness, optimizer=learning, warmup_steps=0)
        rewards = [WeightedReward(function=first)]
        train_grpo(_model(), config, PROBLEMS, PROMPTER, tmp_path / name, rewards=rewards)
        return dict(seen)

    seen = {}
    still, fresh, stale = run("still", 0, 1e-30), run("fresh", 0, 0.1), run("stale", 1, 0.1)
    assert fresh[0] == stale[0] == still[0]
    assert stale[1] == still[1] and fresh[1] != still[1]  # drawn before the first update
    assert stale[2] != still[2]


def test_every_problem_is_asked_once_per_pass_wherever_a_step_begins():
    whole = problem_places(12, 0, 30, seed=0)
    assert sorted(whole[:12]) == sorted(whole[12:24]) == list(range(12)) and whole[:12] != whole[12:24]
    assert problem_places(12, 0, 7, seed=0) + problem_places(12, 7, 23, seed=0) == whole
    assert problem_places(12, 0, 12, seed=1) != whole[:12]


def test_work_is_something_in_the_think_block():
    assert shows_work("<think>1+1=2</think><answer>2</answer>")
    assert not shows_work("<think> \n</think><answer>2</answer>") and not shows_work("1+1=2")


@pytest.mark.parametrize(
    "changes",
    [
        {"group_size": 1},
        {"minibatches": 2},
        {"temperature": 0.0},
        {"steps": 0},
        {"top_p": 0.0},
        {"keep_sampling_mask": True},
        {"overlong_cache_tokens": 9},
        {"staleness": -1},
        {"max_failed_fraction": 2.0},
    ],
)
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        _config(**changes)


def test_a_verifier_that_fails_on_most_answers_stops_the_run(tmp_path):
    class Failing:
        def verify(self, problems, answers):
            return [Grade(score=None, failure="timeout", detail="no answer within 2 s")] * len(answers), 2.0

    class Prompter:
        tokenizer, prompt_ids = PROMPTER.tokenizer, PROMPTER.prompt_ids
        text = staticmethod(lambda ids: "<think></think><answer>1</answer>")

    with pytest.raises(TaskError, match=r"failed on 12 of 12 answers \(12 timeout; first: no answer within 2 s\)"):
        train_grpo(_model(), _config(), PROBLEMS, Prompter(), tmp_path, verifier=Failing())


def test_too_few_problems_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="fewer than prompts_per_step"):
        train_grpo(_model(), _config(), PROBLEMS[:2], PROMPTER, tmp_path)
