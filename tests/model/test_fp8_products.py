"""FP8 products and their gradients against float64, within what three mantissa bits allow."""

import pytest
import torch

from shoal.errors import ConfigError
from shoal.model.experts import SwiGLU
from shoal.model.fp8_products import Fp8GroupedSwiGLU, Fp8LinearProduct
from shoal.model.layers import Linear, set_fp8
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.quant import fp8
from shoal.quant.fp8_recipe import Fp8Recipe, round_mantissa

RECIPES = [Fp8Recipe(), Fp8Recipe(power_of_two="everywhere"), Fp8Recipe(wgrad="bf16", power_of_two="nowhere")]
TOKENS, INPUTS, OUTPUTS = 150, 200, 140


def drawn(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def error_bound(x, top):
    """Of one rounding to E4M3: half of the last of three mantissa bits, or half the smallest step under the scale."""
    return x.abs() / 16 + top * 2 * 2.0**-10 / 448


def product_bound(left, left_error, right, right_error):
    """Of `left @ right` when both factors are off."""
    return left_error @ right.abs() + left.abs() @ right_error + left_error @ right_error


@pytest.mark.parametrize("after_attention", [False, True])
@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.power_of_two}-{recipe.wgrad}")
def test_a_product_and_both_gradients_are_within_the_bound_of_the_format(recipe, after_attention):
    x, weight, grad = drawn(TOKENS, INPUTS, seed=1), drawn(OUTPUTS, INPUTS, seed=2), drawn(TOKENS, OUTPUTS, seed=3)
    x.requires_grad_(), weight.requires_grad_()
    y = Fp8LinearProduct.apply(x, weight, recipe, after_attention)
    y.backward(grad)
    x64, weight64, grad64 = x.detach().double(), weight.detach().double(), grad.double()
    wrong = [error_bound(tensor, tensor.abs().max()) for tensor in (x64, weight64, grad64)]
    x_error, weight_error, grad_error = wrong
    # The inputs are rounded twice before the weight gradient: in tiles of columns, then in tiles of tokens.
    twice = x_error + error_bound(x64.abs() + x_error, 1.1 * x64.abs().max())
    slack = 1 + 1e-4
    assert bool(
        ((y.double() - x64 @ weight64.T).abs() <= slack * product_bound(x64, x_error, weight64.T, weight_error.T)).all()
    )
    assert bool(
        ((x.grad - grad64 @ weight64).abs() <= slack * product_bound(grad64, grad_error, weight64, weight_error)).all()
    )
    bound = slack * product_bound(grad64.T, grad_error.T, x64, twice)
    assert bool(((weight.grad - grad64.T @ x64).abs() <= bound).all())
    relative = float((weight.grad - grad64.T @ x64).norm() / (grad64.T @ x64).norm())
    assert 0.003 < relative < 0.06


def test_the_forward_product_is_the_definition_in_codes():
    x, weight = drawn(5, 300, seed=4), drawn(70, 300, seed=5)
    meant_x = fp8.dequantise_tiles(*fp8.quantise_tiles(x))
    meant_weight = fp8.dequantise_blocks(*fp8.quantise_blocks(weight))
    y = Fp8LinearProduct.apply(x, weight, Fp8Recipe(), False)
    assert torch.allclose(y.double(), meant_x.double() @ meant_weight.double().T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda recipe: f"{recipe.power_of_two}-{recipe.wgrad}")
def test_grouped_swiglu_follows_float64_with_an_empty_expert_and_a_single_row(recipe):
    groups = [(0, 1), (1, 1), (1, 77), (77, 90)]
    x, gate_up, down = drawn(90, 136, seed=6), drawn(4, 2 * 128, 136, seed=7) * 0.1, drawn(4, 136, 128, seed=8) * 0.1
    inputs = [tensor.requires_grad_() for tensor in (x, gate_up, down)]
    exact = [tensor.detach().double().requires_grad_() for tensor in inputs]
    grad = drawn(90, 136, seed=9)
    Fp8GroupedSwiGLU.apply(*inputs, groups, recipe).backward(grad)
    rows = []
    for expert, (start, stop) in enumerate(groups):
        gate, up = (exact[0][start:stop] @ exact[1][expert].T).chunk(2, dim=-1)
        rows.append((torch.nn.functional.silu(gate) * up) @ exact[2][expert].T)
    torch.cat(rows).backward(grad.double())
    for found, wanted in zip(inputs, exact):
        assert float((found.grad - wanted.grad).norm() / wanted.grad.norm()) < 0.08
    assert not gate_up.grad[1].any() and not down.grad[1].any()


