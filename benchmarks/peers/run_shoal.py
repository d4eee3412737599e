"""Shoal on the preset, one weight format: `run_shoal.py PRESET FORMAT`. Limits are measured by the same process.

Prompts are read fast, with keys and values expanded as the peers do it, and exactly, so that bits do not depend on the cut.
"""

import sys

from points import DECODE, PREFILL, report

from shoal.recipes import bench as recipe
from shoal.recipes.bench import bench_decode, bench_prefill, load_packed

recipe.MIN_SECONDS = 1.0  # turns are short and come often
preset, weights = sys.argv[1:3]
exact = load_packed(None, preset, weights, max(*PREFILL, *(length for _, length in DECODE)) + recipe.NEW_TOKENS)
KEPT = ("limit_tokens_per_s", "limit_fraction", "bandwidth_gb_s", "peak_rss_bytes")
for batch, length in DECODE:
    result = bench_decode(exact, batch=batch, context=length)
    kept = {key: result[key] for key in (*KEPT, "measured_bandwidth_gb_s")}
    report("decode", result["tokens_per_s"], batch=batch, context=length, **kept)
fast = load_packed(None, preset, weights, max(PREFILL), fast_prefill=True)
for kind, bench in (("prefill", fast), ("exact prefill", exact)):
    for length in PREFILL:
        result = bench_prefill(bench, tokens=length)
        kept = {key: result[key] for key in (*KEPT, "measured_gflops")}
        report(kind, result["tokens_per_s"], tokens=length, **kept)
