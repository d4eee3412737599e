"""Figures of serving: how fast at most, how many machines for a day's tokens, what a million of them costs and earns."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from datetime import datetime, timedelta, timezone
from decimal import Decimal

from shoal.planner.deployment import Achieved, Deployment
from shoal.planner.hardware import Cluster
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.fitting import Served
from shoal.planner.plan.question import Question
from shoal.planner.plan.settings import SETTINGS, Settings
from shoal.planner.prices import Price, charge, price_at
from shoal.planner.roofline import (
    Pass,
    decode_pass,
    expert_parallel_limit,
    prefill_pass,
    speculation_gain,
    speculation_gain_on,
)
from shoal.planner.service import Fleet, Load, ServiceCost, nodes_needed, service_cost

_BOUND = "shoal/planner/roofline.py: a bound from bytes and operations; DeepSeek's fleet reached under half of it in decoding"
_HARDWARE = ("memory_bytes_per_s", "peak_bf16_flops_per_s", "link_bytes_per_s", "network_bytes_per_s")
_FRACTIONS = ("bandwidth_fraction", "flops_fraction", "network_fraction")


@dataclass(frozen=True, kw_only=True)
class Speeds:
    """Decoding and reading at given shares of the hardware's peak."""

    decode: Pass
    prefill: Pass


def serving_figures(question: Question, found: Served | None) -> Iterator[Figure]:
    """Nothing where the model does not fit; the section on memory says what is missing."""
    if found is None or not found.fit.fits:
        return
    deployment = deployment_of(question, found)
    best = speeds(question, deployment, found)
    worst = _worst(question, deployment, found)
    yield from _speed_figures(question, found, best, worst)
    yield from _limit_figures(question, deployment, found)
    yield from _money_figures(question, deployment, best, worst)


def deployment_of(question: Question, found: Served) -> Deployment:
    """What is served, for the roofline."""
    config, settings = question.model.config, question.settings
    assert config is not None
    return Deployment(
        config=config,
        cluster=Cluster(device=question.cluster.device, count=found.cluster.count),
        weights=found.plan.weights,
        cache_bytes_per_element=settings.value("cache_bytes_per_number"),
        reserve_fraction=settings.value("reserve_fraction"),
        achieved=_achieved(settings),
    )


def speeds(question: Question, deployment: Deployment, found: Served) -> Speeds:
    """Of the batch that is served, and of reading one prompt for each device."""
    settings, count = question.settings, deployment.cluster.count
    return Speeds(
        decode=decode_pass(
            deployment, num_sequences=found.plan.num_sequences, context_tokens=settings.whole("context_tokens")
        ),
        prefill=prefill_pass(
            deployment,
            num_prompts=count if deployment.is_expert_parallel else 1,
            prompt_tokens=settings.whole("prompt_tokens"),
        ),
    )


def bill_of_day(question: Question, deployment: Deployment, at: Speeds) -> tuple[Load, Fleet, ServiceCost]:
    """A day's tokens, the machines they need at these speeds, and their bill."""
    settings, per_node = question.settings, deployment.cluster.device.devices_per_node
    output = settings.value("output_tokens_per_day")
    read = output * settings.value("input_per_output")
    hits = round(read * settings.value("hit_fraction"))
    load = Load(hit_tokens=hits, miss_tokens=max(1, round(read) - hits), output_tokens=round(output))
    fleet = nodes_needed(
        load,
        input_tokens_per_s_per_node=at.prefill.tokens_per_s_per_device * per_node,
        output_tokens_per_s_per_node=at.decode.tokens_per_s_per_device * per_node,
        counts_hits=False,
    )
    return load, fleet, service_cost(load, fleet, settings.cost_assumptions(per_node))


def revenue_of_day(load: Load, model: str, now: datetime) -> tuple[Price, float]:
    """The price row in force, and what a day's tokens earn, spread evenly over peak and off-peak hours."""
    midnight = now.replace(hour=0, minute=0, second=0, microsecond=0)
    price = price_at(model, now)
    total = Decimal(0)
    for hour in range(24):
        total += charge(price, midnight + timedelta(hours=hour), load.hit_tokens, load.miss_tokens, load.output_tokens)
    return price, float(total) / 24


