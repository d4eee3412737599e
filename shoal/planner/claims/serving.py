"""Claims about serving: the published day, speed limits, speculation, expert placement."""

import math

from shoal.planner.claims.claim import Claim, figure
from shoal.planner.placement import place_experts
from shoal.planner.published_day import not_recomputed, published_figures
from shoal.planner.published_figure import PublishedFigure
from shoal.planner.roofline import speculation_gain
from shoal.presets import v3

EPLB_LOADS = (
    (90, 132, 40, 61, 104, 165, 39, 4, 73, 56, 183, 86),
    (20, 107, 104, 64, 19, 197, 187, 157, 172, 86, 16, 27),
)
EPLB_SLOTS = (
    (5, 6, 5, 7, 8, 4, 3, 4, 10, 9, 10, 2, 0, 1, 11, 1),
    (7, 10, 6, 8, 6, 11, 8, 9, 2, 4, 5, 1, 5, 0, 3, 1),
)
"""The worked example of github.com/deepseek-ai/EPLB, README: 12 experts of 2 layers in 16 slots on 8 GPUs of 2 nodes."""


def serving_claims() -> tuple[Claim, ...]:
    """In the order of the table."""
    known = {one.name: one for one in published_figures()}

    def rows(*names: str) -> tuple[PublishedFigure, ...]:
        return tuple(known[name] for name in names)

    return (
        _throughput(),
        _speculation(),
        _node_limit(),
        _placement(),
        Claim(
            number=41,
            title="expert traffic alone limits decoding to 14.76 ms a token over 400G, 0.82 ms over NVL72",
            command="shoal plan --claim 41",
            words="with the paper's rounded hidden size of 7,000; V3's own 7,168 gives 15.11 ms",
            figures=tuple(one for one in published_figures() if "400G" in one.name or "NVL72" in one.name),
        ),
        Claim(
            number=44,
            title="a day of serving cost 87,072 USD; theoretical income 562,027 USD, margin 545 %",
            command="shoal plan --claim 44",
            words="theoretical, as DeepSeek says itself: how many tokens were free, V3's or sold at night is not published; the published "
            "token counts are rounded",
            figures=rows("cost of a day", "theoretical income of a day", "profit over cost"),
        ),
        Claim(
            number=45,
            title="the published speeds and tokens close to 226.75 nodes",
            command="shoal plan --claim 45",
            figures=rows("nodes"),
        ),
        Claim(
            number=46,
            title="56.3 % of the prompt tokens were found in the disk cache",
            command="shoal plan --claim 46",
            figures=rows("share of prompt tokens found in the cache"),
        ),
    )


def _throughput() -> Claim:
    open_row = next(one for one in not_recomputed() if "5.76" in one.figure)
    return Claim(
        number=12,
        title="DeepSeek-V2 generates over 50K tokens/s on a node, 5.76 times DeepSeek-67B",
        command="shoal plan v2 --fit '8x h800' --set cache_bytes_per_number=6bits",
        words=f"not recomputable, a range: {open_row.ours}; {open_row.why}",
        figures=(
            figure("tokens/s of a node", "K tokens/s", 50, None, "largest batch that fits, at the roofline", "DeepSeek-V2 §3.2.3", why_not=open_row.why),
            figure("over DeepSeek-67B", "times", 5.76, None, "the same for both", "DeepSeek-V2 §3.2.3", why_not=open_row.why),
        ),
    )  # fmt: skip


def _speculation() -> Claim:
    costs = [100 * ((1 + kept) / 1.8 - 1) for kept in (0.85, 0.9)]
    return Claim(
        number=36,
        title="multi-token prediction decodes 1.8 times faster at 85 to 90 % acceptance",
        command="shoal plan v3 --explain speculation_speedup",
        words=f"1.8 needs an extra cost of {costs[0]:.1f} to {costs[1]:.1f} %, which is not published; acceptance is a measurement of their model",
        figures=(
            figure("speed-up at 85 %, cost 2.8 %", "times", 1.8, speculation_gain(0.85, 0.028).speedup, "(1 + 0.85) / 1.028",
                   "DeepSeek-V3 §5.4.3", tolerance=0.05),
            figure("speed-up at 90 %, cost 5.6 %", "times", 1.8, speculation_gain(0.9, 0.056).speedup, "(1 + 0.90) / 1.056",
                   "DeepSeek-V3 §5.4.3", tolerance=0.05),
        ),
    )  # fmt: skip


def _node_limit() -> Claim:
    experts, chosen, nodes = v3().n_routed_experts or 0, v3().num_experts_per_tok, 8
    untouched = math.comb(experts - experts // nodes, chosen) / math.comb(experts, chosen)
    return Claim(
        number=38,
        title="a token goes to at most 4 nodes, where 13 experts would cost no more traffic than 8",
        command="shoal plan --claim 38",
        words="that no token breaks the limit is asserted by the router's own tests",
        figures=(
            figure("experts at the same cost", "experts", 13, v3().topk_group * 160 / 50, "4 nodes x 160 / 50 GB/s of NVLink over InfiniBand",
                   "DeepSeek-V3 §3.2.2", tolerance=0.5),
            figure("nodes touched without the limit", "nodes", None, nodes * (1 - untouched), "8 x (1 - C(224, 8) / C(256, 8))", "arithmetic",
                   why_not="not published; it is what the limit saves"),
        ),
    )  # fmt: skip


def _placement() -> Claim:
    placed = place_experts(EPLB_LOADS, num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    pairs = [pair for ours, theirs in zip(placed.expert_of_slot, EPLB_SLOTS) for pair in zip(ours, theirs)]
    return Claim(
        number=40,
        title="the worked example of the expert-parallel load balancer",
        command="shoal plan --claim 40",
        figures=(
            figure("slots as published", "slots", len(pairs), sum(ours == theirs for ours, theirs in pairs), "pack, replicate, pack", "EPLB README"),
        ),
    )  # fmt: skip
