import pytest
import torch

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import ConfigError
from shoal.model.fp8_latent_cache import Fp8LatentCache
from shoal.model.latent_cache import LatentCache
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.quant.latent import entry_bytes, pack_entries, unpack_entries

CONFIG = preset("demo").replace(num_nextn_predict_layers=0, initializer_range=0.1)


@pytest.fixture(scope="module")
def model():
    model = Transformer(CONFIG).eval()
    initialise(model, 2)
    return model


def test_an_entry_of_v3_has_the_656_bytes_of_flashmla():
    assert entry_bytes(512, 64) == 656
    assert pack_entries(torch.randn(3, 576), 512).shape == (3, 656)


def test_latents_are_within_the_format_and_rotary_keys_are_bfloat16_to_the_bit():
    entry = torch.randn(2, 7, 300 + 10, generator=torch.Generator().manual_seed(1))
    back = unpack_entries(pack_entries(entry, 300), 300)
    bound = entry[..., :300].abs() / 16 + entry.abs().max() * 2**-9 / 448
    assert bool(((back - entry)[..., :300].abs() <= bound).all())
    assert torch.equal(back[..., 300:], entry[..., 300:].bfloat16().float())


def test_decoding_token_by_token_equals_one_pass_over_the_same_codes(model):
    token_BS = torch.randint(0, 500, (2, 21), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        whole = model(token_BS, cache=Fp8LatentCache(CONFIG, 2, 21))
        cache = Fp8LatentCache(CONFIG, 2, 21)
        for at in range(21):
            position = torch.full((2, 1), at)
            last = model(token_BS[:, at : at + 1], position_BS=position, cache=cache)
            assert torch.allclose(last[:, 0], whole[:, at], atol=2e-4), at
        exact = model(token_BS, cache=LatentCache(CONFIG, 2, 21))
    # Random experts: a token whose choice of experts flips counts in full.
    assert 1e-4 < float((whole - exact).norm() / exact.norm()) < 0.2


def test_the_engine_generates_with_an_fp8_cache_in_fewer_bytes(model):
    request = Request(prompt_ids=tuple(range(5, 40)), sampling=SamplingParams(max_tokens=8, temperature=0.0))
    small, plain = Engine(model, fp8_cache=True), Engine(model)
    found, expected = (engine.generate([request, request])[0][0] for engine in (small, plain))
    assert len(found.token_ids) == 8 and found.logprobs[0] == pytest.approx(expected.logprobs[0], abs=0.1)
    assert small.cache_bytes_per_token == CONFIG.num_hidden_layers * entry_bytes(64, 16)
    assert small.cache_bytes_per_token < plain.cache_bytes_per_token


def test_a_model_without_latents_is_refused():
    dense = ModelConfig(
        vocab_size=9, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, attention="gqa"
    )
    with pytest.raises(ConfigError, match="needs latent attention"):
        Fp8LatentCache(dense, 1, 4)
