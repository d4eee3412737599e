import pytest
import torch

from shoal.quant import fp8, int4, int8

SHAPES = [(3, 5), (16, 64), (130, 257), (1, 1)]


@pytest.mark.parametrize("shape", SHAPES)
def test_int8_is_within_half_a_step_of_every_weight(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 3
    code, scale = int8.quantise(weight)
    assert code.dtype == torch.int8 and int(code.abs().max()) == 127
    assert bool(((int8.dequantise(code, scale) - weight).abs() <= scale.unsqueeze(-1) * 0.5001).all())


@pytest.mark.parametrize("group", int4.GROUPS)
@pytest.mark.parametrize("shape", SHAPES)
def test_int4_is_no_worse_than_the_plain_symmetric_grid(shape, group):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    code, scale = int4.quantise(weight, group)
    assert int(code.min()) >= -8 and int(code.max()) <= 7
    error = (int4.dequantise(code, scale, group) - weight).square().sum()
    missing = -shape[1] % group
    grouped = torch.nn.functional.pad(weight, (0, missing)).unflatten(-1, (-1, group))
    plain_scale = (grouped.abs().amax(-1, keepdim=True) / 7).clamp_min(1e-30)
    plain = ((grouped / plain_scale).round() * plain_scale).flatten(-2)[:, : shape[1]]
    assert float(error) <= float((plain - weight).square().sum()) * 1.02 + 1e-6


def test_int4_uses_the_extra_code_for_the_largest_weight():
    weight = torch.tensor([[-1.0, 0.875, 0.5, 0.0]])
    code, scale = int4.quantise(weight, 32)
    assert code.tolist() == [[-8, 7, 4, 0]] and float(scale) == 0.125


@pytest.mark.parametrize("shape", SHAPES)
def test_fp8_blocks_meet_the_bound_of_three_mantissa_bits(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    code, scale = fp8.quantise_blocks(weight)
    assert scale.shape == (-(-shape[0] // 128), -(-shape[1] // 128))
    back = fp8.dequantise_blocks(code, scale)
    # Half a unit of the last of three mantissa bits, or half the smallest subnormal step.
    bound = weight.abs() / 16 + scale.max() * 2**-10
    assert bool(((back - weight).abs() <= bound).all())


def test_fp8_powers_of_two_are_powers_of_two_and_never_overflow():
    weight = torch.randn(300, 200, generator=torch.Generator().manual_seed(4)) * 1e3
    code, scale = fp8.quantise_blocks(weight, power_of_two=True)
    assert torch.equal(scale, torch.exp2(torch.log2(scale).round()))
    assert bool(code.float().isfinite().all())


def test_fp8_tiles_scale_each_row_and_128_columns_alone():
    x = torch.ones(2, 256)
    x[1, 128:] = 1000.0
    code, scale = fp8.quantise_tiles(x)
    assert torch.allclose(scale, torch.tensor([[1 / 448, 1 / 448], [1 / 448, 1000 / 448]]))
    assert torch.allclose(fp8.dequantise_tiles(code, scale), x)


def test_zeros_stay_zeros_in_every_format():
    zeros = torch.zeros(16, 64)
    assert not fp8.dequantise_blocks(*fp8.quantise_blocks(zeros)).any()
    assert not int8.dequantise(*int8.quantise(zeros)).any()
    assert not int4.dequantise(*int4.quantise(zeros, 32), 32).any()
