"""Speculative decoding with the model's own multi-token prediction module (DeepSeek-V3 §2.2, "MTP in inference").

The module guesses the token after next from the hidden state of the last one. The next step computes both, the token that
was drawn and the guess; if what is then drawn is the guess, a second token can be drawn from the same step. Nothing is
accepted that plain decoding would not have drawn: the random number of a token depends only on its seed and its place
(`sampling.py`), and the bits of a row on nothing but its own text, so the tokens are the same, not only their
distribution.

It pays when reading the weights for one token costs nearly as much as for two. On a CPU and a mixture of experts two
tokens reach more experts than one, so the gauge measures both ways of going and takes the faster.
"""

import statistics
from collections import deque

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.engine.packed_model import PackedModel, WeightSource, quantised
from shoal.kernels.dispatch import rms_norm
from shoal.kernels.packed import linear, pack

TRIAL_STEPS = 16
"""Steps of each way that a comparison takes."""
TRIAL_EVERY_STEPS = 1024
LEAST_GAIN = 1.05


class Drafter:
    """The first prediction module as packed weights.

    Args:
        source: float weights by name, as for `PackedModel`.
    """

    def __init__(self, main: PackedModel, source: WeightSource) -> None:
        config = main.config
        self.main, self.norm_eps = main, config.rms_norm_eps
        self.final_norm_D, self.enorm_D, self.hnorm_D = (
            source(name).detach().float().contiguous()
            for name in ("norm.weight", "mtp.0.enorm.weight", "mtp.0.hnorm.weight")
        )
        self.join = pack(quantised(source("mtp.0.eh_proj.weight").detach().unsqueeze(0), main.format, main.group))
        self.block = PackedModel(_one_layer(config), _as_model(source), main.format, group=main.group)

    def draft(
        self,
        hidden_MD: Tensor,
        next_token_M: Tensor,
        position_M: Tensor,
        sequence_M: Tensor,
        cache_1PTW: Tensor,
        *,
        output_row: Tensor,
        table_BX: Tensor,
    ) -> Tensor:
        """Guess the token after next of the rows `output_row`, and cache the module's latents for all rows.

        Args:
            hidden_MD: the main model's hidden states before its final norm.
            next_token_M: the token that follows each row.
        """
        hidden_MD = rms_norm(rms_norm(hidden_MD, self.final_norm_D, self.norm_eps), self.hnorm_D, self.norm_eps)
        embedded_MD = rms_norm(self.main.embed(next_token_M), self.enorm_D, self.norm_eps)
        x_MD = linear(self.join, torch.cat([embedded_MD, hidden_MD], dim=-1))
        logit = self.block.run(
            next_token_M,
            position_M,
            sequence_M,
            cache_1PTW,
            output_row=output_row,
            table_BX=table_BX,
            hidden_in=x_MD.contiguous(),
        )
        return logit.argmax(dim=-1)


class SpeculationGauge:
    """Decides by measuring: a few steps with guesses, a few without, then the faster way until the next comparison."""

    def __init__(self) -> None:
        self.accepted = self.drafted = 0
        self._steps = 0
        self._uses = True
        self._pace: dict[bool, deque[float]] = {way: deque(maxlen=TRIAL_STEPS) for way in (True, False)}

    @property
    def acceptance(self) -> float | None:
        """Share of guesses that were right; None before the first."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def gain(self) -> float | None:
        """Tokens per second with guesses over without, as last measured."""
        if min(map(len, self._pace.values())) < TRIAL_STEPS // 2:
            return None
        return statistics.median(self._pace[False]) / statistics.median(self._pace[True])

    def wants_drafts(self) -> bool:
        """Whether the next step should guess."""
        at = self._steps % TRIAL_EVERY_STEPS
        if at < 2 * TRIAL_STEPS:
            return at < TRIAL_STEPS
        return self._uses

    def note(self, *, with_drafts: bool, seconds: float, tokens: int, drafted: int, accepted: int) -> None:
        """Record a step that did nothing but decode."""
        self._steps += 1
        self._pace[with_drafts].append(seconds / max(tokens, 1))
        self.drafted += drafted
        self.accepted += accepted
        if self._steps % TRIAL_EVERY_STEPS == 2 * TRIAL_STEPS:
            gain = self.gain
            self._uses = gain is not None and gain >= LEAST_GAIN


def has_drafter(config: ModelConfig) -> bool:
    """Whether the model carries a prediction module."""
    return config.num_nextn_predict_layers > 0


def _one_layer(config: ModelConfig) -> ModelConfig:
    return config.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


def _as_model(source: WeightSource) -> WeightSource:
    """The module's weights under the names of a model of one layer."""

    def named(name: str) -> Tensor:
        if name.startswith("layers.0."):
            return source("mtp.0.block." + name.removeprefix("layers.0."))
        return source("mtp.0.shared_head_norm.weight" if name == "norm.weight" else name)

    return named
