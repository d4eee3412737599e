"""Fused bfloat16 products of training against the same products through PyTorch."""

import pytest
import torch

from shoal.kernels import products
from shoal.model.experts import Combine, Dispatch, GroupedSwiGLU, SlotLayout
from shoal.model.layers import LinearProduct

pytestmark = pytest.mark.skipif(not products._pays(), reason="PyTorch multiplies bfloat16 here at least as fast")

LOW = torch.bfloat16


def gradients(out, *inputs):
    torch.manual_seed(9)
    return torch.autograd.grad(out, inputs, torch.randn_like(out))


def close(got, expected, tolerance):
    """Relative to the size of the whole array: single numbers may cancel."""
    return float(((got - expected).norm() / expected.norm()).detach()) < tolerance


@pytest.mark.parametrize("rows, cols, outs", [(1, 16, 16), (7, 32, 48), (64, 48, 16), (201, 80, 112)])
def test_linear_equals_pytorch_in_value_and_gradients(rows, cols, outs):
    torch.manual_seed(rows)
    x = torch.randn(rows, cols, requires_grad=True)
    weight = torch.randn(outs, cols, requires_grad=True)
    got, expected = products.linear(x, weight), LinearProduct.apply(x, weight, LOW)
    assert close(got, expected, 4e-3)  # PyTorch rounds its result to bfloat16, ours stays float32
    for mine, theirs in zip(gradients(got, x, weight), gradients(expected, x, weight)):
        assert close(mine, theirs, 4e-3)


def test_linear_sums_rounded_inputs_in_float32():
    torch.manual_seed(0)
    x, weight = torch.randn(70, 96), torch.randn(32, 96)
    exact = x.to(LOW).double() @ weight.to(LOW).double().t()
    assert close(products.linear(x, weight).double(), exact, 1e-6)


@pytest.mark.parametrize("rows", [1, 5, 64, 150])
def test_swiglu_equals_pytorch_in_value_and_gradients(rows):
    torch.manual_seed(rows)
    x = torch.randn(rows, 48, requires_grad=True)
    gate_up, down = (torch.randn(shape, requires_grad=True) for shape in ((64, 48), (48, 32)))
    stacks = (gate_up.unsqueeze(0), down.unsqueeze(0))
    got = products.swiglu(x, gate_up, down)
    expected = GroupedSwiGLU.apply(x.to(LOW), *stacks, [(0, rows)], LOW).float()
    assert close(got, expected, 1e-2)
    for mine, theirs in zip(gradients(got, x, gate_up, down), gradients(expected, x, gate_up, down)):
        assert close(mine, theirs, 1.5e-2)


@pytest.mark.parametrize("tokens, experts, per_token", [(1, 3, 2), (90, 6, 3), (300, 4, 1)])
def test_routed_swiglu_equals_pytorch_in_value_and_gradients(tokens, experts, per_token):
    torch.manual_seed(tokens)
    x = torch.randn(tokens, 32, requires_grad=True)
    weight = torch.rand(tokens, per_token, requires_grad=True)
    gate_up, down = (torch.randn(experts, *shape, requires_grad=True) for shape in ((96, 32), (32, 48)))
    # The last expert gets nothing: its gradients must be zero and not what was in memory.
    chosen = torch.rand(tokens, experts - 1).argsort(dim=1)[:, :per_token]
    got = products.swiglu_experts(x, weight, chosen, gate_up, down)
    layout = SlotLayout.of(chosen, experts, pad=32)
    slots = GroupedSwiGLU.apply(Dispatch.apply(x, layout, LOW), gate_up, down, layout.groups, LOW)
    expected = Combine.apply(slots, weight, layout, torch.float32)
    inputs = (x, weight, gate_up, down)
    assert close(got, expected, 1e-2)
    mine = gradients(got, *inputs)
    for ours, theirs in zip(mine, gradients(expected, *inputs)):
        assert close(ours, theirs, 1.5e-2)
    assert not mine[2][-1].any() and not mine[3][-1].any()


def test_routed_swiglu_takes_experts_in_several_groups():
    torch.manual_seed(1)
    tokens, experts = 3000, 5
    x = torch.randn(tokens, 16, requires_grad=True)
    weight = torch.rand(tokens, 3, requires_grad=True)
    gate_up, down = (torch.randn(experts, *shape, requires_grad=True) for shape in ((32, 16), (16, 16)))
    chosen = torch.rand(tokens, experts).argsort(dim=1)[:, :3]
    whole = gradients(products.swiglu_experts(x, weight, chosen, gate_up, down), x, weight, gate_up, down)
    for expert in range(experts):  # one expert at a time, so in one group each
        row, column = (chosen == expert).nonzero(as_tuple=True)
        alone = torch.zeros(tokens, 1).index_put((row,), weight[row, column].unsqueeze(1))
        out = products.swiglu_experts(
            x, alone, torch.zeros(tokens, 1, dtype=torch.long), gate_up[expert : expert + 1], down[expert : expert + 1]
        )
        part = gradients(out, gate_up, down)
        assert close(whole[2][expert], part[0][expert], 2e-3)
        assert close(whole[3][expert], part[1][expert], 2e-3)


