"""`--algorithm NAME`: a published recipe fitted to a small model, saying what of it was changed.

`variants.py` holds what the papers print: thousands of answers a step and rates around 1e-6, for models of billions of
parameters. The choices that make an algorithm (advantage, loss, clip, divergence, what is replaced or replayed) are taken
as they are; batch, rate and length are those of the model at hand unless the published ones are asked for.
"""

from dataclasses import dataclass, replace
from typing import Any

from shoal.errors import ConfigError, did_you_mean
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.variants import VARIANTS, Variant
from shoal.training.optimizer import OptimizerConfig

ALGORITHMS = {
    "grpo": "deepseekmath",
    "grpo-r1": "r1",
    "dr-grpo": "dr_grpo",
    "dapo": "dapo",
    "gspo": "gspo",
    "rloo": "rloo",
    "v3.2": "v3_2",
}
"""Names on the command line and in `variants.VARIANTS`."""

SMALL_PROMPTS, SMALL_GROUP, SMALL_MINIBATCHES = 32, 16, 2


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """A stage's configuration, and how it departs from the source."""

    config: GrpoConfig
    source: str
    changed: dict[str, tuple[Any, Any]]
    """By field: what is published, and what is used."""


def published_variant(algorithm: str) -> Variant:
    """The recipe behind a name on the command line.

    Raises:
        ConfigError: there is none.
    """
    name = ALGORITHMS.get(algorithm, algorithm)
    if name not in VARIANTS:
        raise ConfigError(
            f"unknown algorithm {algorithm!r}{did_you_mean(algorithm, ALGORITHMS)}; there are {', '.join(ALGORITHMS)}."
        )
    return VARIANTS[name]


def fit_algorithm(
    algorithm: str,
    *,
    parameters: int,
    max_response_tokens: int,
    published_sizes: bool = False,
    learning_rate: float | None = None,
    **settings: Any,
) -> Fitted:
    """The configuration of an algorithm for a model of so many parameters.

    Args:
        published_sizes: also take batch, group, minibatches, rate and length from the source.
        learning_rate: instead of the fitted or published one.
        settings: any other fields of `GrpoConfig`; None leaves a field as it is.
    Raises:
        ConfigError: unknown algorithm, or sizes that do not fit together.
    """
    variant = published_variant(algorithm)
    if not published_sizes:
        variant = variant.scaled_to(max_response_tokens)
    published = published_variant(algorithm).settings()
    used = variant.settings()
    if not published_sizes:
        used |= {
            "prompts_per_step": SMALL_PROMPTS,
            "group_size": SMALL_GROUP,
            "minibatches": min(variant.minibatches, SMALL_MINIBATCHES),
            "optimizer": OptimizerConfig(learning_rate=small_rate(parameters), eps=1e-4, weight_decay=0.0),
        }
        if variant.reference_refresh_updates is not None:
            used["reference_refresh_steps"] = variant.reference_refresh_updates // used["minibatches"]
    used |= {name: value for name, value in settings.items() if value is not None}
    if learning_rate is not None:
        used["optimizer"] = replace(used["optimizer"], learning_rate=learning_rate)
    sizes = ("prompts_per_step", "group_size", "minibatches", "max_response_tokens", "temperature")
    changed = {name: (published[name], used[name]) for name in sizes if used[name] != published[name]}
    rates = published["optimizer"].learning_rate, used["optimizer"].learning_rate
    if rates[0] != rates[1]:
        changed["learning_rate"] = rates
    return Fitted(config=GrpoConfig(**used), source=variant.source, changed=changed)


def small_rate(parameters: int) -> float:
    """A learning rate by size, between what moved 1.4 M parameters here (docs/log.md) and what is published for billions.

    Falls with the square root of the size from 2e-4 at a million: 2e-5 at a hundred million, 2e-6 at ten billion.
    """
    return float(min(2e-4, 2e-4 * (1e6 / max(parameters, 1)) ** 0.5))
