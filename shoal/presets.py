"""Named models: the published DeepSeek shapes, and small ones of the same family that two cores can train.

Every preset is a function whose body is the whole description, so that two of them can be compared by eye. The large ones
repeat the released config.json files; a training recipe may differ from those (V3 §4.2 initialises with 0.006 where its
config.json says 0.02) and then says so itself. The small ones are the shapes this project measures on: `nano` and `mini`
for training speed against other libraries, `small` for decoding, `demo` for the whole recipe in minutes.

`with_overrides` turns `key=value` from a command line into a checked config.
"""

import dataclasses
import types
from collections.abc import Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from shoal.config import ModelConfig, YarnConfig
from shoal.errors import ConfigError, did_you_mean


def nano() -> ModelConfig:
    """10.3 M parameters: the shape of the training benchmark that is over in seconds."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=256,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=704,
        max_position_embeddings=2048,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=176,
        routed_scaling_factor=2.5,
    )


def mini() -> ModelConfig:
    """103 M parameters, with query compression: the larger training benchmark."""
    return ModelConfig(
        vocab_size=4096,
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        intermediate_size=1408,
        max_position_embeddings=2048,
        q_lora_rank=192,
        kv_lora_rank=128,
        qk_nope_head_dim=64,
        qk_rope_head_dim=32,
        v_head_dim=64,
        n_routed_experts=32,
        num_experts_per_tok=4,
        moe_intermediate_size=256,
        routed_scaling_factor=2.5,
    )


def small() -> ModelConfig:
    """1.288 B parameters of which 0.25 B are read per token: the decoding benchmark, with V3's attention widths."""
    return ModelConfig(
        vocab_size=32768,
        hidden_size=1024,
        num_hidden_layers=12,
        num_attention_heads=16,
        intermediate_size=4096,
        max_position_embeddings=8192,
        q_lora_rank=512,
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=512,
        routed_scaling_factor=2.5,
    )


def demo() -> ModelConfig:
    """1.4 M parameters: what `shoal demo` trains and teaches to reason in minutes on two cores."""
    return ModelConfig(
        vocab_size=512,
        hidden_size=128,
        num_hidden_layers=3,
        num_attention_heads=4,
        intermediate_size=384,
        max_position_embeddings=512,
        kv_lora_rank=64,
        qk_nope_head_dim=16,
        qk_rope_head_dim=16,
        v_head_dim=32,
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=128,
        num_nextn_predict_layers=1,
    )


def v2_lite() -> ModelConfig:
    """DeepSeek-V2-Lite: 15.7 B parameters, 2.4 B of them active; no query compression, softmax gate, greedy choice."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=2048,
        num_hidden_layers=27,
        num_attention_heads=16,
        intermediate_size=10944,
        max_position_embeddings=163840,
        n_routed_experts=64,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        rope_scaling=_published_yarn(mscale=0.707),
        bos_token_id=100000,
        eos_token_id=100001,
    )


def v2() -> ModelConfig:
    """DeepSeek-V2: 236 B parameters, 21 B active; experts in 8 groups of which a token may use 3."""
    return ModelConfig(
        vocab_size=102400,
        hidden_size=5120,
        num_hidden_layers=60,
        num_attention_heads=128,
        intermediate_size=12288,
        max_position_embeddings=163840,
        q_lora_rank=1536,
        n_routed_experts=160,
        n_shared_experts=2,
        num_experts_per_tok=6,
        moe_intermediate_size=1536,
        n_group=8,
        topk_group=3,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=False,
        routed_scaling_factor=16.0,
        rope_scaling=_published_yarn(mscale=0.707),
        bos_token_id=100000,
        eos_token_id=100001,
    )


def v3() -> ModelConfig:
    """DeepSeek-V3 and R1: 671 B parameters, 37 B active, one multi-token prediction module."""
    return ModelConfig(
        vocab_size=129280,
        hidden_size=7168,
        num_hidden_layers=61,
        num_attention_heads=128,
        intermediate_size=18432,
        max_position_embeddings=163840,
        q_lora_rank=1536,
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        first_k_dense_replace=3,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
        num_nextn_predict_layers=1,
        rope_scaling=_published_yarn(mscale=1.0),
    )


def _published_yarn(*, mscale: float) -> YarnConfig:
    """4K positions stretched to 160K, as every released V2 and V3 config.json says."""
    return YarnConfig(factor=40.0, original_max_position_embeddings=4096, mscale=mscale, mscale_all_dim=mscale)


PRESETS: dict[str, ModelConfig] = {make.__name__: make() for make in (demo, nano, mini, small, v2_lite, v2, v3)}
"""Every preset by the name it has on the command line."""


def preset(name: str) -> ModelConfig:
    """The model of that name.

    Raises:
        ConfigError: there is none; lists the names there are.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}{did_you_mean(name, PRESETS)}; presets are {', '.join(PRESETS)}.")
    return PRESETS[name]


