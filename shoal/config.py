"""`ModelConfig`: one frozen description of a model, in the published config.json keys.

DeepSeek's own names (`kv_lora_rank`, `n_routed_experts`, ...) are used everywhere, so that a config.json, the code and
the papers speak one language (`docs/glossary.md` ties them together). Dense, GQA and MHA baselines use the same class:
`attention="gqa"` swaps the attention, `n_routed_experts=None` the experts.

A config that exists is one that a model can be built from: types, ranges and the sizes that must fit together are all
checked when it is made, so that nothing downstream checks them again.
"""

import dataclasses
import math
import types
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shoal.errors import ConfigError, did_you_mean


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
        check_types(self, prefix="rope_scaling.")
        if self.factor < 1:
            raise ConfigError(f"rope_scaling.factor={self.factor} would shorten the context; use 1 or more.")
        if self.original_max_position_embeddings < 1:
            raise ConfigError(
                f"rope_scaling.original_max_position_embeddings={self.original_max_position_embeddings} must be at least "
                "1; it is the context that the model was pretrained with."
            )
        if not self.beta_fast > self.beta_slow > 0:
            raise ConfigError(
                f"rope_scaling.beta_fast={self.beta_fast} must exceed beta_slow={self.beta_slow}, and both 0; "
                "the published values are 32 and 1."
            )
        if self.mscale < 0 or self.mscale_all_dim < 0:
            raise ConfigError(
                f"rope_scaling.mscale={self.mscale} and mscale_all_dim={self.mscale_all_dim} must not be negative; "
                "V3 uses 1 for both."
            )

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
        check_types(self)
        self._check_sizes()
        self._check_scales()
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
                raise ConfigError(
                    f"{name}={getattr(self, name)} is outside the vocabulary of {self.vocab_size}; use 0 to "
                    f"{self.vocab_size - 1}."
                )

    def _check_scales(self) -> None:
        for name in ("rms_norm_eps", "routed_scaling_factor"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name}={getattr(self, name)} must be above 0.")
        if self.initializer_range < 0:
            raise ConfigError(f"initializer_range={self.initializer_range} must not be negative; 0.02 is the default.")
        if self.rope_theta <= 1:
            raise ConfigError(f"rope_theta={self.rope_theta} must exceed 1; 10000 is the published base.")

    def _check_attention(self) -> None:
        for name in ("q_lora_rank", "num_key_value_heads", "head_dim"):
            if getattr(self, name) is not None and getattr(self, name) < 1:
                raise ConfigError(f"{name}={getattr(self, name)} must be at least 1, or None to leave it out.")
        if self.attention == "mla":
            for name in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"):
                if getattr(self, name) < 1:
                    raise ConfigError(f"{name}={getattr(self, name)} must be at least 1.")
            if self.qk_rope_head_dim % 2:
                raise ConfigError(
                    f"qk_rope_head_dim={self.qk_rope_head_dim} is odd; rotary pairs need an even size, use {self.qk_rope_head_dim + 1}."
                )
            return
        if self.head_dim is None and self.hidden_size % self.num_attention_heads:
            raise ConfigError(
                f"hidden_size={self.hidden_size} does not split over num_attention_heads={self.num_attention_heads}; "
                f"set head_dim, or use a multiple of {self.num_attention_heads}."
            )
        if self.gqa_head_dim % 2:
            raise ConfigError(
                f"head_dim={self.gqa_head_dim} is odd; rotary pairs need an even size, use {self.gqa_head_dim + 1}."
            )
        if self.num_attention_heads % self.kv_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.kv_heads}; it may be one of {_divisors(self.num_attention_heads)}."
            )

    def _check_experts(self, experts: int) -> None:
        if experts < 1:
            raise ConfigError(f"n_routed_experts={experts} must be at least 1, or None for a dense model.")
        if self.n_shared_experts < 0:
            raise ConfigError(f"n_shared_experts={self.n_shared_experts} must be 0 or more.")
        self._check_dense_layers()
        if not 1 <= self.num_experts_per_tok <= experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be in 1..n_routed_experts={experts}."
            )
        if self.moe_intermediate_size < 1:
            raise ConfigError(
                f"moe_intermediate_size={self.moe_intermediate_size} must be at least 1 for a mixture of experts; "
                "it is the width of one expert."
            )
        self._check_groups(experts)

    def _check_dense_layers(self) -> None:
        last = self.num_hidden_layers + self.num_nextn_predict_layers - 1
        if not 0 <= self.first_k_dense_replace <= last:
            raise ConfigError(
                f"first_k_dense_replace={self.first_k_dense_replace} leaves no layer for n_routed_experts="
                f"{self.n_routed_experts}; use 0 to {last}, or n_routed_experts=None for a dense model."
            )

    def _check_groups(self, experts: int) -> None:
        if self.n_group < 1 or experts % self.n_group:
            raise ConfigError(
                f"n_routed_experts={experts} is not divisible by n_group={self.n_group}; n_group may be one of "
                f"{_divisors(experts)}."
            )
        if not 1 <= self.topk_group <= self.n_group:
            raise ConfigError(f"topk_group={self.topk_group} must be in 1..n_group={self.n_group}.")
        reachable = experts // self.n_group * self.topk_group
        if self.num_experts_per_tok > reachable:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} exceeds the {reachable} experts that "
                f"topk_group={self.topk_group} groups hold; allow more groups or fewer experts per token."
            )
        if self.topk_method == "noaux_tc" and self.n_group > 1 and experts // self.n_group < 2:
            raise ConfigError(
                f"n_group={self.n_group} leaves groups of one expert, and noaux_tc scores a group by its best two; use "
                f"n_group={experts // 2} or fewer."
            )

    @property
    def kv_heads(self) -> int:
        """Key-value heads of the GQA baseline."""
        return self.num_attention_heads if self.num_key_value_heads is None else self.num_key_value_heads

    @property
    def gqa_head_dim(self) -> int:
        """Head size of the GQA baseline."""
        return self.hidden_size // self.num_attention_heads if self.head_dim is None else self.head_dim

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
        check_keys(type(self), changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> "ModelConfig":
        """The inverse of `to_dict`; unknown keys raise ConfigError. For published config.json see `checkpoint.hf_format`."""
        values = dict(values)
        check_keys(cls, values, complete=True)
        yarn = values.get("rope_scaling")
        if isinstance(yarn, Mapping):
            check_keys(YarnConfig, yarn, prefix="rope_scaling.", complete=True)
            values["rope_scaling"] = YarnConfig(**yarn)
        return cls(**values)


def check_keys(owner: type[Any], values: Mapping[str, Any], *, prefix: str = "", complete: bool = False) -> None:
    """Refuse keys that config class `owner` does not have and, with `complete`, the lack of one it cannot do without."""
    fields = dataclasses.fields(owner)
    known = sorted(field.name for field in fields)
    for name in values:
        if name not in known:
            raise ConfigError(
                f"unknown model key {prefix + str(name)!r}{did_you_mean(str(name), known)}; known keys: {', '.join(known)}."
            )
    missing = [field.name for field in fields if field.default is dataclasses.MISSING and field.name not in values]
    if complete and missing:
        raise ConfigError(f"incomplete model config: {', '.join(prefix + name for name in missing)} must be given.")


def check_types(config: Any, *, prefix: str = "") -> None:
    """Refuse a value of another type than its field's, and numbers that are not finite: they come from JSON of others.

    A whole number is taken for a float; a truth value is taken for neither.
    """
    for name, (allowed, words) in _field_types(type(config)).items():
        value = getattr(config, name)
        if words:
            if value not in words:
                raise ConfigError(f"{prefix}{name}={value!r} is unknown; use {' or '.join(map(repr, words))}.")
        elif not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            names = " or ".join("None" if one is types.NoneType else one.__name__ for one in allowed)
            raise ConfigError(f"{prefix}{name}={value!r} is of type {type(value).__name__}; use {names}.")
        elif isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{prefix}{name}={value} is not a finite number.")


def _field_types(owner: type[Any]) -> dict[str, tuple[tuple[type[Any], ...], tuple[str, ...]]]:
    """Per field: the classes a value may have, or the words it may be."""
    found: dict[str, tuple[tuple[type[Any], ...], tuple[str, ...]]] = {}
    for name, hint in get_type_hints(owner).items():
        if get_origin(hint) is Literal:
            found[name] = ((), get_args(hint))
            continue
        allowed = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
        found[name] = ((*allowed, int) if float in allowed else tuple(allowed), ())
    return found


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, min(number, 16) + 1) if number % divisor == 0]
