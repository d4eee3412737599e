"""Multi-head latent attention, in both forms (DeepSeek-V2 §2.1, DeepSeek-V3 §2.1.1).

Keys and values are squeezed into one small latent `c` per token; only `c` and one rotary key shared by all heads are
cached. The *expanded* form multiplies the latents up to ordinary keys and values: fewest operations, so training and
prefill use it. The *absorbed* form moves the up-projections to the query and output side, so that decoding attends to
the cached latents directly, as one key-value head of width `kv_lora_rank + qk_rope_head_dim`: fewest bytes. Both give
the same numbers (`tests/model/test_mla.py`).
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shoal.config import ModelConfig
from shoal.kernels.heads import expand_keys, latent_entries, rotate_tails
from shoal.model.attention import attend
from shoal.model.latent_cache import LatentCache
from shoal.model.layers import Linear, RMSNorm
from shoal.model.rope import rotate_interleaved
from shoal.model.visibility import Visibility

ABSORB_UP_TO_QUERIES = 4
"""With more new positions than this per row, expanding the cached latents costs less than attending to them."""

LATENT_NORM_EPS = 1e-6
"""The released code never passes `rms_norm_eps` to the norms of the latents; Moonlight's 1e-5 is for the others."""


class LatentAttention(nn.Module):
    """Multi-head latent attention; parameters carry the published names."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        num_heads, hidden = config.num_attention_heads, config.hidden_size
        if config.q_lora_rank is None:
            self.q_proj = Linear(hidden, num_heads * config.qk_head_dim)
        else:
            self.q_a_proj = Linear(hidden, config.q_lora_rank)
            self.q_a_layernorm = RMSNorm(config.q_lora_rank, LATENT_NORM_EPS)
            self.q_b_proj = Linear(config.q_lora_rank, num_heads * config.qk_head_dim)
        self.kv_a_proj_with_mqa = Linear(hidden, config.kv_lora_rank + config.qk_rope_head_dim)
        self.kv_a_layernorm = RMSNorm(config.kv_lora_rank, LATENT_NORM_EPS)
        self.kv_b_proj = Linear(config.kv_lora_rank, num_heads * (config.qk_nope_head_dim + config.v_head_dim))
        self.o_proj = Linear(num_heads * config.v_head_dim, hidden, after_attention=True)
        yarn = config.rope_scaling
        self.softmax_scale = config.qk_head_dim**-0.5 * (yarn.softmax_multiplier() if yarn else 1.0)
        self.compute_dtype: torch.dtype | None = None
        self.recompute = False
        """Keep the latents for backward, and compute what comes from them again (DeepSeek-V3 §3.2.3)."""

    def forward(
        self,
        x_BSD: Tensor,
        rotation_BSP: Tensor,
        position_BS: Tensor,
        visibility: Visibility,
        cache: LatentCache | None = None,
    ) -> Tensor:
        """Attend; without a cache to the sequence itself, with one to everything cached so far.

        Args:
            x_BSD: normed hidden states of the new positions.
            rotation_BSP: complex rotations of these positions.
            visibility: what each new position may look at.
        """
        source = x_BSD if self.config.q_lora_rank is None else self.q_a_proj(x_BSD)
        down_BSW = self.kv_a_proj_with_mqa(x_BSD)
        if cache is None and self.recompute and torch.is_grad_enabled():
            mixed_BSX = checkpoint(self._mixed, source, down_BSW, rotation_BSP, visibility, use_reentrant=False)
            return self.o_proj(mixed_BSX)
        if cache is None:
            return self.o_proj(self._mixed(source, down_BSW, rotation_BSP, visibility))
        query_BSHQ, entry_BSW = self._queries(source, rotation_BSP), self._latents(down_BSW, rotation_BSP)
        cached_BTW = cache.append(self.layer, entry_BSW, position_BS).to(x_BSD.dtype)
        if x_BSD.shape[1] <= ABSORB_UP_TO_QUERIES:
            return self._absorbed(query_BSHQ, cached_BTW, visibility)
        return self.o_proj(self._expanded(query_BSHQ, cached_BTW, visibility))

    def _mixed(self, source: Tensor, down_BSW: Tensor, rotation_BSP: Tensor, visibility: Visibility) -> Tensor:
        """From the products of the down projections to the mixed values of all heads: norms, up projections, attention.

        Differs from the paper: with `recompute`, the attention core runs again too, since its backward wants the keys and
        values that would otherwise have to be kept.
        """
        query_BSHQ = self._queries(source, rotation_BSP)
        return self._expanded(query_BSHQ, self._latents(down_BSW, rotation_BSP), visibility)

    def _queries(self, source: Tensor, rotation_BSP: Tensor) -> Tensor:
        """Queries `[B, S, H, N + R]`, the rotary part turned; from the query latent where there is one."""
        config = self.config
        flat = self.q_proj(source) if config.q_lora_rank is None else self.q_b_proj(self.q_a_layernorm(source))
        query_BSHQ: Tensor = flat.unflatten(-1, (config.num_attention_heads, config.qk_head_dim))
        turned_BSHQ = rotate_tails(query_BSHQ, rotation_BSP, config.qk_nope_head_dim)
        if turned_BSHQ is not None:
            return turned_BSHQ
        plain_BSHN, rotary_BSHR = query_BSHQ.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        return torch.cat([plain_BSHN, rotate_interleaved(rotary_BSHR, rotation_BSP)], dim=-1)

    def _latents(self, down_BSW: Tensor, rotation_BSP: Tensor) -> Tensor:
        """What the cache keeps: normed latent and rotated shared key, `[B, S, C + R]`."""
        entry_BSW = latent_entries(down_BSW, self.kv_a_layernorm.weight, rotation_BSP, LATENT_NORM_EPS)
        if entry_BSW is not None:
            return entry_BSW
        latent_BSC, key_BSR = down_BSW.split([self.config.kv_lora_rank, self.config.qk_rope_head_dim], dim=-1)
        key_BSR = rotate_interleaved(key_BSR.unsqueeze(2), rotation_BSP).squeeze(2)
        return torch.cat([self.kv_a_layernorm(latent_BSC), key_BSR], dim=-1)

    def _expanded(self, query_BSHQ: Tensor, cached_BTW: Tensor, visibility: Visibility) -> Tensor:
        """Multiply the latents up to keys and values, then ordinary multi-head attention: `[B, S, H * U]`."""
        config = self.config
        latent_BTC, key_BTR = cached_BTW.split([config.kv_lora_rank, config.qk_rope_head_dim], dim=-1)
        up_BTHX = self.kv_b_proj(latent_BTC).unflatten(-1, (config.num_attention_heads, -1))
        expanded = expand_keys(up_BTHX, key_BTR, config.qk_nope_head_dim)
        if expanded is not None:
            return attend(query_BSHQ, *expanded, visibility, self.softmax_scale, self.compute_dtype).flatten(2)
        plain_BTHN, value_BTHU = up_BTHX.split([config.qk_nope_head_dim, config.v_head_dim], dim=-1)
        rotary_BTHR = key_BTR.unsqueeze(2).expand(-1, -1, config.num_attention_heads, -1)
        key_BTHQ = torch.cat([plain_BTHN, rotary_BTHR], dim=-1)
        return attend(query_BSHQ, key_BTHQ, value_BTHU, visibility, self.softmax_scale, self.compute_dtype).flatten(2)

    def _absorbed(self, query_BSHQ: Tensor, cached_BTW: Tensor, visibility: Visibility) -> Tensor:
        """Attend to the latents themselves: the key up-projection goes into the query, the value one into the output."""
        config = self.config
        up_HXC = self.kv_b_proj.weight.view(config.num_attention_heads, -1, config.kv_lora_rank).to(query_BSHQ.dtype)
        key_up_HNC, value_up_HUC = up_HXC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        plain_BSHN, rotary_BSHR = query_BSHQ.split([config.qk_nope_head_dim, config.qk_rope_head_dim], dim=-1)
        lifted_BSHC = torch.einsum("bshn,hnc->bshc", plain_BSHN, key_up_HNC)
        query_BSHW = torch.cat([lifted_BSHC, rotary_BSHR], dim=-1)
        score_BSHT = torch.einsum("bshw,btw->bsht", query_BSHW, cached_BTW) * self.softmax_scale
        mask_BST = visibility.mask_BST
        if mask_BST is None:
            mask_BST = torch.ones(
                score_BSHT.shape[1], score_BSHT.shape[3], dtype=torch.bool, device=score_BSHT.device
            ).tril()[None]
        weight_BSHT = score_BSHT.masked_fill(~mask_BST.unsqueeze(2), float("-inf")).softmax(dim=-1)
        mixed_BSHC = torch.einsum("bsht,btc->bshc", weight_BSHT, cached_BTW[..., : config.kv_lora_rank])
        return self.o_proj(torch.einsum("bshc,huc->bshu", mixed_BSHC, value_up_HUC).flatten(2))


def set_recompute(model: nn.Module, recompute: bool) -> None:
    """Let every latent attention of `model` keep only its latents for backward, or everything."""
    for module in model.modules():
        if isinstance(module, LatentAttention):
            module.recompute = recompute
