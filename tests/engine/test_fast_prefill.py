"""Prompts read with expanded keys and values, against the absorbed form and against themselves in other batches."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from shoal.engine.making import EngineOptions, make_engine
from shoal.engine.packed_model import PackedModel
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.quant.latent import entry_bytes
from tests.engine.test_runner import model_of

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

SHAPES = {
    "plain": {"qk_nope_head_dim": 32, "v_head_dim": 16, "kv_lora_rank": 128},
    "query compression, twenty heads": {
        "qk_nope_head_dim": 16,
        "v_head_dim": 48,
        "kv_lora_rank": 160,
        "q_lora_rank": 24,
        "num_attention_heads": 20,
    },
    "odd rotary half": {"qk_nope_head_dim": 16, "v_head_dim": 16, "qk_rope_head_dim": 2, "kv_lora_rank": 96},
}
LENGTHS = [140, 17, 65, 3, 200]


def prompt_of(row):
    return torch.tensor([(7 * place + 5 * row) % 97 for place in range(LENGTHS[row])])


def pool(model, fp8=False):
    config = model.config
    width = entry_bytes(config.kv_lora_rank, config.qk_rope_head_dim) if fp8 else config.cache_width
    return torch.zeros(config.num_hidden_layers, 5, 256, width, dtype=torch.uint8 if fp8 else torch.bfloat16)


def read(packed, cache, parts):
    """Logits of every token of parts `(row, first, last)` of the prompts, run as one batch."""
    token = torch.cat([prompt_of(row)[first:last] for row, first, last in parts])
    position = torch.cat([torch.arange(first, last) for _, first, last in parts])
    sequence = torch.cat([torch.full((last - first,), row) for row, first, last in parts])
    return packed.run(token, position, sequence, cache, output_row=torch.arange(len(token)))


def packed_of(model, format_name="bf16", fast=True):
    return PackedModel(model.config, model.state_dict().__getitem__, format_name, fast_prefill=fast)


WHOLE = [(row, 0, length) for row, length in enumerate(LENGTHS)]


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16 cache", "fp8 cache"])
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("format_name", ["bf16", "int8"])
def test_expanded_prompts_are_as_near_to_the_float_model_as_absorbed_ones(format_name, changes, fp8):
    model = model_of(changes)
    exact = read(packed_of(model, "f32", fast=False), pool(model).float(), WHOLE)
    absorbed, expanded = (read(packed_of(model, format_name, fast), pool(model, fp8), WHOLE) for fast in (False, True))
    assert not torch.equal(absorbed, expanded)
    errors = [float((found - exact).norm() / exact.norm()) for found in (absorbed, expanded)]
    assert errors[1] < 1.15 * errors[0] and errors[0] < 0.4, errors


@torch.no_grad()
@pytest.mark.parametrize("fp8", [False, True], ids=["bf16 cache", "fp8 cache"])
def test_cutting_a_prompt_in_long_pieces_or_other_company_changes_no_bit(fp8):
    model = model_of(SHAPES["plain"])
    packed = packed_of(model)
    whole = read(packed, pool(model, fp8), WHOLE)
    cache = pool(model, fp8)
    first = read(packed, cache, [(0, 0, 64), (4, 0, 104)])
    assert torch.equal(first, torch.cat([whole[:64], whole[225:329]]))
    assert torch.equal(
        read(packed, cache, [(4, 104, 200), (3, 0, 3), (0, 64, 140)]),
        torch.cat([whole[329:], whole[222:225], whole[64:140]]),
    )


@torch.no_grad()
def test_few_tokens_after_a_long_context_stay_absorbed():
    model = model_of(SHAPES["plain"])
    fast, exact = packed_of(model), packed_of(model, fast=False)
    cache = pool(model)
    read(fast, cache, [(4, 0, 190)])
    assert torch.equal(read(fast, cache.clone(), [(4, 190, 200)]), read(exact, cache.clone(), [(4, 190, 200)]))


@pytest.mark.parametrize("format_name, changes", [("f32", SHAPES["plain"]), ("bf16", {"qk_nope_head_dim": 10})])
def test_what_cannot_be_read_fast_is_refused_and_not_read_slowly(format_name, changes):
    with pytest.raises(ConfigError, match="Leave --fast-prefill out"):
        packed_of(model_of(changes), format_name)


@pytest.mark.parametrize("option", ["fp8_cache", "fast_prefill"])
def test_options_of_the_packed_pass_are_refused_where_only_the_simple_engine_runs(option):
    config = dataclasses.replace(model_of({}).config, attention="gqa", num_key_value_heads=1)
    with pytest.raises(ConfigError, match="need the packed CPU pass"):
        make_engine(SimpleNamespace(config=config), EngineOptions(**{option: True}))
