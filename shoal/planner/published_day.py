"""DeepSeek's published day of serving (open-infra-index day 6) as a worked example, and every serving figure that recomputes.

What the published inputs do not give is said in words (`not_recomputed`).
"""

from dataclasses import replace
from datetime import datetime, timezone

from shoal.planner.deployment import Deployment, largest_batch
from shoal.planner.hardware import DEVICES, Cluster
from shoal.planner.prices import price_at
from shoal.planner.published_figure import NotRecomputed, PublishedFigure
from shoal.planner.roofline import decode_pass, expert_parallel_limit, speculation_gain
from shoal.planner.service import Fleet, Load, Margin, ServiceCost, margin, nodes_needed, service_cost
from shoal.presets import PRESETS

DAY_6 = "DeepSeek open-infra-index, day 6, 1 March 2025"
PUBLISHED_LOAD = Load(hit_tokens=342 * 10**9, miss_tokens=(608 - 342) * 10**9, output_tokens=168 * 10**9)
"""DeepSeek's V3 and R1 service from 27 February 2025, noon in Beijing, to the next."""
PUBLISHED_FLEET_NODES = 226.75
PUBLISHED_START_UTC = datetime(2025, 2, 27, 4, tzinfo=timezone.utc)
PUBLISHED_DEVICES_PER_NODE = 8


def published_day() -> tuple[ServiceCost, Margin]:
    """DeepSeek's day: the published average fleet at 2 USD per GPU hour, every token at R1's standard price.

    The fleet divides between prefill and decoding as the published throughputs do; only its sum is published.
    """
    needed = _published_need()
    scale = PUBLISHED_FLEET_NODES / needed.nodes
    fleet = Fleet(prefill_nodes=needed.prefill_nodes * scale, decode_nodes=needed.decode_nodes * scale)
    node = Cluster(device=DEVICES["h800"], count=PUBLISHED_DEVICES_PER_NODE).cost_assumptions()
    cost = service_cost(PUBLISHED_LOAD, fleet, node)
    price = price_at("deepseek-reasoner", PUBLISHED_START_UTC)
    return cost, margin(PUBLISHED_LOAD, price, PUBLISHED_START_UTC, cost.usd)


def published_figures() -> tuple[PublishedFigure, ...]:
    """Every published serving figure that its published inputs give, recomputed."""
    cost, earned = published_day()

    def day(name: str, unit: str, published: float, ours: float, tolerance: float, formula: str) -> PublishedFigure:
        return PublishedFigure(
            name=name,
            unit=unit,
            published=published,
            ours=ours,
            tolerance_fraction=tolerance,
            formula=formula,
            source=DAY_6,
        )

    hit_percent = 100 * PUBLISHED_LOAD.hit_fraction
    profit_percent = 100 * earned.profit_over_cost_fraction
    return (
        day("share of prompt tokens found in the cache", "%", 56.3, hit_percent, 0.002, "342 / 608"),
        day("cost of a day", "USD", 87_072, cost.usd, 1e-9, "226.75 nodes x 8 GPUs x 24 h x 2 USD"),
        day(
            "theoretical income of a day",
            "USD",
            562_027,
            float(earned.revenue_usd),
            2e-4,
            "342e9 x 0.14 + 266e9 x 0.55 + 168e9 x 2.19 USD per million; the published tokens are rounded",
        ),
        day("profit over cost", "%", 545, profit_percent, 0.002, "(income - cost) / cost; theoretical, as they say"),
        day(
            "nodes",
            "nodes",
            PUBLISHED_FLEET_NODES,
            _published_need().nodes,
            1e-3,
            "608e9 / 73.7k / 86400 + 168e9 / 14.8k / 86400",
        ),
        *_published_limits(),
    )


