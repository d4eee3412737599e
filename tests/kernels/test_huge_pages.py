import torch

from shoal.kernels.huge_pages import ALIGNMENT_BYTES, HUGE_BYTES, REGION_BYTES, WeightMemory, huge_bytes


def test_tensors_are_aligned_apart_and_keep_their_numbers():
    memory = WeightMemory()
    originals = [torch.randn(3, 5), torch.arange(7), torch.empty(0), torch.ones(2, 3, dtype=torch.bfloat16)]
    kept = [memory.empty(tuple(tensor.shape), tensor.dtype).copy_(tensor) for tensor in originals]
    for tensor, original in zip(kept, originals):
        assert torch.equal(tensor, original) and tensor.dtype == original.dtype
        assert tensor.data_ptr() % ALIGNMENT_BYTES == 0
    kept[0].fill_(-1)
    assert torch.equal(kept[1], originals[1])


def test_what_exceeds_a_region_gets_its_own_and_outlives_the_memory():
    memory = WeightMemory()
    first = memory.empty((4,), torch.float32).fill_(2)
    large = memory.empty((REGION_BYTES + 1,), torch.uint8)
    large[-1] = 7
    del memory
    assert float(first.sum()) == 8 and int(large[-1]) == 7 and int(large[0]) == 0


def test_regions_start_at_a_huge_page():
    assert huge_bytes(100).data_ptr() % HUGE_BYTES == 0
