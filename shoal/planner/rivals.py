"""What other published models keep per token and do with it, so that "a small cache" can be seen beside theirs.

Every attention here is a list of `CachePart`: entries of some bytes, one per token or one per group of tokens, for the whole
context or for a window, and what a new token reads and multiplies of them. That covers MHA and GQA (keys and values), MLA (one
latent), DeepSeek-V3.2's lightning indexer (a second, thin cache that picks 2048 latents) and V4's hybrids: compressed sparse
attention (an entry per 4 tokens, the best 1024 or 512 read), heavily compressed attention (an entry per 128 tokens, all
read) and a window of 128 tokens in every layer. Bytes per token that grow with the context are then a slope, not a constant.

Reproduced: "Insights into DeepSeek-V3" (ISCA 2025) table 1 exactly, the three byte counts of V3's released FP8 files exactly,
V4's 10 % and 7 % of V3.2's cache and V4.1's 890 bytes per token. V4's and V4.1's layer counts, head counts and precision
weights are second-hand quotations of their reports; each entry says so. `not_recomputed` lists what cannot be had from
published inputs, in words.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError, did_you_mean
from shoal.planner.counts import parameter_counts, training_flops_per_token
from shoal.planner.published_figure import NotRecomputed
from shoal.presets import PRESETS, v3

NumberFormat = Literal["bf16", "fp8", "fp4"]
"""What the published models multiply in."""

BF16_EQUIVALENT: dict[NumberFormat, float] = {"bf16": 1.0, "fp8": 0.5, "fp4": 0.25}
"""Time of an operation relative to one in bf16, by which V4's report weighs its FLOPs (second-hand)."""

FP8_BLOCK = 128
"""Rows and columns of the square that shares one scale in V3's released files."""


@dataclass(frozen=True, kw_only=True)
class CachePart:
    """One kind of cached entry, and what a new token does with it."""

    name: str
    copies: int
    """Layers that keep such entries, or groups of layers that share them."""
    elements_per_entry: int
    bytes_per_entry: float
    """As served: codes, scales and padding."""
    tokens_per_entry: int = 1
    window_tokens: int | None = None
    """Only so many last tokens are kept; None keeps all."""
    heads: int | None = None
    """Query heads that visit an entry; None where that is not known."""
    width: int = 0
    """Multiplications per head and entry: score and weighted sum; the score alone in an indexer."""
    most_entries_read: int | None = None
    """What a selection leaves per copy; None reads all."""
    precision: NumberFormat = "bf16"
    is_indexer: bool = False

    def entries(self, context_tokens: int) -> int:
        """Entries of one copy; a group of tokens counts when it is full, until then the window holds its tokens."""
        kept = context_tokens if self.window_tokens is None else min(context_tokens, self.window_tokens)
        return kept // self.tokens_per_entry

    def entries_read(self, context_tokens: int) -> int:
        """Entries of one copy that a new token multiplies with."""
        entries = self.entries(context_tokens)
        return entries if self.most_entries_read is None else min(entries, self.most_entries_read)

    def decode_flops(self, context_tokens: int) -> float:
        """Operations of one new token over all copies.

        Raises:
            ConfigError: the number of heads is not known.
        """
        if self.heads is None:
            raise ConfigError(
                f"the heads that read {self.name!r} are not known to us, so its operations cannot be counted."
            )
        return 2.0 * self.copies * self.heads * self.width * self.entries_read(context_tokens)


@dataclass(frozen=True, kw_only=True)
class DecodeFlops:
    """Operations of one generated token, by what does them."""

    linear: float
    attention: float
    indexer: float
    bf16_equivalent: float
    """The three, each weighed by the precision it runs in."""

    @property
    def total(self) -> float:
        """All of them, unweighed."""
        return self.linear + self.attention + self.indexer


