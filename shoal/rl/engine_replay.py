"""What the engine decided while it sampled, computed again by the engine itself: experts chosen and tokens left to draw from.

DeepSeek-V3.2 §3.1 keeps two of the sampler's decisions in training. *Keep routing*: the trainer sends each token to the
experts that the engine chose, because a choice made by a hair falls differently in another program, and the answer was
sampled under the engine's. *Keep sampling mask*: where top-p or top-k cut the distribution, the trainer renormalises over
the same tokens, or it would learn from probabilities that nothing was drawn from.

The engine need not carry these along while it decodes: its packed pass gives every token the same bits whatever else is in
the batch (`kernels/cpu/forward.cpp`), so one pass over the finished answers makes the very same decisions again, at the
speed of reading a prompt. That holds only until the weights move, so it is done before the first update. Where the packed
pass does not fit the model, the PyTorch module samples and learns, and its decisions are taken from it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.engine.packed_model import PackedModel, fits
from shoal.engine.runner import PREFILL_CHUNK_TOKENS
from shoal.engine.sampling import cut_tail
from shoal.errors import ConfigError
from shoal.model.latent_cache import LatentCache
from shoal.model.router import Routing
from shoal.model.transformer import Transformer
from shoal.rl.rollout import Rollouts

ANSWERS_PER_PASS = 64


@dataclass(kw_only=True)
class EngineReplay:
    """Decisions for a batch of answers, laid end to end; `first_token[i]` is where answer i's tokens begin."""

    layers: list[int]
    """The MoE layers."""
    expert_LMK: Tensor
    """int16, over all prompt and response tokens of all answers; `[0, 0, 0]` when routing is not kept."""
    kept_MX: Tensor
    """uint8, bits of the vocabulary at every response token; `[0, 0]` when no mask is kept."""
    first_token: list[int]
    first_response: list[int]

    def experts_of(self, answer: int) -> Tensor:
        """`[L, tokens, K]`, prompt included."""
        return self.expert_LMK[:, self.first_token[answer] : self.first_token[answer + 1]]

    def kept_of(self, answer: int, vocab_size: int) -> Tensor:
        """Bool `[response tokens, V]`: what the sampler could draw."""
        bits = self.kept_MX[self.first_response[answer] : self.first_response[answer + 1]].numpy()
        return torch.from_numpy(np.unpackbits(bits, axis=1, count=vocab_size).astype(bool))


@torch.no_grad()
def replay_engine(
    model: Transformer,
    rollouts: Rollouts,
    *,
    keep_routing: bool,
    keep_sampling_mask: bool,
    temperature: float,
    top_k: int,
    top_p: float,
) -> EngineReplay:
    """Run the engine over finished answers.

    Args:
        model: with the weights that sampled.
        temperature, top_k, top_p: as they were sampled with.
    Raises:
        ConfigError: routing is to be kept for a model without experts.
    """
    layers = [index for index in range(model.config.num_hidden_layers) if model.config.is_moe_layer(index)]
    if keep_routing and not layers:
        raise ConfigError("keep_routing replays expert choices, but this model has no routed experts; switch it off.")
    engine = _packed(model)
    experts, kept = [], []
    count = len(rollouts.completions)
    for start in range(0, count, ANSWERS_PER_PASS):
        part = range(start, min(start + ANSWERS_PER_PASS, count))
        sequences = [[*rollouts.prompt_ids[i], *rollouts.completions[i].token_ids] for i in part]
        firsts = [len(rollouts.prompt_ids[i]) for i in part]
        chosen_LMK, logit_MV = (
            _run_packed(engine, sequences, firsts) if engine else _run_module(model, sequences, firsts)
        )
        if keep_routing:
            experts.append(chosen_LMK[layers].to(torch.int16) if engine else chosen_LMK.to(torch.int16))
        if keep_sampling_mask:
            drawn_M = torch.tensor([token for i in part for token in rollouts.completions[i].token_ids])
            kept.append(_kept_bits(logit_MV, drawn_M, temperature, top_k, top_p))
    lengths = [
        len(ids) + len(completion.token_ids) for ids, completion in zip(rollouts.prompt_ids, rollouts.completions)
    ]
    responses = [len(completion.token_ids) for completion in rollouts.completions]
    return EngineReplay(
        layers=layers,
        expert_LMK=torch.cat(experts, dim=1) if experts else torch.zeros(0, 0, 0, dtype=torch.int16),
        kept_MX=torch.cat(kept) if kept else torch.zeros(0, 0, dtype=torch.uint8),
        first_token=np.cumsum([0, *lengths]).tolist(),
        first_response=np.cumsum([0, *responses]).tolist(),
    )


