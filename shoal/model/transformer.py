"""The whole model: embedding, decoder layers, final norm, output head, multi-token prediction.

`forward` returns hidden states, not logits: losses and samplers take the head in chunks or only where they need it, so
the `[B, S, V]` array of logits never has to exist. The model knows nothing of engines, trainers or files.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.experts import SwiGLU
from shoal.model.gqa import GroupedQueryAttention
from shoal.model.latent_cache import LatentCache
from shoal.model.layers import Linear, RMSNorm
from shoal.model.mla import LatentAttention
from shoal.model.moe import MixtureOfExperts
from shoal.model.mtp import PredictionModule
from shoal.model.rope import rotation_table
from shoal.model.router import Router, Routing
from shoal.model.visibility import Visibility, visibility_of


class DecoderLayer(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = (LatentAttention if config.attention == "mla" else GroupedQueryAttention)(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.is_moe = config.is_moe_layer(layer)
        self.mlp = (
            MixtureOfExperts(config, layer) if self.is_moe else SwiGLU(config.hidden_size, config.intermediate_size)
        )

    def forward(
        self,
        x_BSD: Tensor,
        rotation_BSP: Tensor,
        position_BS: Tensor,
        visibility: Visibility,
        cache: LatentCache | None,
        routing: Routing | None,
    ) -> Tensor:
        x_BSD = x_BSD + self.self_attn(self.input_layernorm(x_BSD), rotation_BSP, position_BS, visibility, cache)
        normed_BSD = self.post_attention_layernorm(x_BSD)
        return x_BSD + (self.mlp(normed_BSD, routing) if self.is_moe else self.mlp(normed_BSD))


class Transformer(nn.Module):
    """A DeepSeek-family language model, or a baseline of the same shape, as `config` says."""

    rotation_TP: Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size)
        depth = range(config.num_nextn_predict_layers)
        self.mtp = nn.ModuleList(
            PredictionModule(config, DecoderLayer(config, config.num_hidden_layers + k)) for k in depth
        )
        self.register_buffer("rotation_TP", self._rotation_table(), persistent=False)

    def _rotation_table(self) -> Tensor:
        config = self.config
        return rotation_table(config, config.qk_rope_head_dim if config.attention == "mla" else config.gqa_head_dim)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Transformer":
        """Moves and casts as any module, but the rotations: a cast to a real dtype would drop their imaginary half."""
        rotation_TP = self._buffers.pop("rotation_TP")
        super()._apply(fn, recurse)
        device = self.embed_tokens.weight.device
        assert rotation_TP is not None
        self._buffers["rotation_TP"] = (self._rotation_table() if rotation_TP.is_meta else rotation_TP).to(device)
        return self

    @property
    def head_weight_VD(self) -> Tensor:
        """The output head, which is the embedding when they are tied."""
        return self.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def forward(
        self,
        token_BS: Tensor,
        *,
        position_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        cache: LatentCache | None = None,
        routing: Routing | None = None,
    ) -> Tensor:
        """Normed hidden states `[B, S, D]` of the new tokens.

        Args:
            token_BS: token ids, int64.
            position_BS: place of each token in its sequence; default 0, 1, 2, ....
            document_BS: with packed rows, which document each token is part of: attention stays inside.
            cache: entries of earlier positions; the new ones are appended.
            routing: when given, is filled with every MoE layer's decisions.
        """
        if position_BS is None:
            position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        visibility = visibility_of(token_BS, document_BS, position_BS, cache)
        rotation_BSP = self.rotation_TP[position_BS]
        x_BSD = self.embed_tokens(token_BS)
        for layer in self.layers:
            x_BSD = layer(x_BSD, rotation_BSP, position_BS, visibility, cache, routing)
        return self.norm(x_BSD)

    def predict_ahead(
        self,
        hidden_BSD: Tensor,
        token_BS: Tensor,
        *,
        position_BS: Tensor | None = None,
        document_BS: Tensor | None = None,
        routing: Routing | None = None,
        detach_trunk: bool = False,
    ) -> list[Tensor]:
        """Head inputs of every MTP depth: element k at position i predicts token i + k + 2.

        The last k + 1 positions of a row see wrapped-around embeddings; losses must mask them. With `detach_trunk` only
        the MTP modules themselves learn: how they are kept in step while reinforcement learning moves the model.
        """
        if detach_trunk:
            hidden_BSD = hidden_BSD.detach()
        if position_BS is None:
            position_BS = torch.arange(token_BS.shape[1], device=token_BS.device).expand_as(token_BS)
        visibility = visibility_of(token_BS, document_BS, position_BS, None)
        rotation_BSP = self.rotation_TP[position_BS]
        heads = []
        for depth, module in enumerate(self.mtp, start=1):
            ahead_BSD = self.embed_tokens(token_BS.roll(-depth, dims=1))
            if detach_trunk:
                ahead_BSD = ahead_BSD.detach()
            hidden_BSD, head_BSD = module(hidden_BSD, ahead_BSD, rotation_BSP, position_BS, visibility, routing)
            heads.append(head_BSD)
        return heads

    def logits(self, hidden: Tensor) -> Tensor:
        """Scores of every vocabulary entry, for hidden states of any leading shape."""
        if self.lm_head is None:
            return torch.nn.functional.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)


@torch.no_grad()
def initialise(model: Transformer, seed: int) -> None:
    """Normal weights with `initializer_range`, unit norms, zero biases; the same for the same seed on any device."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if name.endswith("norm.weight"):
            parameter.fill_(1.0)
        else:
            values = torch.randn(parameter.shape, generator=generator) * model.config.initializer_range
            parameter.copy_(values)
    for module in model.modules():
        if isinstance(module, Router) and module.config.topk_method == "noaux_tc":
            module.e_score_correction_bias.zero_()
