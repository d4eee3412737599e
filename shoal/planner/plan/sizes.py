"""Figures that follow from the model alone: parameters, cache, files, operations."""

from collections.abc import Iterator

from shoal.config import ModelConfig
from shoal.planner.counts import (
    cache_elements_per_token,
    default_gqa_groups,
    gqa_cache_bytes_per_token,
    mha_cache_bytes_per_token,
    parameter_counts,
    prefill_flops,
    training_flops_per_token,
)
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.question import Question
from shoal.planner.rivals import Rival, fp8_checkpoint

_V3 = "DeepSeek-V3 report §2, §4.2"


def size_figures(question: Question) -> Iterator[Figure]:
    """All of them."""
    yield from _parameter_figures(question.model)
    yield from _cache_figures(question)
    yield from _file_figures(question.model)
    yield from _operation_figures(question)


def parameters_by_part(model: Rival) -> dict[str, int]:
    """Disjoint parts that add up to everything stored; empty where the shape is not known to us."""
    if model.config is None:
        return {}
    parts = parameter_counts(model.config).by_part()
    extra = round(model.total_params) - parameter_counts(model.config).total
    return {**parts, "others": extra} if extra else parts


def files_by_format(model: Rival) -> dict[str, int]:
    """Bytes of `checkpoint_bytes_fp8` by stored format; empty where the plan does not know that figure."""
    if model.config is None or model.is_sparse:
        return {}
    files = fp8_checkpoint(model.config)
    return {
        "fp8_weights": files.fp8_bytes,
        "float32_scales": files.scale_bytes,
        "bf16": files.bf16_bytes,
        "float32": files.fp32_bytes,
    }


def _parameter_figures(model: Rival) -> Iterator[Figure]:
    yield Figure(
        name="total_params",
        label="parameters",
        value=round(model.total_params),
        unit="parameters",
        formula="embedding + head + layers x (attention + norms) + dense layers x FFN + MoE layers x (router + experts), "
        "multi-token-prediction modules left out",
        source=model.source,
        note=model.note,
    )
    yield Figure(
        name="active_params",
        label="parameters that multiply each token",
        value=round(model.active_params),
        unit="parameters",
        formula="total_params with only the chosen and the shared experts, without the input embedding, which is looked up",
        source=f"DeepSeek's convention ({_V3}); {model.source}",
        note=model.note,
    )
    if model.config is not None:
        counts = parameter_counts(model.config)
        yield Figure(
            name="mtp_params",
            label="parameters of multi-token-prediction modules",
            value=counts.mtp,
            unit="parameters",
            formula="modules x (one layer + 2 hidden^2 + 3 hidden); embedding and head are shared",
            source="DeepSeek-V3 §2.2",
        )


def _cache_figures(question: Question) -> Iterator[Figure]:
    model, config = question.model, question.model.config
    formula = (
        "layers x (kv_lora_rank + qk_rope_head_dim) x 2 bytes"
        if _is_latent(config)
        else "2 x heads x width x layers x 2"
    )
    if config is None or model.is_sparse:
        formula = "sum over kinds of entries: copies x bytes of an entry / tokens in it, as served"
    yield Figure(
        name="kv_bytes_per_token",
        label="cache of one token",
        value=_whole(model.kv_bytes_per_token()),
        unit="bytes",
        formula=formula,
        source=f"DeepSeek-V2 table 1; {model.source}",
        note=model.note,
    )
    context = question.settings.whole("context_tokens")
    yield Figure(
        name="kv_bytes_per_sequence",
        label="cache of one sequence",
        value=_whole(model.kv_bytes(context)),
        unit="bytes",
        formula="sum over kinds of entries: copies x bytes of an entry x entries that context_tokens fill",
        inputs=("context_tokens",),
        source=model.source,
    )
    if config is not None:
        yield from _cache_of_others(config)


