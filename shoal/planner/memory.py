"""How many bytes training a model needs on each device, what fills them, and what fits.

Training holds weights in the format of the products, a float32 master copy where that format is narrower, gradients and the
optimizer's moments (`activations.Recipe`), the activations of the micro-batches under way, and a chunk of logits.

Devices split this as DeepSeek did: a pipeline cuts the layers into stages, experts are dealt over `expert` devices, and data
parallelism shares optimizer states (ZeRO-1) or everything (FSDP, ZeRO-3). Every function answers for the fullest device. A
pipeline saves weights but no activations: its first stage keeps as many micro-batches as there are stages. DualPipe holds
two stages per device and PP + 1 micro-batches (V3 table 2).

Not counted, and left to `fits`' reserve: the driver's context, gradient and communication buffers, fragmentation.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Literal, get_args

from shoal.config import ModelConfig
from shoal.errors import ConfigError
from shoal.planner.activations import Recipe, Recompute, layer_activations
from shoal.planner.checks import check_count, check_word
from shoal.planner.counts import attention_parameters, expert_parameters
from shoal.planner.hardware import Device

Shard = Literal["none", "optimizer", "all"]
Schedule = Literal["1f1b", "dualpipe"]


@dataclass(frozen=True, kw_only=True)
class Split:
    """How devices share the work: `data * pipeline` of them."""

    data: int = 1
    expert: int = 1
    """Devices that one layer's experts are dealt over; a divisor of `data`."""
    pipeline: int = 1
    shard: Shard = "all"
    """What data parallelism shares: nothing, optimizer states and master weights (ZeRO-1), or everything (FSDP)."""
    schedule: Schedule = "1f1b"

    def __post_init__(self) -> None:
        for name in ("data", "expert", "pipeline"):
            check_count(name, getattr(self, name))
        check_word("shard", self.shard, get_args(Shard))
        check_word("schedule", self.schedule, get_args(Schedule))
        if self.data % self.expert:
            raise ConfigError(
                f"expert={self.expert} does not divide data={self.data}: expert parallelism lives inside data parallelism; "
                "DeepSeek-V3 has 64 of 128."
            )
        if self.schedule == "dualpipe" and self.pipeline % 2:
            raise ConfigError(f"pipeline={self.pipeline} is odd; DualPipe pairs stages, use an even number.")

    @property
    def num_devices(self) -> int:
        """Of the whole run."""
        return self.data * self.pipeline


@dataclass(frozen=True, kw_only=True)
class TrainingPlan:
    """One training step as far as memory cares."""

    recipe: Recipe
    split: Split = Split()
    micro_batch: int = 1
    """Sequences that one device works on at once."""
    sequence_tokens: int = 4096
    recompute: Recompute = "selective"
    loss_chunk_tokens: int | None = 1024
    """Tokens whose logits exist at once; None makes all of them, and their gradient."""

    def __post_init__(self) -> None:
        check_count("micro_batch", self.micro_batch)
        check_count("sequence_tokens", self.sequence_tokens)
        check_word("recompute", self.recompute, get_args(Recompute))
        if self.loss_chunk_tokens is not None:
            check_count("loss_chunk_tokens", self.loss_chunk_tokens)


@dataclass(frozen=True, kw_only=True)
class TrainingMemory:
    """Bytes on the fullest device."""

    weights: int
    master_weights: int
    gradients: int
    optimizer: int
    gathered: int
    """FSDP only: embedding and head, and two layers at a time, put together from their shards."""
    activations: int
    logits: int

    @property
    def total_bytes(self) -> int:
        """All parts."""
        return sum(self.by_part().values())

    def by_part(self) -> dict[str, int]:
        """The disjoint parts."""
        return dict(vars(self))


@dataclass(frozen=True, kw_only=True)
class Fit:
    """Needed against available, on one device."""

    needed_bytes: int
    device_bytes: int
    reserved_bytes: int
    """Kept free for what is not counted."""

    @property
    def fits(self) -> bool:
        """Whether it does."""
        return self.free_bytes >= 0

    @property
    def free_bytes(self) -> int:
        """What is left beside the reserve; negative by how much is missing."""
        return self.device_bytes - self.reserved_bytes - self.needed_bytes


