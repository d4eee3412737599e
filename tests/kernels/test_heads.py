"""Queries and keys put together in one pass against the same through PyTorch, forward and backward."""

import pytest
import torch

from shoal.kernels.cpu.build import library
from shoal.kernels.heads import expand_keys, latent_entries, rotate_tails
from shoal.kernels.reference import rms_norm
from shoal.model.rope import rotate_interleaved

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

B, S, H, N, R, U = 2, 5, 3, 7, 6, 9


def gradients(outputs, *inputs):
    torch.manual_seed(4)
    return torch.autograd.grad(outputs, inputs, [torch.randn_like(output) for output in outputs])


def test_rotated_tails_equal_the_rotation_of_complex_numbers():
    torch.manual_seed(0)
    x = torch.randn(B, S, H, N + R, requires_grad=True)
    rotation = torch.polar(torch.full((B, S, R // 2), 1.3), torch.randn(B, S, R // 2))
    plain, rotary = x.split([N, R], dim=-1)
    expected = torch.cat([plain, rotate_interleaved(rotary, rotation)], dim=-1)
    got = rotate_tails(x, rotation, N)
    assert torch.allclose(got, expected, atol=1e-6)
    assert torch.allclose(gradients([got], x)[0], gradients([expected], x)[0], atol=1e-6)


def test_expanded_keys_equal_cutting_and_joining():
    torch.manual_seed(1)
    up = torch.randn(B, S, H, N + U, requires_grad=True)
    entry = torch.randn(B, S, 4 + R, requires_grad=True)
    shared = entry[..., 4:]
    plain, value = up.split([N, U], dim=-1)
    expected = (torch.cat([plain, shared.unsqueeze(2).expand(-1, -1, H, -1)], dim=-1), value)
    got = expand_keys(up, shared, N)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(got, expected))
    for mine, theirs in zip(gradients(got, up, entry), gradients(expected, up, entry)):
        assert torch.allclose(mine, theirs, atol=1e-6)


def test_latent_entries_equal_norm_rotation_and_join():
    torch.manual_seed(2)
    C, eps = 11, 1e-6
    down, weight = torch.randn(B, S, C + R, requires_grad=True), torch.randn(C, requires_grad=True)
    rotation = torch.polar(torch.full((B, S, R // 2), 1.3), torch.randn(B, S, R // 2))
    latent, key = down.split([C, R], dim=-1)
    expected = torch.cat([rms_norm(latent, weight, eps), rotate_interleaved(key.unsqueeze(2), rotation).squeeze(2)], -1)
    got = latent_entries(down, weight, rotation, eps)
    assert torch.allclose(got, expected, atol=1e-6)
    for mine, theirs in zip(gradients([got], down, weight), gradients([expected], down, weight)):
        assert torch.allclose(mine, theirs, atol=1e-5)


def test_what_does_not_fit_is_left_to_pytorch():
    rotation = torch.polar(torch.ones(B, S, R // 2), torch.zeros(B, S, R // 2))
    assert rotate_tails(torch.zeros(B, S, H, N + R).double(), rotation, N) is None
    assert rotate_tails(torch.zeros(B, S, H, N + R), rotation, N + 1) is None
    assert latent_entries(torch.zeros(B, S, 5 + R), torch.ones(4), rotation, 1e-6) is None
    assert expand_keys(torch.zeros(B, S, H, N + U).transpose(1, 2), torch.zeros(B, H, R), N) is None