def _packed(model: Transformer) -> PackedModel | None:
    weight = model.embed_tokens.weight
    if not fits(model.config) or weight.device.type != "cpu" or weight.dtype != torch.float32:
        return None
    low = getattr(model.get_submodule("layers.0.self_attn.o_proj"), "compute_dtype", None) == torch.bfloat16
    return PackedModel(model.config, model.state_dict().__getitem__, "bf16" if low else "f32")


def _run_packed(
    engine: PackedModel, sequences: Sequence[Sequence[int]], firsts: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Experts `[layers, tokens, K]` and the logits that each response token was drawn from."""
    config = engine.config
    lengths = [len(ids) for ids in sequences]
    dtype = torch.bfloat16 if engine.format == "bf16" else torch.float32
    cache = LatentCache(config, len(sequences), max(lengths), dtype=dtype)
    token_M = torch.tensor([token for ids in sequences for token in ids])
    position_M = torch.cat([torch.arange(length, dtype=torch.int32) for length in lengths])
    sequence_M = torch.repeat_interleave(torch.arange(len(lengths), dtype=torch.int32), torch.tensor(lengths))
    is_source_M = _sources(lengths, firsts)
    chosen, logits = [], []
    for start in range(0, len(token_M), PREFILL_CHUNK_TOKENS):
        part = slice(start, min(start + PREFILL_CHUNK_TOKENS, len(token_M)))
        shape = (config.num_hidden_layers, part.stop - start, config.num_experts_per_tok or 1)
        chosen_LMK = torch.zeros(shape, dtype=torch.int32)
        rows = is_source_M[part].nonzero().squeeze(1)
        logits.append(
            engine.run(
                token_M[part],
                position_M[part],
                sequence_M[part],
                cache.entry_LBTW,
                output_row=rows,
                chosen_LMK=chosen_LMK,
            )
        )
        chosen.append(chosen_LMK)
    return torch.cat(chosen, dim=1), torch.cat(logits)


def _run_module(model: Transformer, sequences: Sequence[Sequence[int]], firsts: Sequence[int]) -> tuple[Tensor, Tensor]:
    """The same from the PyTorch module, one sequence at a time; experts of the MoE layers only."""
    chosen, logits = [], []
    for ids, first in zip(sequences, firsts):
        routing = Routing()
        hidden_BSD = model(torch.tensor([list(ids)], device=model.embed_tokens.weight.device), routing=routing)
        logits.append(model.logits(hidden_BSD[0, first - 1 : -1]).float().cpu())
        chosen.append(torch.stack(routing.expert_LMK).cpu() if routing.expert_LMK else torch.zeros(0, len(ids), 1))
    return torch.cat(chosen, dim=1), torch.cat(logits)


def _sources(lengths: Sequence[int], firsts: Sequence[int]) -> Tensor:
    """True at the places whose logits a response token was drawn from: the one before each."""
    marks = [torch.zeros(length, dtype=torch.bool) for length in lengths]
    for mark, first in zip(marks, firsts):
        mark[first - 1 : -1] = True
    return torch.cat(marks)


def _kept_bits(logit_MV: Tensor, drawn_M: Tensor, temperature: float, top_k: int, top_p: float) -> Tensor:
    """Which tokens the sampler had left, eight to a byte, exactly as `sampling.sample_tokens` cuts; the drawn one is among
    them, also where another program than the sampler finds it just outside."""
    count = len(logit_MV)
    log_probability_MV = (logit_MV / temperature).log_softmax(dim=-1)
    cut_MV = cut_tail(log_probability_MV, torch.full((count,), top_k), torch.full((count,), top_p))
    is_kept_MV = cut_MV.isfinite().scatter_(1, drawn_M.unsqueeze(1), True)
    return torch.from_numpy(np.packbits(is_kept_MV.numpy(), axis=1))
