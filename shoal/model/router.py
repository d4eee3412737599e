"""Which experts see a token, and with what weight: the V3 and V2 routers.

V3 (§2.1.2): sigmoid affinities; a per-expert bias, moved by `load_balance`, steers the *choice*; the choice may be
limited to the best groups, each scored by its best two experts; the *weights* are the unbiased affinities of the chosen,
renormalised and scaled. V2 (§2.1): softmax affinities, greedy or limited to the groups with the best single expert, not
renormalised. Everything here is float32, as published.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig


@dataclass
class Routing:
    """What one forward pass decided, layer by layer: for balance, metrics and replay. Filled only when handed in."""

    token_mask_M: Tensor | None = None
    """True for real tokens; padding is routed but never counted."""
    sequence_M: Tensor | None = None
    """Which sequence each token belongs to, for the sequence-wise loss; None treats the batch as one."""
    score_LME: list[Tensor] = field(default_factory=list)
    expert_LMK: list[Tensor] = field(default_factory=list)
    layers: list[int] = field(default_factory=list)
    replay: Mapping[int, Tensor] = field(default_factory=dict)
    """Experts to use instead of choosing, `[M, K]` by layer (router replay, arXiv 2510.11370; V3.2 §3.1 "keep routing");
    a row that begins with a negative number chooses for itself. Gates are always computed from the scores of now."""

    def record(self, layer: int, score_ME: Tensor, expert_MK: Tensor) -> None:
        """Called by each MoE layer in order."""
        self.layers.append(layer)
        self.score_LME.append(score_ME)
        self.expert_LMK.append(expert_MK)

    def counts_LE(self, num_experts: int) -> Tensor:
        """Tokens per layer and expert, padding left out, int64."""
        rows = []
        for expert_MK in self.expert_LMK:
            real = expert_MK if self.token_mask_M is None else expert_MK[self.token_mask_M]
            rows.append(torch.bincount(real.reshape(-1), minlength=num_experts))
        return torch.stack(rows) if rows else torch.zeros(0, num_experts, dtype=torch.long)


class Router(nn.Module):
    """The gate of one MoE layer: `weight` `[E, D]` and, for noaux_tc, the selection bias as a float32 buffer."""

    e_score_correction_bias: Tensor

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        assert config.n_routed_experts is not None
        self.config, self.layer = config, layer
        self.weight = nn.Parameter(torch.empty(config.n_routed_experts, config.hidden_size))
        if config.topk_method == "noaux_tc":
            self.register_buffer("e_score_correction_bias", torch.zeros(config.n_routed_experts, dtype=torch.float32))

    def forward(self, x_MD: Tensor, routing: Routing | None = None) -> tuple[Tensor, Tensor]:
        """Weights and experts of each token, both `[M, K]`."""
        score_ME = affinities(x_MD, self.weight, self.config)
        bias_E = self.e_score_correction_bias if self.config.topk_method == "noaux_tc" else None
        weight_MK, expert_MK = choose_experts(score_ME, bias_E, self.config)
        if routing is not None and self.layer in routing.replay:
            replayed_MK = routing.replay[self.layer]
            expert_MK = torch.where(replayed_MK[:, :1] < 0, expert_MK, replayed_MK.to(expert_MK.dtype))
            weight_MK = weigh_experts(score_ME, expert_MK, self.config)
        if routing is not None:
            routing.record(self.layer, score_ME, expert_MK)
        return weight_MK, expert_MK


def affinities(x_MD: Tensor, weight_ED: Tensor, config: ModelConfig) -> Tensor:
    """Scores of every expert for every token, at least float32: sigmoid (V3) or softmax (V2)."""
    dtype = torch.float64 if x_MD.dtype == torch.float64 else torch.float32
    logit_ME = torch.nn.functional.linear(x_MD.to(dtype), weight_ED.to(dtype))
    return logit_ME.sigmoid() if config.scoring_func == "sigmoid" else logit_ME.softmax(dim=-1)


def choose_experts(score_ME: Tensor, bias_E: Tensor | None, config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Pick K experts per token. The bias steers the choice, never the weight.

    Args:
        score_ME: affinities from `affinities`.
        bias_E: selection bias, float32, moved by `load_balance.update_bias`; None for V2 routing.
    Returns:
        weight_MK, with gradient, and expert_MK, int64 in [0, E).
    """
    steered_ME = score_ME.detach() if bias_E is None else score_ME.detach() + bias_E
    if config.n_group > 1 and config.topk_method != "greedy":
        steered_ME = hide_far_groups(steered_ME, config)
    expert_MK = steered_ME.topk(config.num_experts_per_tok, dim=-1).indices
    return weigh_experts(score_ME, expert_MK, config), expert_MK


def weigh_experts(score_ME: Tensor, expert_MK: Tensor, config: ModelConfig) -> Tensor:
    """Weights `[M, K]` of chosen experts, with gradient: their affinities, renormalised where the config says so."""
    weight_MK = score_ME.gather(-1, expert_MK)
    if config.norm_topk_prob:
        weight_MK = weight_MK / (weight_MK.sum(dim=-1, keepdim=True) + 1e-20)
    return weight_MK * config.routed_scaling_factor


def hide_far_groups(steered_ME: Tensor, config: ModelConfig) -> Tensor:
    """Minus infinity for experts outside the best `topk_group` groups (node-limited routing).

    A group counts as its best two experts together in V3 (noaux_tc), as its best one in V2 (group_limited_greedy).
    """
    grouped_MGX = steered_ME.unflatten(-1, (config.n_group, -1))
    best = 2 if config.topk_method == "noaux_tc" else 1
    group_MG = grouped_MGX.topk(best, dim=-1).values.sum(dim=-1)
    kept = group_MG.topk(config.topk_group, dim=-1).indices
    hidden_MG = torch.ones_like(group_MG, dtype=torch.bool).scatter(-1, kept, False)
    return grouped_MGX.masked_fill(hidden_MG.unsqueeze(-1), float("-inf")).flatten(-2)