def with_overrides(config: ModelConfig, overrides: Sequence[str]) -> ModelConfig:
    """A copy with fields changed by `key=value` texts, as typed on a command line.

    Values are read by the field's type: `12`, `1e-5`, `true`, `none` where None is allowed, a word where one of several
    is. Parts of YaRN are reached with a dot: `rope_scaling.factor=8`.

    Raises:
        ConfigError: no `=`, an unknown key, a value of another type, a key given twice, sizes that do not fit together.
    """
    plain: dict[str, Any] = {}
    yarn: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = (part.strip() for part in text.partition("="))
        if not equals or not key:
            raise ConfigError(f"override {text!r} is not of the form key=value; write for example hidden_size=256.")
        outer, dot, inner = key.partition(".")
        into, name, owner = (yarn, inner, YarnConfig) if outer == "rope_scaling" and dot else (plain, key, ModelConfig)
        if name in into:
            raise ConfigError(f"{key} is given twice; keep one of the two.")
        into[name] = _parse(key, value, _type_of(owner, name, key))
    if yarn:
        plain["rope_scaling"] = _changed_yarn(config.rope_scaling, yarn, also_whole="rope_scaling" in plain)
    return config.replace(**plain)


def _changed_yarn(current: YarnConfig | None, parts: dict[str, Any], *, also_whole: bool) -> YarnConfig:
    if also_whole:
        raise ConfigError("rope_scaling and one of its parts are both given; keep the parts, or rope_scaling=none.")
    if current is not None:
        return dataclasses.replace(current, **parts)
    missing = [name for name in ("factor", "original_max_position_embeddings") if name not in parts]
    if missing:
        raise ConfigError(
            f"this model has no rope_scaling yet, so rope_scaling.{missing[0]} must be given too, "
            "for example rope_scaling.factor=8 rope_scaling.original_max_position_embeddings=4096."
        )
    return YarnConfig(**parts)


def _type_of(owner: type[ModelConfig] | type[YarnConfig], name: str, key: str) -> Any:
    types_by_name = get_type_hints(owner)
    if name not in types_by_name:
        known = sorted(types_by_name)
        raise ConfigError(f"unknown model key {key!r}{did_you_mean(name, known)}; known keys: {', '.join(known)}.")
    return types_by_name[name]


def _parse(key: str, text: str, wanted: Any) -> Any:
    """The value that `text` stands for, by the type of its field."""
    choices = get_args(wanted) if get_origin(wanted) in (Union, types.UnionType) else (wanted,)
    if types.NoneType in choices and text.lower() in ("none", "null"):
        return None
    inner = next(choice for choice in choices if choice is not types.NoneType)
    if get_origin(inner) is Literal:
        if text in get_args(inner):
            return text
        raise ConfigError(f"{key}={text!r} is not one of {', '.join(get_args(inner))}.")
    if inner is YarnConfig:
        raise ConfigError(f"{key}={text!r} cannot be read; use rope_scaling=none, or its parts: rope_scaling.factor=8.")
    if inner is bool:
        if text.lower() in ("true", "false"):
            return text.lower() == "true"
        raise ConfigError(f"{key}={text!r} is not true or false.")
    try:
        return inner(text)
    except ValueError:
        what = {int: "a whole number", float: "a number"}[inner]
        or_none = ", or none" if types.NoneType in choices else ""
        raise ConfigError(f"{key}={text!r} is not {what}{or_none}.") from None