def _cache_of_others(config: ModelConfig) -> Iterator[Figure]:
    groups = default_gqa_groups(config)
    for name, label, value, how in (
        (
            "kv_bytes_per_token_mha",
            "the same with multi-head attention",
            mha_cache_bytes_per_token(config),
            "all heads",
        ),
        (
            "kv_bytes_per_token_gqa",
            f"the same with {groups} key-value heads",
            gqa_cache_bytes_per_token(config),
            f"{groups} heads",
        ),
    ):
        yield Figure(
            name=name,
            label=label,
            value=value,
            unit="bytes",
            formula=f"2 x ({how}) x width of a head x layers x 2 bytes",
            source="DeepSeek-V2 table 1",
        )
    if config.attention == "mla":
        head = 2 * config.qk_nope_head_dim * config.num_hidden_layers
        yield Figure(
            name="kv_equivalent_groups",
            label="key-value heads of GQA with the same cache",
            value=cache_elements_per_token(config) / head,
            unit="heads",
            formula="(kv_lora_rank + qk_rope_head_dim) / (2 x qk_nope_head_dim)",
            source="DeepSeek-V2 table 1: 2.25",
        )


def _file_figures(model: Rival) -> Iterator[Figure]:
    config, by_format = model.config, files_by_format(model)
    yield Figure(
        name="checkpoint_bytes_fp8",
        label="files in DeepSeek-V3's FP8 format",
        value=sum(by_format.values()) if by_format else None,
        unit="bytes",
        formula="FP8 weights of attention, FFN and experts + a float32 scale per 128 x 128 + 2 bytes for the rest + 4 for router "
        "bias; MTP modules bring copies of embedding and head",
        source="DeepSeek-V3 README_WEIGHTS; equal to the byte counts of the released files",
        note="" if by_format else model.note or "the shape is not known to us",
    )
    yield Figure(
        name="checkpoint_bytes_bf16",
        label="files in bf16",
        value=None if config is None else 2 * (parameter_counts(config).mtp + round(model.total_params)),
        unit="bytes",
        formula="2 x (total_params + mtp_params)",
        inputs=("total_params", "mtp_params") if config is not None else ("total_params",),
        source="arithmetic",
        note="" if config is not None else "the shape is not known to us",
    )


def _operation_figures(question: Question) -> Iterator[Figure]:
    model, settings = question.model, question.settings
    row, context = settings.whole("sequence_tokens"), settings.whole("context_tokens")
    yield training_operations(model, row)
    config = model.config
    if config is not None:
        yield Figure(
            name="training_flops_per_token_full_square",
            label="the same by the older convention, whole attention square",
            value=training_flops_per_token(config, row, causal=False),
            unit="FLOP",
            formula="6 x active_params + 3 x attention over sequence_tokens, not halved",
            inputs=("active_params", "sequence_tokens"),
            source="ISCA 2025 table 4 gives both",
        )
        prompt = settings.whole("prompt_tokens")
        yield Figure(
            name="prefill_flops_per_token",
            label="operations to read one prompt token",
            value=prefill_flops(config, prompt) / prompt,
            note="whole attention; the selection of the indexer is not modelled" if model.is_sparse else "",
            unit="FLOP",
            formula="2 x active_params without head + attention over half of prompt_tokens, expanded form; head once",
            inputs=("active_params", "prompt_tokens"),
            source="arithmetic on the config",
        )
    if all(part.heads is not None for part in model.cache):
        yield Figure(
            name="decode_flops_per_token",
            label="operations to write one token",
            value=model.decode_flops(context).total,
            unit="FLOP",
            formula="2 x active_params + 2 x heads x (score and sum widths, absorbed form) x entries read x layers",
            inputs=("active_params", "context_tokens"),
            source="DeepSeek-V2 appendix C (absorbed form); " + model.source,
        )


def training_operations(model: Rival, row_tokens: int) -> Figure:
    """Operations of one trained token; where the shape is not known, without attention and said so."""
    config = model.config
    extra = 0.0 if config is None else 6 * (model.active_params - parameter_counts(config).active)
    note = "attention left out: its shape is not known to us" if config is None else ""
    if config is not None and model.is_sparse:
        note = "whole attention, as before sparse training; the indexer's own operations left out"
    value = 6 * model.active_params if config is None else training_flops_per_token(config, row_tokens) + extra
    return Figure(
        name="training_flops_per_token",
        label="operations to train on one token",
        value=value,
        unit="FLOP",
        formula="6 x active_params + 3 x 2 x heads x (qk + v widths) x sequence_tokens / 2 x layers (causal)",
        inputs=("active_params", "sequence_tokens"),
        source="ISCA 2025 table 2: 155 GFLOP for V2, 250 for V3",
        note=note,
    )


def _is_latent(config: ModelConfig | None) -> bool:
    return config is not None and config.attention == "mla"


def _whole(value: float) -> int | float:
    return int(value) if value == int(value) else value
