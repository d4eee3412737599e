"""Triton kernels against float64, in Triton's interpreter where there is no GPU (set before Triton is imported)."""

import os

import pytest
import torch

HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
pytest.importorskip("triton", reason="Triton is not installed (extra 'gpu')")

from shoal.kernels.triton.block_fp8 import grouped_scaled_matmul, row_tiles, scaled_matmul  # noqa: E402
from shoal.kernels.triton.fused_moe import fused_moe  # noqa: E402
from shoal.kernels.triton.mla_decode import mla_decode  # noqa: E402
from shoal.model.experts import experts_reference  # noqa: E402
from shoal.model.fp8_products import Fp8GroupedSwiGLU  # noqa: E402
from shoal.quant import fp8  # noqa: E402
from shoal.quant.fp8_recipe import Fp8Recipe  # noqa: E402

DEVICE = "cuda" if HAS_GPU else "cpu"


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE)


def relative(found, wanted):
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


@pytest.mark.parametrize(("rows", "columns", "depth"), [(1, 5, 128), (70, 130, 300), (64, 64, 256)])
@pytest.mark.parametrize("kind", ["blocks", "turned", "tiles"])
def test_a_scaled_product_is_that_of_the_floats_behind_the_codes(rows, columns, depth, kind):
    left = fp8.tiles(drawn(rows, depth, seed=1))
    if kind == "tiles":
        right = fp8.tiles(drawn(columns, depth, seed=2))
    elif kind == "blocks":
        right = fp8.blocks(drawn(columns, depth, seed=2))
    else:
        right = fp8.blocks(drawn(depth, columns, seed=2)).turned()
    found = scaled_matmul(left.code, left.scale, right.code, right.scale, right.block_rows)
    assert relative(found, left.floats().double() @ right.floats().double().T) < 1e-6


def test_grouped_products_take_each_group_its_own_matrix_and_skip_empty_ones():
    groups = [(0, 3), (3, 3), (3, 80), (80, 81)]
    left, right = fp8.tiles(drawn(81, 200, seed=3)), fp8.blocks(drawn(4, 140, 200, seed=4))
    found = grouped_scaled_matmul(left.code, left.scale, right.code, right.scale, groups)
    for expert, (start, stop) in enumerate(groups):
        wanted = left.floats()[start:stop].double() @ right[expert].floats().double().T
        assert stop == start or relative(found[start:stop], wanted) < 1e-6


def test_row_tiles_cover_every_row_once():
    groups = [(0, 5), (5, 5), (5, 12)]
    assert row_tiles(groups, 4) == [(0, 0, 5), (0, 4, 5), (2, 5, 12), (2, 9, 12)]


def test_training_through_the_triton_backend_gives_the_gradients_of_the_reference():
    groups = [(0, 9), (9, 9), (9, 40)]
    grads = {}
    for backend in ("reference", "triton"):
        inputs = [drawn(40, 128, seed=5), drawn(3, 256, 128, seed=6) * 0.1, drawn(3, 128, 128, seed=7) * 0.1]
        inputs = [tensor.requires_grad_() for tensor in inputs]
        out = Fp8GroupedSwiGLU.apply(*inputs, groups, Fp8Recipe(backend=backend))
        out.backward(drawn(40, 128, seed=8))
        grads[backend] = [out.detach(), *(tensor.grad for tensor in inputs)]
    for found, wanted in zip(grads["triton"], grads["reference"]):
        # The same codes up to the odd one at the edge between two, which a last-bit difference of a sum moves.
        assert relative(found, wanted) < 5e-3


@pytest.mark.parametrize("crowded", [False, True])
def test_fused_experts_equal_the_definition(crowded):
    tokens, hidden, width, experts, choices = 37, 72, 40, 5, 2
    x, gate_up, down = drawn(tokens, hidden, seed=9), drawn(experts, 2 * width, hidden, seed=10) * 0.2, None
    down = drawn(experts, hidden, width, seed=11) * 0.2
    weight = drawn(tokens, choices, seed=12).softmax(dim=-1)
    expert = torch.stack([torch.arange(tokens) % 3, torch.full((tokens,), 4)], dim=1).to(DEVICE)
    if crowded:
        expert = torch.tensor([[2, 0]], device=DEVICE).expand(tokens, 2).contiguous()
    wanted = experts_reference(*(t.double() for t in (x, gate_up, down, weight)), expert)
    assert relative(fused_moe(x, gate_up, down, weight, expert), wanted) < 1e-6


@pytest.mark.parametrize(("heads", "latent", "rotary"), [(3, 40, 8), (16, 64, 16)])
def test_decoding_over_scattered_pages_equals_attention_in_float64(heads, latent, rotary):
    page_tokens, lengths = 64, [1, 64, 300]
    pages = torch.randperm(15, generator=torch.Generator().manual_seed(13)).to(torch.int32).view(3, 5).to(DEVICE)
    pool = drawn(15, page_tokens, latent + rotary, seed=14)
    query = drawn(3, heads, latent + rotary, seed=15)
    length = torch.tensor(lengths, dtype=torch.int32, device=DEVICE)
    found = mla_decode(query, pool, pages, length, latent=latent, scale=0.17)
    for row, count in enumerate(lengths):
        entry = pool[pages[row].long()].flatten(0, 1)[:count].double()
        weight = (query[row].double() @ entry.T * 0.17).softmax(dim=-1)
        assert relative(found[row], weight @ entry[:, :latent]) < 1e-6
