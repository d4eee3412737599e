"""What tiles must give. Run by test_amx.py in a process of its own: on AMX as it is, elsewhere under the emulator."""

import ctypes
import dataclasses
import itertools

import pytest
import torch

from shoal.engine.packed_model import PackedModel
from shoal.engine.runner import TransformerRunner
from shoal.kernels import packed as packed_module
from shoal.kernels.cpu import build
from shoal.kernels.packed import linear, pack
from tests.engine.test_runner import BASE, PROMPTS, model_of
from tests.kernels.test_packed import codes_of, rounded_inputs

EMULATOR = ctypes.CDLL(None)
"""The process itself, which has the emulator's symbols where it was loaded beforehand."""
if hasattr(EMULATOR, "amx_instructions"):
    build.NEEDED["amx"] = build.AVX512
    build.load_level.cache_clear()
    EMULATOR.amx_instructions.restype = ctypes.c_uint64

WHOLE_TILES = {
    "hidden_size": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "intermediate_size": 96,
    "moe_intermediate_size": 32,
    "initializer_range": 0.1,
}


@pytest.fixture(autouse=True)
def tiles_are_used():
    before = EMULATOR.amx_instructions() if hasattr(EMULATOR, "amx_instructions") else 0
    yield
    if hasattr(EMULATOR, "amx_instructions"):
        assert EMULATOR.amx_instructions() > before


@pytest.mark.parametrize("rows", [16, 48, 70, 112])
@pytest.mark.parametrize("inputs", [1, 3, 16, 33, 70])
def test_products_of_pairs_equal_the_reference(rows, inputs):
    generator = torch.Generator().manual_seed(rows + inputs)
    weight, x = torch.randn(rows, 96, generator=generator), torch.randn(inputs, 96, generator=generator)
    codes, meant = codes_of(weight, "bf16")
    expected = rounded_inputs(x, "bf16").double() @ meant.double().T
    assert torch.allclose(linear(pack(codes), x).double(), expected, atol=3e-4, rtol=1e-4)


def test_a_row_of_pairs_gives_the_same_bits_in_any_batch():
    generator = torch.Generator().manual_seed(5)
    packed = pack(codes_of(torch.randn(112, 160, generator=generator), "bf16")[0])
    x = torch.randn(75, 160, generator=generator)
    together = linear(packed, x)
    for size in (1, 2, 13, 16, 17, 32, 40):
        assert torch.equal(torch.cat([linear(packed, part) for part in x.split(size)]), together), size


@pytest.mark.parametrize("name", ["int8", "int4-32", "int4-64"])
def test_bytes_have_the_bits_of_the_vector_unit(name, monkeypatch):
    generator = torch.Generator().manual_seed(8)
    packed = pack(codes_of(torch.randn(70, 200, generator=generator), name)[0])
    x = torch.randn(37, 200, generator=generator)
    got = linear(packed, x)
    vectors = build.load_level("avx512")
    monkeypatch.setattr(packed_module, "library", lambda: vectors)
    assert torch.equal(got, linear(packed, x))


@torch.no_grad()
@pytest.mark.parametrize("heads", [3, 16, 20])
@pytest.mark.parametrize("page_tokens", [16, 64])
def test_a_pass_over_a_paged_bfloat16_cache_is_near_the_pytorch_model(heads, page_tokens):
    model = model_of({**WHOLE_TILES, "num_attention_heads": heads, "n_routed_experts": 2, "num_experts_per_tok": 2})
    reference = TransformerRunner(model)
    packed = PackedModel(model.config, model.state_dict().__getitem__, "bf16")
    for length in (1, 15, 17, 32, 64, 65, 130):
        prompt = [(7 * place + heads) % 97 for place in range(length)]
        expected = reference.prefill([prompt], cache_of_one(model))[0]
        pages = -(-length // page_tokens)
        cache = torch.full((3, pages + 1, page_tokens, model.config.cache_width), float("nan"), dtype=torch.bfloat16)
        table = torch.randperm(pages, generator=torch.Generator().manual_seed(length)).to(torch.int32) + 1
        at, zero = torch.arange(length, dtype=torch.int32), torch.zeros(length, dtype=torch.int32)
        last = torch.tensor([length - 1], dtype=torch.int32)
        got = packed.run(torch.tensor(prompt), at, zero, cache, output_row=last, table_BX=table.unsqueeze(0))[0]
        assert (got - expected).norm() < 0.03 * expected.norm(), length
        assert bool(got.isfinite().all())


def cache_of_one(model):
    from shoal.model.latent_cache import LatentCache

    return LatentCache(model.config, 1, 192, dtype=torch.float32)


@torch.no_grad()
def test_prompts_in_chunks_give_the_bits_of_whole_ones():
    model = model_of(WHOLE_TILES)
    packed = PackedModel(model.config, model.state_dict().__getitem__, "bf16")
    tokens, at = torch.arange(150) % 97, torch.arange(150, dtype=torch.int32)
    zero = torch.zeros(150, dtype=torch.int32)
    outputs = []
    for cuts in ((0, 150), (0, 1, 70, 128, 150)):
        cache = torch.zeros(3, 1, 192, model.config.cache_width, dtype=torch.bfloat16)
        parts = []
        for start, stop in itertools.pairwise(cuts):
            rows = torch.arange(stop - start)
            parts.append(packed.run(tokens[start:stop], at[start:stop], zero[start:stop], cache, output_row=rows))
        outputs.append(torch.cat(parts))
    assert torch.equal(*outputs)


def test_shapes_that_are_no_whole_tiles_still_agree():
    assert dataclasses.replace(BASE).kv_lora_rank % 32 == 0 and BASE.hidden_size % 32 != 0
    model = model_of(
        {"n_routed_experts": 2, "num_experts_per_tok": 2, "initializer_range": 0.1, "qk_rope_head_dim": 32}
    )
    packed = PackedModel(model.config, model.state_dict().__getitem__, "bf16")
    prompt = PROMPTS[2]
    expected = TransformerRunner(model).prefill([prompt], cache_of_one(model))[0]
    cache = torch.zeros(3, 1, 96, model.config.cache_width, dtype=torch.bfloat16)
    at, zero = torch.arange(len(prompt), dtype=torch.int32), torch.zeros(len(prompt), dtype=torch.int32)
    got = packed.run(torch.tensor(prompt), at, zero, cache, output_row=at[-1:])[0]
    assert (got - expected).norm() < 0.03 * expected.norm()
