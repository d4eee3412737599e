"""Latents in FP8 inside the packed pass: its bytes are those of `quant/latent.py`, its answers those of the PyTorch model."""

import pytest
import torch

from shoal.engine.disk_cache import DiskCache
from shoal.engine.engine import Engine
from shoal.engine.packed_model import PackedModel
from shoal.engine.prefix_cache import CacheIdentity
from shoal.engine.request import Request, SamplingParams
from shoal.engine.runner import PackedRunner, TransformerRunner
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.kernels.cpu.build import library
from shoal.model.fp8_latent_cache import Fp8LatentCache
from shoal.model.latent_cache import LatentCache
from shoal.quant.latent import pack_entries
from tests.engine.running import generate
from tests.engine.test_runner import PROMPTS, model_of

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

IDENTITY = CacheIdentity(
    weights_digest="a", dtype="fp8 latents", layout_version=1, rope_digest="r", tokenizer_digest="t"
)
SHAPES = {"one tile": {}, "a tile and a bit": {"kv_lora_rank": 144}, "two tiles": {"kv_lora_rank": 256}}


def cache_of(model):
    return Fp8LatentCache(model.config, len(PROMPTS), 192)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("scale", [0.0, 1e-6, 1.0, 1e4])
def test_entries_are_written_as_the_definition_packs_them(changes, scale):
    model = model_of(changes)
    model.layers[0].self_attn.kv_a_layernorm.weight.mul_(scale)
    runner, latent = PackedRunner(model), model.config.kv_lora_rank
    plain, packed = LatentCache(model.config, len(PROMPTS), 192, dtype=torch.float32), cache_of(model)
    runner.prefill(PROMPTS, plain)
    runner.prefill(PROMPTS, packed)
    for row, prompt in enumerate(PROMPTS):
        expected = pack_entries(plain.entry_LBTW[0, row, : len(prompt)], latent)
        assert torch.equal(packed.entry_LBTW[0, row, : len(prompt)], expected)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_the_pass_equals_the_pytorch_model_over_the_same_kind_of_cache(changes):
    model = model_of(changes)
    runners = (TransformerRunner(model), PackedRunner(model))
    caches = [cache_of(model) for _ in runners]
    expected, got = (runner.prefill(PROMPTS, cache) for runner, cache in zip(runners, caches))
    # A latent at the border of two codes may fall to either side: one step of a code, rarely.
    assert float((got - expected).abs().median()) < 1e-4 and torch.allclose(got, expected, atol=0.1)
    caches[0].entry_LBTW.copy_(caches[1].entry_LBTW)
    position = torch.tensor([len(prompt) for prompt in PROMPTS])
    expected, got = (r.decode(torch.tensor([2, 5, 9, 11]), position, c) for r, c in zip(runners, caches))
    assert float((got - expected).abs().median()) < 1e-4 and torch.allclose(got, expected, atol=0.1)


def serving(packed, **options):
    return ServingEngine(packed, ServingConfig(cache_bytes=1 << 22, step_tokens=64, **options), identity=IDENTITY)


@torch.no_grad()
def test_serving_gives_the_simple_engines_tokens_also_from_prefixes_in_memory_and_on_disk(tmp_path):
    model = model_of({})
    requests = [
        Request(prompt_ids=tuple(prompt), sampling=SamplingParams(max_tokens=9, temperature=0.8, seed=row))
        for row, prompt in enumerate(PROMPTS)
    ]
    expected = [[each.token_ids for each in group] for group in Engine(model, fp8_cache=True).generate(requests)]
    packed = PackedModel(model.config, model.state_dict().__getitem__, "f32")
    engine, plain = serving(packed, fp8_cache=True), serving(packed)
    assert engine.unit_bytes == 64 * 3 * (32 + 4 + 2 * 6) and engine.pool.num_pages > 2.5 * plain.pool.num_pages
    for again in (False, True):
        tokens, found = generate(engine, requests)
        assert tokens == expected and (sum(found) > 0) == again
    for again in (False, True):
        engine = serving(packed, fp8_cache=True)
        engine.disk = DiskCache(tmp_path, max_bytes=1 << 30, max_age_s=1000, unit_bytes=engine.unit_bytes)
        tokens, found = generate(engine, requests)
        assert tokens == expected and (sum(found) > 0) == again
        engine.disk.close()


@torch.no_grad()
def test_a_unit_of_numbers_that_are_not_finite_is_offered_to_nobody():
    model = model_of({})
    state = dict(model.state_dict())
    state["embed_tokens.weight"] = state["embed_tokens.weight"].clone()
    state["embed_tokens.weight"][91] = float("nan")
    engine = serving(PackedModel(model.config, state.__getitem__, "f32"), fp8_cache=True)
    spoilt = Request(prompt_ids=(*range(70), 91, *range(70)), sampling=SamplingParams(max_tokens=2))
    generate(engine, [spoilt])
    assert engine.stats.spoilt_units == 1
    assert generate(engine, [spoilt])[1] == [64]