def training_memory(config: ModelConfig, plan: TrainingPlan) -> TrainingMemory:
    """Bytes on the fullest device of a training run.

    Raises:
        ConfigError: more pipeline stages than layers, or more expert devices than experts.
    """
    _check_split(config, plan.split)
    loads = (_device_memory(config, plan, stages) for stages in _devices(plan.split))
    return max(loads, key=lambda memory: memory.total_bytes)


def fits(needed_bytes: int, device: Device, *, reserve_fraction: float = 0.1) -> Fit:
    """Hold `needed_bytes` of one device against its memory.

    Args:
        reserve_fraction: of the device's memory, kept free for what is not counted.
    """
    if not 0 <= reserve_fraction < 1:
        raise ConfigError(f"reserve_fraction={reserve_fraction} must be at least 0 and below 1; 0.1 is the default.")
    return Fit(
        needed_bytes=needed_bytes,
        device_bytes=device.memory_bytes,
        reserved_bytes=math.ceil(device.memory_bytes * reserve_fraction),
    )


def smallest_split(
    config: ModelConfig, device: Device, plan: TrainingPlan, *, max_devices: int = 16384, reserve_fraction: float = 0.1
) -> TrainingPlan | None:
    """`plan` on the fewest devices that hold it, powers of two; None where even `max_devices` do not.

    Of equally many devices the plainest split is taken: fewest pipeline stages, then fewest expert devices. `plan.split`
    gives sharding and schedule.
    """
    check_count("max_devices", max_devices)

    def fit(split: Split) -> bool:
        needed = training_memory(config, replace(plan, split=split)).total_bytes
        return fits(needed, device, reserve_fraction=reserve_fraction).fits

    for splits in _splits(config, plan.split, max_devices):
        if fit(splits[-1]):  # dealing experts wider never takes more memory, so the widest decides
            return replace(plan, split=next(split for split in splits if fit(split)))
    return None


def largest_micro_batch(
    config: ModelConfig, device: Device, plan: TrainingPlan, *, reserve_fraction: float = 0.1
) -> int:
    """Most sequences of `plan.sequence_tokens` that a device can work on at once; 0 where not even one."""

    def fit(batch: int) -> bool:
        needed = training_memory(config, replace(plan, micro_batch=batch)).total_bytes
        return fits(needed, device, reserve_fraction=reserve_fraction).fits

    return largest(fit)


def largest_sequence(config: ModelConfig, device: Device, plan: TrainingPlan, *, reserve_fraction: float = 0.1) -> int:
    """Longest training row at `plan.micro_batch`, whatever positions the model knows; 0 where not even one token fits."""

    def fit(tokens: int) -> bool:
        needed = training_memory(config, replace(plan, sequence_tokens=tokens)).total_bytes
        return fits(needed, device, reserve_fraction=reserve_fraction).fits

    return largest(fit)


def largest(fit: Callable[[int], bool], limit: int = 2**40) -> int:
    """The largest whole number up to `limit` that still fits; 0 where 1 does not. `fit` must not come back once lost."""
    if not fit(1):
        return 0
    low, high = 1, 2
    while high <= limit and fit(high):
        low, high = high, 2 * high
    high = min(high, limit + 1)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fit(middle) else (low, middle)
    return low


@dataclass(frozen=True, kw_only=True)
class HeldParameters:
    """What lies on one device before data parallelism shares it, in numbers."""

    experts: int
    """Of its own experts."""
    matrices: int
    """Attention, dense layers, shared experts."""
    tables: int
    """Embedding and head."""
    others: int
    """Router, norms, the joints of MTP modules."""

    @property
    def total(self) -> int:
        """All of them."""
        return self.experts + self.matrices + self.tables + self.others

    def bytes_at(self, matrix_bytes: float, other_bytes: float, shares: tuple[int, int] = (1, 1)) -> int:
        """Bytes of one share.

        Args:
            shares: how many devices share the experts, and how many the rest.
        """
        rest = self.matrices * matrix_bytes + (self.tables + self.others) * other_bytes
        return math.ceil(self.experts * matrix_bytes / shares[0]) + math.ceil(rest / shares[1])


