"""Quantised directories in the engine: what is stored is what is multiplied."""

import json

import pytest
import torch

from shoal.checkpoint.convert import convert
from shoal.checkpoint.hf_format import save_model
from shoal.checkpoint.quantised import Scheme
from shoal.checkpoint.stored_weights import StoredWeights
from shoal.engine.codes import floats, halves, joined, quantised
from shoal.engine.loading import load_for_generation
from shoal.engine.making import EngineOptions, make_engine, pack_stored, simple_engine
from shoal.engine.packed_model import PackedModel
from shoal.engine.request import Request, SamplingParams
from shoal.kernels.cpu.build import library
from shoal.kernels.packed import Codes
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

CONFIG = preset("demo").replace(
    vocab_size=97,
    hidden_size=160,
    num_hidden_layers=2,
    kv_lora_rank=32,
    q_lora_rank=48,
    intermediate_size=176,
    moe_intermediate_size=144,
    n_routed_experts=3,
    num_nextn_predict_layers=0,
    initializer_range=0.1,
)
SCHEMES = [
    Scheme(weights="bf16"),
    Scheme(weights="fp8"),
    Scheme(weights="int8"),
    Scheme(weights="int4", group=64),
    Scheme(weights="int4", group=32, head=True, embedding=True),
]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A directory in bfloat16, so that nothing is rounded but what the formats round."""
    directory = tmp_path_factory.mktemp("stored") / "model"
    model = Transformer(CONFIG)
    initialise(model, 4)
    save_model(directory, CONFIG, model.state_dict())
    return directory


def directory_of(source, tmp_path, scheme):
    convert(source, tmp_path / "out", CONFIG, scheme, command="shoal convert")
    return tmp_path / "out"


def logits_of(packed):
    token = torch.arange(1, 60)
    rows = torch.arange(len(token), dtype=torch.int32)
    cache = torch.zeros(CONFIG.num_hidden_layers, 1, 64, CONFIG.cache_width)
    return packed.run(token, rows, torch.zeros_like(rows), cache, output_row=rows)


BITWISE = [scheme for scheme in SCHEMES if scheme.weights != "fp8"]


@pytest.mark.parametrize("scheme", BITWISE, ids=lambda scheme: f"{scheme.weights}{'-all' if scheme.head else ''}")
def test_an_opened_directory_computes_the_bits_of_the_model_quantised_at_start(source, tmp_path, scheme):
    found = logits_of(pack_stored(StoredWeights(directory_of(source, tmp_path, scheme))))
    plain = StoredWeights(source)
    embedding = plain("embed_tokens.weight")
    if scheme.embedding:
        embedding = floats(quantised(embedding, "int8"))
    latent = {"int4": "int8"}.get(scheme.weights)
    at_start = PackedModel(
        CONFIG,
        lambda name: embedding if name == "embed_tokens.weight" else floats(plain(name)),
        scheme.weights,
        group=scheme.group if scheme.weights == "int4" else None,
        head_format=scheme.weights if scheme.head else "bf16",
        latent_format=latent,
    )
    assert torch.equal(found, logits_of(at_start))


def float_logits(weights):
    """What the stored numbers mean, in PyTorch and float32."""
    with torch.no_grad():
        model = Transformer(CONFIG).eval()
        model.load_state_dict({name: floats(weights(name)).float() for name in model.state_dict()})
        return model.logits(model(torch.arange(1, 60).unsqueeze(0)))[0]


def test_an_fp8_directory_is_off_by_its_inputs_rounding_only(source, tmp_path):
    # Blocks of 128 do not survive joining and turning, so another quantisation at start would give other bits.
    weights = StoredWeights(directory_of(source, tmp_path, SCHEMES[1]))
    found, expected = logits_of(pack_stored(weights)), float_logits(weights)
    bf16 = logits_of(pack_stored(StoredWeights(source)))
    assert float((found - expected).norm() / expected.norm()) < 0.01
    assert float((found - bf16).norm() / bf16.norm()) > 0.01, "the comparison above could not have failed"


def test_another_format_than_the_stored_one_can_still_be_asked_for(source, tmp_path):
    weights = StoredWeights(directory_of(source, tmp_path, SCHEMES[2]))
    wide = pack_stored(weights, "f32")
    assert wide.format == "f32"
    assert torch.allclose(logits_of(wide), float_logits(weights), atol=2e-4, rtol=1e-4)


def test_weights_stay_codes_all_the_way(source, tmp_path):
    weights = StoredWeights(directory_of(source, tmp_path, SCHEMES[4]))
    assert (weights.format, weights.head_format, weights.group) == ("int4", "int4", 32)
    for name in ("layers.1.mlp.experts.gate_up_proj", "layers.0.mlp.down_proj.weight", "embed_tokens.weight"):
        assert isinstance(weights(name), Codes), name
    experts = weights("layers.1.mlp.experts.gate_up_proj")
    assert experts.code.shape == (3, 288, 160 // 8) and experts.cols == 160 and experts.scale.shape == (3, 288, 5)
    second = Codes("int4", 32, experts.code[1:2], experts.scale[1:2], word_cols=160)
    assert torch.equal(floats(experts)[1], floats(second))


@pytest.mark.parametrize("name", ["fp8", "int8", "int4"])
def test_joining_and_halving_codes_equals_joining_and_halving_floats(name):
    generator = torch.Generator().manual_seed(9)
    first, second = (torch.randn(1, 128 * rows, 96, generator=generator) for rows in (1, 2))
    codes = [quantised(weight, name, 32 if name == "int4" else None) for weight in (first, second)]
    both = joined(*codes)
    assert isinstance(both, Codes)
    assert torch.equal(floats(both), torch.cat([floats(code) for code in codes]))
    upper, lower = halves(both)
    assert isinstance(upper, Codes) and isinstance(lower, Codes)
    assert torch.equal(torch.cat([floats(upper), floats(lower)]), floats(both))


def test_generation_and_serving_take_a_quantised_directory(source, tmp_path):
    loaded = load_for_generation(directory_of(source, tmp_path, SCHEMES[3]))
    request = Request(prompt_ids=(3, 1, 4), sampling=SamplingParams(max_tokens=6, temperature=0.0))
    alone = simple_engine(loaded).generate([request])[0][0]
    made = make_engine(loaded, EngineOptions(use_disk=False, cache_bytes=1 << 24))
    made.engine.add(request)
    served = []
    while not made.engine.is_idle:
        served += [event.token_id for event in made.engine.step()]
    assert len(alone.token_ids) == 6 and served == list(alone.token_ids)
    assert "model" not in vars(loaded), "the float module was built for nothing"


def test_a_directory_of_another_layout_is_not_opened(source, tmp_path):
    directory = directory_of(source, tmp_path, SCHEMES[2])
    report = json.loads((directory / "conversion.json").read_text())
    (directory / "conversion.json").write_text(json.dumps(report | {"layout_version": 0}))
    with pytest.raises(Exception, match="Build it again: shoal convert"):
        load_for_generation(directory)
