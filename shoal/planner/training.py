"""What training costs: tokens and hardware in, hours, money, electricity and carbon out.

    device hours = tokens * FLOPs per token / (peak FLOP/s * utilisation * 3600)

Everything but the utilisation is arithmetic. Utilisation (MFU, model FLOPs utilisation) is measured, or stated with its
source, and always against the dense bf16 peak even where products run in FP8, because published figures are: so DeepSeek-V3's
39 % in FP8 and another run's 39 % in bf16 mean equal tokens per hour, not equal skill. FLOPs are counted causally, without
recomputation and MTP modules, as in ISCA 2025 table 4; `causal=False` gives the older convention (V3: 43.7 % instead of 38.9 %).

`published_runs.py` holds what others reported against this.
"""

from dataclasses import dataclass, replace

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.cost import Assumption, Cost, CostAssumptions, training_cost
from shoal.planner.counts import parameter_counts, training_flops_per_token
from shoal.planner.hardware import Cluster, Device

LOW_TOKENS, HIGH_TOKENS = 1e3, 1e18

V3_UTILISATION = Assumption(
    name="utilisation",
    value=0.3894,
    unit="of the bf16 peak",
    source="DeepSeek-V3 on 2048 H800, causal (ISCA 2025 table 4); small clusters and other code often reach 0.2 to 0.35",
)
"""What a very good run reached: a default for large GPU clusters, and far too much for anything else."""


@dataclass(frozen=True, kw_only=True)
class TrainingEstimate:
    """A training run, foretold."""

    config: ModelConfig
    cluster: Cluster
    tokens: float
    sequence_tokens: int
    utilisation: Assumption
    flops_per_token: float
    device_hours: float
    cost: Cost
    """Of the whole cluster; its `wall_s` is the length of the run."""
    board_kwh: float | None
    """Of the devices' boards alone, the lower end for electricity; `cost.kwh` has machines and building. None: not known."""

    @property
    def total_flops(self) -> float:
        """Of the whole run."""
        return self.tokens * self.flops_per_token

    @property
    def hours(self) -> float:
        """On the clock."""
        return self.cost.wall_s / 3600

    @property
    def tokens_per_s(self) -> float:
        """Of the whole cluster."""
        return self.tokens / self.cost.wall_s

    @property
    def usd_per_trillion_tokens(self) -> float:
        """Rent, as V3 table 1 states it per trillion."""
        return self.cost.rent_usd / self.tokens * 1e12

    def assumptions(self) -> tuple[Assumption, ...]:
        """Every number that somebody chose, the most uncertain first."""
        return (self.utilisation, *self.cost.assumptions.listed())


@dataclass(frozen=True, kw_only=True)
class TrainingComparison:
    """Two runs on the same cluster; fractions of the second one."""

    first: TrainingEstimate
    second: TrainingEstimate

    @property
    def cost_fraction(self) -> float:
        """Money and hours of the first over the second."""
        return self.first.device_hours / self.second.device_hours

    @property
    def flops_fraction(self) -> float:
        """Per token."""
        return self.first.flops_per_token / self.second.flops_per_token


def estimate_training(
    config: ModelConfig,
    cluster: Cluster,
    *,
    tokens: float,
    utilisation: Assumption | float = V3_UTILISATION,
    sequence_tokens: int = 4096,
    causal: bool = True,
    include_mtp: bool = False,
    assumptions: CostAssumptions | None = None,
) -> TrainingEstimate:
    """Foretell a run of `tokens` on `cluster`.

    Args:
        utilisation: fraction of the dense bf16 peak; a bare number is "stated by you". `utilisation_of` measures one.
        sequence_tokens: length of a training row.
        causal: convention of the FLOPs; must be that of the utilisation.
        assumptions: prices and factors of the whole cluster; None takes `cluster.cost_assumptions()`.
    Raises:
        ConfigError: figures that cannot be, such as percent for fractions or trillions for tokens.
    """
    _check_tokens(tokens)
    _check_sequence(sequence_tokens)
    stated = utilisation if isinstance(utilisation, Assumption) else stated_utilisation(utilisation)
    _check_utilisation(stated.value)
    flops_per_token = training_flops_per_token(config, sequence_tokens, causal, include_mtp)
    wall_s = tokens * flops_per_token / (cluster.peak_flops("bf16") * stated.value)
    cost = training_cost(wall_s, assumptions or cluster.cost_assumptions())
    device_hours = wall_s / 3600 * cluster.count
    board_w = cluster.device.chip_power_w
    return TrainingEstimate(
        config=config,
        cluster=cluster,
        tokens=tokens,
        sequence_tokens=sequence_tokens,
        utilisation=stated,
        flops_per_token=flops_per_token,
        device_hours=device_hours,
        cost=cost,
        board_kwh=None if board_w is None else device_hours * board_w / 1000,
    )


def stated_utilisation(fraction: float, source: str = "stated by you") -> Assumption:
    """A utilisation with where it is from."""
    _check_utilisation(fraction)
    return replace(V3_UTILISATION, value=fraction, source=source)


