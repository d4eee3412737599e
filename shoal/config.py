"""`ModelConfig`: one frozen description of a model, in the published config.json keys.

DeepSeek's own names (`kv_lora_rank`, `n_routed_experts`, ...) are used everywhere, so that a config.json, the code and
the papers speak one language (`docs/glossary.md` ties them together). Dense, GQA and MHA baselines use the same class:
`attention="gqa"` swaps the attention, `n_routed_experts=None` the experts.
"""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from shoal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class YarnConfig:
    """YaRN context extension (V2 §3.1.4, V3 §4.3), the `rope_scaling` object of config.json."""

    factor: float
    original_max_position_embeddings: int
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float = 1.0
    mscale_all_dim: float = 0.0

    def __post_init__(self) -> None:
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor={self.factor} would shorten the context; use 1 or more.")
        if self.original_max_position_embeddings < 1:
            raise ConfigError("rope_scaling.original_max_position_embeddings must be positive.")

    def softmax_multiplier(self) -> float:
        """The square of the YaRN magnitude correction that attention scores are multiplied by."""
        if not self.mscale_all_dim or self.factor <= 1:
            return 1.0
        return (0.1 * self.mscale_all_dim * math.log(self.factor) + 1.0) ** 2


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """Every size of a model. Fields keep the published config.json keys; departures say so."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    """Hidden width of a dense feed-forward layer."""
    max_position_embeddings: int = 4096

    attention: Literal["mla", "gqa"] = "mla"
    """Shoal's own key: latent attention, or the grouped-query baseline (MHA when the two head counts are equal)."""
    num_key_value_heads: int | None = None
    """GQA only; None means as many as `num_attention_heads`."""
    head_dim: int | None = None
    """GQA only; None means `hidden_size // num_attention_heads`."""
    q_lora_rank: int | None = None
    """Width of the query latent; None means no query compression (V2-Lite)."""
    kv_lora_rank: int = 512
    """Width of the cached key-value latent."""
    qk_nope_head_dim: int = 128
    qk_rope_head_dim: int = 64
    v_head_dim: int = 128

    n_routed_experts: int | None = None
    """None makes every layer dense."""
    n_shared_experts: int = 1
    num_experts_per_tok: int = 8
    moe_intermediate_size: int = 0
    """Hidden width of one expert."""
    first_k_dense_replace: int = 1
    """The first layers stay dense."""
    n_group: int = 1
    topk_group: int = 1
    scoring_func: Literal["sigmoid", "softmax"] = "sigmoid"
    topk_method: Literal["noaux_tc", "greedy", "group_limited_greedy"] = "noaux_tc"
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0

    num_nextn_predict_layers: int = 0
    """Depth of multi-token prediction."""
    tie_word_embeddings: bool = False
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    rope_theta: float = 10000.0
    rope_scaling: YarnConfig | None = None
    bos_token_id: int = 0
    eos_token_id: int = 1

    def __post_init__(self) -> None:
        self._check_sizes()
        self._check_attention()
        if self.n_routed_experts is not None:
            self._check_experts(self.n_routed_experts)

    def _check_sizes(self) -> None:
        for name in (
            "vocab_size",
            "hidden_size",
            "num_hidden_layers",
            "num_attention_heads",
            "intermediate_size",
            "max_position_embeddings",
        ):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
        if not 0 <= self.num_nextn_predict_layers <= 4:
            raise ConfigError(f"num_nextn_predict_layers={self.num_nextn_predict_layers} is outside 0..4; V3 uses 1.")
        for name in ("bos_token_id", "eos_token_id"):
            if not 0 <= getattr(self, name) < self.vocab_size:
                raise ConfigError(f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size}.")

    def _check_attention(self) -> None:
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
            if self.qk_rope_head_dim % 2:
                raise ConfigError(
                    f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rotary pairs need an even size, use {self.qk_rope_head_dim + 1}."
                )
            return
        if self.attention != "gqa":
            raise ConfigError(f"attention={self.attention!r} is unknown; use 'mla' or 'gqa'.")
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not split over num_attention_heads={self.num_attention_heads}; "
                f"set head_dim, or use a multiple of {self.num_attention_heads}."
            )
        if self.gqa_head_dim % 2:
            raise ConfigError(f"head_dim={self.gqa_head_dim} is odd; rotary pairs need an even size.")
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of num_key_value_heads={self.kv_heads}."
            )

    def _check_experts(self, experts: int) -> None:
        if not 1 <= self.num_experts_per_tok <= experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be in 1..n_routed_experts={experts}."
            )
        if self.moe_intermediate_size < 1:
            raise ConfigError(
                "moe_intermediate_size must be given for a mixture of experts; it is the width of one expert."
            )
        if self.n_group < 1 or experts % self.n_group:
            divisors = [n for n in range(1, min(experts, 16) + 1) if experts % n == 0]
            raise ConfigError(
                f"n_routed_experts={experts} is not divisible by n_group={self.n_group}; n_group may be one of {divisors}."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(f"topk_group={self.topk_group} must be in 1..n_group={self.n_group}.")
        reachable = experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts that topk_group={self.topk_group} groups hold."
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and experts // self.n_group < 2:
            raise ConfigError("noaux_tc scores a group by its best two experts; use groups of at least 2.")

    @property
    def kv_heads(self) -> int:
        """Key-value heads of the GQA baseline."""
        return self.num_key_value_heads or self.num_attention_heads

    @property
    def gqa_head_dim(self) -> int:
        """Head size of the GQA baseline."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def qk_head_dim(self) -> int:
        """Width of one latent-attention query: plain part and rotary part."""
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def cache_width(self) -> int:
        """Numbers cached per token and layer: `kv_lora_rank + qk_rope_head_dim` for MLA, keys and values for GQA."""
        if self.attention == "mla":
            return self.kv_lora_rank + self.qk_rope_head_dim
        return 2 * self.kv_heads * self.gqa_head_dim

    def is_moe_layer(self, layer: int) -> bool:
        """Whether layer `layer` (MTP layers count on from `num_hidden_layers`) has experts."""
        return self.n_routed_experts is not None and layer >= self.first_k_dense_replace

    def replace(self, **changes: Any) -> "ModelConfig":
        """A copy with some fields changed; unknown names raise ConfigError."""
        known = {field.name for field in dataclasses.fields(self)}
        for name in changes:
            if name not in known:
                raise ConfigError(f"unknown model key {name!r}; known keys: {', '.join(sorted(known))}.")
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; unknown keys raise ConfigError. For published config.json see `checkpoint.hf_format`."""
        values = dict(values)
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(values) - known)
        if unknown:
            raise ConfigError(f"unknown model key {unknown[0]!r}; known keys: {', '.join(sorted(known))}.")
        if isinstance(values.get("rope_scaling"), Mapping):
            values["rope_scaling"] = YarnConfig(**values["rope_scaling"])
        try:
            return cls(**values)
        except TypeError as error:
            raise ConfigError(f"incomplete model config: {error}.") from error
