"""What the Plan page draws: cost by part, memory by part against the device, cache over context, cost over the hit rate."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from shoal.config import ModelConfig
from shoal.planner.counts import expert_parameters, forward_attention_flops_per_token, parameter_counts
from shoal.planner.plan.cost_of_serving import bill_of_day, deployment_of, speeds
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.whole import Plan
from shoal.planner.prices import price_at
from shoal.planner.published_models import kv_bytes_over_context
from shoal.planner.rivals import Rival
from shoal.planner.roofline import expert_parallel_limit
from shoal.planner.service import over_hit_rate

CONTEXTS = tuple(2**power for power in range(10, 21))
"""1 K to 1 M tokens."""

BESIDE = ("v3", "v3.2", "v4-pro", "v4-flash", "qwen2.5-72b", "llama-3.1-405b", "llama-2-7b")
"""Models whose cache is drawn beside the planned one's."""

LINKS_GB_PER_S = (12.5, 25, 50, 100, 200, 450, 900, 1800)
"""From 100G Ethernet to NVLink, one direction."""

HIT_FRACTIONS = tuple(step / 20 for step in range(21))


def charts(plan: Plan) -> dict[str, Any]:
    """All of them, as JSON values; one that the plan cannot give is empty."""
    return {
        "training_by_part": training_by_part(plan),
        "serving_by_part": serving_by_part(plan),
        "memory_by_part": memory_by_part(plan),
        "kv_over_context": kv_over_context(plan.question.model),
        "cost_over_hit_rate": cost_over_hit_rate(plan),
        "decode_limit_over_link": decode_limit_over_link(plan),
    }


def training_flops_by_part(config: ModelConfig, row_tokens: int) -> dict[str, float]:
    """Operations of one trained token by what does them; they add up to `training_flops_per_token`."""
    counts, layers = parameter_counts(config), config.num_hidden_layers
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(layers))
    chosen = moe_layers * config.num_experts_per_tok * expert_parameters(config)
    head = config.vocab_size * config.hidden_size
    parts = {
        "attention projections": counts.attention,
        "routed experts": chosen,
        "shared experts": counts.shared_experts,
        "dense layers": counts.dense_ffn,
        "output head": head,
        "router and norms": counts.router + counts.norms,
    }
    operations = {name: 6.0 * params for name, params in parts.items() if params}
    return {**operations, "attention scores": 3.0 * forward_attention_flops_per_token(config, row_tokens / 2)}


def training_by_part(plan: Plan) -> list[dict[str, Any]]:
    """Operations and, where tokens were given, money and electricity, shared out by operations."""
    config, settings = plan.question.model.config, plan.question.settings
    if config is None:
        return []
    parts = training_flops_by_part(config, settings.whole("sequence_tokens"))
    total = sum(parts.values())
    usd, kwh = (_number(plan.figures.get(name)) for name in ("training_usd", "training_kwh"))
    return [
        {
            "part": name,
            "flops_per_token": flops,
            "share_fraction": flops / total,
            "usd": None if usd is None else usd * flops / total,
            "kwh": None if kwh is None else kwh * flops / total,
        }
        for name, flops in parts.items()
    ]


def serving_by_part(plan: Plan) -> list[dict[str, Any]]:
    """A day's bill: reading prompts and writing answers."""
    question, found = plan.question, plan.serving
    if found is None or not found.fit.fits:
        return []
    deployment = deployment_of(question, found)
    _, fleet, cost = bill_of_day(question, deployment, speeds(question, deployment, found))
    return [
        {"part": "reading prompts", "usd_per_day": cost.prefill.rent_usd, "kwh_per_day": cost.prefill.kwh, "machines": fleet.prefill_nodes},
        {"part": "writing answers", "usd_per_day": cost.decode.rent_usd, "kwh_per_day": cost.decode.kwh, "machines": fleet.decode_nodes},
    ]  # fmt: skip


def memory_by_part(plan: Plan) -> dict[str, Any]:
    """Bytes on the fullest device, beside what the device has and what is kept free of it."""
    question = plan.question
    device = question.cluster.device
    return {
        "device": device.name,
        "device_bytes": device.memory_bytes,
        "reserved_bytes": round(device.memory_bytes * question.settings.value("reserve_fraction")),
        "training": _memory(plan.training.memory.by_part(), plan.training.plan.split.num_devices)
        if plan.training
        else None,
        "serving": _memory(plan.serving.memory.by_part(), plan.serving.plan.num_devices) if plan.serving else None,
    }


def kv_over_context(model: Rival, contexts: Sequence[int] = CONTEXTS) -> list[dict[str, Any]]:
    """Cache of one sequence over its length, the planned model first."""
    others = [name for name in BESIDE if name != model.name]
    return [asdict(curve) for curve in kv_bytes_over_context([model, *others], contexts)]


def cost_over_hit_rate(plan: Plan) -> dict[str, Any]:
    """A million prompt tokens over the hit rate: price to the customer, cost to the operator at the roofline."""
    question, cost_usd = plan.question, _number(plan.figures.get("usd_per_million_input_tokens"))
    if cost_usd is None:
        return {}
    missed = 1 - question.settings.value("hit_fraction")
    now = datetime.now(timezone.utc)
    price = price_at(question.settings.words["price_model"], now)
    points = over_hit_rate(price, now, cost_usd / missed if missed else 0.0, HIT_FRACTIONS)
    return {"price_model": price.model, "source": price.source, "points": [asdict(point) for point in points]}


def decode_limit_over_link(plan: Plan) -> list[dict[str, Any]]:
    """What expert traffic alone leaves of one sequence's speed, over the link of one device."""
    config = plan.question.model.config
    if config is None or config.n_routed_experts is None:
        return []
    tokens = plan.question.settings.whole("micro_batch_tokens")
    limits = [(link, expert_parallel_limit(config, link * 1e9, micro_batch_tokens=tokens)) for link in LINKS_GB_PER_S]
    return [
        {"link_gb_per_s": link, "all_to_all_us": limit.all_to_all_us, "tokens_per_s": limit.tokens_per_s}
        for link, limit in limits
    ]


def _memory(parts: Mapping[str, int], num_devices: int) -> dict[str, Any]:
    return {"num_devices": num_devices, "bytes_by_part": dict(parts), "total_bytes": sum(parts.values())}


def _number(figure: Figure | None) -> float | None:
    return float(figure.value) if figure is not None and isinstance(figure.value, int | float) else None