def layer_parameters(config: ModelConfig, layer: int, expert_devices: int = 1) -> HeldParameters:
    """One layer with the largest share of its experts; MTP layers count on from `num_hidden_layers`, with their joint."""
    hidden, is_latent = config.hidden_size, config.attention == "mla"
    inner_norms = config.kv_lora_rank + (config.q_lora_rank or 0) if is_latent else 0
    experts, matrices, others = 0, attention_parameters(config) - inner_norms, inner_norms + 2 * hidden
    if config.is_moe_layer(layer):
        count = config.n_routed_experts or 0
        experts = math.ceil(count / expert_devices) * expert_parameters(config)
        matrices += config.n_shared_experts * expert_parameters(config)
        others += count * hidden + (count if config.topk_method == "noaux_tc" else 0)
    else:
        matrices += 3 * hidden * config.intermediate_size
    if layer >= config.num_hidden_layers:
        others += 2 * hidden * hidden + 3 * hidden
    return HeldParameters(experts=experts, matrices=matrices, tables=0, others=others)


def _device_memory(config: ModelConfig, plan: TrainingPlan, stages: tuple[int, ...]) -> TrainingMemory:
    """Bytes on a device that holds these pipeline stages."""
    recipe, split = plan.recipe, plan.split
    layers = [_stage_layers(config, split, stage) for stage in stages]
    held = _held(config, split, layers, stages)
    replicas = (split.data // split.expert, split.data)
    weight_shares = replicas if split.shard == "all" else (1, 1)
    state_shares = (1, 1) if split.shard == "none" else replicas
    return TrainingMemory(
        weights=held.bytes_at(recipe.matrix_weight_bytes, recipe.other_weight_bytes, weight_shares),
        master_weights=held.bytes_at(recipe.master_bytes, recipe.master_bytes, state_shares),
        gradients=held.bytes_at(recipe.gradient_bytes, recipe.gradient_bytes, weight_shares),
        optimizer=held.bytes_at(recipe.matrix_moment_bytes, recipe.other_moment_bytes, state_shares),
        gathered=_gathered(config, plan, layers, held.tables) if split.shard == "all" and split.data > 1 else 0,
        activations=_activations(config, plan, layers, stages),
        logits=_logits(config, plan) if split.pipeline - 1 in stages else 0,
    )


def _held(config: ModelConfig, split: Split, layers: list[range], stages: tuple[int, ...]) -> HeldParameters:
    parts = [
        (layer_parameters(config, layer, split.expert), count)
        for stage in layers
        for layer, count in alike_layers(config, stage)
    ]
    is_first, is_last = 0 in stages, split.pipeline - 1 in stages
    # MTP modules on the last stage read the embedding too; where it is the head's table it is there already.
    needs_embedding = is_first or (is_last and (config.tie_word_embeddings or config.num_nextn_predict_layers > 0))
    num_tables = int(needs_embedding) + int(is_last and not config.tie_word_embeddings)
    return HeldParameters(
        experts=sum(part.experts * count for part, count in parts),
        matrices=sum(part.matrices * count for part, count in parts),
        tables=num_tables * config.vocab_size * config.hidden_size,
        others=sum(part.others * count for part, count in parts) + (config.hidden_size if is_last else 0),
    )


def _gathered(config: ModelConfig, plan: TrainingPlan, layers: list[range], tables: int) -> int:
    """Whole weights beside the shards: tables for the step, the layer at work and the one fetched ahead."""
    recipe, split = plan.recipe, plan.split
    sizes = []
    for layer, count in (group for stage in layers for group in alike_layers(config, stage)):
        part = layer_parameters(config, layer, split.expert)
        if split.data == split.expert:  # every expert has one home, so there is nothing to put together
            part = replace(part, experts=0)
        sizes += [part.bytes_at(recipe.matrix_weight_bytes, recipe.other_weight_bytes)] * min(count, 2)
    return sum(sorted(sizes)[-2:]) + math.ceil(tables * recipe.other_weight_bytes)


def _activations(config: ModelConfig, plan: TrainingPlan, layers: list[range], stages: tuple[int, ...]) -> int:
    """Kept over all micro-batches under way, and one layer's recomputed part."""
    tokens, pipeline = plan.micro_batch * plan.sequence_tokens, plan.split.pipeline
    kept_halves, recomputed = 0, 0
    for stage, held in zip(stages, layers, strict=True):
        in_flight_halves = pipeline + 1 if plan.split.schedule == "dualpipe" else 2 * (pipeline - stage)
        for layer, count in alike_layers(config, held):
            kept = layer_activations(config, layer, plan.recipe, plan.recompute).total_bytes
            whole = layer_activations(config, layer, plan.recipe, "none").total_bytes
            kept_halves += in_flight_halves * kept * count
            recomputed = max(recomputed, whole - kept)
    return math.ceil(kept_halves / 2) * tokens + recomputed * tokens


def _logits(config: ModelConfig, plan: TrainingPlan) -> int:
    """Final hidden states with their gradient, and the scores; MTP modules pass through the head once more each."""
    recipe, tokens = plan.recipe, plan.micro_batch * plan.sequence_tokens
    passes = 1 + config.num_nextn_predict_layers
    hidden = passes * tokens * math.ceil(2 * config.hidden_size * recipe.activation_bytes)
    if plan.loss_chunk_tokens is None:
        return hidden + passes * tokens * math.ceil(config.vocab_size * (recipe.activation_bytes + 4))
    # The scores of a chunk become their own gradient in place (shoal/training/loss.py).
    return hidden + min(tokens, plan.loss_chunk_tokens) * config.vocab_size * 4


def _stage_layers(config: ModelConfig, split: Split, stage: int) -> range:
    """Layers are dealt evenly; MTP modules follow the last one."""
    layers = config.num_hidden_layers
    stop = (stage + 1) * layers // split.pipeline
    if stage == split.pipeline - 1:
        stop += config.num_nextn_predict_layers
    return range(stage * layers // split.pipeline, stop)


def alike_layers(config: ModelConfig, layers: range) -> list[tuple[int, int]]:
    """The layers in at most four groups of equal ones, each as its first layer and a count: plans must answer at once."""
    cuts = {layers.start, layers.stop, config.first_k_dense_replace, config.num_hidden_layers}
    inside = sorted(cut for cut in cuts if layers.start <= cut <= layers.stop)
    return [(first, stop - first) for first, stop in pairwise(inside)]


def _devices(split: Split) -> Iterator[tuple[int, ...]]:
    """The stages that each pipeline rank holds; DualPipe pairs the first with the last."""
    if split.schedule == "dualpipe":
        yield from ((stage, split.pipeline - 1 - stage) for stage in range(split.pipeline // 2))
    else:
        yield from ((stage,) for stage in range(split.pipeline))


def _splits(config: ModelConfig, like: Split, max_devices: int) -> Iterator[list[Split]]:
    """Splits by powers of two, fewest devices first, then fewest stages; each list deals the experts ever wider."""
    experts = config.n_routed_experts or 1
    for devices in _powers_of_two(max_devices):
        for pipeline in _powers_of_two(min(devices, config.num_hidden_layers)):
            if like.schedule == "dualpipe" and pipeline == 1:
                continue
            data = devices // pipeline
            widths = [width for width in _powers_of_two(min(data, experts)) if experts % width == 0]
            yield [replace(like, data=data, expert=width, pipeline=pipeline) for width in widths]


def _powers_of_two(top: int) -> list[int]:
    return [2**power for power in range(top.bit_length())]


def _check_split(config: ModelConfig, split: Split) -> None:
    if split.pipeline > config.num_hidden_layers:
        raise ConfigError(
            f"pipeline={split.pipeline} stages for num_hidden_layers={config.num_hidden_layers}; a stage holds at least one."
        )
    if split.expert > (config.n_routed_experts or 1):
        raise ConfigError(
            f"expert={split.expert} devices for n_routed_experts={config.n_routed_experts}; a device holds at least one "
            "expert, and a dense model has nothing to deal: use expert=1."
        )
