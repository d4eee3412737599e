import pytest
import torch

from shoal.checkpoint.store import flatten_optimizer_state, restore_optimizer_state
from shoal.errors import ConfigError
from shoal.training.optimizer import OptimizerConfig, OptimizerSet


def moved(moments, steps, seed=1):
    """A small map after some steps towards a noisy target, and its optimizers."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Linear(24, 16)
    with torch.no_grad():
        model.weight.copy_(torch.randn(16, 24, generator=generator))
        model.bias.zero_()
    optimizers = OptimizerSet(model, OptimizerConfig(learning_rate=1e-2, moments=moments))
    for _ in range(steps):
        x = torch.randn(32, 24, generator=generator)
        (model(x) - x[:, :16]).square().mean().backward()
        optimizers.step()
    return model, optimizers


def test_the_first_step_is_that_of_adamw_to_the_rounding_of_a_quotient():
    # Moments of one step are the gradient and its square, and what is rounded is what is kept, not what is used.
    low, high = moved("bf16", 1)[0], moved("fp32", 1)[0]
    assert torch.allclose(low.weight, high.weight, atol=1e-6) and torch.allclose(low.bias, high.bias, atol=1e-6)


def test_a_hundred_steps_stay_close_to_adamw_with_half_the_bytes():
    (low, kept), (high, full) = moved("bf16", 100), moved("fp32", 100)
    start = moved("fp32", 0)[0].weight
    with torch.no_grad():
        assert float((low.weight - high.weight).norm() / (high.weight - start).norm()) < 0.02
    assert not torch.equal(low.weight, high.weight)

    def bytes_of(optimizers):
        states = [state for optimizer in optimizers.optimizers for state in optimizer.state.values()]
        return sum(state[name].nbytes for state in states for name in ("exp_avg", "exp_avg_sq"))

    assert bytes_of(kept) * 2 == bytes_of(full) == 8 * (24 * 16 + 16)


def test_saved_and_restored_moments_go_on_to_the_same_bits():
    model, optimizers = moved("bf16", 7)
    again, others = moved("bf16", 2)
    named, names = dict(model.named_parameters()), dict(again.named_parameters())
    tensors, values = flatten_optimizer_state(optimizers.optimizers[0], named)
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    again.load_state_dict(model.state_dict())
    restore_optimizer_state(others.optimizers[0], names, tensors, values)
    x = torch.randn(8, 24, generator=torch.Generator().manual_seed(2))
    for net, optimizer in ((model, optimizers), (again, others)):
        net(x).square().mean().backward()
        optimizer.step()
    assert torch.equal(model.weight, again.weight)
    assert others.optimizers[0].state[again.weight]["exp_avg"].dtype == torch.bfloat16


def test_unknown_moments_are_named():
    with pytest.raises(ConfigError, match="moments='fp16' is unknown; use 'fp32' or 'bf16'"):
        OptimizerConfig(moments="fp16")
