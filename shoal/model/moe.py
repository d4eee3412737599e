"""The mixture-of-experts layer: shared experts that always work, routed ones that are chosen (DeepSeekMoE, V3 §2.1.2)."""

from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.experts import Experts, SwiGLU
from shoal.model.router import Router, Routing


class MixtureOfExperts(nn.Module):
    """`shared(x) + sum over chosen experts of weight * expert(x)`."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.gate = Router(config, layer)
        self.experts = Experts(config)
        shared_width = config.n_shared_experts * config.moe_intermediate_size
        self.shared_experts = SwiGLU(config.hidden_size, shared_width) if config.n_shared_experts else None

    def forward(self, x_BSD: Tensor, routing: Routing | None = None) -> Tensor:
        x_MD = x_BSD.reshape(-1, x_BSD.shape[-1])
        weight_MK, expert_MK = self.gate(x_MD, routing)
        out_MD = self.experts(x_MD, weight_MK, expert_MK)
        if self.shared_experts is not None:
            out_MD = out_MD + self.shared_experts(x_MD)
        return out_MD.view_as(x_BSD)
