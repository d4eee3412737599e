"""The models to plan and to compare with: DeepSeek's V3 to V4.1, and the dense ones they are usually held against.

Reproduced: "Insights into DeepSeek-V3" (ISCA 2025) table 1 exactly, the three byte counts of V3's released FP8 files exactly,
V4's 10 % and 7 % of V3.2's cache and V4.1's 890 bytes per token. V4's and V4.1's layer counts, head counts and precision
weights are second-hand quotations of their reports; each entry says so. `not_recomputed` lists what cannot be had from
published inputs, in words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean
from shoal.planner.counts import training_flops_per_token
from shoal.planner.published_figure import NotRecomputed
from shoal.planner.rivals import CachePart, Rival, index_keys, rival_of, with_indexer
from shoal.presets import PRESETS, v3


@dataclass(frozen=True, kw_only=True)
class KvCurve:
    """Cache of one sequence against its length."""

    name: str
    context_tokens: tuple[int, ...]
    kv_bytes: tuple[float, ...]


def kv_bytes_over_context(rivals: Iterable[str | Rival], context_tokens: Sequence[int]) -> tuple[KvCurve, ...]:
    """The curves to draw, one per model, in the order asked for.

    Args:
        rivals: names that `rival` knows, or entries of your own.
    """
    contexts = tuple(context_tokens)
    if not contexts:
        raise ConfigError("no context lengths were given; name at least one, such as 4096.")
    models = [rival(one) if isinstance(one, str) else one for one in rivals]
    return tuple(
        KvCurve(name=one.name, context_tokens=contexts, kv_bytes=tuple(one.kv_bytes(tokens) for tokens in contexts))
        for one in models
    )


def not_recomputed() -> tuple[NotRecomputed, ...]:
    """Published figures about cache and size that stay open, with what we get instead."""
    latent, grouped = PRESETS["v2"].cache_width * 60, RIVALS["deepseek-67b"].kv_elements(1)
    ratio = RIVALS["llama-3.1-405b"].kv_bytes(1) / RIVALS["v3"].kv_bytes(1)
    dense = [
        training_flops_per_token(config, 4096) / 1e9
        for config in (RIVALS[name].config for name in ("qwen2.5-72b", "llama-3.1-405b"))
        if config is not None
    ]
    return (
        NotRecomputed(
            figure="KV cache of DeepSeek-V2 against DeepSeek 67B",
            published="-93.3 % (DeepSeek-V2 abstract)",
            ours=f"-{100 * (1 - latent / grouped):.1f} % at equal precision, -{100 * (1 - latent * 6 / (grouped * 16)):.2f} % "
            "if V2's cache has 6 bits and the other's 16",
            why="the paper does not state the arithmetic; only its own 6-bit cache quantisation gives the figure, so MLA alone "
            "does not",
        ),
        NotRecomputed(
            figure="training FLOPs per token of Qwen2.5-72B and LLaMA-3.1-405B",
            published="394 and 2448 GFLOPs (ISCA 2025 table 2)",
            ours=f"{dense[0]:.1f} and {dense[1]:.1f} GFLOPs",
            why="the formula that gives both mixture-of-experts rows of the table does not give its dense rows",
        ),
        NotRecomputed(
            figure="KV cache of LLaMA-3.1-405B against DeepSeek-V3",
            published="7.28 times (ISCA 2025 table 1)",
            ours=f"{ratio:.2f} times",
            why="the table's own bytes, 516.096 and 70.272 KB, have this ratio; the printed multiplier is off",
        ),
    )


def rival(name: str) -> Rival:
    """A published model by its name, `RIVALS` first, then our own presets.

    Raises:
        ConfigError: there is none; lists the names there are.
    """
    if name in RIVALS:
        return RIVALS[name]
    if name in PRESETS:
        return rival_of(name, PRESETS[name], source="preset of that name")
    known = [*RIVALS, *PRESETS]
    raise ConfigError(f"unknown model {name!r}{did_you_mean(name, known)}; known are {', '.join(known)}.")


def _dense(
    layers: int, hidden: int, heads: int, kv_heads: int, intermediate: int, vocabulary: int, positions: int = 4096
) -> ModelConfig:
    return ModelConfig(
        max_position_embeddings=positions,
        vocab_size=vocabulary,
        hidden_size=hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        intermediate_size=intermediate,
        attention="gqa",
    )


def _compressed(
    name: str,
    copies: int,
    heads: int,
    *,
    tokens_per_entry: int = 1,
    window_tokens: int | None = None,
    most_entries_read: int | None = None,
) -> CachePart:
    """Entries of V4's attention: 448 e4m3, 64 bf16 and 8 bytes of scales, serving as key and value."""
    return CachePart(
        name=name,
        copies=copies,
        elements_per_entry=512,
        bytes_per_entry=584,
        tokens_per_entry=tokens_per_entry,
        window_tokens=window_tokens,
        heads=heads,
        width=2 * 512,
        most_entries_read=most_entries_read,
    )


