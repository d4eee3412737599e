"""The fused CPU pass against the model in PyTorch, and against itself in other batches."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.config import YarnConfig
from shoal.engine.packed_model import Draw, PackedModel
from shoal.engine.runner import PackedRunner, TransformerRunner, runner_for
from shoal.kernels.cpu.build import library
from shoal.kernels.dispatch import sample_rows
from shoal.model.latent_cache import LatentCache
from shoal.model.layers import set_compute_dtype
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.training.optimizer import OptimizerConfig, OptimizerSet

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

BASE = dataclasses.replace(
    preset("demo"),
    vocab_size=97,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=3,
    kv_lora_rank=32,
    qk_nope_head_dim=10,
    qk_rope_head_dim=6,
    v_head_dim=14,
    intermediate_size=50,
    moe_intermediate_size=20,
    n_routed_experts=8,
    num_experts_per_tok=3,
    num_nextn_predict_layers=0,
    initializer_range=0.3,
    max_position_embeddings=1024,
)
SHAPES = {
    "v3": {},
    "query compression": {"q_lora_rank": 24},
    "groups": {"n_group": 4, "topk_group": 2},
    "v2": {
        "topk_method": "group_limited_greedy",
        "scoring_func": "softmax",
        "norm_topk_prob": False,
        "n_group": 4,
        "topk_group": 2,
    },
    "no shared expert": {"n_shared_experts": 0},
    "twenty heads": {"num_attention_heads": 20},
    "yarn": {
        "rope_scaling": YarnConfig(factor=4.0, original_max_position_embeddings=256, mscale=1.0, mscale_all_dim=1.0)
    },
}
PROMPTS = [[3, 1, 4], [1] * 140, list(range(90)), [7]]


def model_of(changes):
    model = Transformer(dataclasses.replace(BASE, **changes)).eval()
    initialise(model, 3)
    for layer in model.layers:
        if layer.is_moe and model.config.topk_method == "noaux_tc":
            layer.mlp.gate.e_score_correction_bias.normal_(0, 0.2)
    return model


def cache_of(model, runner, rows=4):
    return LatentCache(model.config, rows, 192, dtype=runner.cache_dtype)


@torch.no_grad()
@pytest.mark.parametrize("changes", SHAPES.values(), ids=SHAPES.keys())
def test_fused_pass_equals_the_pytorch_model(changes):
    model = model_of(changes)
    reference, fused = TransformerRunner(model), PackedRunner(model)
    caches = [cache_of(model, runner) for runner in (reference, fused)]
    expected, got = (runner.prefill(PROMPTS, cache) for runner, cache in zip((reference, fused), caches))
    assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4)
    position = torch.tensor([len(prompt) for prompt in PROMPTS])
    for step in range(3):
        token = torch.tensor([step, 5, 9, 11])
        expected, got = (r.decode(token, position + step, c) for r, c in zip((reference, fused), caches))
        assert torch.allclose(got, expected, atol=2e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_sequence_gives_the_same_bits_alone_and_among_others(dtype):
    model = model_of({})
    set_compute_dtype(model, dtype)
    runner = PackedRunner(model)
    together = cache_of(model, runner)
    logits = [runner.prefill(PROMPTS, together)]
    position = torch.tensor([len(prompt) for prompt in PROMPTS])
    tokens = torch.tensor([2, 4, 6, 8])
    logits.append(runner.decode(tokens, position, together))
    for row, prompt in enumerate(PROMPTS):
        alone = cache_of(model, runner, 1)
        assert torch.equal(runner.prefill([prompt], alone)[0], logits[0][row])
        assert torch.equal(runner.decode(tokens[row : row + 1], position[row : row + 1], alone)[0], logits[1][row])


@torch.no_grad()
@settings(max_examples=12, deadline=None)
@given(
    heads=st.integers(1, 18),
    latent=st.sampled_from([16, 48]),
    experts=st.integers(2, 9),
    width=st.integers(1, 40),
    crowded=st.booleans(),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=3),
)
def test_odd_shapes_and_crowded_or_empty_experts_agree_with_the_pytorch_model(
    heads, latent, experts, width, crowded, lengths
):
    changes = {"num_attention_heads": heads, "kv_lora_rank": latent, "n_routed_experts": experts}
    model = model_of({**changes, "moe_intermediate_size": width, "num_experts_per_tok": min(2, experts)})
    if crowded:
        for layer in model.layers[1:]:
            layer.mlp.gate.e_score_correction_bias[:2] += 100.0
    prompts = [[(7 * place + row) % 97 for place in range(length)] for row, length in enumerate(lengths)]
    reference, fused = TransformerRunner(model), PackedRunner(model)
    caches = [cache_of(model, runner, len(prompts)) for runner in (reference, fused)]
    expected, got = (runner.prefill(prompts, cache) for runner, cache in zip((reference, fused), caches))
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)
    token, position = torch.arange(len(prompts)), torch.tensor(lengths)
    expected, got = (r.decode(token, position, c) for r, c in zip((reference, fused), caches))
    assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("vocabulary, rows", [(97, 1), (97, 9), (512, 7), (1500, 70)])
def test_draws_of_the_pass_are_those_from_its_logits_bit_for_bit(dtype, vocabulary, rows):
    model = model_of({"vocab_size": vocabulary})
    set_compute_dtype(model, dtype)
    runner = PackedRunner(model)
    cache = cache_of(model, runner, rows)
    runner.prefill([[row % 90, 5] for row in range(rows)], cache)
    generator = torch.Generator().manual_seed(rows)
    for step in range(3):
        temperature = 0.3 + 2 * torch.rand(rows, generator=generator)
        uniform = torch.rand(rows, generator=generator, dtype=torch.float64)
        token, position = torch.arange(rows) % 97, torch.full((rows,), 2 + step)
        draw = Draw.of(temperature, uniform)
        assert runner.decode_and_draw(token, position, cache, draw)
        drawn, logprob, finite = sample_rows(runner.decode(token, position, cache), temperature, uniform)
        assert finite.all() and torch.equal(draw.token_N, drawn) and torch.equal(draw.logprob_N, logprob)


@torch.no_grad()
@pytest.mark.parametrize("far", [float("nan"), float("inf"), 1e6], ids=str)
def test_scores_that_cannot_be_drawn_from_at_once_are_left_to_their_logits(far):
    model = model_of({"vocab_size": 600})
    model.norm.weight.fill_(1.0)
    model.lm_head.weight[400] *= far
    runner = PackedRunner(model)
    cache = cache_of(model, runner, 8)
    runner.prefill([[row, 5] for row in range(8)], cache)
    draw = Draw.of(torch.ones(8), torch.full((8,), 0.5, dtype=torch.float64))
    assert not runner.decode_and_draw(torch.arange(8), torch.full((8,), 2), cache, draw)
    model.lm_head.weight[400] = 0.0
    runner.prefill([[row, 5] for row in range(8)], cache)
    assert runner.decode_and_draw(torch.arange(8), torch.full((8,), 2), cache, draw)


@torch.no_grad()
def test_a_prompt_in_chunks_and_over_scattered_pages_gives_the_same_bits():
    model = model_of({})
    packed = PackedModel(model.config, model.state_dict().__getitem__, "bf16")
    tokens = torch.arange(150) % 97
    width = model.config.cache_width
    whole = torch.zeros(3, 1, 192, width, dtype=torch.bfloat16)
    positions, zeros = torch.arange(150, dtype=torch.int32), torch.zeros(150, dtype=torch.int32)
    expected = packed.run(tokens, positions, zeros, whole, output_row=torch.arange(150))
    paged = torch.full((3, 7, 64, width), float("nan"), dtype=torch.bfloat16)
    table = torch.tensor([[5, 0, 3]])
    got = []
    for start, stop in ((0, 1), (1, 70), (70, 128), (128, 150)):
        part = slice(start, stop)
        rows = torch.arange(stop - start)
        got.append(packed.run(tokens[part], positions[part], zeros[part], paged, output_row=rows, table_BX=table))
    assert torch.equal(torch.cat(got), expected)


@torch.no_grad()
@pytest.mark.parametrize("name, bound", [("bf16", 0.02), ("fp8", 0.1), ("int8", 0.05), ("int4", 0.35)])
def test_lower_formats_stay_near_the_float_logits(name, bound):
    # Mild weights: with wild ones a rounding flips experts, which says nothing about the products.
    model = model_of({"initializer_range": 0.05, "n_routed_experts": 2, "num_experts_per_tok": 2})
    tokens = torch.arange(40) % 97
    logits = {}
    for format_name in ("f32", name):
        packed = PackedModel(model.config, model.state_dict().__getitem__, format_name)
        cache = torch.zeros(3, 1, 64, model.config.cache_width)
        logits[format_name] = packed.run(tokens, torch.arange(40), torch.zeros(40), cache, output_row=torch.arange(40))
    error = (logits[name] - logits["f32"]).norm() / logits["f32"].norm()
    assert 0 < error < bound


@torch.no_grad()
def test_new_weights_are_noticed():
    model = model_of({})
    runner = PackedRunner(model)
    before = runner.prefill([[1, 2, 3]], cache_of(model, runner, 1))
    model.embed_tokens.weight.add_(0.1)
    after = runner.prefill([[1, 2, 3]], cache_of(model, runner, 1))
    expected = TransformerRunner(model).prefill([[1, 2, 3]], cache_of(model, TransformerRunner(model), 1))
    assert torch.allclose(after, expected, atol=2e-4) and not torch.allclose(after, before, atol=1e-2)


def test_models_that_do_not_fit_take_the_pytorch_path():
    odd = model_of({"kv_lora_rank": 24})
    assert isinstance(runner_for(odd), TransformerRunner)
    assert isinstance(runner_for(model_of({})), PackedRunner)
    assert isinstance(runner_for(model_of({}).double()), TransformerRunner)


@pytest.mark.parametrize("kind", ["adamw", "muon"])
def test_every_optimizer_step_is_seen_by_the_packed_weights(kind):
    model = model_of({"n_routed_experts": None, "topk_method": "noaux_tc"})
    optimizers = OptimizerSet(model, OptimizerConfig(kind=kind, learning_rate=0.05))
    packed, plain = PackedRunner(model), TransformerRunner(model)
    for _ in range(3):
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizers.step()
        logits = [
            runner.prefill([[3, 1, 4]], LatentCache(model.config, 1, 8, dtype=runner.cache_dtype))
            for runner in (packed, plain)
        ]
        torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-3)


def test_a_token_outside_of_the_vocabulary_is_refused_before_anything_is_read():
    model = model_of({})
    packed = PackedModel(model.config, model.state_dict().__getitem__, "f32")
    cache = torch.zeros(model.config.num_hidden_layers, 1, 16, model.config.cache_width)
    zero = torch.zeros(1, dtype=torch.int32)
    for token in (-1, model.config.vocab_size):
        with pytest.raises(IndexError, match=r"0\.\.96"):
            packed.run(torch.tensor([token]), zero, zero, cache, output_row=zero)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_pass_looks_tokens_up_as_embed_does(dtype):
    model = model_of({})
    weights = {**model.state_dict(), "embed_tokens.weight": model.state_dict()["embed_tokens.weight"].to(dtype)}
    packed = PackedModel(model.config, weights.__getitem__, "f32")
    token, at = torch.tensor([5, 0, 96]), torch.arange(3, dtype=torch.int32)
    logits = []
    for hidden_in in (None, packed.embed(token)):
        cache = torch.zeros(model.config.num_hidden_layers, 1, 16, model.config.cache_width)
        logits.append(packed.run(token, at, torch.zeros_like(at), cache, output_row=at, hidden_in=hidden_in))
    assert torch.equal(logits[0], logits[1])
