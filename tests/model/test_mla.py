import pytest
import torch

from shoal.config import ModelConfig, YarnConfig
from shoal.model.latent_cache import LatentCache
from shoal.model.mla import LatentAttention
from shoal.model.transformer import Transformer, initialise

TINY = ModelConfig(
    vocab_size=61,
    hidden_size=40,
    num_hidden_layers=2,
    num_attention_heads=3,
    intermediate_size=56,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=6,
    v_head_dim=10,
    n_routed_experts=6,
    num_experts_per_tok=2,
    moe_intermediate_size=24,
    max_position_embeddings=64,
    initializer_range=0.2,
)
YARN = YarnConfig(factor=4, original_max_position_embeddings=16, mscale=1.0, mscale_all_dim=1.0)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-4), (torch.float64, 1e-10)])
@pytest.mark.parametrize("q_lora_rank", [None, 14])
@pytest.mark.parametrize("yarn", [None, YARN])
def test_absorbed_attention_equals_expanded(dtype, tolerance, q_lora_rank, yarn):
    model = Transformer(TINY.replace(q_lora_rank=q_lora_rank, rope_scaling=yarn))
    initialise(model, 0)
    model.to(dtype)
    token_BS = torch.randint(0, 61, (3, 11), generator=torch.Generator().manual_seed(1))
    whole_BSD = model(token_BS)
    cache = LatentCache(model.config, 3, 16, dtype=dtype)
    steps = [model(token_BS[:, :5], cache=cache)]
    for position in range(5, 11):
        steps.append(model(token_BS[:, position : position + 1], position_BS=torch.full((3, 1), position), cache=cache))
    assert (torch.cat(steps, dim=1) - whole_BSD).abs().max() < tolerance


def test_the_cache_holds_latents_only():
    cache = LatentCache(TINY, 1, 1)
    assert cache.bytes_per_token == 2 * (20 + 6) * 4
    expanded = 2 * 3 * (12 + 6 + 10) * 4
    assert cache.bytes_per_token < expanded / 3


def test_attention_matches_its_definition():
    """One layer against a direct transcription of V2 eq. 9-19, position by position."""
    torch.manual_seed(0)
    config = TINY.replace(q_lora_rank=None)
    layer = LatentAttention(config, 0).double()
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    model = Transformer(config)
    rotation_BSP = model.rotation_TP[:7].unsqueeze(0)
    x_BSD = torch.randn(1, 7, 40, dtype=torch.float64)
    from shoal.model.visibility import Visibility

    out = layer(
        x_BSD, rotation_BSP, torch.arange(7).unsqueeze(0), Visibility(first_BS=torch.zeros(1, 7, dtype=torch.long))
    )
    expected = _attention_by_definition(layer, x_BSD[0], rotation_BSP[0].to(torch.complex128), config)
    assert torch.allclose(out[0], expected, atol=1e-10)


def _attention_by_definition(layer, x_SD, rotation_SP, config):
    def rotate(vector_R, position):
        pairs = torch.view_as_complex(vector_R.reshape(-1, 2).contiguous())
        return torch.view_as_real(pairs * rotation_SP[position]).reshape(-1)

    def norm(latent_C):
        return latent_C / (latent_C.square().mean() + config.rms_norm_eps).sqrt() * layer.kv_a_layernorm.weight

    heads, plain, rotary, value = 3, config.qk_nope_head_dim, config.qk_rope_head_dim, config.v_head_dim
    keys, values, queries = [], [], []
    for position, x_D in enumerate(x_SD):
        down = layer.kv_a_proj_with_mqa.weight @ x_D
        shared = rotate(down[config.kv_lora_rank :], position)
        up = (layer.kv_b_proj.weight @ norm(down[: config.kv_lora_rank])).view(heads, plain + value)
        keys.append([torch.cat([up[h, :plain], shared]) for h in range(heads)])
        values.append([up[h, plain:] for h in range(heads)])
        query = (layer.q_proj.weight @ x_D).view(heads, plain + rotary)
        queries.append([torch.cat([query[h, :plain], rotate(query[h, plain:], position)]) for h in range(heads)])
    rows = []
    for position in range(len(x_SD)):
        mixed = []
        for h in range(heads):
            scores = (
                torch.stack([queries[position][h] @ keys[t][h] for t in range(position + 1)]) * (plain + rotary) ** -0.5
            )
            weights = scores.softmax(dim=0)
            mixed.append(sum(weight * values[t][h] for t, weight in enumerate(weights)))
        rows.append(layer.o_proj.weight @ torch.cat(mixed))
    return torch.stack(rows)


def test_packed_documents_do_not_see_each_other():
    model = Transformer(TINY)
    initialise(model, 0)
    first, second = torch.randint(0, 61, (1, 6)), torch.randint(0, 61, (1, 9))
    packed = torch.cat([first, second], dim=1)
    document_BS = torch.tensor([[0] * 6 + [1] * 9])
    position_BS = torch.tensor([[*range(6), *range(9)]])
    hidden = model(packed, document_BS=document_BS, position_BS=position_BS)
    assert torch.allclose(hidden[:, :6], model(first), atol=1e-5)
    assert torch.allclose(hidden[:, 6:], model(second), atol=1e-5)


def test_gradients_equal_finite_differences():
    torch.manual_seed(0)
    model = Transformer(TINY.replace(num_hidden_layers=1, n_routed_experts=None))
    initialise(model, 0)
    model.double()
    token_BS = torch.randint(0, 61, (2, 5))
    weight = model.layers[0].self_attn.kv_b_proj.weight
    direction = torch.randn_like(weight)

    def value() -> torch.Tensor:
        return model.logits(model(token_BS)).square().mean()

    (gradient,) = torch.autograd.grad(value(), weight)
    step = 1e-5
    with torch.no_grad():
        weight += step * direction
        above = value()
        weight -= 2 * step * direction
        below = value()
    assert float((gradient * direction).sum()) == pytest.approx(float((above - below) / (2 * step)), rel=1e-5)


def test_casting_the_model_keeps_its_rotations():
    model = Transformer(TINY)
    table = model.rotation_TP.clone()
    model.to(torch.float64)
    assert torch.equal(model.rotation_TP, table) and model.rotation_TP.is_complex()
