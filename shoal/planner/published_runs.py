"""What others reported about their training runs, and what our formulas make of it.

`PUBLISHED_RUNS` are the runs as published: hours, dollars, tokens and row lengths where they were given. Their utilisation is
always a result of these, never an input. `published_figures` recomputes every figure that follows from other published ones;
where nothing published leads to a figure, `not_recomputable` says so in words.

Three traps. DeepSeek's dollars are hours at an assumed 2 USD, of the official run only: "excluding the costs associated with
prior research and ablation experiments" (V3 §1). The electricity of none of these runs was published; the two ends given here
differ by what is counted. And the "648 GPUs" of some articles on R1 are the paper's "64*8", that is 512.

Sources: DeepSeek-V2 (arXiv 2405.04434), DeepSeek-V3 (2412.19437), "Insights into DeepSeek-V3" (ISCA 2025, 2505.09343),
DeepSeek-R1 v2 table 7 (2501.12948), LLaMA 3 (2407.21783) and the LLaMA 3.1 model card.
"""

from dataclasses import dataclass

from shoal.config import ModelConfig
from shoal.planner.cost import training_cost
from shoal.planner.hardware import Cluster, device
from shoal.planner.published_figure import PublishedFigure
from shoal.planner.published_models import RIVALS
from shoal.planner.training import implied_utilisation
from shoal.presets import v2, v3

ASSUMED_USD_PER_HOUR = 2.0
"""Of an H800 (V3 table 1, R1 v2 table 7)."""

_V3_STEP_SEQUENCES, _V3_STEP_S, _V3_GPUS, _V3_TOKENS = 15360, 19.926, 2048, 14.8e12
_LONG_CONTEXT = ((1000 * 1920 * 32768.0, 32768), (1000 * 480 * 131072.0, 131072))


@dataclass(frozen=True, kw_only=True)
class PublishedRun:
    """A run as its authors reported it."""

    name: str
    device: str
    device_hours: float
    config: ModelConfig | None = None
    phases: tuple[tuple[float, int], ...] = ()
    """Tokens, and the length of the rows they came in; empty where that was not published."""
    usd: float | None = None
    source: str
    not_recomputable: str = ""
    """Why the hours cannot be had from the work done; empty where they can."""

    @property
    def utilisation(self) -> float | None:
        """Implied, of the dense bf16 peak and causal; None where tokens were not published."""
        if self.config is None or not self.phases:
            return None
        return implied_utilisation(self.config, device(self.device), device_hours=self.device_hours, phases=self.phases)

    @property
    def tokens(self) -> float | None:
        """Over all phases."""
        return sum(tokens for tokens, _ in self.phases) or None


PUBLISHED_RUNS: dict[str, PublishedRun] = {
    one.name: one
    for one in (
        PublishedRun(
            name="deepseek-67b",
            device="h800",
            device_hours=300.6e3,
            config=RIVALS["deepseek-67b"].config,
            phases=((1e12, 4096),),
            source="hours per trillion tokens, DeepSeek-V2 §3.2.3; the model's shape is second-hand",
        ),
        PublishedRun(
            name="deepseek-v2",
            device="h800",
            device_hours=172.8e3 * 8.1,
            config=v2(),
            phases=((8.1e12, 4096),),
            source="172.8K hours per trillion tokens (DeepSeek-V2 §3.2.3), 8.1 trillion (§3.1.1)",
        ),
        PublishedRun(
            name="deepseek-v3 pretraining",
            device="h800",
            device_hours=2664e3,
            config=v3(),
            phases=((_V3_TOKENS, 4096),),
            usd=5.328e6,
            source="DeepSeek-V3 table 1, §4.2",
        ),
        PublishedRun(
            name="deepseek-v3 context extension",
            device="h800",
            device_hours=119e3,
            config=v3(),
            phases=_LONG_CONTEXT,
            usd=0.238e6,
            source="DeepSeek-V3 table 1; 1000 steps of 1920 rows of 32K, 1000 steps of 480 rows of 128K (§4.3)",
        ),
        PublishedRun(
            name="deepseek-v3 post-training",
            device="h800",
            device_hours=5e3,
            config=v3(),
            usd=0.01e6,
            source="DeepSeek-V3 table 1",
            not_recomputable="1.5 million instances and two epochs are published, their tokens and the rollouts of RL are not",
        ),
        PublishedRun(
            name="r1-zero rl",
            device="h800",
            device_hours=101e3,
            config=v3(),
            usd=202e3,
            source="DeepSeek-R1 v2 table 7",
            not_recomputable="steps and the longest answers are published, the tokens really sampled are not",
        ),
        PublishedRun(
            name="r1 sft data",
            device="h800",
            device_hours=5e3,
            usd=10e3,
            source="DeepSeek-R1 v2 table 7",
            not_recomputable="804,745 samples were kept; how many were sampled and rejected is not published",
        ),
        PublishedRun(
            name="r1 rl",
            device="h800",
            device_hours=41e3,
            config=v3(),
            usd=82e3,
            source="DeepSeek-R1 v2 table 7",
            not_recomputable="steps and the longest answers are published, the tokens really sampled are not",
        ),
        PublishedRun(
            name="llama-3.1-405b",
            device="h100",
            device_hours=30.84e6,
            config=RIVALS["llama-3.1-405b"].config,
            phases=((15.6e12, 8192),),
            source="LLaMA 3.1 model card (hours, all stages); 15.6 trillion tokens, rows of 8K (LLaMA 3 report §3); second-hand",
        ),
    )
}
"""By name. Two of the hours are per trillion tokens or a product of published numbers; their sources say so."""


