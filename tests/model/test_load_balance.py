import torch

from shoal.model.load_balance import auxiliary_loss, max_violation, sequence_balance_loss, update_bias, update_biases
from shoal.model.router import Routing
from shoal.model.transformer import Transformer, initialise
from tests.model.test_mla import TINY


def test_max_violation_is_the_papers_formula():
    count_LE = torch.tensor([[10, 20, 30, 40], [25, 25, 25, 25]])
    assert torch.allclose(max_violation(count_LE), torch.tensor([(40 - 25) / 25, 0.0], dtype=torch.float64))


def test_the_bias_moves_by_its_speed_against_the_overload():
    bias_E = torch.tensor([0.5, 0.0, -0.25, 0.0])
    update_bias(bias_E, torch.tensor([9, 1, 5, 5]), speed=0.125)
    assert torch.equal(bias_E, torch.tensor([0.375, 0.125, -0.25, 0.0]))


def test_speed_zero_freezes_the_bias():
    bias_E = torch.rand(4)
    before = bias_E.clone()
    update_bias(bias_E, torch.tensor([9, 1, 5, 5]), speed=0.0)
    assert torch.equal(bias_E, before)


def test_every_moe_layer_is_updated_the_mtp_layer_too():
    model = Transformer(TINY.replace(num_nextn_predict_layers=1))
    initialise(model, 0)
    uneven = torch.tensor([5, 0, 0, 0, 0, 1])
    update_biases(model, {1: uneven, 2: uneven}, speed=0.01)
    assert torch.allclose(model.layers[1].mlp.gate.e_score_correction_bias[0], torch.tensor(-0.01))
    assert torch.allclose(model.mtp[0].block.mlp.gate.e_score_correction_bias[0], torch.tensor(-0.01))


def test_updates_balance_a_skewed_router():
    """A router that prefers one expert becomes even by bias updates alone."""
    torch.manual_seed(0)
    from shoal.model.router import choose_experts

    config = TINY.replace(num_experts_per_tok=1)
    score_ME = torch.rand(600, 6)
    score_ME[:, 2] += 0.5
    bias_E = torch.zeros(6)

    def violation() -> float:
        _, expert_MK = choose_experts(score_ME, bias_E, config)
        return float(max_violation(torch.bincount(expert_MK.reshape(-1), minlength=6).unsqueeze(0)))

    before = violation()
    for _ in range(400):
        _, expert_MK = choose_experts(score_ME, bias_E, config)
        update_bias(bias_E, torch.bincount(expert_MK.reshape(-1), minlength=6), 0.003)
    assert before > 2 and violation() < 0.15


def _routing(score_ME, sequence_M=None, mask_M=None):
    routing = Routing(token_mask_M=mask_M, sequence_M=sequence_M)
    routing.record(1, score_ME, score_ME.topk(2, dim=-1).indices)
    return routing


def test_sequence_loss_equals_the_published_sum_per_sequence():
    torch.manual_seed(0)
    score_ME = torch.rand(10, 6, dtype=torch.float64)
    sequence_M = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1])
    expected = 0.0
    for sequence in (0, 1):
        part = score_ME[sequence_M == sequence]
        chosen = torch.zeros_like(part).scatter(1, part.topk(2, dim=-1).indices, 1.0)
        load = chosen.sum(0) * 6 / (2 * len(part))
        affinity = (part / part.sum(dim=-1, keepdim=True)).mean(0)
        expected += float((load * affinity).sum()) / 2
    assert abs(float(sequence_balance_loss(_routing(score_ME, sequence_M), TINY)) - expected) < 1e-12


def test_perfect_balance_costs_one():
    score_ME = torch.full((6, 6), 0.1) + torch.eye(6) * 0.8 + torch.eye(6).roll(1, 1) * 0.8
    assert abs(float(sequence_balance_loss(_routing(score_ME), TINY)) - 1.0) < 1e-6
    assert abs(float(auxiliary_loss(_routing(score_ME), TINY)) - 1.0) < 1e-6


def test_padding_changes_no_balance_loss():
    torch.manual_seed(0)
    score_ME = torch.rand(8, 6)
    alone = sequence_balance_loss(_routing(score_ME[:5]), TINY)
    mask_M = torch.tensor([True] * 5 + [False] * 3)
    padded = sequence_balance_loss(_routing(score_ME, torch.tensor([0] * 5 + [-1] * 3), mask_M), TINY)
    assert torch.allclose(alone, padded)
