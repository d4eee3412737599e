import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.kernels.cpu.build import library
from shoal.kernels.packed import Codes, linear, pack, panel_scales
from shoal.quant import fp8, int4, int8

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work")

FORMATS = ["f32", "bf16", "int8", "int4-32", "int4-64", "fp8"]


def codes_of(weight, name):
    """Codes and the float weights that they stand for."""
    format_name, _, group = name.partition("-")
    stack = weight.unsqueeze(0)
    if format_name == "f32":
        return Codes("f32", 1, stack), weight
    if format_name == "bf16":
        return Codes("bf16", 1, stack.bfloat16()), weight.bfloat16().float()
    if format_name == "int8":
        code, scale = int8.quantise(stack)
        return Codes("int8", 64, code, scale), int8.dequantise(code, scale)[0]
    if format_name == "int4":
        code, scale = int4.quantise(stack, int(group))
        return Codes("int4", int(group), code, scale), int4.dequantise(code, scale, int(group))[0]
    code, scale = fp8.quantise_blocks(stack)
    return Codes("fp8", 1, code, panel_scales(scale, len(weight))), fp8.dequantise_blocks(code, scale)[0]


def rounded_inputs(x, name):
    """What the kernel multiplies: inputs in the precision of the format."""
    if name == "f32":
        return x
    if name in ("bf16", "fp8"):
        return x.bfloat16().float()
    group = 64 if name == "int8" else int(name.split("-")[1])
    padded = torch.nn.functional.pad(x, (0, -x.shape[1] % group))
    code, scale = int8.quantise_inputs(padded, group)
    return int8.dequantise(code.unflatten(-1, (-1, group)), scale).flatten(-2)[:, : x.shape[1]]


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(FORMATS),
    rows=st.integers(1, 150),
    cols=st.integers(1, 300),
    inputs=st.integers(1, 19),
    seed=st.integers(0, 1000),
)
def test_packed_product_equals_the_float_product_of_the_same_codes(name, rows, cols, inputs, seed):
    generator = torch.Generator().manual_seed(seed)
    weight, x = torch.randn(rows, cols, generator=generator), torch.randn(inputs, cols, generator=generator)
    codes, meant = codes_of(weight, name)
    expected = rounded_inputs(x, name).double() @ meant.double().T
    got = linear(pack(codes), x)
    assert torch.allclose(got.double(), expected, atol=3e-5 * cols**0.5, rtol=1e-4)


@pytest.mark.parametrize("name", FORMATS)
def test_a_row_gives_the_same_bits_in_any_batch(name):
    generator = torch.Generator().manual_seed(5)
    weight, x = torch.randn(80, 192, generator=generator), torch.randn(37, 192, generator=generator)
    packed = pack(codes_of(weight, name)[0])
    together = linear(packed, x)
    for size in (1, 2, 3, 5, 13):
        alone = torch.cat([linear(packed, part) for part in x.split(size)])
        assert torch.equal(alone, together), size


@pytest.mark.parametrize("name", FORMATS)
def test_nan_inputs_spoil_their_own_row_only(name):
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(6))
    x[1, 7] = float("nan")
    y = linear(pack(codes_of(torch.randn(16, 64), name)[0]), x)
    assert bool(y[1].isnan().all()) and bool(y[[0, 2]].isfinite().all())


def test_every_e4m3_code_is_decoded_exactly():
    every = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    finite = every[every.float().isfinite()]
    weight = torch.zeros(16, 256, dtype=torch.float8_e4m3fn)
    weight[3, : len(finite)] = finite
    packed = pack(Codes("fp8", 1, weight.unsqueeze(0), torch.ones(1, 1, 2)))
    assert torch.equal(linear(packed, torch.eye(256))[: len(finite), 3], finite.float())
