"""Speculative decoding with the model's own multi-token prediction module (DeepSeek-V3 §2.2, "MTP in inference").

The module guesses the token after next from the hidden state of the last one; fed its own output and guess, it guesses
further. The next step computes what was drawn and the guesses together: while what is drawn is what was guessed, another
token can be drawn from the same step. Nothing is accepted that plain decoding would not have drawn: the random number of
a token depends only on its seed and its place (`sampling.py`), and the bits of a row on nothing but its own text, so the
tokens are the same, not only their distribution.

The module's own latents are one more layer of every page. A text can only be guessed on where they are complete, so the
module runs over every token of prompt and answer while guessing is on.

It pays when reading the weights for one token costs nearly as much as for two. On a CPU and a mixture of experts two
tokens reach more experts than one, so a gauge measures both ways (`speculation_gauge.py`) and takes the faster.
"""

from collections.abc import Sequence as Many

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.engine.batch import Batch
from shoal.engine.codes import Weight, floats, quantised
from shoal.engine.drawing import Sample
from shoal.engine.packed_model import PackedModel, WeightSource
from shoal.engine.prefix_cache import UNIT_TOKENS
from shoal.engine.scheduler import Work
from shoal.engine.speculation_gauge import SpeculationGauge
from shoal.errors import ConfigError
from shoal.kernels.dispatch import rms_norm
from shoal.kernels.packed import linear, pack

MAX_GUESSES = 4


class Drafter:
    """The first prediction module as packed weights.

    Args:
        source: float weights by name, as for `PackedModel`.
    """

    def __init__(self, main: PackedModel, source: WeightSource) -> None:
        config = main.config
        self.main, self.norm_eps = main, config.rms_norm_eps
        self.final_norm_D, self.enorm_D, self.hnorm_D = (
            floats(source(name)).float().contiguous()
            for name in ("norm.weight", "mtp.0.enorm.weight", "mtp.0.hnorm.weight")
        )
        self.join = pack(quantised(source("mtp.0.eh_proj.weight"), main.format, main.group))
        self.block = PackedModel(_one_layer(config), _as_model(source), main.format, group=main.group)

    def draft(
        self, hidden_MD: Tensor, next_token_M: Tensor, batch: Batch, cache_1PTW: Tensor, output_row: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Cache the module's latents for all rows; for the rows `output_row`, what follows the token after them.

        Args:
            hidden_MD: normed hidden states, of the main model or of an earlier guess.
            next_token_M: the token that follows each row.
        Returns:
            guess_N, and the hidden states `[N, D]` from which it can go on guessing.
        """
        x_MD = self._join(hidden_MD, next_token_M)
        logit_NV = self.block.run(
            next_token_M,
            batch.position_M,
            batch.sequence_M,
            cache_1PTW,
            output_row=output_row,
            table_BX=batch.table_BX,
            hidden_in=x_MD,
        )
        return logit_NV.argmax(dim=-1), x_MD[output_row.long()]

    def after_final_norm(self, hidden_MD: Tensor) -> Tensor:
        """The main model's hidden states as the module takes them."""
        return rms_norm(hidden_MD, self.final_norm_D, self.norm_eps)

    def _join(self, hidden_MD: Tensor, token_M: Tensor) -> Tensor:
        hidden_MD = rms_norm(hidden_MD, self.hnorm_D, self.norm_eps)
        embedded_MD = rms_norm(self.main.embed(token_M), self.enorm_D, self.norm_eps)
        return linear(self.join, torch.cat([embedded_MD, hidden_MD], dim=-1)).contiguous()


class Speculation:
    """A drafter at work in an engine.

    Args:
        num_guesses: tokens guessed per step at most.
    Raises:
        ConfigError: impossible number of guesses.
    """

    def __init__(self, drafter: Drafter, num_guesses: int = 1, gauge: SpeculationGauge | None = None) -> None:
        if not 1 <= num_guesses <= MAX_GUESSES:
            raise ConfigError(f"speculative_tokens={num_guesses} must be between 1 and {MAX_GUESSES}.")
        self.drafter, self.num_guesses = drafter, num_guesses
        self.gauge = gauge or SpeculationGauge(num_guesses)

    def guess(self, planned: Many[Work], batch: Batch, hidden_MD: Tensor, cache_1PTW: Tensor) -> None:
        """Guess on for everybody who goes on decoding, after a step in which `hidden_MD` was computed."""
        rows: list[int] = []
        following: list[int] = []
        guessing: list[Sample] = []
        last: list[int] = []
        for first, work in zip(batch.first_row, planned):
            sample = work.sequence
            assert isinstance(sample, Sample)
            sample.draft = []
            # A row can be read when the token after it is known, and right: that ends at what was accepted.
            count = min(sample.computed, len(sample.token_ids) - 1) - work.start
            rows += range(first, first + count)
            following += sample.token_ids[work.start + 1 : work.start + 1 + count]
            if sample.ahead >= work.start:
                sample.ahead = work.start + count
            if count and work.draws and self._may_guess(sample):
                guessing.append(sample)
                last.append(len(rows) - 1)
        if rows:
            picked = torch.tensor(rows)
            hidden_MD = self.drafter.after_final_norm(hidden_MD[picked])
            self._chain(guessing, hidden_MD, torch.tensor(following), batch.pick(picked), cache_1PTW, last)

    def _chain(
        self,
        guessing: list[Sample],
        hidden_MD: Tensor,
        following_M: Tensor,
        batch: Batch,
        cache_1PTW: Tensor,
        last: list[int],
    ) -> None:
        """Guess once for everybody, then on from the guesses for whoever has room for more."""
        while True:
            output_row = torch.tensor(last, dtype=torch.int32)
            guess_N, hidden_ND = self.drafter.draft(hidden_MD, following_M, batch, cache_1PTW, output_row)
            for sample, guess in zip(guessing, guess_N.tolist()):
                sample.draft.append(guess)
            on = [row for row, sample in enumerate(guessing) if self._may_go_on(sample)]
            if not on:
                return
            picked = torch.tensor(on)
            batch = batch.pick(output_row.long()[picked], further=1)
            hidden_MD, following_M = hidden_ND[picked], guess_N[picked]
            guessing, last = [guessing[row] for row in on], list(range(len(on)))

    def _may_guess(self, sample: Sample) -> bool:
        goes_on = sample.may_draw > 1 and sample.token_ids[-1] not in sample.stop
        return goes_on and sample.ahead == len(sample.token_ids) - 1

    def _may_go_on(self, sample: Sample) -> bool:
        """Whether one more guess could be used, and its latents have a place."""
        place = len(sample.token_ids) - 2 + len(sample.draft)
        most = min(self.num_guesses, sample.may_draw - 1)
        return len(sample.draft) < most and place < len(sample.pages) * UNIT_TOKENS


def has_drafter(config: ModelConfig) -> bool:
    """Whether the model carries a prediction module."""
    return config.num_nextn_predict_layers > 0


def _one_layer(config: ModelConfig) -> ModelConfig:
    return config.replace(num_hidden_layers=1, first_k_dense_replace=0, num_nextn_predict_layers=0)


def _as_model(source: WeightSource) -> WeightSource:
    """The module's weights under the names of a model of one layer."""

    def named(name: str) -> Weight:
        if name.startswith("layers.0."):
            return source("mtp.0.block." + name.removeprefix("layers.0."))
        return source("mtp.0.shared_head_norm.weight" if name == "norm.weight" else name)

    return named
