"""Calibrated int4 codes of a model, layer by layer, from the inputs that its matrices see on a text.

Each decoder layer is read once: the text's hidden states pass through it and every matrix notes the gram matrix of its
inputs; its codes are chosen; the states pass again, now through the rounded weights, so that later layers are calibrated
on what they will really get. An expert that few tokens reach borrows curvature from all tokens.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shoal.checkpoint.convert import Int4Codes
from shoal.checkpoint.layerwise import LayerwiseModel
from shoal.checkpoint.quantised import Scheme
from shoal.kernels.reference import swiglu
from shoal.model.experts import Experts, SwiGLU
from shoal.model.layers import Linear
from shoal.model.transformer import DecoderLayer
from shoal.quant.calibration import calibrated
from shoal.quant.int4 import dequantise

BORROWED_TOKENS = 64.0
"""How many tokens' worth of all tokens' curvature an expert's own gram matrix is given."""

GateUpDown = tuple[Tensor, Tensor]
"""Gram matrices of the inputs of gate and up, and of down."""


class Calibration:
    """Walks the layers of a model in order; `codes` is what a conversion asks for."""

    def __init__(self, source: Path, scheme: Scheme, token_BS: Tensor) -> None:
        self.model, self.scheme = LayerwiseModel(source), scheme
        self.hidden_BSD = self.model.embed(token_BS)

    @torch.no_grad()
    def codes(self, index: int) -> Int4Codes:
        """Choose the codes of layer `index`, and move the hidden states behind it."""
        layer = self.model.layer(index)
        grams = input_grams(layer, lambda: self.model.run(layer, self.hidden_BSD))
        found: Int4Codes = {}
        for key, (weight_FD, gram_DD) in _matrices(layer, f"model.layers.{index}.", grams).items():
            if self.scheme.format_of(key, tuple(weight_FD.shape)) != "int4":
                continue
            codes = calibrated(weight_FD, gram_DD, self.scheme.group)
            # The views share the layer's memory: from here on the layer computes with the rounded weights.
            weight_FD.copy_(dequantise(*codes, self.scheme.group))
            found[key] = codes
        self.hidden_BSD = self.model.run(layer, self.hidden_BSD)
        return found


def input_grams(layer: DecoderLayer, run: Callable[[], Any]) -> dict[str, Any]:
    """Gram matrices of all inputs that `run` sends through the layer, by module name; per expert for `mlp.experts`."""
    grams: dict[str, Any] = {}
    handles = []
    for name, module in layer.named_modules():
        if isinstance(module, Linear | SwiGLU | Experts):
            handles.append(module.register_forward_pre_hook(_collector(grams, name)))
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return grams


def _collector(grams: dict[str, Any], name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def collect(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x_MD = inputs[0].reshape(-1, inputs[0].shape[-1])
        if isinstance(module, Experts):
            _add_experts(grams.setdefault(name, {}), module, x_MD, inputs[2])
        elif isinstance(module, SwiGLU):
            act_MF = swiglu(x_MD @ module.gate_up_proj.weight.t())
            before = grams.get(name)
            both = (x_MD.t() @ x_MD, act_MF.t() @ act_MF)
            grams[name] = both if before is None else (before[0] + both[0], before[1] + both[1])
        else:
            grams[name] = grams.get(name, 0) + x_MD.t() @ x_MD

    return collect


def _add_experts(grams: dict[Any, Any], module: Experts, x_MD: Tensor, expert_MK: Tensor) -> None:
    """Per expert its own gram matrices and token count; under "all" those of every routed token."""
    for expert in range(len(module.gate_up_proj)):
        own_MD = x_MD[(expert_MK == expert).any(dim=-1)]
        act_MF = swiglu(own_MD @ module.gate_up_proj[expert].t())
        own = (own_MD.t() @ own_MD, act_MF.t() @ act_MF, float(len(own_MD)))
        for key in (expert, "all"):
            before = grams.get(key)
            grams[key] = own if before is None else tuple(a + b for a, b in zip(before, own))


def _matrices(layer: DecoderLayer, prefix: str, grams: Mapping[str, Any]) -> dict[str, tuple[Tensor, Tensor]]:
    """Every published matrix of the layer as a view of its parameter, with the gram matrix of its inputs."""
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, module in layer.named_modules():
        if isinstance(module, Experts):
            for expert in range(len(module.gate_up_proj)):
                both = _borrowed(grams[name], expert)
                weights = (module.gate_up_proj[expert], module.down_proj[expert])
                found |= _swiglu(f"{prefix}{name}.{expert}.", weights, both)
        elif isinstance(module, SwiGLU):
            weights = (module.gate_up_proj.weight, module.down_proj.weight)
            found |= _swiglu(f"{prefix}{name}.", weights, grams[name])
        elif isinstance(module, Linear) and name in grams:
            found[f"{prefix}{name}.weight"] = (module.weight.data, grams[name])
    return found


def _swiglu(prefix: str, weights: tuple[Tensor, Tensor], grams: GateUpDown) -> dict[str, tuple[Tensor, Tensor]]:
    gate_FD, up_FD = weights[0].data.chunk(2)
    return {
        f"{prefix}gate_proj.weight": (gate_FD, grams[0]),
        f"{prefix}up_proj.weight": (up_FD, grams[0]),
        f"{prefix}down_proj.weight": (weights[1].data, grams[1]),
    }


def _borrowed(grams: Mapping[Any, Any], expert: int) -> GateUpDown:
    own, everyone = grams[expert], grams["all"]
    share = BORROWED_TOKENS / max(everyone[2], 1.0)
    return own[0] + share * everyone[0], own[1] + share * everyone[1]
