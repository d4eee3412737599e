"""The engine that serves a loaded model best on this machine: paged and cached where the packed pass fits, else simple."""

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.checkpoint.stored_weights import StoredWeights
from shoal.config import ModelConfig
from shoal.engine.disk_cache import DiskCache
from shoal.engine.engine import Engine
from shoal.engine.loading import LoadedModel
from shoal.engine.packed_model import PackedModel, WeightSource, fits
from shoal.engine.prefix_cache import CacheIdentity
from shoal.engine.runner import PackedRunner
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.engine.speculative import Drafter, Speculation, has_drafter
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import kernels_digest
from shoal.kernels.packed import FP8_BLOCK
from shoal.log import say
from shoal.model.transformer import Transformer

GIB = 1 << 30
LAYOUT_VERSION = 2
"""Of a unit's bytes; another layout finds nothing."""


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """What an operator chooses."""

    weights: str = "auto"
    """Format in memory: f32, bf16, fp8, int8 or int4; auto is the format of a quantised directory, else bf16."""
    cache_bytes: int = GIB
    """RAM for latents."""
    fp8_cache: bool = False
    """Keep them in FP8, also on disk."""
    disk_dir: Path | None = None
    """Where latents outlive the process; None is the user's cache directory."""
    use_disk: bool = True
    disk_bytes: int = 20 * GIB
    disk_age_s: float = 7 * 86400.0
    max_context: int | None = None
    max_running: int = 64
    step_tokens: int = 512
    fast_prefill: bool = False
    """Read long prompts with expanded keys and values (`PackedModel`)."""
    speculative: bool | None = None
    """Guess tokens with the model's own prediction module: where it gains (None: where the model has one), or never."""
    speculative_tokens: int = 1
    """Guesses per step at most."""


@dataclass(frozen=True, kw_only=True)
class MadeEngine:
    """An engine and what must be closed after it."""

    engine: Engine | ServingEngine
    disk: DiskCache | None


def make_engine(loaded: LoadedModel, options: EngineOptions) -> MadeEngine:
    """Choose and build.

    Raises:
        ConfigError: a quantised format, speculation, FP8 latents or fast prefill for a model that only the simple engine can
            run; speculation for a model without a prediction module; fast prefill in float32 or with odd widths.
    """
    model_config = loaded.config
    if not fits(model_config):
        if options.weights not in ("auto", "f32", "bf16"):
            raise ConfigError(
                f"weights={options.weights!r} needs the packed CPU pass, which does not fit this model; use bf16."
            )
        if options.speculative:
            raise ConfigError(
                "speculative decoding needs the packed CPU pass, which does not fit this model; leave it out."
            )
        if options.fp8_cache or options.fast_prefill:
            raise ConfigError(
                "--fp8-cache and --fast-prefill need the packed CPU pass, which does not fit this model; leave them out."
            )
        say(
            "the packed CPU pass does not fit this model or machine (see shoal doctor): simple engine, no context cache"
        )
        return MadeEngine(engine=Engine(loaded.model, max_context=options.max_context), disk=None)
    packed = pack_stored(loaded.weights, options.weights, fast_prefill=options.fast_prefill)
    speculation = _speculation(packed, loaded.weights, has_drafter(model_config), options)
    identity = CacheIdentity(
        weights_digest=loaded.weights.digest,
        dtype=", ".join(
            [
                packed.format,
                *["fp8 latents"] * options.fp8_cache,
                *["fast prefill"] * packed.fast_prefill,
                kernels_digest(),
            ]
        ),
        layout_version=LAYOUT_VERSION,
        rope_digest=hashlib.blake2b(
            repr((model_config.rope_theta, model_config.rope_scaling)).encode(), digest_size=16
        ).hexdigest(),
        tokenizer_digest=loaded.tokenizer.digest if loaded.tokenizer else "",
        isolation="",
    )
    config = ServingConfig(
        cache_bytes=options.cache_bytes,
        fp8_cache=options.fp8_cache,
        max_context=options.max_context,
        max_running=options.max_running,
        step_tokens=options.step_tokens,
    )
    engine = ServingEngine(packed, config, identity=identity, speculation=speculation)
    if options.use_disk:
        engine.disk = DiskCache(
            options.disk_dir or default_disk_dir(),
            max_bytes=options.disk_bytes,
            max_age_s=options.disk_age_s,
            unit_bytes=engine.unit_bytes,
        )
    return MadeEngine(engine=engine, disk=engine.disk)


def _speculation(
    packed: PackedModel, source: WeightSource, has_module: bool, options: EngineOptions
) -> Speculation | None:
    """The model's own prediction module at work, when it has one and nobody forbids it."""
    if options.speculative and not has_module:
        raise ConfigError(
            "this model has no prediction module (num_nextn_predict_layers is 0); leave --speculative out."
        )
    if options.speculative is False or not has_module:
        return None
    return Speculation(Drafter(packed, source), options.speculative_tokens)


def simple_engine(loaded: LoadedModel) -> Engine:
    """The engine of a single conversation: float weights in the dtype of training, a quantised directory as it is."""
    if loaded.weights.format is None or not fits(loaded.config):
        return Engine(loaded.model)
    with torch.device("meta"):
        shape_only = Transformer(loaded.config)
    return Engine(shape_only, runner=PackedRunner(shape_only, pack_stored(loaded.weights)))


def pack_stored(
    weights: StoredWeights, format_name: str = "auto", *, max_positions: int | None = None, fast_prefill: bool = False
) -> PackedModel:
    """Pack a directory, one parameter in memory at a time.

    Args:
        format_name: "auto" keeps a quantised directory's own formats, of the head too; plain floats become bf16.
    """
    own = format_name in ("auto", weights.format) and weights.format is not None
    return PackedModel(
        weights.config,
        weights,
        str(weights.format) if own else "bf16" if format_name == "auto" else format_name,
        group=weights.group if own else None,
        head_format=weights.head_format if own else None,
        latent_format=_latent_format(weights.config, str(weights.format)) if own else None,
        max_positions=max_positions,
        fast_prefill=fast_prefill,
    )


def _latent_format(config: ModelConfig, stored: str) -> str:
    """What the absorbed up-projections become, whose key half is quantised along the other axis than it is stored.

    Integer directories keep them in bfloat16 for that reason: eight bits are enough, and four would be the largest error
    of the layer. FP8 blocks can be turned where heads fill whole blocks; else a second rounding is not worth the bytes.
    """
    if stored != "fp8":
        return "int8"
    whole = config.qk_nope_head_dim % FP8_BLOCK == 0 and config.v_head_dim % FP8_BLOCK == 0
    return "fp8" if whole and config.kv_lora_rank % FP8_BLOCK == 0 else "bf16"


def default_disk_dir() -> Path:
    """The context cache in the user's cache directory (XDG base directory specification)."""
    root = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(root) / "shoal" / "context"
