"""Claims that follow from the models' configs: parameters, files, cache, operations, states."""

from shoal.planner.activations import recipe
from shoal.planner.claims.claim import Claim, figure
from shoal.planner.counts import (
    cache_bytes_per_token,
    cache_elements_per_token,
    mha_cache_bytes_per_token,
    parameter_counts,
    training_flops_per_token,
)
from shoal.planner.published_models import rival
from shoal.planner.rivals import fp8_checkpoint
from shoal.presets import v2, v2_lite, v3

MILLION = 2**20
"""Tokens of the "1M" contexts."""
_V2, _V3, _ISCA = "DeepSeek-V2", "DeepSeek-V3", "ISCA 2025"
_V4 = "DeepSeek-V4 report, second-hand"


def size_claims() -> tuple[Claim, ...]:
    """In the order of the table."""
    return (*_parameters(), *_caches(), *_operations(), *_formats(), *_successors())


def _parameters() -> tuple[Claim, ...]:
    three, two, lite = parameter_counts(v3()), parameter_counts(v2()), parameter_counts(v2_lite())
    files, copied = fp8_checkpoint(v3()), 2 * v3().vocab_size * v3().hidden_size
    readme = (
        "DeepSeek-V3 README; byte counts of the released files as a reader of their headers gives them, second-hand"
    )
    return (
        Claim(
            number=1,
            title="DeepSeek-V3 has 671B parameters, 37B active",
            command="shoal plan v3 --explain total_params",
            words="active leaves out the input embedding; with it 37.55B, so the README's '36.7B including both' is not reproducible as written",
            figures=(
                figure("total", "B parameters", 671, three.total / 1e9, "sum over the config's matrices", f"{_V3} §4.2", tolerance=0.5),
                figure("active", "B parameters", 37, three.active / 1e9, "chosen and shared experts, no input embedding", f"{_V3} §4.2", tolerance=0.5),
            ),
        ),
        Claim(
            number=2,
            title="the released files hold 685B numbers, 14B of them the MTP module",
            command="shoal plan v3 --explain checkpoint_bytes_fp8",
            words="671.03 + 13.46 = 684.49: the README's 685 and 14 are rounded up",
            figures=(
                figure("numbers", "parameters", 684_489_845_504, three.stored + copied, "total + MTP block + its copies of embedding and head", readme),
                figure("MTP module", "B parameters", 14, (three.mtp + copied) / 1e9, "MTP block + copies of embedding and head", readme, tolerance=0.6),
                figure("FP8 weights", "bytes", 680_571_043_840, files.fp8_bytes, "attention, dense layers, experts", readme),
                figure("scales", "bytes", 166_161_984, files.scale_bytes, "4 x ceil(rows/128) x ceil(columns/128)", readme),
                figure("everything else", "bytes", 7_837_633_536, files.bf16_bytes + files.fp32_bytes, "2 x bf16 numbers + 4 x router bias", readme),
            ),
        ),
        Claim(
            number=3,
            title="DeepSeek-V2: 236B, 21B active; V2-Lite: 15.7B, 2.4B active",
            command="shoal plan --compare v2 v2_lite",
            figures=(
                figure("V2", "B parameters", 236, two.total / 1e9, "sum over the config's matrices", f"{_V2} §3.1.2", tolerance=0.5),
                figure("V2 active", "B parameters", 21, two.active / 1e9, "without the input embedding", f"{_V2} §3.1.2", tolerance=0.5),
                figure("V2-Lite", "B parameters", 15.7, lite.total / 1e9, "sum over the config's matrices", f"{_V2} appendix B", tolerance=0.05),
                figure("V2-Lite active", "B parameters", 2.4, lite.active / 1e9, "without the input embedding", f"{_V2} appendix B", tolerance=0.06),
            ),
        ),
    )  # fmt: skip


