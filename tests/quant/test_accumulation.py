import pytest
import torch

from shoal.quant import fp8
from shoal.quant.accumulation import limited_product


def codes(draw, seed):
    return fp8.tiles(draw(24, 4096, generator=torch.Generator().manual_seed(seed))).code


def test_a_register_of_three_bits_truncates_as_by_hand():
    # 8 + 1 with three bits: the unit under 8 is 2, so the 1 is lost; with four bits it stays.
    left, right = torch.tensor([[8.0, 1.0]]), torch.tensor([[1.0, 1.0]])
    assert float(limited_product(left, right, register_bits=3, promote_every=None)) == 8.0
    assert float(limited_product(left, right, register_bits=4, promote_every=None)) == 9.0


def test_a_wide_register_is_exact():
    left, right = codes(torch.randn, 1), codes(torch.randn, 2)
    exact = left.double() @ right.double().T
    assert torch.allclose(limited_product(left, right, register_bits=50, promote_every=None), exact, rtol=1e-12)


@pytest.mark.parametrize("draw", [torch.randn, torch.rand])
@pytest.mark.parametrize("bits", [13, 14])
def test_promotion_every_128_terms_mends_the_sum(draw, bits):
    left, right = codes(draw, 3), codes(draw, 4)
    exact = left.double() @ right.double().T
    wrong = [
        float((limited_product(left, right, register_bits=bits, promote_every=every) - exact).abs().max())
        for every in (None, 128)
    ]
    assert wrong[1] < wrong[0] / 8