def published_figures() -> tuple[PublishedFigure, ...]:
    """Every figure of these runs that follows from others, beside ours; those that do not say why."""
    return (*_v2_figures(), *_v3_figures(), *_v3_bills(), *_r1_figures(), *_llama_figures(), *_electricity())


def _v2_figures() -> tuple[PublishedFigure, ...]:
    return (
        PublishedFigure(
            name="training hours of V2 against DeepSeek-67B, saved",
            unit="%",
            published=42.5,
            ours=100 * (1 - 172.8 / 300.6),
            formula="1 - 172.8K / 300.6K hours per trillion tokens",
            source="DeepSeek-V2 §3.2.3",
            tolerance_fraction=0.0005 / 0.425,
        ),
        _implied("deepseek-67b", None),
        _implied("deepseek-v2", None),
    )


def _v3_figures() -> tuple[PublishedFigure, ...]:
    tokens_per_day = _V3_STEP_SEQUENCES * 4096 / _V3_STEP_S * 86400
    hours = _V3_TOKENS / tokens_per_day * 24 * _V3_GPUS
    insight = "ISCA 2025 table 4"
    return (
        PublishedFigure(
            name="V3 tokens per day",
            unit="tokens",
            published=272.80e9,
            ours=tokens_per_day,
            formula="15360 rows * 4096 tokens / 19.926 s per step * 86400 s",
            source=insight,
            tolerance_fraction=1e-4,
        ),
        _mfu(tokens_per_day, causal=True, published=38.94),
        _mfu(tokens_per_day, causal=False, published=43.73),
        PublishedFigure(
            name="V3 pretraining hours, from hours per trillion tokens",
            unit="H800 h",
            published=2664e3,
            ours=180e3 * 14.8,
            formula="180K hours * 14.8 trillion tokens",
            source="DeepSeek-V3 §1, table 1",
        ),
        PublishedFigure(
            name="V3 pretraining hours, from tokens per day",
            unit="H800 h",
            published=2664e3,
            ours=hours,
            formula="14.8e12 / tokens per day * 24 h * 2048 GPUs",
            source=f"DeepSeek-V3 table 1; {insight}",
            tolerance_fraction=1e-3,
        ),
        PublishedFigure(
            name="V3 days per trillion tokens",
            unit="days",
            published=3.7,
            ours=180e3 / 24 / _V3_GPUS,
            formula="180K hours / 24 / 2048 GPUs",
            source="DeepSeek-V3 §1",
            tolerance_fraction=0.05 / 3.7,
        ),
        _implied("deepseek-v3 pretraining", 38.94, tolerance_fraction=0.01),
        _implied("deepseek-v3 context extension", None),
    )


def _v3_bills() -> tuple[PublishedFigure, ...]:
    stages = [run for run in PUBLISHED_RUNS.values() if run.name.startswith("deepseek-v3")]
    hours = sum(run.device_hours for run in stages)
    return (
        *(_bill(run) for run in stages),
        PublishedFigure(
            name="V3 hours in all",
            unit="H800 h",
            published=2788e3,
            ours=hours,
            formula="2664K + 119K + 5K",
            source="DeepSeek-V3 table 1",
        ),
        PublishedFigure(
            name="V3 cost in all, official run only",
            unit="USD",
            published=5.576e6,
            ours=hours * ASSUMED_USD_PER_HOUR,
            formula="2788K hours * 2 USD",
            source="DeepSeek-V3 table 1",
        ),
        _unexplained("deepseek-v3 post-training"),
    )


