import pytest
import torch

from shoal.config import ModelConfig
from shoal.model.router import Router, Routing, affinities, choose_experts, hide_far_groups

BASE = ModelConfig(
    vocab_size=11,
    hidden_size=10,
    num_hidden_layers=2,
    num_attention_heads=1,
    intermediate_size=8,
    n_routed_experts=12,
    num_experts_per_tok=3,
    moe_intermediate_size=8,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=2.5,
)


def test_the_bias_steers_the_choice_and_never_the_weight():
    torch.manual_seed(0)
    score_ME = torch.rand(7, 12)
    bias_E = torch.zeros(12)
    bias_E[5] = 100.0
    weight_MK, expert_MK = choose_experts(score_ME, bias_E, BASE)
    assert (expert_MK == 5).any(dim=-1).all()
    for weights, experts, scores in zip(weight_MK, expert_MK, score_ME):
        expected = scores[experts] / scores[experts].sum() * 2.5
        assert torch.allclose(weights, expected, atol=1e-6)


def test_weights_sum_to_the_scaling_factor():
    weight_MK, _ = choose_experts(torch.rand(9, 12), torch.zeros(12), BASE)
    assert torch.allclose(weight_MK.sum(dim=-1), torch.full((9,), 2.5), atol=1e-5)


def test_no_gradient_reaches_the_bias_or_the_unchosen():
    torch.manual_seed(1)
    score_ME = torch.rand(5, 12, requires_grad=True)
    bias_E = torch.zeros(12, requires_grad=True)
    weight_MK, expert_MK = choose_experts(score_ME, bias_E, BASE.replace(norm_topk_prob=False))
    weight_MK.sum().backward()
    assert bias_E.grad is None
    chosen_ME = torch.zeros(5, 12).scatter(1, expert_MK, 1.0)
    assert torch.equal(score_ME.grad, chosen_ME * 2.5)


def test_at_most_topk_group_groups_are_used_by_the_sum_of_their_best_two():
    torch.manual_seed(2)
    score_ME = torch.rand(50, 12)
    _, expert_MK = choose_experts(score_ME, torch.zeros(12), BASE)
    for scores, experts in zip(score_ME, expert_MK):
        best = scores.view(4, 3).topk(2, dim=-1).values.sum(dim=-1).topk(2).indices
        assert set((experts // 3).tolist()) <= set(best.tolist())


def test_negative_biased_scores_still_beat_hidden_groups():
    """Hidden groups must be minus infinity: with 0 they would win over negative scores (a bug several engines had)."""
    steered_ME = -torch.rand(20, 12) - 1
    hidden_ME = hide_far_groups(steered_ME, BASE)
    assert torch.isinf(hidden_ME).sum(dim=-1).eq(6).all()
    experts = hidden_ME.topk(3, dim=-1)
    assert torch.isfinite(experts.values).all()


def test_v2_groups_count_by_their_best_expert():
    config = BASE.replace(
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        num_experts_per_tok=2,
        topk_group=1,
    )
    score_ME = torch.tensor([[0.30, 0.0, 0.0, 0.2, 0.2, 0.0, 0.1, 0.1, 0.05, 0.05, 0.0, 0.0]])
    weight_MK, expert_MK = choose_experts(score_ME, None, config)
    assert expert_MK[0, 0] == 0 and (expert_MK < 3).all()
    assert weight_MK[0, 0] == pytest.approx(0.30 * 2.5)


def test_affinities_are_float32_even_for_bfloat16_inputs():
    score_ME = affinities(torch.randn(4, 10).bfloat16(), torch.randn(12, 10), BASE)
    assert score_ME.dtype == torch.float32


def test_routing_counts_leave_padding_out():
    router = Router(BASE, layer=1)
    torch.nn.init.normal_(router.weight)
    routing = Routing(token_mask_M=torch.tensor([True, True, False, True, False]))
    router(torch.randn(5, 10), routing)
    assert int(routing.counts_LE(12).sum()) == 3 * 3
    assert torch.equal(
        routing.counts_LE(12)[0], torch.bincount(routing.expert_LMK[0][[0, 1, 3]].reshape(-1), minlength=12)
    )
