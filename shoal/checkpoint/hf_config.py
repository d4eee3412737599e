"""config.json of the published families, to `ModelConfig` and back.

Read: DeepSeek V2, V2-Lite, V3, R1, Moonlight, Kimi-K2, and for the baselines Llama and GLM-4-MoE, in the old spelling
(`rope_theta` beside `rope_scaling`) and in that of transformers 5 (`rope_parameters`). A key whose value would change the
numbers, and which this model does not compute, is refused by name, never ignored.

Written: the old, complete spelling, which transformers, vLLM and SGLang all open. The family is chosen so that the
opened model computes the same numbers; a mixture that no family describes (softmax scores with V3's bias, say) is
written as `model_type` "shoal", which other programs refuse instead of computing something else.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shoal.config import ModelConfig, YarnConfig
from shoal.errors import ConfigError

if TYPE_CHECKING:  # the planner reads config.json files, and must answer before torch would be loaded
    import torch

MLA_FAMILIES = ("deepseek_v3", "deepseek_v2", "kimi_k2")
GQA_FAMILIES = ("llama", "glm4_moe")
OWN_FAMILY = "shoal"
_ARCHITECTURES = {
    "deepseek_v3": "DeepseekV3ForCausalLM",
    "deepseek_v2": "DeepseekV2ForCausalLM",
    "llama": "LlamaForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    OWN_FAMILY: "ShoalForCausalLM",
}
_ONLY_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "moe_layer_freq": (1,),
    "rope_interleave": (True, None),
    "use_qk_norm": (False,),
    "sliding_window": (None,),
}
"""Keys that change the numbers, and the values that this model computes."""


def config_from_hf(values: Mapping[str, Any]) -> ModelConfig:
    """Read the content of a published config.json.

    Token ids that the file leaves out or sets to null become 0 (begin) and 1 (end); of several end tokens the first.

    Raises:
        ConfigError: another family, a missing key, or a value that this model does not compute.
    """
    family = values.get("model_type")
    if family == OWN_FAMILY:
        return ModelConfig.from_dict({k: v for k, v in values.items() if k in ModelConfig.__dataclass_fields__})
    if family not in MLA_FAMILIES + GQA_FAMILIES:
        raise ConfigError(
            f"model_type={family!r} is not supported; supported: {', '.join((*MLA_FAMILIES, *GQA_FAMILIES, OWN_FAMILY))}."
        )
    for key, allowed in _ONLY_VALUES.items():
        if key in values and values[key] not in allowed:
            raise ConfigError(f"{key}={values[key]!r} is not supported; this model computes {key}={allowed[0]!r}.")
    check_quantization(values)
    fields = _sizes(values) | _rotation(values, family) | _experts(values, family)
    fields |= _latent_attention(values) if family in MLA_FAMILIES else _grouped_attention(values)
    return ModelConfig(**fields)


def _sizes(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    fields = {name: _required(values, name) for name in (*names, "max_position_embeddings")}
    fields["rms_norm_eps"] = _required(values, "rms_norm_eps", kind=float)
    fields["initializer_range"] = values.get("initializer_range", 0.02)
    fields["tie_word_embeddings"] = bool(values.get("tie_word_embeddings", False))
    fields["num_nextn_predict_layers"] = _num_mtp(values)
    for name, default in (("bos_token_id", 0), ("eos_token_id", 1)):
        token = values.get(name)
        token = token[0] if isinstance(token, list) and token else token
        fields[name] = default if token is None or isinstance(token, list) else token
    return fields


def _latent_attention(values: Mapping[str, Any]) -> dict[str, Any]:
    names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
    return {"attention": "mla", **{name: _required(values, name, may_be_null=name == "q_lora_rank") for name in names}}


def _grouped_attention(values: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "attention": "gqa",
        "num_key_value_heads": values.get("num_key_value_heads"),
        "head_dim": values.get("head_dim"),
    }


def _experts(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    if family == "llama" or values.get("n_routed_experts") is None:
        return {"n_routed_experts": None}
    first_dense = _required(values, "first_k_dense_replace")
    if first_dense >= _required(values, "num_hidden_layers") + _num_mtp(values):
        return {"n_routed_experts": None}
    softmax = family == "deepseek_v2"
    if softmax and values.get("norm_topk_prob"):
        raise ConfigError(
            "norm_topk_prob=true with model_type='deepseek_v2' is read differently by every implementation; use false."
        )
    return {
        "n_routed_experts": values["n_routed_experts"],
        "first_k_dense_replace": first_dense,
        "n_shared_experts": values.get("n_shared_experts") or 0,
        "n_group": values.get("n_group") or 1,
        "topk_group": values.get("topk_group") or 1,
        "norm_topk_prob": bool(values.get("norm_topk_prob", not softmax)),
        "routed_scaling_factor": values.get("routed_scaling_factor", 1.0),
        "scoring_func": values.get("scoring_func", "softmax" if softmax else "sigmoid"),
        "topk_method": values.get("topk_method", "greedy" if softmax else "noaux_tc"),
        "num_experts_per_tok": _required(values, "num_experts_per_tok"),
        "moe_intermediate_size": _required(values, "moe_intermediate_size"),
    }


def _rotation(values: Mapping[str, Any], family: str) -> dict[str, Any]:
    """Base and YaRN from either spelling."""
    scaling = {**_object(values, "rope_scaling"), **_object(values, "rope_parameters")}
    theta = scaling.get("rope_theta", values.get("rope_theta", 10000.0))
    partial = scaling.get(
        "partial_rotary_factor", values.get("partial_rotary_factor", 0.5 if family == "glm4_moe" else 1.0)
    )
    if partial != 1.0:
        raise ConfigError(f"partial_rotary_factor={partial} is not supported; this model rotates whole heads (1.0).")
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind == "default":
        return {"rope_theta": theta, "rope_scaling": None}
    if kind != "yarn" or scaling.get("attention_factor") is not None or not scaling.get("truncate", True):
        raise ConfigError(
            f"rope_scaling of type {kind!r} with these options is not supported; supported: none, or 'yarn' without "
            "attention_factor and with truncate=true."
        )
    length = "original_max_position_embeddings"
    fields = {"factor": _required(scaling, "factor", kind=float, within="rope_scaling.")}
    fields[length] = _required(scaling, length, within="rope_scaling.")
    optional = ("beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    fields |= {name: scaling[name] for name in optional if scaling.get(name) is not None}
    return {"rope_theta": theta, "rope_scaling": YarnConfig(**fields)}


@dataclass(frozen=True)
class Quantization:
    """What config.json says about the stored weights."""

    block: tuple[int, int] | None = None
    """Of FP8 weights, `weight_block_size`."""
    group: int | None = None
    """Columns that share a scale in packed four-bit weights."""


def check_quantization(values: Mapping[str, Any]) -> Quantization | None:
    """How the weights are quantised, None for plain ones.

    Raises:
        ConfigError: another kind of quantisation.
    """
    quantization = _object(values, "quantization_config")
    if not quantization:
        return None
    method, block = quantization.get("quant_method"), quantization.get("weight_block_size")
    if method == "compressed-tensors":
        return Quantization(group=_packed_group(quantization))
    if method != "fp8" or not isinstance(block, list) or len(block) != 2 or min(block) < 1:
        raise ConfigError(
            f"quantization_config with quant_method={method!r} and weight_block_size={block!r} is not supported; supported: "
            "'fp8' with blocks such as [128, 128], and 'compressed-tensors' with integers. Use the unquantised checkpoint."
        )
    return Quantization(block=(block[0], block[1]))


def _packed_group(quantization: Mapping[str, Any]) -> int | None:
    """The one group size of all four-bit weights; None when there are none."""
    groups = set()
    for scheme in _object(quantization, "config_groups").values():
        weights = _object(scheme, "weights") if isinstance(scheme, Mapping) else {}
        kind = (weights.get("num_bits"), weights.get("type"), weights.get("symmetric"), weights.get("strategy"))
        if (
            kind == (4, "int", True, "group")
            and isinstance(weights.get("group_size"), int)
            and not weights.get("actorder")
        ):
            groups.add(int(weights["group_size"]))
        elif kind != (8, "int", True, "channel"):
            raise ConfigError(
                f"quantization_config of compressed-tensors with weights {dict(weights)} is not supported; supported: 4 bits "
                "symmetric in groups without reordering, and 8 bits symmetric per channel. Use the unquantised checkpoint."
            )
    if len(groups) > 1:
        raise ConfigError(f"quantization_config mixes group sizes {sorted(groups)}; one for all weights is supported.")
    return groups.pop() if groups else None


def published_family(config: ModelConfig) -> tuple[str, str | None]:
    """The `model_type` to write, and when it is our own, why no published one will do."""
    is_v3_routing = (config.scoring_func, config.topk_method) == ("sigmoid", "noaux_tc")
    if config.n_routed_experts is None:
        if config.attention == "mla":
            return "deepseek_v3", None
        return ("llama" if config.num_nextn_predict_layers == 0 else "glm4_moe"), None
    if is_v3_routing:
        return ("deepseek_v3" if config.attention == "mla" else "glm4_moe"), None
    if config.attention == "gqa":
        return OWN_FAMILY, "no published family joins grouped-query attention and V2 routing"
    if config.scoring_func != "softmax" or config.topk_method == "noaux_tc":
        return OWN_FAMILY, f"no published family joins {config.scoring_func} scores and {config.topk_method}"
    if config.norm_topk_prob:
        return OWN_FAMILY, "deepseek_v2 does not renormalise the chosen weights"
    if config.hidden_size % config.num_attention_heads:
        return OWN_FAMILY, "transformers opens deepseek_v2 only where the heads divide hidden_size"
    return "deepseek_v2", None


def config_to_hf(config: ModelConfig, *, dtype: "torch.dtype | str" = "bfloat16") -> dict[str, Any]:
    """The content of a published config.json, complete and in the old spelling."""
    family, _ = published_family(config)
    values: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[family]],
        "model_type": family,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if family == OWN_FAMILY:
        return values | config.to_dict()
    common = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    more = ("max_position_embeddings", "tie_word_embeddings", "rms_norm_eps", "initializer_range", "rope_theta")
    values |= {name: getattr(config, name) for name in (*common, *more, "bos_token_id", "eos_token_id")}
    values |= {"hidden_act": "silu", "attention_bias": False, "attention_dropout": 0.0, "use_cache": True}
    values["rope_scaling"] = _yarn_to_hf(config.rope_scaling)
    if config.attention == "mla":
        names = ("q_lora_rank", "kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        values |= {name: getattr(config, name) for name in names}
        values["num_key_value_heads"] = config.num_attention_heads
    else:
        values |= {"num_key_value_heads": config.kv_heads, "head_dim": config.gqa_head_dim}
    if family == "llama":
        return values | {"mlp_bias": False}
    if family == "glm4_moe":
        values |= {"partial_rotary_factor": 1.0, "use_qk_norm": False}
    values["num_nextn_predict_layers"] = config.num_nextn_predict_layers
    return values | _experts_to_hf(config)


def _experts_to_hf(config: ModelConfig) -> dict[str, Any]:
    names = ("n_shared_experts", "num_experts_per_tok", "moe_intermediate_size", "n_group", "topk_group")
    values = {name: getattr(config, name) for name in names}
    values |= {name: getattr(config, name) for name in ("scoring_func", "topk_method", "norm_topk_prob")}
    values |= {"routed_scaling_factor": config.routed_scaling_factor, "moe_layer_freq": 1}
    if config.n_routed_experts is None:
        # These families want a number of experts; that every layer is dense says first_k_dense_replace.
        every_layer = config.num_hidden_layers + config.num_nextn_predict_layers
        return values | {"n_routed_experts": 1, "first_k_dense_replace": every_layer}
    return values | {
        "n_routed_experts": config.n_routed_experts,
        "first_k_dense_replace": config.first_k_dense_replace,
    }


def _yarn_to_hf(yarn: YarnConfig | None) -> dict[str, Any] | None:
    if yarn is None:
        return None
    names = ("factor", "original_max_position_embeddings", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
    return {"type": "yarn", **{name: getattr(yarn, name) for name in names}}


def _num_mtp(values: Mapping[str, Any]) -> int:
    names = [name for name in ("num_nextn_predict_layers", "num_mtp_layers") if values.get(name) is not None]
    return int(_required(values, names[0])) if names else 0


def _object(values: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    found = values.get(name) or {}
    if not isinstance(found, Mapping):
        raise ConfigError(f"{name}={found!r} in config.json must be an object.")
    return found


def _required(
    values: Mapping[str, Any], name: str, *, kind: type = int, may_be_null: bool = False, within: str = ""
) -> Any:
    """A number of the config, checked; `kind` float takes integers too."""
    if name not in values or (values[name] is None and not may_be_null):
        raise ConfigError(f"config.json lacks {within}{name}; restore the file from where the model came from.")
    value = values[name]
    is_number = isinstance(value, int | kind) and not isinstance(value, bool)
    if value is not None and not is_number:
        raise ConfigError(f"{within}{name}={value!r} in config.json must be of type {kind.__name__}.")
    return value