def test_tiling_anew_along_the_tokens_costs_nothing_with_powers_of_two():
    x = drawn(128, 128, seed=10)
    for power_of_two in (True, False):
        once = fp8.tiles(x, power_of_two).floats()
        twice = fp8.tiles(once.t(), power_of_two).floats().t()
        # What lies far below its new tile's top is rounded to a subnormal; everything else stays to the bit.
        normal = once.abs() > once.abs().amax(dim=0, keepdim=True) * 2**-13
        assert torch.equal(once[normal], twice[normal]) == power_of_two


def test_e5m6_keeps_six_bits_and_is_held_by_bfloat16():
    x = drawn(4000, seed=11)
    rounded = round_mantissa(x, 6, 5, torch.tensor(0.25))
    assert bool(((rounded - x).abs() <= x.abs() / 128 + 2.0**-20).all())
    assert torch.equal(rounded.bfloat16().float(), rounded)
    assert not torch.equal(rounded, x.bfloat16().float())


def test_only_products_inside_decoder_layers_become_fp8():
    model = Transformer(preset("demo"))
    set_fp8(model, Fp8Recipe())
    named = {name for name, module in model.named_modules() if getattr(module, "fp8", None) is not None}
    assert {"layers.0.self_attn.o_proj", "layers.1.mlp.experts", "mtp.0.block.self_attn.kv_b_proj"} <= named
    assert not any(part in name for name in named for part in ("lm_head", "gate.", "eh_proj", "norm", "embed"))
    assert model.layers[0].self_attn.o_proj.after_attention and not model.layers[0].mlp.down_proj.after_attention
    set_fp8(model, None)
    assert all(getattr(module, "fp8", None) is None for module in model.modules())


def saved_bytes(run, *parameters):
    """Bytes kept for backward, parameters not counted."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    kept = []

    def keep(tensor):
        if tensor.untyped_storage().data_ptr() not in own:
            kept.append(tensor.numel() * tensor.element_size())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run()
    return sum(kept)


def test_backward_keeps_a_byte_per_number_and_a_scale_per_tile():
    linear, swiglu = Linear(INPUTS, OUTPUTS), SwiGLU(256, 128)
    for module in (linear, swiglu):
        for parameter in module.parameters():
            torch.nn.init.normal_(parameter)
    set_fp8(torch.nn.ModuleDict({"layers": torch.nn.ModuleList([linear, swiglu])}), Fp8Recipe())
    x = drawn(TOKENS, INPUTS, seed=12).requires_grad_()
    assert saved_bytes(lambda: linear(x), *linear.parameters()) == TOKENS * INPUTS + TOKENS * 2 * 4
    x = drawn(TOKENS, 256, seed=13).requires_grad_()
    # Inputs and gate-up products, 256 wide each, against 4 + 2 bytes a number in float32 and bfloat16 products.
    assert saved_bytes(lambda: swiglu(x), *swiglu.parameters()) == 2 * (TOKENS * 256 + TOKENS * 2 * 4)


def test_a_model_learns_in_fp8_like_in_float32():
    config = preset("demo").replace(num_nextn_predict_layers=0, num_hidden_layers=2)
    token_BS = torch.randint(0, 40, (2, 48), generator=torch.Generator().manual_seed(14))
    losses = {}
    for name, recipe in (("fp32", None), ("fp8", Fp8Recipe())):
        model = Transformer(config)
        initialise(model, 5)
        set_fp8(model, recipe)
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(12):
            logits = model.logits(model(token_BS[:, :-1]))
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), token_BS[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        losses[name] = float(loss.detach())
    assert losses["fp32"] < 3.5 and losses["fp8"] == pytest.approx(losses["fp32"], rel=0.1)
    assert losses["fp8"] != losses["fp32"]


@pytest.mark.parametrize("change", [{"wgrad": "fp4"}, {"power_of_two": "yes"}, {"backend": "cublas"}])
def test_unknown_switches_are_named(change):
    with pytest.raises(ConfigError, match="is unknown; use"):
        Fp8Recipe(**change)


def test_the_hopper_backend_is_refused_elsewhere():
    with pytest.raises(ConfigError, match="needs a Hopper GPU"):
        Fp8LinearProduct.apply(drawn(2, 128, seed=1), drawn(3, 128, seed=1), Fp8Recipe(backend="torch"), False)
