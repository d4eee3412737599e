"""Everything that decides a reinforcement-learning stage, with its checks."""

from dataclasses import dataclass, field
from typing import Literal

from shoal.errors import ConfigError
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.rewards import OnError
from shoal.training.optimizer import OptimizerConfig


@dataclass(frozen=True, kw_only=True)
class GrpoConfig:
    """One reinforcement-learning stage."""

    steps: int = 60
    prompts_per_step: int = 32
    group_size: int = 16
    minibatches: int = 1
    """Optimizer steps per rollout; with more than one the ratio leaves 1 and clipping matters."""
    max_response_tokens: int = 80
    temperature: float = 1.0
    top_p: float = 1.0
    """Below 1 the sampler cuts the tail; without `keep_sampling_mask` the trainer then learns from other probabilities."""
    top_k: int = 0
    advantage: Literal["std", "none", "rloo", "reward"] = "std"
    """Group mean and standard deviation (GRPO), mean only (Dr. GRPO), leave-one-out, or the reward itself: with rewards
    of 1 and 0 the last is fine-tuning on the right answers (expert iteration), the control that takes the same compute."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    reference_refresh_steps: int = 400
    """How often the KL reference becomes the current policy; used only with a KL coefficient."""
    dynamic_sampling: bool = False
    """Replace groups that are all right or all wrong by others before the update (DAPO)."""
    max_sampling_rounds: int = 8
    """With dynamic sampling: after so many rounds the step makes do with what it has."""
    overlong_cache_tokens: int = 0
    """The reward falls to -1 over the last so many tokens before the limit (DAPO); 0 for no penalty."""
    keep_routing: bool = False
    """The trainer sends tokens to the experts that the engine chose (V3.2, `engine_replay`)."""
    keep_sampling_mask: bool = False
    """The trainer renormalises over the tokens that the sampler's cuts had left (V3.2)."""
    staleness: int = 0
    """Rollouts are sampled in the background with the weights of so many steps ago; 0 samples with the newest."""
    on_reward_error: OnError = "stop"
    """What happens when a reward breaks its contract: the run stops, or the values count as None."""
    max_failed_fraction: float = 0.5
    """The run stops when the verifier fails on a larger share of a step's answers; below, they are left out and counted."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(learning_rate=3e-4, weight_decay=0.0))
    warmup_steps: int = 5
    decay_fraction: float = 0.0
    """Share of the steps, at the end, in which the rate falls linearly to a tenth; 0 keeps it, as published."""
    bias_speed: float = 1e-3
    mtp_weight: float = 0.1
    precision: Literal["auto", "fp32", "bf16"] = "fp32"
    row_tokens: int = 256
    micro_batch_answers: int = 512
    seed: int = 0
    log_every: int = 1
    samples_per_step: int = 4
    """Answers written to samples.jsonl at every logged step."""
    checkpoint_every: int = 20

    def __post_init__(self) -> None:
        if self.group_size < 2:
            raise ConfigError(
                f"group_size={self.group_size} leaves nothing to compare an answer with; use at least 2, published 16."
            )
        for name in (
            "steps",
            "prompts_per_step",
            "minibatches",
            "max_response_tokens",
            "checkpoint_every",
            "log_every",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if self.prompts_per_step % self.minibatches:
            raise ConfigError(
                f"prompts_per_step={self.prompts_per_step} does not split into minibatches={self.minibatches} equal parts."
            )
        if not 0 < self.temperature <= 10:
            raise ConfigError(
                f"temperature={self.temperature} must be above 0 (greedy groups are all alike) and at most 10."
            )
        self._check_cuts()
        if not 0 <= self.overlong_cache_tokens <= self.max_response_tokens:
            raise ConfigError(
                f"overlong_cache_tokens={self.overlong_cache_tokens} must be between 0 (no penalty) and "
                f"max_response_tokens={self.max_response_tokens}; published is a fifth of it."
            )
        if not 0 <= self.staleness <= 16 or not 1 <= self.max_sampling_rounds <= 64:
            raise ConfigError(
                f"staleness={self.staleness} must be 0 to 16 steps, and max_sampling_rounds={self.max_sampling_rounds} 1 to 64."
            )
        if not 0 <= self.max_failed_fraction <= 1:
            raise ConfigError(f"max_failed_fraction={self.max_failed_fraction} must be between 0 and 1.")

    def _check_cuts(self) -> None:
        if not 0 < self.top_p <= 1 or self.top_k < 0:
            raise ConfigError(
                f"top_p={self.top_p} must be in (0, 1] and top_k={self.top_k} must be 0 (off) or positive."
            )
        if self.keep_sampling_mask and self.top_p == 1 and self.top_k == 0:
            raise ConfigError("keep_sampling_mask has nothing to keep: sampling is not cut; set top_p or top_k too.")
