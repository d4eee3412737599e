"""A published model as far as its cache, its size and its decoding go, whatever its attention.

Every attention here is a list of `CachePart`: entries of some bytes, one per token or one per group of tokens, for the whole
context or for a window, and what a new token reads and multiplies of them. That covers MHA and GQA (keys and values), MLA (one
latent), DeepSeek-V3.2's lightning indexer (a second, thin cache that picks 2048 latents) and V4's hybrids: compressed sparse
attention (an entry per 4 tokens, the best 1024 or 512 read), heavily compressed attention (an entry per 128 tokens, all
read) and a window of 128 tokens in every layer. Bytes per token that grow with the context are then a slope, not a constant.

The models themselves are in `published_models.py`.
"""

from dataclasses import dataclass
from typing import Literal

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.counts import parameter_counts

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

    @property
    def is_sparse(self) -> bool:
        """Whether a new token reads a selection or groups of what is cached, which `config` cannot say."""
        return len(self.cache) > 1

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
    keys = index_keys(copies=layers, bytes_per_entry=width + 4, precision="fp8", heads=heads, width=width)
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


def index_keys(
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
