import ctypes
import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.device import describe_machine
from shoal.kernels import packed as packed_module
from shoal.kernels.cpu.build import NEEDED, build, library
from shoal.kernels.packed import Codes, Packed, linear, pack, panel_scales, random_packed, words_by_torch
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
        words = int4.to_words(code)
        return Codes("int4", int(group), words, scale, word_cols=code.shape[-1]), int4.dequantise(
            code, scale, int(group)
        )[0]
    code, scale = fp8.quantise_blocks(stack)
    return Codes("fp8", 1, code, panel_scales(scale, len(weight))), fp8.dequantise_blocks(code, scale)[0]


def rounded_inputs(x, name):
    """What the kernel multiplies: inputs in the precision of the format."""
    if name == "f32":
        return x
    if name in ("bf16", "fp8"):
        return x.bfloat16().float()
    # Multiplied by 127 / top, where quant/int8.py divides by top / 127: a number between two codes may fall to the other side.
    group = 64 if name == "int8" else int(name.split("-")[1])
    grouped = torch.nn.functional.pad(x, (0, -x.shape[1] % group)).unflatten(-1, (-1, group))
    top = grouped.abs().amax(-1, keepdim=True).clamp(min=1e-30)
    return ((grouped * (127.0 / top)).round() * (top / 127.0)).flatten(-2)[:, : x.shape[1]]


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


def products_at(level):
    """The product kernel alone at a level of instructions: a few seconds to compile, once."""
    missing = NEEDED.get(level, set()) - set(describe_machine().instructions)
    if missing:
        pytest.skip(f"this processor lacks {', '.join(missing)}")
    return ctypes.CDLL(str(build(level, ("packed_linear.cpp",))))


@pytest.mark.slow
@pytest.mark.parametrize("level", ["avx512", "avx2", "plain"])
def test_every_level_of_instructions_gives_the_same_products(level, monkeypatch):
    kernels = products_at(level)
    monkeypatch.setattr(packed_module, "library", lambda: kernels)
    generator = torch.Generator().manual_seed(7)
    for name in FORMATS:
        for rows, cols, inputs in ((1, 1, 1), (33, 70, 5), (80, 192, 37)):
            weight = torch.randn(rows, cols, generator=generator)
            x = torch.randn(inputs, cols, generator=generator)
            codes, meant = codes_of(weight, name)
            expected = rounded_inputs(x, name).double() @ meant.double().T
            assert torch.allclose(linear(pack(codes), x).double(), expected, atol=3e-5 * cols**0.5, rtol=1e-4), name


@pytest.mark.parametrize("name", ["f32", "bf16", "int8", "int4", "fp8"])
def test_random_codes_stand_for_weights_of_ordinary_size(name):
    packed = random_packed(name, 64, (2, 48, 192), lambda shape, dtype: torch.empty(shape, dtype=dtype))
    real = pack(codes_of(torch.randn(48, 192), "int4-64" if name == "int4" else name)[0])
    assert packed.data.shape[1:] == real.data.shape[1:] and packed.scale.shape[1:] == real.scale.shape[1:]
    weight = linear(Packed(name, packed.group, 48, 192, packed.data[:1], packed.scale[:1]), torch.eye(192))
    assert 0.005 < float(weight.std()) < 0.08


@pytest.mark.parametrize(("rows", "cols", "group"), [(16, 32, 32), (40, 200, 64), (7, 77, 32), (33, 1000, 128)])
def test_every_code_of_a_word_finds_its_place_in_a_panel(rows, cols, group):
    code, scale = int4.quantise(torch.randn(3, rows, cols, generator=torch.Generator().manual_seed(rows)), group)
    packed = pack(Codes("int4", group, int4.to_words(code), scale, word_cols=cols))
    assert packed.cols == cols and packed.rows == rows
    panels = -(-rows // 16)
    # lines of eight columns, panels, sixteen rows, four columns and the four after them
    bundle = packed.data[0].flatten()[: min(panels, 4) * packed.data.shape[-1]].view(-1, min(panels, 4), 16, 4)
    for row, column in itertools.product(range(min(rows, 64)), range(0, cols, 3)):
        byte = int(bundle[column // 8, row // 16, row % 16, column % 4])
        assert (byte >> 4 if column % 8 > 3 else byte & 15) == int(code[0, row, column]) + 8


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 3),
    st.integers(1, 150),
    st.integers(1, 40),
    st.integers(0, 9),
    st.booleans(),
    st.sampled_from([0, -0x7F7F7F80]),
    st.integers(0, 2**31),
)
def test_words_are_laid_out_as_by_the_definition(count, rows, width, more, nibbles, flip, seed):
    generator = torch.Generator().manual_seed(seed)
    words = torch.randint(-(2**31), 2**31, (count, rows, width), dtype=torch.int32, generator=generator)
    options = {"filler": int(words[0, 0, 0]), "flip": flip, "nibbles": nibbles}
    laid = packed_module._words(words, width + more, packed_module._ordinary, **options)
    assert torch.equal(laid, words_by_torch(words, width + more, **options))
