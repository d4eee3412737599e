"""Who computes the logits: the fused CPU pass over packed weights where it fits, else the PyTorch model.

A runner reads prompts and takes decoding steps over a `LatentCache`. `TransformerRunner` is the definition.
`PackedRunner` keeps a second, packed copy of the weights (`kernels/packed.py`) and makes one C++ call per step: no Python
loop over layers or experts, and the bits of a row do not depend on its neighbours. It notices when the module's weights
have changed (reinforcement learning trains them between rollouts) and packs them again.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from shoal.engine.packed_model import Draw, PackedModel, fits
from shoal.model.latent_cache import LatentCache
from shoal.model.layers import product_dtype
from shoal.model.transformer import Transformer

PREFILL_CHUNK_TOKENS = 1024
"""Prompt tokens per pass: enough rows to reuse every panel of weights, few enough for the working memory."""


class Runner(Protocol):
    """Turns tokens into logits and fills the cache on the way."""

    @property
    def cache_dtype(self) -> torch.dtype:
        """In what precision entries are cached."""
        ...

    def prefill(self, prompts: Sequence[Sequence[int]], cache: LatentCache) -> Tensor:
        """Read one prompt per cache row from position 0; logits `[B, V]` after the last token of each."""
        ...

    def decode(self, token_N: Tensor, position_N: Tensor, cache: LatentCache) -> Tensor:
        """Take one token per cache row; logits `[N, V]`."""
        ...

    def decode_and_draw(self, token_N: Tensor, position_N: Tensor, cache: LatentCache, draw: Draw) -> bool:
        """The same with the next tokens drawn on the way; False, with nothing drawn, where that cannot be done."""
        ...


def runner_for(model: Transformer) -> Runner:
    """The fastest runner for this module on its device."""
    if (
        fits(model.config)
        and model.embed_tokens.weight.device.type == "cpu"
        and model.embed_tokens.weight.dtype == torch.float32
    ):
        return PackedRunner(model)
    return TransformerRunner(model)


class TransformerRunner:
    """The reference: padded prompts through the expanded form, decoding steps through the absorbed one."""

    def __init__(self, model: Transformer) -> None:
        self.model = model

    @property
    def cache_dtype(self) -> torch.dtype:
        return self.model.embed_tokens.weight.dtype

    def prefill(self, prompts: Sequence[Sequence[int]], cache: LatentCache) -> Tensor:
        length_B = torch.tensor([len(prompt) for prompt in prompts])
        token_BS = torch.zeros(len(prompts), int(length_B.max()), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            token_BS[row, : len(prompt)] = torch.tensor(prompt)
        cache.num_visible = token_BS.shape[1]
        hidden_BSD = self.model(token_BS, cache=cache)
        return self.model.logits(hidden_BSD[torch.arange(len(prompts)), length_B - 1]).float()

    def decode(self, token_N: Tensor, position_N: Tensor, cache: LatentCache) -> Tensor:
        cache.num_visible = int(position_N.max()) + 1
        hidden_NSD = self.model(token_N.unsqueeze(1), position_BS=position_N.unsqueeze(1), cache=cache)
        return self.model.logits(hidden_NSD[:, 0]).float()

    def decode_and_draw(self, token_N: Tensor, position_N: Tensor, cache: LatentCache, draw: Draw) -> bool:
        return False


class PackedRunner:
    """The fused pass. Weights are float32 or bfloat16, whichever the module multiplies in; or they are given, and stay."""

    def __init__(self, model: Transformer, given: PackedModel | None = None) -> None:
        self.model, self._given = model, given
        self._fingerprint: tuple[int, ...] = ()
        self._packed: PackedModel | None = given

    @property
    def cache_dtype(self) -> torch.dtype:
        return torch.bfloat16 if self._format() == "bf16" else torch.float32

    def prefill(self, prompts: Sequence[Sequence[int]], cache: LatentCache) -> Tensor:
        packed = self._fresh()
        length = [len(prompt) for prompt in prompts]
        token_M = torch.tensor([token for prompt in prompts for token in prompt])
        position_M = torch.cat([torch.arange(count, dtype=torch.int32) for count in length])
        sequence_M = torch.repeat_interleave(torch.arange(len(prompts), dtype=torch.int32), torch.tensor(length))
        last_B = torch.tensor(length).cumsum(0) - 1
        logit_BV = torch.empty(len(prompts), packed.config.vocab_size)
        for start in range(0, len(token_M), PREFILL_CHUNK_TOKENS):
            stop = min(start + PREFILL_CHUNK_TOKENS, len(token_M))
            ends = ((last_B >= start) & (last_B < stop)).nonzero().squeeze(1)
            part = slice(start, stop)
            logit_BV[ends] = packed.run(
                token_M[part], position_M[part], sequence_M[part], cache.entry_LBTW, output_row=last_B[ends] - start
            )
        return logit_BV

    def decode(self, token_N: Tensor, position_N: Tensor, cache: LatentCache) -> Tensor:
        return self._step(token_N, position_N, cache, None)

    def decode_and_draw(self, token_N: Tensor, position_N: Tensor, cache: LatentCache, draw: Draw) -> bool:
        self._step(token_N, position_N, cache, draw)
        return draw.done

    def _step(self, token_N: Tensor, position_N: Tensor, cache: LatentCache, draw: Draw | None) -> Tensor:
        rows = torch.arange(len(token_N), dtype=torch.int32)
        packed = self._packed or self._fresh()
        return packed.run(token_N, position_N.to(torch.int32), rows, cache.entry_LBTW, output_row=rows, draw=draw)

    def _format(self) -> str:
        if self._given is not None:
            return "f32" if self._given.format == "f32" else "bf16"
        return "bf16" if product_dtype(self.model) == torch.bfloat16 else "f32"

    def _fresh(self) -> PackedModel:
        """The packed weights, made anew when the module's have changed since."""
        if self._given is not None:
            return self._given
        tensors = [*self.model.parameters(), *self.model.buffers()]
        fingerprint = (hash(self._format()), *(tensor._version for tensor in tensors), *(t.data_ptr() for t in tensors))
        if self._packed is None or fingerprint != self._fingerprint:
            state = self.model.state_dict()
            self._packed = PackedModel(self.model.config, state.__getitem__, self._format())
            self._fingerprint = fingerprint
        return self._packed
