"""The published recipes of the GRPO family, by name, with the numbers their sources print.

A variant is a handful of choices: how rewards become advantages (`advantage`), what is maximised (`objective`), how much is
sampled and how often the weights move before sampling again, and what the loop does besides. Each constant below is one
source's answer. Where the source is silent, the value is this project's or another source's, and `unpublished` names it.

The learning rates belong to models of 1.5 to 671 billion parameters; models a million times smaller want about a hundred
times more. Lengths belong to tens of thousands of tokens: `scaled_to` fits a variant to shorter answers.

    recipe = variant("dapo").scaled_to(256)
    config = GrpoConfig(**recipe.settings())

`algorithms.fit_algorithm` does the same and fits the sizes to a small model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from shoal.errors import ConfigError, did_you_mean
from shoal.rl.objective import ObjectiveConfig
from shoal.training.optimizer import OptimizerConfig

UNCLIPPED = 1e9
"""A clip that never binds: ratios are cut at exp(20), about 5e8, before it."""

NEVER_STEPS = 1_000_000_000
"""Longer than any run: the reference stays what it was at the start."""


@dataclass(frozen=True, kw_only=True)
class Variant:
    """One published recipe. An *update* is one optimizer step; a *rollout* is sampled at once for several updates."""

    name: str
    source: str
    objective: ObjectiveConfig
    advantage: Literal["std", "none", "rloo"]
    """As in `advantage`: group mean and standard deviation, mean only, or leave-one-out."""
    group_size: int
    prompts_per_update: int
    minibatches: int
    """Updates per rollout; with 1 the ratio stays 1 and nothing is ever clipped."""
    learning_rate: float
    max_response_tokens: int
    temperature: float = 1.0
    reference_refresh_updates: int | None = None
    """After so many updates the policy becomes its own reference; None keeps the first."""
    dynamic_sampling: bool = False
    """Replace groups that are all right or all wrong before the update (`advantage.informative_groups`)."""
    overlong_cache_tokens: int = 0
    """Length over which `advantage.overlong_penalty` falls to -1 before the limit; 0 for no penalty."""
    keep_routing: bool = False
    """Replay the engine's expert choices in the trainer's forward pass; gates are recomputed."""
    top_p: float = 1.0
    """How the sampler cuts the tail of the distribution; 1 not at all."""
    keep_sampling_mask: bool = False
    """Renormalise the trainer's log-probabilities over the tokens that top-p and top-k had left to the sampler."""
    unpublished: tuple[str, ...] = ()
    """Fields (of this class or of `objective`) on which the source is silent."""

    @property
    def answers_per_update(self) -> int:
        return self.prompts_per_update * self.group_size

    @property
    def prompts_per_rollout(self) -> int:
        return self.prompts_per_update * self.minibatches

    def scaled_to(self, max_response_tokens: int) -> "Variant":
        """The same recipe for answers of another length: the limit, what is divided by it, and the overlong share.

        Raises:
            ConfigError: a length below 1.
        """
        if max_response_tokens < 1:
            raise ConfigError(f"max_response_tokens={max_response_tokens} must be at least 1.")
        objective = self.objective
        if objective.loss_average == "constant":
            objective = replace(objective, max_response_tokens=max_response_tokens)
        cache_tokens = round(self.overlong_cache_tokens * max_response_tokens / self.max_response_tokens)
        return replace(
            self,
            max_response_tokens=max_response_tokens,
            objective=objective,
            overlong_cache_tokens=max(cache_tokens, 1) if self.overlong_cache_tokens else 0,
        )

    def settings(self) -> dict[str, Any]:
        """Arguments of `grpo_config.GrpoConfig`, whose step is a rollout with all its updates."""
        refresh_updates = self.reference_refresh_updates
        return {
            "prompts_per_step": self.prompts_per_rollout,
            "group_size": self.group_size,
            "minibatches": self.minibatches,
            "max_response_tokens": self.max_response_tokens,
            "temperature": self.temperature,
            "advantage": self.advantage,
            "objective": self.objective,
            "reference_refresh_steps": NEVER_STEPS if refresh_updates is None else refresh_updates // self.minibatches,
            "dynamic_sampling": self.dynamic_sampling,
            "overlong_cache_tokens": self.overlong_cache_tokens,
            "keep_routing": self.keep_routing,
            "top_p": self.top_p,
            "keep_sampling_mask": self.keep_sampling_mask,
            "optimizer": OptimizerConfig(learning_rate=self.learning_rate, weight_decay=0.0),
        }


DEEPSEEKMATH = Variant(
    name="deepseekmath",
    source="DeepSeekMath, arXiv 2402.03300, §4.1 and §4.2",
    objective=ObjectiveConfig(loss_average="sequence", clip_low=0.2, clip_high=0.2, kl_coefficient=0.04),
    advantage="std",
    group_size=64,
    prompts_per_update=16,  # a batch of 1024, read as answers
    minibatches=1,
    learning_rate=1e-6,
    max_response_tokens=1024,
    unpublished=("clip_low", "clip_high", "temperature", "reference_refresh_updates"),
)
"""The first GRPO: 64 answers a question, one update each, so that its clip never acts."""