def _caches() -> tuple[Claim, ...]:
    table = f"{_ISCA} table 1"
    latent, lite = cache_elements_per_token(v2()), cache_elements_per_token(v2_lite())
    grouped = rival("deepseek-67b").kv_elements(1)
    ratio = rival("llama-3.1-405b").kv_bytes(1) / rival("v3").kv_bytes(1)
    small_mha = mha_cache_bytes_per_token(v2_lite()) // 2
    return (
        Claim(
            number=4,
            title="cache of one token: V3 70 KB, Qwen2.5-72B 328 KB, LLaMA-3.1-405B 516 KB",
            command="shoal plan --compare v3 qwen2.5-72b llama-3.1-405b",
            words=f"the table's multiplier 7.28 for LLaMA is not the ratio of its own bytes, which is {ratio:.2f}",
            figures=(
                figure("V3", "bytes", 70_272, cache_bytes_per_token(v3()), "61 x 576 x 2", table),
                figure("Qwen2.5-72B", "bytes", 327_680, rival("qwen2.5-72b").kv_bytes(1), "80 x 2 x 8 x 128 x 2", table),
                figure("LLaMA-3.1-405B", "bytes", 516_096, rival("llama-3.1-405b").kv_bytes(1), "126 x 2 x 8 x 128 x 2", table),
                figure("LLaMA-3.1-405B over V3", "times", 7.28, ratio, "516,096 / 70,272", table,
                       why_not="the table's own bytes have another ratio; the printed multiplier is off"),
            ),
        ),
        Claim(
            number=5,
            title="latent attention caches 14 % (small) and 4 % (large) of multi-head attention",
            command="shoal plan v2_lite --explain kv_bytes_per_token_mha",
            words="the large model's baseline has 56 heads, which is inferred from its 860.2K numbers",
            figures=(
                figure("small", "%", 14, 100 * lite / small_mha, "27 x 576 / (27 x 2 x 16 x 128)", f"{_V2} table 9", tolerance=0.5),
                figure("large", "%", 4, 100 * latent / (60 * 2 * 56 * 128), "60 x 576 / (60 x 2 x 56 x 128)", f"{_V2} table 9", tolerance=0.5),
            ),
        ),
        Claim(
            number=6,
            title="DeepSeek-V2's cache is 93.3 % smaller than DeepSeek-67B's",
            command="shoal plan --claim 6",
            words=f"not recomputable at equal precision, which gives {100 * (1 - latent / grouped):.1f} %; the paper never states the "
            "arithmetic, and only its own six-bit cache against sixteen bits gives the figure; the 67B's shape is second-hand",
            figures=(
                figure("at equal precision", "%", 93.3, 100 * (1 - latent / grouped), "1 - 34,560 / 194,560", f"{_V2} abstract",
                       why_not="latent attention alone does not give it"),
                figure("six bits against sixteen", "%", 93.3, 100 * (1 - latent * 6 / (grouped * 16)), "1 - 34,560 x 6 / (194,560 x 16)",
                       f"{_V2} abstract, reconstructed", tolerance=0.05),
            ),
        ),
        Claim(
            number=7,
            title="latent attention caches as much as GQA with 2.25 groups",
            command="shoal plan v2 --explain kv_equivalent_groups",
            figures=(figure("groups", "heads", 2.25, v2().cache_width / (2 * v2().qk_nope_head_dim), "576 / (2 x 128)", f"{_V2} table 1"),),
        ),
    )  # fmt: skip


def _operations() -> tuple[Claim, ...]:
    table = f"{_ISCA} table 2"
    dense = {name: training_flops_per_token(config, 4096) / 1e9 for name, config in
             ((name, rival(name).config) for name in ("qwen2.5-72b", "llama-3.1-405b")) if config is not None}  # fmt: skip
    why = "the formula that gives both mixture-of-experts rows does not give the dense ones, and the table states no other"
    formula = "6 x active + 3 x causal attention at 4096"
    return (
        Claim(
            number=13,
            title="training operations per token: V2 155, V3 250 GFLOP",
            command="shoal plan v3 --explain training_flops_per_token",
            figures=(
                figure("V2", "GFLOP", 155, training_flops_per_token(v2(), 4096) / 1e9, formula, table, tolerance=0.8),
                figure("V3", "GFLOP", 250, training_flops_per_token(v3(), 4096) / 1e9, formula, table, tolerance=1.25),
            ),
        ),
        Claim(
            number=14,
            title="training operations per token of dense models: Qwen2.5-72B 394, LLaMA-3.1-405B 2448 GFLOP",
            command="shoal plan llama-3.1-405b --explain training_flops_per_token",
            words=f"not recomputable: {why}",
            figures=(
                figure("Qwen2.5-72B", "GFLOP", 394, dense["qwen2.5-72b"], formula, table, why_not=why),
                figure("LLaMA-3.1-405B", "GFLOP", 2448, dense["llama-3.1-405b"], formula, table, why_not=why),
            ),
        ),
    )