def utilisation_of(
    config: ModelConfig, cluster: Cluster, tokens_per_s: float, *, sequence_tokens: int, causal: bool = True
) -> Assumption:
    """The utilisation that a measured speed of the whole cluster stands for, to plan longer runs of the same code with."""
    if not 0 < tokens_per_s < float("inf"):
        raise ConfigError(f"tokens_per_s={tokens_per_s} must be a positive number, measured over some steps.")
    _check_sequence(sequence_tokens)
    flops_per_s = tokens_per_s * training_flops_per_token(config, sequence_tokens, causal)
    fraction = flops_per_s / cluster.peak_flops("bf16")
    if fraction > 1:
        raise ConfigError(
            f"{tokens_per_s:g} tokens/s are {fraction:.3g} times what {cluster.name} can compute at its peak; check the number "
            "of devices, and that tokens are counted once."
        )
    return stated_utilisation(fraction, f"measured: {tokens_per_s:g} tokens/s on {cluster.name}")


def implied_utilisation(
    config: ModelConfig,
    device: Device,
    *,
    device_hours: float,
    phases: tuple[tuple[float, int], ...],
    causal: bool = True,
) -> float:
    """The fraction of the bf16 peak that published hours stand for: a result, never an input.

    Args:
        phases: tokens, and the length of the rows they came in.
    """
    if not 0 < device_hours < float("inf"):
        raise ConfigError(f"device_hours={device_hours} must be a positive number.")
    flops = sum(tokens * training_flops_per_token(config, length, causal) for tokens, length in phases)
    return flops / (device_hours * 3600 * device.peak_flops("bf16"))


def compare_training(
    first: ModelConfig,
    second: ModelConfig,
    cluster: Cluster,
    *,
    tokens: float,
    second_tokens: float | None = None,
    utilisation: Assumption | float = V3_UTILISATION,
    second_utilisation: Assumption | float | None = None,
    sequence_tokens: int = 4096,
) -> TrainingComparison:
    """Two models on the same cluster; the second with its own tokens and utilisation where they differ."""
    other_use = utilisation if second_utilisation is None else second_utilisation
    return TrainingComparison(
        first=estimate_training(
            first, cluster, tokens=tokens, utilisation=utilisation, sequence_tokens=sequence_tokens
        ),
        second=estimate_training(
            second,
            cluster,
            tokens=tokens if second_tokens is None else second_tokens,
            utilisation=other_use,
            sequence_tokens=sequence_tokens,
        ),
    )


def dense_twin(config: ModelConfig, params: float | None = None) -> ModelConfig:
    """A dense model with the same attention and, to within half a column of its feed-forward layers, `params` parameters.

    Args:
        params: None takes the total of `config`: the dense model "of the same size", which multiplies all of it per token.
    Raises:
        ConfigError: fewer parameters than attention and embedding alone have.
    """
    bare = config.replace(n_routed_experts=None, num_nextn_predict_layers=0, intermediate_size=1)
    column = 3 * config.hidden_size * config.num_hidden_layers
    base = parameter_counts(bare).total - column
    wanted = parameter_counts(config).total if params is None else params
    width = round((wanted - base) / column)
    if width < 1:
        raise ConfigError(
            f"params={wanted:g} are fewer than the {base + column:g} that attention and embedding of this shape need; "
            "ask for more."
        )
    return bare.replace(intermediate_size=width)


def same_loss_params(config: ModelConfig) -> Assumption:
    """How large a dense model would reach about the same loss on the same tokens; give it to `dense_twin`.

    A rule of thumb, and called one: nobody published a law for these models. What is published are pairs: DeepSeek-V2 (236 B,
    21 B active) beats DeepSeek-67B, and V3 (671 B, 37 B active) is on a level with LLaMA-3.1-405B.
    """
    counts = parameter_counts(config)
    return Assumption(
        name="dense parameters of the same loss",
        value=(counts.total * counts.active) ** 0.5,
        unit="parameters",
        source="rule of thumb, not published by DeepSeek: geometric mean of total and active parameters",
    )


def _check_tokens(tokens: float) -> None:
    if not LOW_TOKENS <= tokens <= HIGH_TOKENS:
        raise ConfigError(
            f"tokens={tokens:g} cannot be: it is in tokens, plausible from {LOW_TOKENS:g} to {HIGH_TOKENS:g} (V3's 14.8 "
            "trillion are 14.8e12)."
        )


def _check_sequence(sequence_tokens: int) -> None:
    if type(sequence_tokens) is not int or not 1 <= sequence_tokens <= 2**30:
        raise ConfigError(
            f"sequence_tokens={sequence_tokens!r} must be a whole number, at least 1; V3 trained with 4096."
        )


def _check_utilisation(fraction: float) -> None:
    if not 1e-6 <= fraction <= 1:
        percent = f", {fraction:g} % is {fraction / 100:g}" if 1 < fraction <= 100 else ""
        raise ConfigError(
            f"utilisation={fraction:g} must be a fraction above 0 and at most 1{percent}; V3 reached 0.39, small runs 0.05 to 0.35."
        )
