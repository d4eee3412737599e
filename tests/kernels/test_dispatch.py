import os
import subprocess
import sys

import pytest
import torch

from shoal.kernels import reference
from shoal.kernels.cpu.build import library
from shoal.kernels.dispatch import document_attention, rms_norm, swiglu_backward, swiglu_forward

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
