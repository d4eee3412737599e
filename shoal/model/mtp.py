"""Multi-token prediction: small extra modules that predict the token after next (DeepSeek-V3 §2.2).

Module k takes the hidden states of the one before it and the embeddings of the tokens k places on, and runs one more
decoder layer; embedding and output head are the model's own. It densifies the training signal and later drafts tokens
for speculative decoding.

Differs from the paper: the concatenation is [embedding ; hidden], as in the released checkpoint (the paper prints the
other order), and the first module reads the hidden state after the final norm, as the released code does.
"""

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.layers import Linear, RMSNorm
from shoal.model.router import Routing
from shoal.model.visibility import Visibility


class PredictionModule(nn.Module):
    """One depth of multi-token prediction. `block` is a full decoder layer, made by the transformer."""

    def __init__(self, config: ModelConfig, block: nn.Module) -> None:
        super().__init__()
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size)
        self.block = block
        self.shared_head_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        hidden_BSD: Tensor,
        embedded_BSD: Tensor,
        rotation_BSP: Tensor,
        position_BS: Tensor,
        visibility: Visibility,
        routing: Routing | None,
    ) -> tuple[Tensor, Tensor]:
        """Combine hidden state i with the embedding of token i + k.

        Returns:
            the hidden states that the next depth takes, and their normed form for the output head.
        """
        joined_BSD = self.eh_proj(torch.cat([self.enorm(embedded_BSD), self.hnorm(hidden_BSD)], dim=-1))
        out_BSD = self.block(joined_BSD, rotation_BSP, position_BS, visibility, None, routing)
        return out_BSD, self.shared_head_norm(out_BSD)