@dataclass(frozen=True, kw_only=True)
class Rival:
    """A published model as far as its cache, its size and its decoding go."""

    name: str
    """As on the command line."""
    cache: tuple[CachePart, ...]
    total_params: float
    """Without multi-token-prediction modules."""
    active_params: float
    """Per token, without the input embedding."""
    checkpoint_bytes: int | None
    """Of the released weights; None where `note` says why it cannot be told."""
    linear_precision: NumberFormat
    """In which the weights are multiplied."""
    config: ModelConfig | None = None
    """For everything else the planner counts; None where `ModelConfig` cannot express the model."""
    source: str
    note: str = ""

    def kv_bytes_by_part(self, context_tokens: int) -> dict[str, float]:
        """Cache of one sequence by part, as served; the sum is `kv_bytes`."""
        _check_context(context_tokens)
        return {part.name: part.copies * part.bytes_per_entry * part.entries(context_tokens) for part in self.cache}

    def kv_bytes(self, context_tokens: int) -> float:
        """Cache of one sequence, as served."""
        return sum(self.kv_bytes_by_part(context_tokens).values())

    def kv_bytes_read(self, context_tokens: int) -> float:
        """What one new token reads of it."""
        _check_context(context_tokens)
        return sum(part.copies * part.bytes_per_entry * part.entries_read(context_tokens) for part in self.cache)

    def kv_elements(self, context_tokens: int) -> int:
        """Cached numbers of one sequence; twice that is its size in bf16."""
        _check_context(context_tokens)
        return sum(part.copies * part.elements_per_entry * part.entries(context_tokens) for part in self.cache)

    def kv_bytes_per_token(self) -> float:
        """Growth per token of a long context; windows, which stop growing, are left out."""
        growing = (part for part in self.cache if part.window_tokens is None)
        return sum(part.copies * part.bytes_per_entry / part.tokens_per_entry for part in growing)

    def decode_flops(self, context_tokens: int) -> DecodeFlops:
        """Operations to generate one token after `context_tokens` cached ones.

        Raises:
            ConfigError: the model's head counts are not known.
        """
        _check_context(context_tokens)
        linear = 2.0 * self.active_params
        attention = [part for part in self.cache if not part.is_indexer]
        indexer = [part for part in self.cache if part.is_indexer]
        return DecodeFlops(
            linear=linear,
            attention=sum(part.decode_flops(context_tokens) for part in attention),
            indexer=sum(part.decode_flops(context_tokens) for part in indexer),
            bf16_equivalent=linear * BF16_EQUIVALENT[self.linear_precision]
            + sum(part.decode_flops(context_tokens) * BF16_EQUIVALENT[part.precision] for part in self.cache),
        )


@dataclass(frozen=True, kw_only=True)
class KvCurve:
    """Cache of one sequence against its length."""

    name: str
    context_tokens: tuple[int, ...]
    kv_bytes: tuple[float, ...]


@dataclass(frozen=True, kw_only=True)
class Fp8Checkpoint:
    """Bytes of a release in V3's format, by stored format."""

    fp8_bytes: int
    """Weights of attention, feed-forward layers and experts."""
    scale_bytes: int
    """One float32 for each block of 128 by 128."""
    bf16_bytes: int
    """Embedding and head (the MTP module brings its own copies), router, norms, and the joint of the MTP module."""
    fp32_bytes: int
    """Selection bias of the router."""

    @property
    def total_bytes(self) -> int:
        """The four together."""
        return self.fp8_bytes + self.scale_bytes + self.bf16_bytes + self.fp32_bytes


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


def rival_of(
    name: str,
    config: ModelConfig,
    *,
    source: str,
    extra_params: int = 0,
    cache_bytes_per_element: float = 2.0,
    released_as: Literal["bf16", "fp8"] = "bf16",
    note: str = "",
) -> Rival:
    """Any config beside the published ones.

    Args:
        extra_params: what `config` cannot say, such as biases; taken to be active.
        cache_bytes_per_element: 2 is bf16; 0.75 is the six-bit cache that DeepSeek-V2 was served with.
        released_as: format of the weights on disk; fp8 is V3's.
    """
    if not 0 < cache_bytes_per_element <= 8:
        raise ConfigError(
            f"cache_bytes_per_element={cache_bytes_per_element} must be above 0 and at most 8; bf16 is 2."
        )
    counts = parameter_counts(config)
    is_latent = config.attention == "mla"
    width = 2 * config.kv_lora_rank + config.qk_rope_head_dim if is_latent else 2 * config.gqa_head_dim
    part = CachePart(
        name="latents" if is_latent else "keys and values",
        copies=config.num_hidden_layers,
        elements_per_entry=config.cache_width,
        bytes_per_entry=config.cache_width * cache_bytes_per_element,
        heads=config.num_attention_heads,
        width=width,
    )
    stored_bytes = 2 * (counts.stored + extra_params)
    return Rival(
        name=name,
        cache=(part,),
        total_params=counts.total + extra_params,
        active_params=counts.active + extra_params,
        checkpoint_bytes=stored_bytes if released_as == "bf16" else fp8_checkpoint(config).total_bytes,
        linear_precision=released_as,
        config=config,
        source=source,
        note=note,
    )


