"""Sampled answers as rows for the trainer: several to a row, so that no time goes into padding."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from shoal.model.router import Routing
from shoal.rl.engine_replay import EngineReplay
from shoal.rl.rollout import Rollouts
from shoal.text.packing import pack_documents
from shoal.training.loss import IGNORED, routing_of


@dataclass
class PackedRollouts:
    """Several answers per row. Response token `t` of answer `i` is predicted at flat row position `place_MT[i, t]`."""

    replay: dict[int, Tensor]
    """By MoE layer, the engine's experts for every place of the rows `[B * S, K]`, -1 at padding; empty without replay."""
    kept_NV: Tensor | None
    """What the sampler could draw at each response token, answer by answer; None without a sampling mask."""
    token_BS: Tensor
    document_BS: Tensor
    position_BS: Tensor
    label_BS: Tensor
    """Next token at response positions of right answers, for the MTP loss; ignored elsewhere."""
    response_MT: Tensor
    place_MT: Tensor
    mask_MT: Tensor
    engine_logprob_MT: Tensor
    """As the engine reported them when it drew the tokens."""
    old_logprob_MT: Tensor
    """Under the policy before this rollout's first update: the trainer's where it was asked, else the engine's."""

    def routing(self) -> Routing:
        """A record for a pass over these rows, with the experts to be used in it."""
        routing = routing_of(self.token_BS, self.document_BS)
        routing.replay = self.replay
        return routing


def pack_rollouts(
    rollouts: Rollouts,
    chosen: Sequence[int],
    right: Sequence[bool],
    row_tokens: int,
    *,
    old_logprobs: Sequence[Tensor] | None = None,
    replay: EngineReplay | None = None,
    vocab_size: int = 0,
) -> PackedRollouts:
    """Lay the chosen answers (prompt and response each) out in rows of `row_tokens` or less.

    Args:
        chosen: answers, by their place in `rollouts`; `right`, `old_logprobs` and `replay` are by that place too.
    """
    longest = max(len(rollouts.completions[i].token_ids) for i in chosen)
    lengths = [len(rollouts.prompt_ids[i]) + len(rollouts.completions[i].token_ids) for i in chosen]
    rows = pack_documents(lengths, max(row_tokens, max(lengths)), seed=0)
    width = max(sum(lengths[item] for item in row) for row in rows)
    shape, answers = (len(rows), width), (len(chosen), longest)
    token, label, document, position = (
        np.zeros(shape, np.int64),
        np.full(shape, IGNORED),
        np.full(shape, -1),
        np.zeros(shape, np.int64),
    )
    response, place, mask = np.zeros(answers, np.int64), np.zeros(answers, np.int64), np.zeros(answers, bool)
    engine, old = np.zeros(answers, np.float32), np.zeros(answers, np.float32)
    start_of = np.zeros(len(chosen), np.int64)
    for row, items in enumerate(rows):
        at = 0
        for number, item in enumerate(items):
            answer = chosen[item]
            prompt, completion = rollouts.prompt_ids[answer], rollouts.completions[answer]
            ids, count = [*prompt, *completion.token_ids], len(completion.token_ids)
            here, first = slice(at, at + len(ids)), at + len(prompt) - 1
            token[row, here], document[row, here], position[row, here] = ids, number, range(len(ids))
            response[item, :count], mask[item, :count] = completion.token_ids, True
            engine[item, :count] = completion.logprobs
            old[item, :count] = completion.logprobs if old_logprobs is None else old_logprobs[answer]
            place[item, :count] = row * width + first + np.arange(count)
            if right[answer]:
                label[row, first : first + count] = completion.token_ids
            start_of[item] = row * width + at
            at += len(ids)
    arrays = (token, document, position, label, response, place, mask, engine, old)
    return PackedRollouts(
        _replayed_experts(replay, chosen, start_of, len(rows) * width),
        _kept_tokens(replay, chosen, vocab_size),
        *(torch.from_numpy(np.ascontiguousarray(array)) for array in arrays),
    )


def _replayed_experts(
    replay: EngineReplay | None,
    chosen: Sequence[int],
    start_of: "np.ndarray[tuple[int], np.dtype[np.int64]]",
    places: int,
) -> dict[int, Tensor]:
    if replay is None or not replay.expert_LMK.numel():
        return {}
    num_layers, _, per_token = replay.expert_LMK.shape
    expert_LMK = torch.full((num_layers, places, per_token), -1, dtype=torch.long)
    for item, answer in enumerate(chosen):
        experts = replay.experts_of(answer)
        expert_LMK[:, start_of[item] : start_of[item] + experts.shape[1]] = experts.long()
    return dict(zip(replay.layers, expert_LMK))


def _kept_tokens(replay: EngineReplay | None, chosen: Sequence[int], vocab_size: int) -> Tensor | None:
    if replay is None or not replay.kept_MX.numel():
        return None
    return torch.cat([replay.kept_of(answer, vocab_size) for answer in chosen])
