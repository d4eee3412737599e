"""Grouped-query attention: the baseline that latent attention is compared with, behind the same config and cache.

With `num_key_value_heads = num_attention_heads` it is ordinary multi-head attention, with 1 it is multi-query. Rotary
pairs are halves, as in the Llama family, so that a dense model saved from here opens as `LlamaForCausalLM`.
"""

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.attention import attend
from shoal.model.latent_cache import LatentCache
from shoal.model.layers import Linear
from shoal.model.rope import rotate_halves
from shoal.model.visibility import Visibility


class GroupedQueryAttention(nn.Module):
    """Attention whose query heads share `kv_heads` keys and values."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        self.compute_dtype: torch.dtype | None = None
        width = config.gqa_head_dim
        self.q_proj = Linear(config.hidden_size, config.num_attention_heads * width)
        self.k_proj = Linear(config.hidden_size, config.kv_heads * width)
        self.v_proj = Linear(config.hidden_size, config.kv_heads * width)
        self.o_proj = Linear(config.num_attention_heads * width, config.hidden_size, after_attention=True)

    def forward(
        self,
        x_BSD: Tensor,
        rotation_BSP: Tensor,
        position_BS: Tensor,
        visibility: Visibility,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Attend; arguments as in `mla.LatentAttention.forward`."""
        width = self.config.gqa_head_dim
        query_BSHQ = rotate_halves(self.q_proj(x_BSD).unflatten(-1, (-1, width)), rotation_BSP)
        key_BSGQ = rotate_halves(self.k_proj(x_BSD).unflatten(-1, (-1, width)), rotation_BSP)
        entry_BSW = torch.cat([key_BSGQ.flatten(2), self.v_proj(x_BSD)], dim=-1)
        if cache is not None:
            entry_BSW = cache.append(self.layer, entry_BSW, position_BS).to(x_BSD.dtype)
        key_BTW, value_BTW = entry_BSW.chunk(2, dim=-1)
        shared = self.config.num_attention_heads // self.config.kv_heads
        key_BTHQ = key_BTW.unflatten(-1, (-1, width)).repeat_interleave(shared, dim=2)
        value_BTHQ = value_BTW.unflatten(-1, (-1, width)).repeat_interleave(shared, dim=2)
        mixed_BSHQ = attend(query_BSHQ, key_BTHQ, value_BTHQ, visibility, width**-0.5, self.compute_dtype)
        return self.o_proj(mixed_BSHQ.flatten(2))
