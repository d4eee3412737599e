"""A whole model as packed weights, and one C++ call that runs it (`kernels/cpu/forward.cpp`).

The weights come by name, one tensor at a time, so that a quantised model never needs its float form in memory at once.
Projections that read the same input are laid one after the other and become one product; the key and value up-projections
are cut into heads for the absorbed form; gate and up projections alternate panel by panel.
"""

import ctypes
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from shoal.config import ModelConfig
from shoal.engine.codes import INT4_GROUP, Weight, floats, halves, joined, quantised, rows
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.kernels.huge_pages import WeightMemory
from shoal.kernels.packed import INT8_GROUP, Codes, MatrixStruct, Packed, absent, pack, pack_gated, random_packed
from shoal.model.mla import LATENT_NORM_EPS
from shoal.model.rope import rotation_table
from shoal.quant.latent import entry_bytes

WeightSource = Callable[[str], Weight]
"""Gives the weight of a name of `Transformer.state_dict()`, floats or the codes of a quantised directory."""

LANES = 16
OUTSIDE_VOCABULARY, NOT_DRAWN = 2, 3
"""What a pass returns when a token is none, and when draws need a look at all scores."""


class _LayerStruct(ctypes.Structure):
    """`shoal::Layer`."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("input_norm", "query_norm", "latent_norm", "post_norm", "router_bias")),
        *(
            (name, MatrixStruct)
            for name in (
                "down_projections",
                "query_up",
                "key_up",
                "value_up",
                "output",
                "router",
                "expert_gate_up",
                "expert_down",
                "shared_gate_up",
                "shared_down",
                "key_expand",
            )
        ),
    ]


class _ModelStruct(ctypes.Structure):
    """`shoal::Model`."""

    _fields_ = [
        *(
            (name, ctypes.c_int64)
            for name in (
                "num_layers",
                "hidden",
                "heads",
                "plain",
                "rotary",
                "value",
                "latent",
                "query_latent",
                "experts_per_token",
                "groups",
                "top_groups",
            )
        ),
        *((name, ctypes.c_int32) for name in ("softmax_scores", "group_by_best_two", "renormalise")),
        *((name, ctypes.c_float) for name in ("routed_scale", "norm_eps", "latent_norm_eps", "softmax_scale")),
        ("rotations", ctypes.c_void_p),
        ("final_norm", ctypes.c_void_p),
        ("embedding", ctypes.c_void_p),
        ("embedding_is_bf16", ctypes.c_int32),
        ("head", MatrixStruct),
        ("layers", ctypes.POINTER(_LayerStruct)),
    ]


class _BatchStruct(ctypes.Structure):
    """`shoal::Batch`."""

    _fields_ = [
        ("tokens", ctypes.c_int64),
        *((name, ctypes.c_void_p) for name in ("token", "x", "position", "sequence", "table")),
        ("table_width", ctypes.c_int64),
        ("cache", ctypes.c_void_p),
        ("reads_bf16", ctypes.c_int32),
        ("cache_is_fp8", ctypes.c_int32),
        ("page_tokens", ctypes.c_int64),
        ("layer_bytes", ctypes.c_int64),
        ("output_row", ctypes.c_void_p),
        ("outputs", ctypes.c_int64),
        ("logits", ctypes.c_void_p),
        *((name, ctypes.c_void_p) for name in ("chosen", "temperature", "uniform", "drawn", "drawn_logprob")),
    ]


@dataclass
class Draw:
    """Draws by the pass itself, so that logits need not exist: in, how; out, what (`engine/sampling.py` has the meaning)."""

    temperature_N: Tensor
    """Above zero."""
    uniform_N: Tensor
    token_N: Tensor
    logprob_N: Tensor
    done: bool = False
    """Whether the tokens stand: scores that are not finite, or of a spread beyond float32, need logits."""

    @staticmethod
    def of(temperature_N: Tensor, uniform_N: Tensor) -> "Draw":
        """Room for as many tokens as there are temperatures."""
        count = len(temperature_N)
        return Draw(
            temperature_N.float().contiguous(), uniform_N, torch.empty(count, dtype=torch.long), torch.empty(count)
        )

    def pointers(self) -> tuple[int, ...]:
        """As the pass takes them."""
        return tuple(each.data_ptr() for each in (self.temperature_N, self.uniform_N, self.token_N, self.logprob_N))


def _plain(embedding_VD: Tensor) -> Tensor:
    """Float32 or bfloat16, row after row."""
    embedding_VD = embedding_VD.detach()
    wanted = embedding_VD.dtype if embedding_VD.dtype in (torch.float32, torch.bfloat16) else torch.float32
    return embedding_VD.to(wanted).contiguous()


def cache_width(config: ModelConfig, is_fp8: bool) -> int:
    """Numbers of a cached entry, or bytes of one in FP8."""
    return entry_bytes(config.kv_lora_rank, config.qk_rope_head_dim) if is_fp8 else config.cache_width


def fits(config: ModelConfig) -> bool:
    """Whether the fused pass can run this model here: latent attention, whole vectors of latents, kernels built."""
    return (
        config.attention == "mla"
        and config.kv_lora_rank % LANES == 0
        and config.qk_rope_head_dim % 2 == 0
        and config.hidden_size % LANES == 0
        and library() is not None
    )


class PackedModel:
    """Packed weights of one model, ready to run.

    Args:
        source: weights by name; a matrix on the meta device stands for random codes of its shape.
        format_name: of all matrices but the router, which stays float32: a flipped expert is a large error.
        head_format: of the output head; default `format_name`.
        latent_format: of the absorbed key and value up-projections; default `format_name`.
        fast_prefill: read long pieces of prompts with keys and values expanded from the latents, which takes a third of the
            arithmetic of attention. The last bits of an answer then depend on how its prompt was cut. Tiles (AMX) make it needless, and it is not done.
    """

    def __init__(
        self,
        config: ModelConfig,
        source: WeightSource,
        format_name: str,
        *,
        group: int | None = None,
        head_format: str | None = None,
        latent_format: str | None = None,
        fast_prefill: bool = False,
        max_positions: int | None = None,
    ) -> None:
        if not fits(config):
            raise ConfigError(
                "the packed CPU pass needs latent attention, kv_lora_rank and hidden_size in multiples of 16, and built kernels."
            )
        self.config, self.format, self.group = config, format_name, group
        self._latent_format = latent_format or format_name
        self.fast_prefill = fast_prefill
        if fast_prefill and (format_name == "f32" or config.qk_nope_head_dim % LANES or config.v_head_dim % LANES):
            raise ConfigError(
                "fast prefill multiplies in bfloat16 and needs qk_nope_head_dim and v_head_dim in multiples of 16; "
                f"here are {format_name}, {config.qk_nope_head_dim} and {config.v_head_dim}. Leave --fast-prefill out."
            )
        self._kept: list[Any] = []
        """Everything the C structures point to."""
        self._memory = WeightMemory()
        self.weight_bytes = 0
        embedding_VD = source("embed_tokens.weight")
        head_VD = embedding_VD if config.tie_word_embeddings else source("lm_head.weight")
        self._embedding = embedding_VD if isinstance(embedding_VD, Codes) else _plain(embedding_VD)
        layers = (_LayerStruct * config.num_hidden_layers)(
            *(self._layer(source, index) for index in range(config.num_hidden_layers))
        )
        head = self._matrix(head_VD, head_format)
        self._struct = self._model(source, layers, head, max_positions)
        kernels = library()
        assert kernels is not None
        _check_layout(kernels)
        self._kernels = kernels
        kernels.forward_new.restype = ctypes.c_void_p
        self._forward = ctypes.c_void_p(kernels.forward_new(ctypes.byref(self._struct)))

    def __del__(self) -> None:
        if getattr(self, "_forward", None):
            self._kernels.forward_free(self._forward)

    def run(
        self,
        token_M: Tensor,
        position_M: Tensor,
        sequence_M: Tensor,
        cache_LPTW: Tensor,
        *,
        output_row: Tensor,
        table_BX: Tensor | None = None,
        hidden_in: Tensor | None = None,
        hidden_out: Tensor | None = None,
        chosen_LMK: Tensor | None = None,
        draw: Draw | None = None,
    ) -> Tensor:
        """Run `M` tokens, append their cache entries, return logits of the tokens `output_row`.

        Args:
            position_M, sequence_M: int32; a sequence's earlier positions must be in the cache or in this batch.
            cache_LPTW: contiguous `[layers, pages, page tokens, latent + rotary]`, float32 or bfloat16, or of bytes as
                `quant/latent.py` has them.
            table_BX: int32 pages of each sequence; default: sequence b lies whole on page b.
            hidden_in: float32 `[M, D]` to start from in the place of embeddings; overwritten by what `hidden_out` would hold.
            hidden_out: float32 `[M, D]`, filled with the hidden states before the final norm.
            chosen_LMK: int32, filled with the routed experts of every layer (dense layers untouched).
            draw: fill this with a token for each output instead of making logits; none are returned.
        """
        is_fp8 = cache_LPTW.dtype == torch.uint8
        assert cache_LPTW.is_contiguous() and cache_LPTW.dtype in (torch.float32, torch.bfloat16, torch.uint8)
        assert cache_LPTW.shape[3] == cache_width(self.config, is_fp8)
        num_pages, page_tokens = cache_LPTW.shape[1], cache_LPTW.shape[2]
        if table_BX is None:
            table_BX = torch.arange(num_pages, dtype=torch.int32).unsqueeze(1)
        token_at = None
        if hidden_in is not None:
            x_MD = hidden_in
        else:
            x_MD = torch.empty(len(token_M), self.config.hidden_size) if hidden_out is None else hidden_out
            if isinstance(self._embedding, Codes):
                x_MD.copy_(self.embed(token_M))
            else:
                token_M = token_M.to(torch.int64).contiguous()
                token_at = token_M.data_ptr()
        arrays = [tensor.to(torch.int32).contiguous() for tensor in (position_M, sequence_M, table_BX, output_row)]
        position_M, sequence_M, table_BX, output_row = arrays
        logit = torch.empty(0 if draw else len(output_row), self.config.vocab_size)
        batch = _BatchStruct(
            len(token_M),
            token_at,
            x_MD.data_ptr(),
            position_M.data_ptr(),
            sequence_M.data_ptr(),
            table_BX.data_ptr(),
            table_BX.shape[1],
            cache_LPTW.data_ptr(),
            int((self.float_dtype if is_fp8 else cache_LPTW.dtype) == torch.bfloat16),
            int(is_fp8),
            page_tokens,
            cache_LPTW.stride(0) * cache_LPTW.itemsize,
            output_row.data_ptr(),
            len(output_row),
            None if draw else logit.data_ptr(),
            chosen_LMK.data_ptr() if chosen_LMK is not None else None,
            *(draw.pointers() if draw else ()),
        )
        failed = self._kernels.forward_run(self._forward, ctypes.byref(batch))
        if failed == OUTSIDE_VOCABULARY:
            raise IndexError(f"tokens must be in 0..{self.config.vocab_size - 1}; got {token_M.tolist()}")
        if failed not in (0, NOT_DRAWN):
            raise MemoryError(f"no memory for a pass over {len(token_M)} tokens")
        if draw:
            draw.done = not failed
        return logit

    @property
    def float_dtype(self) -> torch.dtype:
        """Of cached latents that are not in FP8, and of what attention reads."""
        return torch.float32 if self.format == "f32" else torch.bfloat16

    def weight_data(self) -> Iterator[Tensor]:
        """The bytes of every packed matrix, for whoever measures how fast they can be read."""
        return (kept.data for kept in self._kept if isinstance(kept, Packed))

    def embed(self, token_M: Tensor) -> Tensor:
        """Embeddings in float32, `[M, D]`."""
        if isinstance(self._embedding, Codes):
            return floats(rows(self._embedding, token_M)).float()
        return self._embedding[token_M].float()

    def _layer(self, source: WeightSource, index: int) -> _LayerStruct:
        config, name = self.config, f"layers.{index}."
        attention = name + "self_attn."
        compressed = config.q_lora_rank is not None
        first = source(attention + ("q_a_proj.weight" if compressed else "q_proj.weight"))
        both_FD = joined(first, source(attention + "kv_a_proj_with_mqa.weight"))
        layer = _LayerStruct(
            input_norm=self._keep(source(name + "input_layernorm.weight")),
            query_norm=self._keep(source(attention + "q_a_layernorm.weight")) if compressed else None,
            latent_norm=self._keep(source(attention + "kv_a_layernorm.weight")),
            post_norm=self._keep(source(name + "post_attention_layernorm.weight")),
            down_projections=self._matrix(both_FD),
            query_up=self._matrix(source(attention + "q_b_proj.weight")) if compressed else absent(),
        )
        layer.key_up, layer.value_up, layer.key_expand = self._heads(floats(source(attention + "kv_b_proj.weight")))
        layer.output = self._matrix(source(attention + "o_proj.weight"))
        self._feed_forward(layer, source, index)
        return layer

    def _heads(self, up_XC: Tensor) -> tuple[MatrixStruct, MatrixStruct, MatrixStruct]:
        """Key up-projection transposed per head `[H, C, N]`, value up-projection `[H, U, C]`, and the former not transposed."""
        config = self.config
        up_HXC = up_XC.view(config.num_attention_heads, -1, config.kv_lora_rank)
        key_HNC, value_HUC = up_HXC.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
        key_up = self._matrix(key_HNC.transpose(1, 2), self._latent_format)
        expand = self._matrix(key_HNC, self._latent_format) if self.fast_prefill else absent()
        return key_up, self._matrix(value_HUC, self._latent_format), expand

    def _feed_forward(self, layer: _LayerStruct, source: WeightSource, index: int) -> None:
        config, name = self.config, f"layers.{index}.mlp."
        layer.router = layer.expert_gate_up = layer.expert_down = layer.shared_gate_up = layer.shared_down = absent()
        if not config.is_moe_layer(index):
            layer.shared_gate_up = self._gated(source(name + "gate_up_proj.weight"))
            layer.shared_down = self._matrix(source(name + "down_proj.weight"))
            return
        layer.router = self._add(quantised(source(name + "gate.weight"), "f32"))
        if config.topk_method == "noaux_tc":
            layer.router_bias = self._keep(source(name + "gate.e_score_correction_bias"))
        layer.expert_gate_up = self._gated(source(name + "experts.gate_up_proj"))
        layer.expert_down = self._matrix(source(name + "experts.down_proj"))
        if config.n_shared_experts:
            layer.shared_gate_up = self._gated(source(name + "shared_experts.gate_up_proj.weight"))
            layer.shared_down = self._matrix(source(name + "shared_experts.down_proj.weight"))

    def _matrix(self, weight: Weight, format_name: str | None = None) -> MatrixStruct:
        if isinstance(weight, Tensor) and weight.is_meta:
            return self._random(weight, format_name or self.format)
        return self._add(quantised(weight, format_name or self.format, self.group))

    def _gated(self, gate_up: Weight) -> MatrixStruct:
        if isinstance(gate_up, Tensor) and gate_up.is_meta:
            return self._random(gate_up, self.format)
        gate, up = (quantised(half, self.format, self.group) for half in halves(gate_up))
        return self._hold(pack_gated(gate, up, self._memory.empty))

    def _random(self, weight: Tensor, format_name: str) -> MatrixStruct:
        """Codes nobody computed, for measuring speed without quantising first."""
        group = INT8_GROUP if format_name == "int8" else self.group or INT4_GROUP
        shape = weight.shape if weight.dim() == 3 else (1, *weight.shape)
        return self._hold(random_packed(format_name, group, shape, self._memory.empty))

    def _add(self, codes: Codes) -> MatrixStruct:
        return self._hold(pack(codes, self._memory.empty))

    def _hold(self, packed: Packed) -> MatrixStruct:
        self._kept.append(packed)
        self.weight_bytes += packed.num_bytes
        return packed.struct()

    def _keep(self, vector: Weight) -> int:
        kept = floats(vector).float().contiguous().clone()
        self._kept.append(kept)
        return kept.data_ptr()

    def _model(self, source: WeightSource, layers: Any, head: MatrixStruct, max_positions: int | None) -> _ModelStruct:
        config = self.config
        rotations = torch.view_as_real(rotation_table(config, config.qk_rope_head_dim)[:max_positions])
        limited = config.n_group > 1 and config.topk_method != "greedy"
        yarn = config.rope_scaling
        self._kept.append(layers)
        return _ModelStruct(
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            heads=config.num_attention_heads,
            plain=config.qk_nope_head_dim,
            rotary=config.qk_rope_head_dim,
            value=config.v_head_dim,
            latent=config.kv_lora_rank,
            query_latent=config.q_lora_rank or 0,
            experts_per_token=config.num_experts_per_tok,
            groups=config.n_group if limited else 1,
            top_groups=config.topk_group if limited else 1,
            softmax_scores=config.scoring_func != "sigmoid",
            group_by_best_two=config.topk_method == "noaux_tc",
            renormalise=config.norm_topk_prob,
            routed_scale=config.routed_scaling_factor,
            embedding=None if isinstance(self._embedding, Codes) else self._embedding.data_ptr(),
            embedding_is_bf16=not isinstance(self._embedding, Codes) and self._embedding.dtype == torch.bfloat16,
            norm_eps=config.rms_norm_eps,
            latent_norm_eps=LATENT_NORM_EPS,
            softmax_scale=config.qk_head_dim**-0.5 * (yarn.softmax_multiplier() if yarn else 1.0),
            rotations=self._keep(rotations),
            final_norm=self._keep(source("norm.weight")),
            head=head,
            layers=layers,
        )


def _check_layout(kernels: ctypes.CDLL) -> None:
    """The two sides must agree on every structure, or pointers would be read as sizes."""
    kernels.shoal_struct_bytes.restype = ctypes.c_int64
    for which, struct in enumerate((MatrixStruct, _LayerStruct, _ModelStruct, _BatchStruct)):
        assert kernels.shoal_struct_bytes(which) == ctypes.sizeof(struct), struct.__name__