def _formats() -> tuple[Claim, ...]:
    ours, usual = recipe("deepseek_fp8"), recipe("bf16")
    states = [one.master_bytes + one.gradient_bytes + one.matrix_moment_bytes for one in (ours, usual)]
    config, kept = v3(), (v3().q_lora_rank or 0) + v3().cache_width
    heads = config.num_attention_heads
    raised = heads * (config.qk_head_dim + config.qk_nope_head_dim + config.v_head_dim)
    return (
        Claim(
            number=24,
            title="dispatching tokens in FP8 halves the traffic of bf16",
            command="shoal plan --claim 24",
            words="with one float32 scale for 128 numbers it is 51.6 %",
            figures=(figure("payload", "% of bf16", 50, 100 * 1 / 2, "1 byte / 2 bytes", f"{_ISCA} §3.2"),
                     figure("with scales", "% of bf16", None, 100 * (1 + 4 / 128) / 2, "(1 + 4/128) / 2", f"{_ISCA} §3.2",
                            why_not="scales are not in the paper's figure")),
        ),
        Claim(
            number=25,
            title="Adam moments in bf16: 12 bytes of states for each parameter instead of 16",
            command="shoal plan --claim 25",
            words="that it does no harm is a training claim and not made here",
            figures=(figure("V3's recipe", "bytes", 12, states[0], "4 master + 4 gradient + 2 x 2", f"{_V3} §3.3.3"),
                     figure("the usual recipe", "bytes", 16, states[1], "4 master + 4 gradient + 2 x 4", f"{_V3} §3.3.3")),
        ),
        Claim(
            number=26,
            title="recomputing the up-projections keeps latents in the place of queries, keys and values",
            command="shoal plan --claim 26",
            figures=(figure("numbers kept", "times fewer", None, raised / kept, "(24,576 + 32,768) / 2,112 at V3's shape", f"{_V3} §3.2.3",
                            why_not="the report gives no figure"),),
        ),
        Claim(
            number=52,
            title="one cached token of one layer in FP8: 656 bytes in V3.2, 584 in V4",
            command="shoal plan --claim 52",
            figures=(
                figure("V3.2", "bytes", 656, rival("v3.2").cache[0].bytes_per_entry, "512 + 4 x 4 + 64 x 2", "FlashMLA"),
                figure("V4", "bytes", 584, rival("v4-pro").cache[0].bytes_per_entry, "448 + 64 x 2 + 8", "FlashMLA"),
            ),
        ),
    )  # fmt: skip


def _successors() -> tuple[Claim, ...]:
    before, pro, flash = (rival(name) for name in ("v3.2", "v4-pro", "v4-flash"))
    grouped = 61 * MILLION * 2 * 8 * 128 * 2
    work = [one.decode_flops(MILLION).bf16_equivalent for one in (before, pro, flash)]
    words = "layer counts and the weights of number formats are second-hand"
    return (
        Claim(
            number=53,
            title="at a million tokens V4's cache is 10 % (Pro) and 7 % (Flash) of V3.2's, and 2 % of GQA-8's",
            command="shoal plan --compare v3.2 v4-pro v4-flash --set context_tokens=1M",
            words=words,
            figures=(
                figure("V4-Pro", "%", 10, 100 * pro.kv_bytes(MILLION) / before.kv_bytes(MILLION), "sum over kinds of entries", _V4, tolerance=1),
                figure("V4-Flash", "%", 7, 100 * flash.kv_bytes(MILLION) / before.kv_bytes(MILLION), "sum over kinds of entries", _V4, tolerance=1),
                figure("V4-Pro against GQA-8 in bf16", "%", 2, 100 * pro.kv_bytes(MILLION) / grouped, "61 layers x 2 x 8 x 128 x 2", _V4, tolerance=0.1),
            ),
        ),
        Claim(
            number=54,
            title="at a million tokens V4 decodes with 27 % (Pro) and 10 % (Flash) of V3.2's operations",
            command="shoal plan --claim 54",
            words=words,
            figures=(
                figure("V4-Pro", "%", 27, 100 * work[1] / work[0], "operations weighed by number format", _V4, tolerance=1.5),
                figure("V4-Flash", "%", 10, 100 * work[2] / work[0], "operations weighed by number format", _V4, tolerance=1.5),
            ),
        ),
        Claim(
            number=55,
            title="V4.1-Flash caches 890 bytes for each token, a quarter of V4-Flash",
            command="shoal plan v4.1-flash --explain kv_bytes_per_token",
            figures=(
                figure("global cache", "bytes", 890, rival("v4.1-flash").kv_bytes_per_token(), "2.5 x (288 + 68)", "arXiv 2609.19969, abstract"),
                figure("of V4-Flash", "%", 25, 100 * rival("v4.1-flash").kv_bytes(MILLION) / flash.kv_bytes(MILLION), "at a million tokens",
                       "arXiv 2609.19969, abstract", tolerance=1),
            ),
        ),
        Claim(
            number=56,
            title="a million tokens cached in bf16: 83.9 GiB in V3.2, 9.62 GiB in V4-Pro",
            command="shoal plan --claim 56",
            figures=(
                figure("V3.2", "GiB", 83.9, before.kv_elements(MILLION) * 2 / 2**30, "61 x (576 + 128) x 2 per token", "vLLM's announcement, second-hand", tolerance=0.05),
                figure("V4-Pro", "GiB", 9.62, pro.kv_elements(MILLION) * 2 / 2**30, "numbers of all entries x 2", "vLLM's announcement, second-hand", tolerance=0.01),
            ),
        ),
    )  # fmt: skip
