"""How many parameters, cached numbers and floating-point operations a config stands for, exactly, without building it.

Everything here is arithmetic on `ModelConfig`, so a plan for 671B parameters costs microseconds. The conventions are the
published ones, because only then can published figures be checked (`tests/planner/test_counts.py` reproduces V2-Lite, V2
and V3 to the last parameter, and the FLOPs per token of "Insights into DeepSeek-V3", ISCA 2025, table 2):

- *total* leaves out the multi-token-prediction modules ("671B, plus 14B"), which are counted on their own;
- *active* leaves out the input embedding, which is looked up and never multiplied ("37B", "2.4B");
- training costs six operations per active parameter and three times the forward attention; causal attention sees half
  the sequence on average;
- MHA and GQA "of the same shape" have heads as wide as the plain key part, as in DeepSeek-V2 table 1.
"""

from dataclasses import dataclass

from shoal.config import ModelConfig

MAX_GQA_GROUPS = 8
"""Key-value heads of the grouped-query models MLA is usually held against (LLaMA-3, Qwen2.5)."""


@dataclass(frozen=True, kw_only=True)
class ParameterCounts:
    """Learnt numbers by part; the selection bias of the router counts, being stored with every checkpoint."""

    embedding: int
    head: int
    """0 when tied to the embedding."""
    attention: int
    dense_ffn: int
    routed_experts: int
    shared_experts: int
    router: int
    norms: int
    """Of layers and the final one; norms inside the attention count with it."""
    mtp: int
    """All multi-token-prediction modules; embedding and head are shared with the model."""
    active: int
    """Multiplied with every token, input embedding and MTP modules left out (DeepSeek's "activated")."""
    mtp_active: int
    """The same for the MTP modules, the shared head not counted again."""

    @property
    def total(self) -> int:
        """The model without MTP modules, as DeepSeek counts it."""
        return sum(self.by_part().values()) - self.mtp

    @property
    def stored(self) -> int:
        """The model with its MTP modules: what a training run holds."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """The disjoint parts, which add up to `stored`."""
        return {
            "embedding": self.embedding,
            "head": self.head,
            "attention": self.attention,
            "dense_ffn": self.dense_ffn,
            "routed_experts": self.routed_experts,
            "shared_experts": self.shared_experts,
            "router": self.router,
            "norms": self.norms,
            "mtp": self.mtp,
        }


def parameter_counts(config: ModelConfig) -> ParameterCounts:
    """Count every parameter of `config`."""
    hidden, layers, depth = config.hidden_size, config.num_hidden_layers, config.num_nextn_predict_layers
    table = config.vocab_size * hidden
    moe_layers = sum(config.is_moe_layer(layer) for layer in range(layers))
    main = [_layer_parameters(config, layer) for layer in range(layers)]
    ahead = [_layer_parameters(config, layers + k) for k in range(depth)]
    joining = 2 * hidden * hidden + 3 * hidden  # eh_proj, and the norms of embedding, hidden state and output
    final_norm = hidden
    return ParameterCounts(
        embedding=table,
        head=0 if config.tie_word_embeddings else table,
        attention=layers * attention_parameters(config),
        dense_ffn=(layers - moe_layers) * 3 * hidden * config.intermediate_size,
        routed_experts=moe_layers * (config.n_routed_experts or 0) * expert_parameters(config),
        shared_experts=moe_layers * config.n_shared_experts * expert_parameters(config),
        router=moe_layers * _router_parameters(config),
        norms=layers * 2 * hidden + final_norm,
        mtp=sum(total for total, _ in ahead) + depth * joining,
        active=sum(active for _, active in main) + final_norm + table,
        mtp_active=sum(active for _, active in ahead) + depth * joining,
    )


def attention_parameters(config: ModelConfig) -> int:
    """Parameters of one attention, its inner norms included."""
    hidden, heads = config.hidden_size, config.num_attention_heads
    if config.attention == "gqa":
        return 2 * hidden * config.gqa_head_dim * (heads + config.kv_heads)
    query = hidden * heads * config.qk_head_dim
    if config.q_lora_rank is not None:
        query = config.q_lora_rank * (hidden + 1 + heads * config.qk_head_dim)
    down = hidden * (config.kv_lora_rank + config.qk_rope_head_dim) + config.kv_lora_rank
    up = config.kv_lora_rank * heads * (config.qk_nope_head_dim + config.v_head_dim)
    return query + down + up + heads * config.v_head_dim * hidden


def expert_parameters(config: ModelConfig) -> int:
    """Parameters of one expert: gate, up and down projection."""
    return 3 * config.hidden_size * config.moe_intermediate_size


def cache_elements_per_token(config: ModelConfig) -> int:
    """Numbers cached per token over all layers: latent and shared rotary key for MLA, keys and values for GQA."""
    return config.cache_width * config.num_hidden_layers


def cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """Bytes cached per token over all layers."""
    return cache_elements_per_token(config) * bytes_per_element


def mha_cache_bytes_per_token(config: ModelConfig, bytes_per_element: int = 2) -> int:
    """What multi-head attention of the same shape would cache per token (DeepSeek-V2 table 1)."""
    return _cache_of_heads(config, config.num_attention_heads) * bytes_per_element


def gqa_cache_bytes_per_token(config: ModelConfig, num_groups: int | None = None, bytes_per_element: int = 2) -> int:
    """What grouped-query attention of the same shape would cache per token.

    Args:
        num_groups: key-value heads; None takes `default_gqa_groups`.
    """
    return _cache_of_heads(config, num_groups or default_gqa_groups(config)) * bytes_per_element


def default_gqa_groups(config: ModelConfig) -> int:
    """Most key-value heads, up to eight, that still let at least two query heads share each (one for a single head)."""
    heads = config.num_attention_heads
    most = max(1, min(MAX_GQA_GROUPS, heads // 2))
    return max(groups for groups in range(1, most + 1) if heads % groups == 0)


def forward_attention_flops_per_token(config: ModelConfig, seen_tokens: float) -> float:
    """Scores and weighted sum in the expanded form, per token that sees `seen_tokens`, over all layers."""
    width = config.qk_head_dim + config.v_head_dim if config.attention == "mla" else 2 * config.gqa_head_dim
    return 2.0 * config.num_attention_heads * width * seen_tokens * config.num_hidden_layers


def training_flops_per_token(
    config: ModelConfig, sequence_tokens: int, causal: bool = True, include_mtp: bool = False
) -> float:
    """Forward and backward operations per trained token, `6 * active + 3 * attention`.

    Gate nonlinearities, softmax and recomputation are left out, as published.

    Args:
        sequence_tokens: length of a training row.
        causal: count only what the mask lets through; False is the older convention.
        include_mtp: also count the MTP modules and their passes through the head; published figures do not.
    """
    seen_tokens = sequence_tokens / 2 if causal else sequence_tokens
    counts = parameter_counts(config)
    attention = forward_attention_flops_per_token(config, seen_tokens)
    flops = 6.0 * counts.active + 3.0 * attention
    if include_mtp:
        depth = config.num_nextn_predict_layers
        head = config.vocab_size * config.hidden_size
        flops += 6.0 * (counts.mtp_active + depth * head) + 3.0 * attention * depth / config.num_hidden_layers
    return flops


def prefill_flops(config: ModelConfig, prompt_tokens: int) -> float:
    """Operations to read a whole prompt in the expanded form; the head runs once, for its last token."""
    head = config.vocab_size * config.hidden_size
    body = parameter_counts(config).active - head
    attention = forward_attention_flops_per_token(config, prompt_tokens / 2)
    return prompt_tokens * (2.0 * body + attention) + 2.0 * head


def decode_flops_per_token(config: ModelConfig, context_tokens: int) -> float:
    """Operations to generate one token after `context_tokens` cached ones.

    MLA decodes in the absorbed form, where every head attends to the latents themselves; its up-projections move to the
    query and the output but are the same size, so the active parameters still count twice.
    """
    if config.attention == "mla":
        width = 2 * config.kv_lora_rank + config.qk_rope_head_dim
    else:
        width = 2 * config.gqa_head_dim
    attention = 2.0 * config.num_attention_heads * width * context_tokens * config.num_hidden_layers
    return 2.0 * parameter_counts(config).active + attention


def _layer_parameters(config: ModelConfig, layer: int) -> tuple[int, int]:
    """All and active parameters of one decoder layer."""
    around = attention_parameters(config) + 2 * config.hidden_size
    if not config.is_moe_layer(layer):
        dense = around + 3 * config.hidden_size * config.intermediate_size
        return dense, dense
    expert, always = expert_parameters(config), around + _router_parameters(config)
    total = always + expert * ((config.n_routed_experts or 0) + config.n_shared_experts)
    return total, always + expert * (config.num_experts_per_tok + config.n_shared_experts)


def _router_parameters(config: ModelConfig) -> int:
    experts = config.n_routed_experts or 0
    bias = experts if config.topk_method == "noaux_tc" else 0
    return experts * config.hidden_size + bias


def _cache_of_heads(config: ModelConfig, key_value_heads: int) -> int:
    """Elements per token of ordinary attention with this many key-value heads, keys and values equally wide."""
    width = config.qk_nope_head_dim if config.attention == "mla" else config.gqa_head_dim
    return 2 * key_value_heads * width * config.num_hidden_layers