def _r1_figures() -> tuple[PublishedFigure, ...]:
    runs = [PUBLISHED_RUNS[name] for name in ("r1-zero rl", "r1 sft data", "r1 rl")]
    table = "DeepSeek-R1 v2 table 7"
    zero, rl = 512 * 198, 512 * 80
    return (
        PublishedFigure(
            name="R1-Zero hours",
            unit="H800 h",
            published=101e3,
            ours=zero,
            formula="64 * 8 GPUs * 198 h",
            source=table,
            tolerance_fraction=0.5 / 101,
        ),
        PublishedFigure(
            name="R1 RL hours",
            unit="H800 h",
            published=41e3,
            ours=rl,
            formula="64 * 8 GPUs * 80 h",
            source=table,
            tolerance_fraction=0.5 / 41,
        ),
        PublishedFigure(
            name="R1 hours in all",
            unit="H800 h",
            published=147e3,
            ours=zero + 5e3 + rl,
            formula="512 * (198 + 80) h + 5K for SFT data",
            source=table,
            tolerance_fraction=0.003,
        ),
        *(_bill(run) for run in runs),
        PublishedFigure(
            name="R1 cost in all",
            unit="USD",
            published=294e3,
            ours=sum(run.device_hours for run in runs) * ASSUMED_USD_PER_HOUR,
            formula="(101K + 5K + 41K) hours * 2 USD",
            source=table,
        ),
        *(_unexplained(run.name) for run in runs),
    )


def _llama_figures() -> tuple[PublishedFigure, ...]:
    run = PUBLISHED_RUNS["llama-3.1-405b"]
    assert run.utilisation is not None
    flops = run.utilisation * run.device_hours * 3600 * device(run.device).peak_flops("bf16")
    return (
        PublishedFigure(
            name="LLaMA-3.1-405B FLOPs in all",
            unit="FLOP",
            published=3.8e25,
            ours=flops,
            formula="15.6e12 tokens * (6 * active parameters + 3 * causal attention at 8192)",
            source="LLaMA 3 report §3.2",
            tolerance_fraction=0.05,
        ),
        _implied("llama-3.1-405b", None),
        PublishedFigure(
            name="LLaMA-3.1-405B hours over V3's, in all",
            unit="times",
            published=None,
            ours=run.device_hours / 2788e3,
            formula="30.84M H100 hours / 2.788M H800 hours",
            source=f"{run.source}; DeepSeek-V3 table 1",
            not_recomputable="neither report compares them; the chips compute equally fast, in bf16 here and FP8 there",
        ),
    )


def _electricity() -> tuple[PublishedFigure, ...]:
    h800, hours = device("h800"), 2788e3
    assert h800.chip_power_w is not None
    assumptions = Cluster(device=h800).cost_assumptions()
    building = training_cost(hours * 3600, assumptions)
    why = "no official figure exists; hours times watts, and published estimates from 350 W to 1,275 W differ in what they count"
    return (
        PublishedFigure(
            name="V3 electricity, boards alone",
            unit="kWh",
            published=None,
            ours=hours * h800.chip_power_w / 1000,
            formula=f"2788K hours * {h800.chip_power_w:g} W",
            source=h800.source,
            not_recomputable=why,
        ),
        PublishedFigure(
            name="V3 electricity, machines and building",
            unit="kWh",
            published=None,
            ours=building.kwh,
            formula=f"2788K hours * {h800.power_w:g} W * PUE {assumptions.pue.value:g}",
            source=f"{h800.source}; PUE: {assumptions.pue.source}",
            not_recomputable=why,
        ),
    )


def _mfu(tokens_per_day: float, *, causal: bool, published: float) -> PublishedFigure:
    ours = 100 * implied_utilisation(
        v3(), device("h800"), device_hours=24 * _V3_GPUS, phases=((tokens_per_day, 4096),), causal=causal
    )
    return PublishedFigure(
        name=f"V3 utilisation, {'causal' if causal else 'not causal'}",
        unit="% of the bf16 peak",
        published=published,
        ours=ours,
        formula=f"tokens per day * FLOPs per token ({'causal' if causal else 'whole square'}) / (2048 GPUs * 989.5 TFLOP/s * 86400 s)",
        source="ISCA 2025 table 4",
        tolerance_fraction=0.3 / published,
    )


def _implied(name: str, published: float | None, tolerance_fraction: float = 0.0) -> PublishedFigure:
    run = PUBLISHED_RUNS[name]
    assert run.utilisation is not None
    return PublishedFigure(
        name=f"{name}, utilisation implied by its hours",
        unit="% of the bf16 peak",
        published=published,
        ours=100 * run.utilisation,
        formula="tokens * FLOPs per token (causal) / (hours * 3600 * peak)",
        source=run.source,
        tolerance_fraction=tolerance_fraction,
        not_recomputable=""
        if published
        else "no utilisation over the whole run was published; this is what its hours imply",
    )


def _bill(run: PublishedRun) -> PublishedFigure:
    return PublishedFigure(
        name=f"{run.name}, cost",
        unit="USD",
        published=run.usd,
        ours=run.device_hours * ASSUMED_USD_PER_HOUR,
        formula=f"{run.device_hours / 1e3:g}K hours * 2 USD",
        source=run.source,
    )


def _unexplained(name: str) -> PublishedFigure:
    run = PUBLISHED_RUNS[name]
    return PublishedFigure(
        name=f"{name}, hours from the work done",
        unit="H800 h",
        published=run.device_hours,
        ours=None,
        formula="tokens * FLOPs per token / (peak * utilisation)",
        source=run.source,
        not_recomputable=run.not_recomputable,
    )
