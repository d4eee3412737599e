import pytest
import torch

from shoal.model.experts import Experts, SlotLayout, SwiGLU, experts_reference, grouped_swiglu_cuda
from tests.model.test_mla import TINY

CASES = {
    "spread": torch.tensor([[0, 3], [1, 5], [2, 4], [5, 0], [3, 1], [0, 2], [4, 5]]),
    "one expert takes all": torch.tensor([[2, 4]] * 5),
    "one token": torch.tensor([[5, 0]]),
}


def _experts(dtype=None):
    torch.manual_seed(0)
    experts = Experts(TINY)
    torch.nn.init.normal_(experts.gate_up_proj, std=0.3)
    torch.nn.init.normal_(experts.down_proj, std=0.3)
    experts.compute_dtype = dtype
    return experts


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype, tolerance", [(None, 1e-5), (torch.bfloat16, 0.05)])
def test_grouped_experts_equal_the_definition_with_gradients(name, dtype, tolerance):
    expert_MK = CASES[name]
    experts = _experts(dtype)
    x_MD = torch.randn(len(expert_MK), 40, requires_grad=True)
    weight_MK = torch.rand(expert_MK.shape, requires_grad=True)
    leaves = (x_MD, weight_MK, experts.gate_up_proj, experts.down_proj)
    fast = experts(x_MD, weight_MK, expert_MK)
    slow = experts_reference(x_MD, experts.gate_up_proj, experts.down_proj, weight_MK, expert_MK)
    scale = slow.abs().max()
    assert (fast - slow).abs().max() < tolerance * scale
    grad = torch.randn_like(slow)
    for got, want in zip(torch.autograd.grad(fast, leaves, grad), torch.autograd.grad(slow, leaves, grad)):
        assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-6) * 2


def test_slots_are_padded_blocks_in_expert_order():
    layout = SlotLayout.of(torch.tensor([[0, 2], [2, 0], [2, 5]]), num_experts=6, pad=4)
    assert layout.groups == [(0, 4), (4, 4), (4, 8), (8, 8), (8, 8), (8, 12)]
    assert layout.slot_MK.tolist() == [[0, 4], [5, 1], [6, 8]]
    assert layout.token_P[layout.slot_MK.reshape(-1)].tolist() == [0, 0, 1, 1, 2, 2]


def test_the_grouped_product_of_gpus_gives_the_same():
    torch.manual_seed(0)
    x_PD, gate_up, down = torch.randn(8, 16), torch.randn(3, 16, 16), torch.randn(3, 16, 8)
    got = grouped_swiglu_cuda(x_PD, gate_up, down, torch.tensor([3, 3, 8], dtype=torch.int32))
    for expert, rows in ((0, slice(0, 3)), (2, slice(3, 8))):
        gate, up = (x_PD[rows] @ gate_up[expert].t()).chunk(2, dim=-1)
        want = (torch.nn.functional.silu(gate) * up) @ down[expert].t()
        assert torch.allclose(got[rows], want, atol=1e-4)


def test_dense_swiglu_equals_its_formula():
    torch.manual_seed(0)
    layer = SwiGLU(12, 20).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter)
    x = torch.randn(2, 3, 12, dtype=torch.float64, requires_grad=True)
    gate, up = (x @ layer.gate_up_proj.weight.t()).chunk(2, dim=-1)
    expected = (torch.nn.functional.silu(gate) * up) @ layer.down_proj.weight.t()
    assert torch.allclose(layer(x), expected, atol=1e-12)
    assert torch.autograd.gradcheck(lambda value: layer(value), (x,), atol=1e-6)
