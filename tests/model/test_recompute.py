"""Latent attention that keeps only its latents for backward: same gradients, and the bytes that the sizes say."""

import pytest
import torch

from shoal.config import ModelConfig
from shoal.model.mla import LatentAttention, set_recompute
from shoal.model.rope import rotation_table
from shoal.model.visibility import visibility_of

ROWS, LENGTH = 2, 24
SIZES = {
    "vocab_size": 11,
    "hidden_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 3,
    "intermediate_size": 8,
    "kv_lora_rank": 20,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 4,
    "v_head_dim": 10,
}


def attention(q_lora_rank):
    config = ModelConfig(q_lora_rank=q_lora_rank, **SIZES)
    module = LatentAttention(config, 0)
    generator = torch.Generator().manual_seed(1)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.3, generator=generator)
    return module


def run(module):
    """Output, input gradient, parameter gradients, and the bytes kept for backward (parameters not counted)."""
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor.dtype == torch.float32:
            kept[storage.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    x = torch.randn(ROWS, LENGTH, 40, generator=torch.Generator().manual_seed(2)).requires_grad_()
    position = torch.arange(LENGTH).expand(ROWS, -1)
    rotation = rotation_table(module.config, 4)[position]
    module.zero_grad()
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        out = module(x, rotation, position, visibility_of(position, None, position, None))
    num_bytes = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    out.backward(torch.randn(out.shape, generator=torch.Generator().manual_seed(3)))
    return out.detach(), x.grad, [parameter.grad.clone() for parameter in module.parameters()], num_bytes


@pytest.mark.parametrize("q_lora_rank", [None, 16])
def test_recomputing_changes_no_bit_and_keeps_what_the_latents_take(q_lora_rank):
    module = attention(q_lora_rank)
    out, grad_x, grads, before = run(module)
    set_recompute(module, True)
    again, grad_x_again, grads_again, after = run(module)
    assert torch.equal(out, again) and torch.equal(grad_x, grad_x_again)
    assert all(torch.equal(first, second) for first, second in zip(grads, grads_again))
    # The input, the two products of the down projections, and the mixed values that the output projection reads.
    numbers = 40 + (q_lora_rank or 0) + (20 + 4) + 3 * 10
    assert after == 4 * ROWS * LENGTH * numbers
    # Besides, queries and keys of every head, and the up projection that the values lie in, would have been kept.
    assert before >= after + 4 * ROWS * LENGTH * 3 * (16 + 16 + 10)
