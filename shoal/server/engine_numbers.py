"""The serving engine's counters under the names that dashboards made for vLLM know (its `v1/metrics/loggers.py`, 0.32).

Where a name of ours has no counterpart there it is formed the same way: `kv_pages_*`, `spoilt_units`.
"""

from shoal.engine.disk_cache import DiskStats
from shoal.engine.prefix_cache import UNIT_TOKENS
from shoal.engine.serving import ServingStats
from shoal.server.metrics import Number


def serving_numbers(stats: ServingStats) -> dict[str, Number]:
    """Current numbers by name without prefix; those that end in `_total` are counters."""
    numbers: dict[str, Number] = {
        "num_requests_running": stats.running,
        "num_requests_waiting": stats.waiting,
        "num_preemptions_total": stats.preemptions,
        "kv_cache_usage_perc": stats.pages_in_use / stats.pages_total,
        "kv_pages_in_use": stats.pages_in_use,
        "kv_pages_cached": stats.pages_idle,
        "kv_pages_free": stats.pages_free,
        "prompt_tokens_total": stats.prompt_tokens,
        "generation_tokens_total": stats.generated_tokens,
        "iterations_total": stats.steps,
        "prefix_cache_queries_total": stats.prompt_tokens,
        "prefix_cache_hits_total": stats.found_tokens,
        "corrupted_requests_total": stats.corrupted,
        "spoilt_units_total": stats.spoilt_units,
    }
    return numbers | _speculation(stats) | (_disk(stats.disk) if stats.disk else {})


def _speculation(stats: ServingStats) -> dict[str, Number]:
    if not stats.drafted:
        return {}
    return {
        "spec_decode_num_drafts_total": stats.drafted[0],
        "spec_decode_num_draft_tokens_total": sum(stats.drafted),
        "spec_decode_num_accepted_tokens_total": sum(stats.accepted),
        "spec_decode_num_draft_tokens_per_pos_total": ("position", _by_place(stats.drafted)),
        "spec_decode_num_accepted_tokens_per_pos_total": ("position", _by_place(stats.accepted)),
    }


def _disk(disk: DiskStats) -> dict[str, Number]:
    return {
        "external_prefix_cache_queries_total": (disk.hits + disk.misses) * UNIT_TOKENS,
        "external_prefix_cache_hits_total": disk.hits * UNIT_TOKENS,
        "disk_units_written_total": disk.written,
        "disk_units_dropped_total": disk.dropped,
        "disk_units_damaged_total": disk.damaged,
        "disk_units_deleted_total": disk.deleted,
    }


def _by_place(counts: tuple[int, ...]) -> dict[str, float]:
    return {str(place): count for place, count in enumerate(counts)}