def _speed_figures(question: Question, found: Served, best: Speeds, worst: Speeds | None) -> Iterator[Figure]:
    settings = ("context_tokens", "weights", "cache_bytes_per_number", *_HARDWARE, *_FRACTIONS)
    for name, label, get, unit in (
        (
            "decode_tokens_per_s",
            f"written by {found.plan.num_sequences} sequences together, at most",
            lambda p: p.tokens_per_s,
            "tokens/s",
        ),
        ("decode_tokens_per_s_per_device", "the same for one device", lambda p: p.tokens_per_s_per_device, "tokens/s"),
        (
            "decode_tokens_per_s_per_sequence",
            "what one reader sees, without speculation",
            lambda p: p.tokens_per_s_per_sequence,
            "tokens/s",
        ),
    ):
        yield Figure(
            name=name,
            label=label,
            value=get(best.decode),
            unit=unit,
            formula="tokens of a pass / max(bytes read / bandwidth, operations / peak, bytes sent / link)",
            inputs=settings,
            source=_BOUND,
            low=None if worst is None else get(worst.decode),
            high=None if worst is None else get(best.decode),
        )
    yield Figure(
        name="decode_limited_by",
        label="what a pass of decoding waits for",
        value=best.decode.limited_by,
        unit="memory, compute or network",
        formula=f"the longest of {best.decode.memory_s * 1e3:.3g} ms memory, {best.decode.compute_s * 1e3:.3g} ms compute, "
        f"{best.decode.network_s * 1e3:.3g} ms network",
        inputs=settings,
        source=_BOUND,
    )
    yield Figure(
        name="prefill_tokens_per_s",
        label="prompt tokens read together, at most",
        value=best.prefill.tokens_per_s,
        unit="tokens/s",
        formula="tokens of a pass / max(bytes moved / bandwidth, operations / peak, bytes sent / link)",
        inputs=("prompt_tokens", "weights", *_HARDWARE, *_FRACTIONS),
        source=_BOUND,
        low=None if worst is None else worst.prefill.tokens_per_s,
        high=None if worst is None else best.prefill.tokens_per_s,
    )


def _limit_figures(question: Question, deployment: Deployment, found: Served) -> Iterator[Figure]:
    config, settings = deployment.config, question.settings
    acceptance = settings.value("acceptance_fraction")
    sequences, context = found.plan.num_sequences, settings.whole("context_tokens")
    gain = speculation_gain_on(deployment, acceptance, num_sequences=sequences, context_tokens=context)
    cost = gain.extra_cost_fraction
    yield Figure(
        name="speculation_speedup",
        label="one drafted token for each pass (multi-token prediction)",
        value=gain.speedup,
        unit="times",
        formula=f"(1 + acceptance_fraction) / (1 + {cost:.3g}), the extra cost as the roofline has it for this batch",
        inputs=("acceptance_fraction", "context_tokens"),
        source="DeepSeek-V3 §5.4.3: 1.8 times at 85 to 90 %, an extra cost of 2.8 to 5.6 %",
        low=speculation_gain(0.8, cost).speedup if acceptance >= 0.8 else None,
        high=speculation_gain(0.9, cost).speedup if acceptance <= 0.9 else None,
    )
    link = deployment.link_bytes_per_s
    if config.n_routed_experts is not None and link:
        limit = expert_parallel_limit(config, link, micro_batch_tokens=settings.whole("micro_batch_tokens"))
        yield Figure(
            name="all_to_all_us",
            label="sending a micro-batch to its experts and back, one layer",
            value=limit.all_to_all_us,
            unit="us",
            formula=f"3 bytes x micro_batch_tokens x (experts per token + shared) x hidden / {link:.3g} bytes/s",
            inputs=("micro_batch_tokens", "link_bytes_per_s", "network_bytes_per_s"),
            source="ISCA 2025 §2.3.2: FP8 out, bf16 back; 120.96 us at 50 GB/s with the hidden size rounded",
        )
        yield Figure(
            name="expert_parallel_limit_tokens_per_s",
            label="one sequence where nothing but expert traffic takes time",
            value=limit.tokens_per_s,
            unit="tokens/s",
            formula=f"1 / (2 x layers x 3 bytes x micro_batch_tokens x (experts per token + shared) x hidden / {link:.3g} bytes/s)",
            inputs=("micro_batch_tokens", "link_bytes_per_s", "network_bytes_per_s"),
            source="ISCA 2025 §2.3.2: 67 tokens/s at 50 GB/s, about 1200 at 900 GB/s",
        )