def _v4(name: str, *, layers: int, sparse: int, heavy: int, heads: int, top: int, params: tuple[float, float]) -> Rival:
    """V4's hybrid: `sparse` layers of CSA, `heavy` layers of HCA, a window in every layer."""
    return Rival(
        name=name,
        cache=(
            _compressed("compressed sparse", sparse, heads, tokens_per_entry=4, most_entries_read=top),
            index_keys(copies=sparse, bytes_per_entry=68, tokens_per_entry=4, precision="fp4"),
            _compressed("heavily compressed", heavy, heads, tokens_per_entry=128),
            _compressed("window", layers, heads, window_tokens=128),
        ),
        total_params=params[0],
        active_params=params[1],
        checkpoint_bytes=None,
        linear_precision="fp8",
        source="DeepSeek-V4 report (arXiv 2606.19348), layer and head counts second-hand; FlashMLA (584 bytes per entry)",
        note="released file sizes not known to us: the shares of FP4 and FP8 weights are not in what we read",
    )


def _v4_1_flash() -> Rival:
    """Four groups of layers share one cache each: three with an entry per 2 tokens, one with an entry per token."""

    def group(name: str, copies: int, tokens_per_entry: int) -> CachePart:
        # 512 FP4 numbers with 32 bytes of scales, and an index key of 128 FP4 numbers with 4.
        return CachePart(
            name=name,
            copies=copies,
            elements_per_entry=512 + 128,
            bytes_per_entry=256 + 32 + 68,
            tokens_per_entry=tokens_per_entry,
            precision="fp4",
        )

    return Rival(
        name="v4.1-flash",
        cache=(group("pairs of tokens", 3, 2), group("single tokens", 1, 1)),
        total_params=552e9,
        active_params=16e9,
        checkpoint_bytes=None,
        linear_precision="fp8",
        source="DeepSeek-V4.1-Flash report (arXiv 2609.19969): 890 bytes per token from its abstract, the rest second-hand",
        note="global cache only, the windows' share is not known to us, nor are head counts and file sizes; active parameters of "
        "decoding (8B in prefill); the 196B of Engram tables are not counted",
    )


_GQA_SOURCE = "config.json of the release"

RIVALS: dict[str, Rival] = {
    one.name: one
    for one in (
        rival_of("v3", v3(), source="DeepSeek-V3 report and config.json", released_as="fp8"),
        with_indexer(
            "v3.2",
            v3(),
            (64, 128, 2048),
            "deepseek-ai/DeepSeek-V3.2-Exp inference/model.py (indexer); FlashMLA (656 bytes per latent)",
            "active parameters without the indexers' 0.85B, as V4's report compares; the size of the released files was not "
            "read, it is V3's and about 0.9 GB of indexers; config has no indexer",
        ),
        _v4("v4-pro", layers=61, sparse=30, heavy=31, heads=128, top=1024, params=(1.6e12, 49e9)),
        _v4("v4-flash", layers=43, sparse=21, heavy=20, heads=64, top=512, params=(284e9, 13e9)),
        _v4_1_flash(),
        rival_of(
            "qwen2.5-72b",
            _dense(80, 8192, 64, 8, 29568, 152064, positions=32768),
            source=_GQA_SOURCE,
            extra_params=80 * (64 + 2 * 8) * 128,
            note="extra parameters are the biases of query, key and value, which ModelConfig lacks",
        ),
        rival_of("llama-3.1-405b", _dense(126, 16384, 128, 8, 53248, 128256, positions=131072), source=_GQA_SOURCE),
        rival_of(
            "llama-2-7b", _dense(32, 4096, 32, 32, 11008, 32000), source=_GQA_SOURCE, note="plain multi-head attention"
        ),
        rival_of(
            "deepseek-67b",
            _dense(95, 8192, 64, 8, 22016, 102400),
            source="DeepSeek LLM report (arXiv 2401.02954) and config.json, second-hand",
        ),
    )
}
"""Published models by name; `rival` knows the presets too."""
