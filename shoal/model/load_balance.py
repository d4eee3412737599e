"""Keeping experts equally busy: the bias update without a loss, and the losses it is compared with.

Auxiliary-loss-free balancing (arXiv 2408.15664, DeepSeek-V3 §2.1.2): after each optimizer step the selection bias of an
over-used expert goes down by a fixed step, that of an under-used one up; no gradient is bent. V3 adds a very small
sequence-wise loss against extreme imbalance inside one sequence. `auxiliary_loss` is the classic alternative, the
baseline of the comparison. MaxVio is the papers' measure: how far the busiest expert is above the mean, relative to it.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from shoal.config import ModelConfig
from shoal.model.router import Router, Routing


def max_violation(count_LE: Tensor) -> Tensor:
    """MaxVio of each layer: (busiest - mean) / mean of the expert loads; 0 is perfect balance."""
    load_LE = count_LE.double()
    mean_L = load_LE.mean(dim=-1).clamp_min(1e-12)
    return (load_LE.amax(dim=-1) - mean_L) / mean_L


@torch.no_grad()
def update_bias(bias_E: Tensor, count_E: Tensor, speed: float) -> None:
    """Move one layer's selection bias, in place, by `speed` against the sign of its overload.

    Args:
        bias_E: float32 buffer of the router.
        count_E: tokens per expert of the whole step: all micro-batches, all ranks, padding left out.
        speed: the papers' u or gamma, 0.001; 0 freezes.
    """
    count_E = count_E.to(bias_E.device, torch.float32)
    bias_E.add_(speed * torch.sign(count_E.mean() - count_E))


def update_biases(model: nn.Module, count_by_layer: Mapping[int, Tensor], speed: float) -> None:
    """`update_bias` for every router of `model` that has a bias, MTP layers included."""
    for module in model.modules():
        if isinstance(module, Router) and module.config.topk_method == "noaux_tc" and module.layer in count_by_layer:
            update_bias(module.e_score_correction_bias, count_by_layer[module.layer], speed)


def sequence_balance_loss(routing: Routing, config: ModelConfig) -> Tensor:
    """V3 eq. 17-20: sum over experts of (share of choices) x (mean affinity) within each sequence, averaged over
    sequences, summed over layers; 1 per layer at perfect balance. Multiply by alpha (published: 1e-4).

    The choices counted are the top-k of the raw affinities, without bias and group limit, as published.
    """
    total = torch.zeros((), device=routing.score_LME[0].device if routing.score_LME else None)
    for score_ME in routing.score_LME:
        chosen_MK = score_ME.detach().topk(config.num_experts_per_tok, dim=-1).indices
        total = total + _product_of_shares(score_ME, chosen_MK, routing, config)
    return total


def auxiliary_loss(routing: Routing, config: ModelConfig) -> Tensor:
    """The classic balance loss (Switch, GShard, V2 expert-level): as above, over the whole batch and the real choices."""
    total = torch.zeros((), device=routing.score_LME[0].device if routing.score_LME else None)
    whole_batch = Routing(token_mask_M=routing.token_mask_M)
    for score_ME, expert_MK in zip(routing.score_LME, routing.expert_LMK):
        total = total + _product_of_shares(score_ME, expert_MK, whole_batch, config)
    return total


def _product_of_shares(score_ME: Tensor, expert_MK: Tensor, routing: Routing, config: ModelConfig) -> Tensor:
    """Mean over sequences of sum_e f_e P_e, where f_e = E/(K T) x choices of e and P_e = mean normalised affinity."""
    num_experts, per_token = score_ME.shape[-1], config.num_experts_per_tok
    sequence_M = (
        routing.sequence_M if routing.sequence_M is not None else score_ME.new_zeros(len(score_ME), dtype=torch.long)
    )
    if routing.token_mask_M is not None:
        real = routing.token_mask_M
        score_ME, expert_MK, sequence_M = score_ME[real], expert_MK[real], sequence_M[real]
    if len(score_ME) == 0:
        return score_ME.sum()
    num_sequences = int(sequence_M.max()) + 1
    tokens_Q = torch.bincount(sequence_M, minlength=num_sequences).to(score_ME.dtype)
    cell_MK = sequence_M.unsqueeze(1) * num_experts + expert_MK
    count_QE = torch.bincount(cell_MK.reshape(-1), minlength=num_sequences * num_experts).view(
        num_sequences, num_experts
    )
    share_ME = score_ME / (score_ME.sum(dim=-1, keepdim=True) + 1e-20)
    affinity_QE = score_ME.new_zeros(num_sequences, num_experts).index_add(0, sequence_M, share_ME)
    tokens_Q1 = tokens_Q.clamp_min(1).unsqueeze(1)
    load_QE = count_QE * (num_experts / per_token) / tokens_Q1
    present = (tokens_Q > 0).sum()
    return (load_QE * affinity_QE / tokens_Q1).sum() / present