R1 = Variant(
    name="r1",
    source="DeepSeek-R1, arXiv 2501.12948v2 (Nature 645, 2025), §2.2 and supplement",
    # Differs from the paper: it prints the ratio of whole sequences; this is the token's, as every open framework has it.
    objective=ObjectiveConfig(loss_average="sequence", clip_low=10.0, clip_high=10.0, kl_coefficient=0.001),
    advantage="std",
    group_size=16,
    prompts_per_update=32,
    minibatches=16,
    learning_rate=3e-6,
    max_response_tokens=32768,
    reference_refresh_updates=400,
)
"""8,192 answers a rollout in 16 minibatches of 512. The clip is printed for R1's first stage; Zero's is not."""

DR_GRPO = Variant(
    name="dr_grpo",
    source="Understanding R1-Zero-Like Training, arXiv 2503.20783, §3, and its published training script",
    objective=ObjectiveConfig(loss_average="constant", max_response_tokens=3000, clip_low=0.2, clip_high=0.2),
    advantage="none",
    group_size=8,
    prompts_per_update=16,  # 128 questions a rollout, 128 answers an update
    minibatches=8,
    learning_rate=1e-6,
    max_response_tokens=3000,
    unpublished=("clip_low", "clip_high"),
)
"""Neither divided by the answer's length (which lets wrong answers grow) nor by the group's spread."""

DAPO = Variant(
    name="dapo",
    source="DAPO, arXiv 2503.14476, §3 and §4.1",
    objective=ObjectiveConfig(loss_average="token", clip_low=0.2, clip_high=0.28),
    advantage="std",
    group_size=16,
    prompts_per_update=32,  # a minibatch of 512 answers out of 512 questions x 16
    minibatches=16,
    learning_rate=1e-6,
    max_response_tokens=20480,
    dynamic_sampling=True,
    overlong_cache_tokens=4096,
    unpublished=("temperature",),
)
"""Clip-higher, token-level loss, dynamic sampling, soft overlong punishment; its reward is 1 or -1, not 1 or 0."""

GSPO = Variant(
    name="gspo",
    source="Group Sequence Policy Optimization, arXiv 2507.18071, §4 and §5.1",
    objective=ObjectiveConfig(loss_average="sequence", level="sequence", clip_low=3e-4, clip_high=4e-4),
    advantage="std",
    group_size=16,
    prompts_per_update=32,
    minibatches=4,
    learning_rate=1e-6,
    max_response_tokens=32768,
    unpublished=(
        "group_size",
        "prompts_per_update",
        "learning_rate",
        "max_response_tokens",
        "temperature",
        "kl_coefficient",
    ),
)
"""One ratio per answer, the geometric mean of its tokens', clipped a thousand times tighter than a token's."""

RLOO = Variant(
    name="rloo",
    source="Back to Basics, arXiv 2402.14740, §3 and appendix C (numbers as TRL's paper index quotes them)",
    # Differs from the paper: it puts the divergence into the reward and trains on whole-sequence REINFORCE; here it is a
    # term of the loss, and the second minibatch is corrected by its ratio. The first update's policy gradient is the same.
    objective=ObjectiveConfig(
        loss_average="constant", max_response_tokens=1024, clip_low=UNCLIPPED, clip_high=UNCLIPPED, kl_coefficient=0.03
    ),
    advantage="rloo",
    group_size=4,
    prompts_per_update=128,  # 512 answers
    minibatches=2,
    learning_rate=1e-6,
    max_response_tokens=1024,
    unpublished=("max_response_tokens", "temperature"),
)
"""REINFORCE with the mean of the other answers as the baseline; nothing is clipped."""

V3_2 = Variant(
    name="v3_2",
    source="DeepSeek-V3.2, arXiv 2512.02556, §3.1",
    objective=ObjectiveConfig(
        loss_average="sequence",
        clip_low=0.2,
        clip_high=0.2,
        kl_coefficient=0.001,
        kl_estimator="unbiased",
        off_policy_threshold=0.5,
    ),
    advantage="none",
    group_size=16,
    prompts_per_update=32,
    minibatches=16,
    learning_rate=3e-6,
    max_response_tokens=32768,
    keep_routing=True,
    top_p=0.95,
    keep_sampling_mask=True,
    unpublished=(
        "top_p",
        "clip_low",
        "clip_high",
        "kl_coefficient",
        "off_policy_threshold",
        "group_size",
        "prompts_per_update",
        "minibatches",
        "learning_rate",
        "max_response_tokens",
        "temperature",
        "reference_refresh_updates",
    ),
)
"""The four stabilisers: unbiased KL, off-policy sequence mask, keep-routing, keep-sampling-mask. The report prints methods,
no numbers: batch shape, rate and KL weight are R1's, the threshold is the one TRL's documentation suggests."""

VARIANTS: Mapping[str, Variant] = {each.name: each for each in (DEEPSEEKMATH, R1, DR_GRPO, DAPO, GSPO, RLOO, V3_2)}
"""Every variant by the name it has on the command line."""


def variant(name: str) -> Variant:
    """The recipe of that name.

    Raises:
        ConfigError: there is none; lists the names there are.
    """
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown variant {name!r}{did_you_mean(name, VARIANTS)}; variants are {', '.join(VARIANTS)}."
        )
    return VARIANTS[name]
