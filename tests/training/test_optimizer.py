"""Clipping and stepping all optimizers of a model as PyTorch would one after the other."""

import copy

import pytest
import torch
from torch import nn

from shoal.training.optimizer import OptimizerConfig, OptimizerSet


def model_with_gradients(size):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    for parameter in model.parameters():
        parameter.grad = size * torch.randn_like(parameter)
    return model


@pytest.mark.parametrize("size", [0.01, 10.0], ids=["below the limit", "above the limit"])
@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_clipping_inside_the_step_equals_clipping_before_it(size, kind):
    config = OptimizerConfig(kind=kind, learning_rate=0.1, clip_norm=0.5)
    model = model_with_gradients(size)
    expected = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), expected.parameters()):
        theirs.grad = mine.grad.clone()
    sets = OptimizerSet(model, config), OptimizerSet(expected, config)
    for _ in range(3):
        grads = [torch.randn_like(p) * size for p in model.parameters()]
        for parameters in (model.parameters(), expected.parameters()):
            for parameter, grad in zip(parameters, grads):
                parameter.grad = grad.clone()
        want = nn.utils.clip_grad_norm_(list(expected.parameters()), 0.5)
        for optimizer in sets[1].optimizers:
            optimizer.step()
        assert sets[0].step() == pytest.approx(float(want), rel=1e-6)
    for mine, theirs in zip(model.parameters(), expected.parameters()):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)
        assert mine.grad is None


def test_gradients_that_are_not_finite_move_nothing_and_are_dropped():
    model = model_with_gradients(1.0)
    before = copy.deepcopy(model.state_dict())
    next(iter(model.parameters())).grad[0] = float("nan")
    assert OptimizerSet(model, OptimizerConfig()).step() is None
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
