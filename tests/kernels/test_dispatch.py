import os
import subprocess
import sys

import pytest
import torch

from shoal.kernels import reference
from shoal.kernels.cpu.build import library
from shoal.kernels.dispatch import (
    cross_entropy_rows_,
    document_attention,
    gather_rows,
    log_probability_rows,
    reduce_slots,
    reduce_slots_backward,
    rms_norm,
    sample_rows,
    swiglu_backward,
    swiglu_forward,
)

needs_library = pytest.mark.skipif(
    library() is None, reason="no C++ compiler on this machine: the reference does the work"
)


@needs_library
@pytest.mark.parametrize("shape", [(1, 1), (7, 33), (3, 2, 16), (5, 130)])
def test_rms_norm_equals_its_definition(shape):
    torch.manual_seed(0)
    x, weight, grad = (
        torch.randn(shape, requires_grad=True),
        torch.randn(shape[-1], requires_grad=True),
        torch.randn(shape),
    )
    got = torch.autograd.grad(rms_norm(x, weight, 1e-6), (x, weight), grad)
    want = torch.autograd.grad(reference.rms_norm(x, weight, 1e-6), (x, weight), grad)
    assert torch.allclose(rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6), atol=1e-5)
    for a, b in zip(got, want):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
@pytest.mark.parametrize("rows, width", [(1, 1), (6, 19), (33, 64)])
def test_swiglu_equals_its_definition(dtype, tolerance, rows, width):
    torch.manual_seed(0)
    gate_up = (torch.randn(rows, 2 * width) * 3).to(dtype)
    grad = torch.randn(rows, width).to(dtype)
    leaf = gate_up.float().requires_grad_()
    want = reference.swiglu(leaf)
    (want_grad,) = torch.autograd.grad(want, leaf, grad.float())
    got_grad, act = swiglu_backward(grad, gate_up)
    assert torch.allclose(swiglu_forward(gate_up).float(), want, atol=tolerance, rtol=tolerance)
    assert torch.allclose(act.float(), want, atol=tolerance, rtol=tolerance)
    assert torch.allclose(got_grad.float(), want_grad, atol=2 * tolerance, rtol=2 * tolerance)


@needs_library
def test_swiglu_survives_extreme_gates():
    gate_up = torch.tensor([[1e4, -1e4, 88.0, -88.0, 0.0, 1.0, 1.0, 1.0, 1.0, 1.0]])
    act = swiglu_forward(gate_up)
    assert torch.allclose(act, reference.swiglu(gate_up), atol=1e-6, rtol=1e-5)
    assert swiglu_backward(torch.ones(1, 5), gate_up)[0].isfinite().all()


CASES = {
    "one document": [[0] * 37],
    "several documents": [[0] * 10 + [10] * 20 + [30] * 7, [0] * 36 + [36]],
    "every token alone": [list(range(5))],
    "one token": [[0]],
}


@needs_library
@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("heads, qk_width, v_width", [(1, 1, 1), (3, 24, 20), (2, 32, 32)])
def test_document_attention_equals_its_definition(name, heads, qk_width, v_width):
    torch.manual_seed(0)
    first_BS = torch.tensor(CASES[name])
    batch, length = first_BS.shape
    query, key = (torch.randn(batch, length, heads, qk_width, requires_grad=True) for _ in range(2))
    wide = torch.randn(batch, length, heads, v_width + 3, requires_grad=True)
    grad = torch.randn(batch, length, heads, v_width)
    arguments = (query, key, wide[..., 3:], first_BS, 0.4)
    fast, slow = document_attention(*arguments), reference.document_attention(*arguments)
    assert torch.allclose(fast, slow, atol=1e-5)
    for a, b in zip(
        torch.autograd.grad(fast, (query, key, wide), grad), torch.autograd.grad(slow, (query, key, wide), grad)
    ):
        assert torch.allclose(a, b, atol=2e-5, rtol=1e-4)


@needs_library
@pytest.mark.parametrize("name", [*CASES, "long"])
@pytest.mark.parametrize("heads, qk_width, v_width", [(1, 16, 16), (2, 48, 32), (1, 80, 112)])
def test_document_attention_with_bfloat16_products_is_the_definition_on_rounded_inputs(name, heads, qk_width, v_width):
    if not library().shoal_multiplies_bf16():
        pytest.skip("this processor does not multiply bfloat16")
    torch.manual_seed(0)
    long = [[0] * 70 + [70] * 90 + list(range(160, 167)), [0] * 167]
    first_BS = torch.tensor({**CASES, "long": long}[name])
    batch, length = first_BS.shape

    def rounded(*shape):
        return torch.randn(*shape).bfloat16().float()

    query, key = (rounded(batch, length, heads, qk_width).requires_grad_() for _ in range(2))
    wide = rounded(batch, length, heads, v_width + 16).requires_grad_()
    grad = rounded(batch, length, heads, v_width)
    arguments = (query, key, wide[..., 16:], first_BS, qk_width**-0.5)
    fast, slow = document_attention(*arguments, torch.bfloat16), reference.document_attention(*arguments)
    assert name != "long" or not torch.equal(fast, document_attention(*arguments))  # it is another kernel
    # The weights, and the score gradients, are rounded to 8 bits on the way.
    assert (fast - slow).abs().max() < 2**-7 * slow.abs().max()
    for a, b in zip(
        torch.autograd.grad(fast, (query, key, wide), grad), torch.autograd.grad(slow, (query, key, wide), grad)
    ):
        assert (a - b).norm() < 2**-8 * b.norm() + 1e-6 * grad.norm()