def _money_figures(question: Question, deployment: Deployment, best: Speeds, worst: Speeds | None) -> Iterator[Figure]:
    load, fleet, cost = bill_of_day(question, deployment, best)
    slow = None if worst is None else bill_of_day(question, deployment, worst)
    day = ("output_tokens_per_day", "input_per_output", "hit_fraction")
    rows: list[tuple[str, str, str, float, float | None, str]] = [
        ("serving_nodes", f"machines of {deployment.cluster.device.devices_per_node} for the day's tokens, at least", "machines",
         fleet.nodes, slow and slow[1].nodes, "missed prompt tokens / prefill speed + written tokens / decode speed"),
        ("usd_per_million_output_tokens", "decoding a million tokens, rent alone", "USD", cost.usd_per_million_output_tokens,
         slow and slow[2].usd_per_million_output_tokens, "rent of the decoding machines / written tokens"),
        ("usd_per_million_input_tokens", "reading a million prompt tokens, hits counted", "USD", cost.usd_per_million_input_tokens,
         slow and slow[2].usd_per_million_input_tokens, "rent of the prefill machines / prompt tokens"),
        ("joules_per_output_token", "electricity of one written token, all reading included", "J", cost.joules_per_output_token,
         slow and slow[2].joules_per_output_token, "machines x power_w x devices x pue / written tokens"),
        ("joules_per_million_tokens", "electricity of a million tokens read or written", "J", cost.joules_per_million_tokens,
         slow and slow[2].joules_per_million_tokens, "the same / all tokens"),
    ]  # fmt: skip
    for name, label, unit, value, end, formula in rows:
        yield Figure(
            name=name,
            label=label,
            value=value,
            unit=unit,
            formula=formula,
            inputs=(*day, "decode_tokens_per_s", "prefill_tokens_per_s", "price_usd_per_device_h", "power_w", "pue"),
            source=_BOUND,
            low=None if end is None else value,
            high=end,
        )
    yield from _price_figures(question, load, cost, None if slow is None else slow[2])


def _price_figures(question: Question, load: Load, cost: ServiceCost, slow: ServiceCost | None) -> Iterator[Figure]:
    model = question.settings.words["price_model"]
    now = datetime.now(timezone.utc)
    price, revenue = revenue_of_day(load, model, now)
    _, without = revenue_of_day(replace(load, hit_tokens=0, miss_tokens=load.input_tokens), model, now)
    yield Figure(
        name="cache_saving_fraction",
        label=f"what cache hits take off a customer's bill at {model} prices",
        value=1 - revenue / without if without else 0.0,
        unit="fraction",
        formula="1 - bill / bill with every prompt token at the price of a miss",
        inputs=("hit_fraction", "input_per_output", "price_model"),
        source=price.source,
    )
    yield Figure(
        name="profit_over_cost_fraction",
        label=f"theoretical margin at {model} prices, over cost, at most",
        value=revenue / cost.usd - 1,
        unit="fraction",
        formula="revenue of the day's tokens at list price / rent - 1; free and discounted use, research and staff are not in it",
        inputs=("price_model", "output_tokens_per_day", "input_per_output", "hit_fraction", "price_usd_per_device_h"),
        source=f"{price.source}; DeepSeek's own day: 545 %",
        low=None if slow is None else revenue / slow.usd - 1,
        high=None if slow is None else revenue / cost.usd - 1,
    )


def _worst(question: Question, deployment: Deployment, found: Served) -> Speeds | None:
    """The same at the low end of what is usually reached; None where somebody set what is reached."""
    settings = question.settings
    if any(settings.value(key) != 1 for key in _FRACTIONS):
        return None
    ends = {key: (SETTINGS[key].doubt or (1.0, 1.0))[0] for key in _FRACTIONS}
    return speeds(question, replace(deployment, achieved=Achieved(**ends)), found)


def _achieved(settings: Settings) -> Achieved:
    return Achieved(**{key: settings.value(key) for key in _FRACTIONS})