@pytest.mark.parametrize("rows, width, vocabulary", [(1, 16, 32), (45, 48, 1360), (300, 64, 1104), (1500, 32, 80)])
def test_head_cross_entropy_equals_pytorch_in_value_and_gradients(rows, width, vocabulary):
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    label = torch.randint(0, vocabulary, (rows,))
    total, best = products.head_cross_entropy(hidden, weight, label)
    score = hidden.to(LOW).float() @ weight.to(LOW).float().t()
    expected = torch.nn.functional.cross_entropy(score, label, reduction="sum")
    assert close(total, expected, 1e-5) and torch.equal(best, score.argmax(dim=-1))
    for mine, theirs in zip(gradients(total, hidden, weight), gradients(expected, hidden, weight)):
        assert close(mine, theirs, 6e-3)


@pytest.mark.parametrize(
    "rows, width, vocabulary, temperature",
    [(1, 16, 32, 1.0), (45, 48, 1360, 0.6), (300, 64, 1104, 1.0), (1500, 32, 80, 1.3), (2049, 16, 32, 1.0)],
)
@pytest.mark.parametrize("kept", ["all", "some", "none"])
@pytest.mark.parametrize("size", [1.0, 40.0], ids=["", "far from the token's score"])
def test_head_log_probability_equals_pytorch_in_value_and_gradients(
    rows, width, vocabulary, temperature, kept, size, monkeypatch
):
    kept_rows = {"all": rows, "some": min(rows - 1, 1030), "none": 0}[kept]
    monkeypatch.setattr(products, "KEPT_BYTES", 2 * vocabulary * kept_rows)
    torch.manual_seed(rows)
    hidden = torch.randn(rows, width, requires_grad=True)
    weight = (size * torch.randn(vocabulary, width)).requires_grad_()
    token = torch.randint(0, vocabulary, (rows,))
    got, entropy = products.head_log_probability(hidden, weight, token, temperature)
    score = hidden.to(LOW).float() @ weight.to(LOW).float().t() / temperature
    expected = score.log_softmax(dim=-1)
    assert close(entropy, -(expected.exp() * expected).sum(dim=-1), 1e-4)
    expected = expected.gather(1, token.unsqueeze(1)).squeeze(1)
    assert close(got, expected, 1e-5)
    for mine, theirs in zip(gradients(got, hidden, weight), gradients(expected, hidden, weight)):
        assert close(mine, theirs, 6e-3)


def test_a_detached_head_gives_its_input_the_same_gradient():
    torch.manual_seed(3)
    hidden, weight = torch.randn(70, 32, requires_grad=True), torch.randn(48, 32, requires_grad=True)
    label = torch.randint(0, 48, (70,))
    whole, _ = products.head_cross_entropy(hidden, weight, label)
    detached, _ = products.head_cross_entropy(hidden, weight.detach(), label)
    (expected,), (got,) = gradients(whole, hidden), gradients(detached, hidden)
    assert torch.equal(got, expected)


def test_slots_are_sorted_by_expert_tokens_ascending():
    chosen = torch.tensor([[2, 0], [0, 2], [2, 3]])
    slot, choice, end = products.sort_slots(chosen, 5)
    assert choice.tolist() == [1, 2, 0, 3, 4, 5]
    assert end.tolist() == [2, 2, 5, 6, 6]
    assert slot.reshape(-1)[choice].tolist() == list(range(6))


@pytest.mark.parametrize(
    "x, weight",
    [
        (torch.zeros(3, 24), torch.zeros(16, 24)),
        (torch.zeros(3, 32), torch.zeros(20, 32)),
        (torch.zeros(3, 32).double(), torch.zeros(16, 32).double()),
        (torch.zeros(3, 32), torch.zeros(32, 16).t()),
        (torch.zeros(0, 32), torch.zeros(16, 32)),
        (torch.zeros(3, 48), torch.zeros(16, 32)),
    ],
    ids=["odd input", "odd output", "double", "not contiguous", "empty", "sizes differ"],
)
def test_what_does_not_fit_is_left_to_pytorch(x, weight):
    assert products.linear(x, weight) is None


def test_results_do_not_depend_on_the_number_of_threads():
    torch.manual_seed(2)
    x, weight = torch.randn(500, 64), torch.rand(500, 2)
    gate_up, down = torch.randn(7, 64, 64, requires_grad=True), torch.randn(7, 64, 32, requires_grad=True)
    chosen = torch.rand(500, 7).argsort(dim=1)[:, :2]
    threads, results = torch.get_num_threads(), []
    for count in (1, 3):
        torch.set_num_threads(count)
        out = products.swiglu_experts(x, weight, chosen, gate_up, down)
        results.append([out, *gradients(out, gate_up, down)])
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*results))