PROBE = "import torch; from shoal.kernels.cpu.build import library; from shoal.kernels.dispatch import rms_norm; \
print(library() is None, float(rms_norm(torch.tensor([[3.0, 4.0]]), torch.ones(2), 0.0)[0, 0]))"


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, said", [({"SHOAL_KERNELS": "off"}, ""), ({"CXX": "/bin/false"}, "cpu kernels unavailable")]
)
def test_without_kernels_pytorch_does_the_work_and_says_so(tmp_path, changes, said):
    environment = {**os.environ, "XDG_CACHE_HOME": str(tmp_path), **changes}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], env=environment, capture_output=True, text=True, check=True, timeout=60
    )
    is_missing, value = done.stdout.split()
    assert is_missing == "True" and float(value) == pytest.approx(3 / 12.5**0.5, rel=1e-5)
    assert said in done.stderr


@needs_library
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.01)])
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 16), (9, 37)])
def test_cross_entropy_equals_its_definition(dtype, tolerance, rows, width):
    generator = torch.Generator().manual_seed(1)
    score = (torch.randn(rows, width, generator=generator) * 6).to(dtype)
    label = torch.randint(0, width, (rows,), generator=generator)
    want_gradient, got_gradient = score.clone(), score.clone()
    want_loss, want_best = reference.cross_entropy_rows_(want_gradient, label)
    got_loss, got_best = cross_entropy_rows_(got_gradient, label)
    assert torch.allclose(got_loss, want_loss, atol=1e-5, rtol=1e-5) and torch.equal(got_best, want_best)
    assert torch.allclose(got_gradient.float(), want_gradient.float(), atol=tolerance)


@needs_library
@pytest.mark.parametrize("rows, width", [(1, 1), (5, 16), (9, 37)])
def test_log_probability_and_entropy_equal_their_definition(rows, width):
    generator = torch.Generator().manual_seed(1)
    score = torch.randn(rows, width, generator=generator) * 6
    if width > 2:
        score[:, 1] = -1e4  # ruled out
    token = torch.randint(0, width, (rows,), generator=generator)
    for got, want in zip(log_probability_rows(score, token), reference.log_probability_rows(score.double(), token)):
        assert torch.allclose(got.double(), want, atol=2e-5, rtol=1e-5)


@needs_library
def test_cross_entropy_of_nan_scores_is_nan():
    score = torch.randn(2, 40)
    score[0, 3] = float("nan")
    loss, _ = cross_entropy_rows_(score, torch.tensor([1, 2]))
    assert bool(loss[0].isnan()) and bool(loss[1].isfinite())


@needs_library
@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.02)])
def test_slot_kernels_equal_their_definitions(dtype, tolerance):
    generator = torch.Generator().manual_seed(2)
    tokens, choices, width, slots = 7, 3, 21, 25
    slot = torch.randperm(slots, generator=generator)[: tokens * choices].view(tokens, choices)
    x, grad = torch.randn(slots, width, generator=generator).to(dtype), torch.randn(tokens, width, generator=generator)
    weight, hidden = torch.rand(tokens, choices, generator=generator), torch.randn(tokens, width, generator=generator)
    token = torch.randint(0, tokens, (slots,), generator=generator)
    assert torch.equal(gather_rows(hidden, token, dtype), reference.gather_rows(hidden, token, dtype))
    for factor in (weight, None):
        got, want = (f(x, slot, factor, torch.float32) for f in (reduce_slots, reference.reduce_slots))
        assert torch.allclose(got, want, atol=1e-5)
    got, want = (f(grad, x, slot, weight) for f in (reduce_slots_backward, reference.reduce_slots_backward))
    assert torch.allclose(got[0].float(), want[0].float(), atol=tolerance)
    assert torch.allclose(got[1], want[1], atol=1e-4)


@needs_library
@pytest.mark.parametrize("width", [53, 700])
def test_sampling_kernel_draws_what_the_definition_draws(width):
    generator = torch.Generator().manual_seed(3)
    rows = 400
    logit = torch.randn(rows, width, generator=generator) * 3
    temperature = torch.rand(rows, generator=generator) * 2
    temperature[::5] = 0
    uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
    got, want = (f(logit, temperature, uniform) for f in (sample_rows, reference.sample_rows))
    assert float((got[0] == want[0]).float().mean()) > 0.995  # a draw may fall on a boundary of the other's rounding
    same = got[0] == want[0]
    assert torch.allclose(got[1][same], want[1][same], atol=1e-4) and bool(got[2].all())
    logit[3, 2] = float("inf")
    assert sample_rows(logit, temperature, uniform)[2].logical_not().nonzero().tolist() == [[3]]