def not_recomputed() -> tuple[NotRecomputed, ...]:
    """Published serving figures that stay open, with the range that their inputs leave."""
    night = datetime(2025, 2, 27, 20, tzinfo=timezone.utc)
    cost, earned = published_day()
    at_night = margin(PUBLISHED_LOAD, price_at("deepseek-reasoner", night), night, cost.usd)
    mwh = [PUBLISHED_FLEET_NODES * 24 * node_kw * 1.25 / 1e3 for node_kw in (8.0, 10.2)]
    joules = [energy * 3.6e9 / PUBLISHED_LOAD.output_tokens for energy in mwh]
    limit = Deployment(config=PRESETS["v3"], cluster=Cluster(device=DEVICES["h800"], count=144))
    batch = largest_batch(limit, 4989).sequences
    decoding = decode_pass(limit, num_sequences=batch, context_tokens=4989).tokens_per_s_per_device * 8
    v2 = Deployment(
        config=PRESETS["v2"], cluster=Cluster(device=DEVICES["h800"], count=8), cache_bytes_per_element=0.75
    )
    by_length = [
        decode_pass(v2, num_sequences=largest_batch(v2, tokens).sequences, context_tokens=tokens).tokens_per_s
        for tokens in (8192, 1024)
    ]
    return (
        NotRecomputed(
            figure="real income of DeepSeek's day",
            published="substantially lower than the theoretical 562,027 USD",
            ours=f"{at_night.revenue_usd:,.0f} to {earned.revenue_usd:,.0f} USD for tokens that were paid at R1's price",
            why="how many tokens were V3's, free of charge in web and app, or sold at night is not published",
        ),
        NotRecomputed(
            figure="electricity of DeepSeek's day",
            published="none",
            ours=f"{mwh[0]:.0f} to {mwh[1]:.0f} MWh, {joules[0]:.1f} to {joules[1]:.1f} J per output token, prefill included",
            why="8 to 10.2 kW per node and a PUE of 1.25 are our assumptions; neither power nor PUE is published",
        ),
        NotRecomputed(
            figure="14.8k output tokens/s per node",
            published="14.8k at 4,989 cached tokens on average",
            ours=f"at most {decoding / 1e3:.0f}k on 144 H800 with {batch / 144:.0f} sequences each",
            why="the batch is not published, and a roofline is a bound; it enters the fleet above as published",
        ),
        NotRecomputed(
            figure="DeepSeek-V2 generates more than 50K tokens/s per node, 5.76 times DeepSeek 67B",
            published="> 50K tokens/s; 5.76 times",
            ours=f"at most {by_length[0] / 1e3:.0f}k at 8,192 cached tokens to {by_length[1] / 1e3:.0f}k at 1,024",
            why="measured with FP8 weights and a 6-bit cache on the length distribution of a service, which is not published",
        ),
        NotRecomputed(
            figure="multi-token prediction makes decoding 1.8 times faster",
            published="1.8 times at 85 to 90 % acceptance (DeepSeek-V3 5.4.3)",
            ours=f"{speculation_gain(0.85).speedup:.2f} to {speculation_gain(0.9).speedup:.2f} times before the extra cost",
            why=f"1.8 needs an extra cost of {100 * (1.85 / 1.8 - 1):.1f} to {100 * (1.9 / 1.8 - 1):.1f} %, which is not published",
        ),
    )


def _published_need() -> Fleet:
    return nodes_needed(
        PUBLISHED_LOAD, input_tokens_per_s_per_node=73.7e3, output_tokens_per_s_per_node=14.8e3, counts_hits=True
    )


def _published_limits() -> list[PublishedFigure]:
    """ISCA 2025 §2.3.2, with its hidden size of 7,000; V3's own is 7,168."""
    rounded = replace(PRESETS["v3"], hidden_size=7000)
    figures = []
    for link, link_bytes_per_s, tpot_ms, tokens_per_s in (
        ("400G InfiniBand", 50e9, 14.76, 67.0),
        ("NVL72", 900e9, 0.82, 1200.0),
    ):
        limit = expert_parallel_limit(rounded, link_bytes_per_s)
        for name, unit, published, ours, tolerance in (
            (f"time per output token over {link}", "ms", tpot_ms, limit.tpot_ms, 1e-3),
            (f"output speed of one user over {link}", "tokens/s", tokens_per_s, limit.tokens_per_s, 0.02),
        ):
            figures.append(
                PublishedFigure(
                    name=name,
                    unit=unit,
                    published=published,
                    ours=ours,
                    tolerance_fraction=tolerance,
                    formula="2 x 61 layers x 3 B x 32 tokens x 9 experts x 7000 / link",
                    source="Insights into DeepSeek-V3 (ISCA 2025) 2.3.2",
                )
            )
    return figures