def fp8_checkpoint(config: ModelConfig) -> Fp8Checkpoint:
    """What `config` weighs released the way DeepSeek-V3 was, MTP modules with their own embedding and head included."""
    counts, depth = parameter_counts(config), config.num_nextn_predict_layers
    layers = config.num_hidden_layers + depth
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(layers))
    experts = (config.n_routed_experts or 0) + config.n_shared_experts
    shapes = [(layers, shape) for shape in _attention_shapes(config)]
    shapes += [((layers - moe_layers) * 3, (config.intermediate_size, config.hidden_size))]
    shapes += [(moe_layers * experts * 3, (config.moe_intermediate_size, config.hidden_size))]
    fp8 = sum(count * rows * columns for count, (rows, columns) in shapes)
    scales = sum(count * -(-rows // FP8_BLOCK) * -(-columns // FP8_BLOCK) for count, (rows, columns) in shapes)
    bias = moe_layers * (config.n_routed_experts or 0) if config.topk_method == "noaux_tc" else 0
    copied = depth * (counts.embedding + (counts.head or counts.embedding))
    return Fp8Checkpoint(
        fp8_bytes=fp8,
        scale_bytes=4 * scales,
        bf16_bytes=2 * (counts.stored + copied - fp8 - bias),
        fp32_bytes=4 * bias,
    )


def _attention_shapes(config: ModelConfig) -> list[tuple[int, int]]:
    """Rows and columns of every matrix in one attention."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.attention == "gqa":
        query, shared = heads * config.gqa_head_dim, config.kv_heads * config.gqa_head_dim
        return [(query, hidden), (shared, hidden), (shared, hidden), (hidden, query)]
    query = heads * config.qk_head_dim
    shapes = [(query, hidden)]
    if config.q_lora_rank is not None:
        shapes = [(config.q_lora_rank, hidden), (query, config.q_lora_rank)]
    return [
        *shapes,
        (config.kv_lora_rank + config.qk_rope_head_dim, hidden),
        (heads * (config.qk_nope_head_dim + config.v_head_dim), config.kv_lora_rank),
        (hidden, heads * config.v_head_dim),
    ]


def _check_context(context_tokens: int) -> None:
    if type(context_tokens) is not int or context_tokens < 0:
        raise ConfigError(f"context_tokens={context_tokens!r} must be a whole number of tokens, zero or more.")


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


def with_indexer(name: str, config: ModelConfig, indexer: tuple[int, int, int], source: str, note: str = "") -> Rival:
    """Latent attention with DeepSeek-V3.2's lightning indexer, served in its FP8 layout.

    Args:
        indexer: query heads, their width, and latents that the selection leaves.
    """
    heads, width, top = indexer
    counts, layers, latent = parameter_counts(config), config.num_hidden_layers, config.kv_lora_rank
    query_from = config.q_lora_rank or config.hidden_size
    # Query from the query latent, one key, a LayerNorm with bias, and a weight per head.
    indexer_params = layers * (query_from * heads * width + config.hidden_size * (width + heads) + 2 * width)
    latents = CachePart(
        name="latents",
        copies=layers,
        elements_per_entry=config.cache_width,
        # FP8 codes, a float32 scale for each 128, the rotary part in bf16: 656 bytes for V3's widths.
        bytes_per_entry=latent + 4 * -(-latent // 128) + 2 * config.qk_rope_head_dim,
        heads=config.num_attention_heads,
        width=2 * latent + config.qk_rope_head_dim,
        most_entries_read=top,
    )
    keys = _index_keys(copies=layers, bytes_per_entry=width + 4, precision="fp8", heads=heads, width=width)
    return Rival(
        name=name,
        cache=(latents, keys),
        total_params=counts.total + indexer_params,
        active_params=counts.active,
        checkpoint_bytes=None,
        linear_precision="fp8",
        config=config,
        source=source,
        note=note
        or "active parameters without the indexers', as V4's report compares; the FP8 layout of indexers in files is not counted",
    )


def _index_keys(
    *,
    copies: int,
    bytes_per_entry: int,
    tokens_per_entry: int = 1,
    precision: NumberFormat,
    heads: int = 64,
    width: int = 128,
) -> CachePart:
    """Keys of a lightning indexer: every one is scored."""
    return CachePart(
        name="index keys",
        copies=copies,
        elements_per_entry=width,
        bytes_per_entry=bytes_per_entry,
        tokens_per_entry=tokens_per_entry,
        heads=heads,
        width=width,
        precision=precision,
        is_indexer=True,
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
            _index_keys(copies=sparse, bytes_per_entry=68, tokens_per_entry=4, precision="fp4"),
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
