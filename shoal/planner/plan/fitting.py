"""Does it fit, on how many of what: training and serving memory of a question, each with the split that was found."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, cast

from shoal.config import ModelConfig
from shoal.planner.hardware import Cluster
from shoal.planner.memory import (
    Fit,
    Split,
    TrainingMemory,
    TrainingPlan,
    fits,
    largest_micro_batch,
    largest_sequence,
    smallest_split,
    training_memory,
)
from shoal.planner.plan.figure import Figure
from shoal.planner.plan.question import Question
from shoal.planner.serving_memory import (
    ServingMemory,
    ServingPlan,
    WeightFormat,
    fewest_devices,
    longest_context,
    most_sequences,
    serving_memory,
)

MOST_TRAINING_DEVICES = 16384
MOST_SERVING_DEVICES = 1024
SEQUENCES_PER_DEVICE = 256
"""At most so many are served at once for each device where nobody says how many: beyond, answers get slow."""

_TRAINING = "shoal/planner/memory.py: closed forms held within a fifth of the real model by tests"
_SERVING = "shoal/planner/serving_memory.py"


@dataclass(frozen=True, kw_only=True)
class Trained:
    """The split that training needs."""

    plan: TrainingPlan
    memory: TrainingMemory
    fit: Fit
    devices_min: int | None
    """None where even `MOST_TRAINING_DEVICES` do not hold it."""


@dataclass(frozen=True, kw_only=True)
class Served:
    """The deployment that is served."""

    plan: ServingPlan
    cluster: Cluster
    memory: ServingMemory
    fit: Fit
    devices_min: int | None
    """None where even `MOST_SERVING_DEVICES` do not hold it."""
    most_sequences: int


def trained(question: Question) -> Trained | None:
    """The smallest split that holds training, or what one device would need; None where the shape is not known."""
    config, settings = question.model.config, question.settings
    if config is None:
        return None
    device, reserve = question.cluster.device, settings.value("reserve_fraction")
    most = MOST_TRAINING_DEVICES if device.link_bytes_per_s else 1
    named = settings.words["recompute"]
    found = None
    for recompute in ("selective", "full") if named == "auto" else (named,):
        plan = TrainingPlan(
            recipe=question.recipe,
            split=Split(shard=cast(Any, settings.words["shard"])),
            micro_batch=settings.whole("micro_batch"),
            sequence_tokens=settings.whole("sequence_tokens"),
            recompute=cast(Any, recompute),
        )
        found = found or smallest_split(config, device, plan, max_devices=most, reserve_fraction=reserve)
    chosen = found or plan
    if found is not None and question.is_hardware_given:  # more devices than the least share what can be shared
        chosen = _spread(found, question.cluster.count)
    memory = training_memory(config, chosen)
    return Trained(
        plan=chosen,
        memory=memory,
        fit=fits(memory.total_bytes, device, reserve_fraction=reserve),
        devices_min=None if found is None else found.split.num_devices,
    )


def served(question: Question) -> Served | None:
    """The deployment on the hardware given, or on the fewest of the assumed device.

    None where the shape is not known, or where the cache is no single kind of entry: then neither memory nor speed would be right.
    """
    config, settings = question.model.config, question.settings
    if config is None or question.model.is_sparse:
        return None
    device, reserve = question.cluster.device, settings.value("reserve_fraction")
    most = MOST_SERVING_DEVICES if device.link_bytes_per_s else 1
    plan = replace(_serving_plan(question, config), weights=_weights(question, config))
    least = fewest_devices(config, device, plan, max_devices=most, reserve_fraction=reserve)
    count = question.cluster.count
    if not question.is_hardware_given and least is not None:
        whole = device.devices_per_node
        count = least if least <= whole else -(-least // whole) * whole
    plan = replace(plan, num_devices=count)
    room = most_sequences(config, device, plan, reserve_fraction=reserve)
    wanted = settings.whole("num_sequences") if "num_sequences" in settings.numbers else None
    plan = replace(plan, num_sequences=wanted or max(1, min(room, SEQUENCES_PER_DEVICE * count)))
    memory = serving_memory(config, plan)
    return Served(
        plan=plan,
        cluster=Cluster(device=device, count=count),
        memory=memory,
        fit=fits(memory.total_bytes, device, reserve_fraction=reserve),
        devices_min=least,
        most_sequences=room,
    )


def fitting_figures(question: Question, training: Trained | None, serving: Served | None) -> Iterator[Figure]:
    """Memory of both, against the device."""
    if training is not None:
        yield from _training_figures(question, training)
    if serving is not None:
        yield from _serving_figures(question, serving)


def _training_figures(question: Question, found: Trained) -> Iterator[Figure]:
    config, device = question.model.config, question.cluster.device
    assert config is not None
    plan, reserve = found.plan, question.settings.value("reserve_fraction")
    split, name = plan.split, device.name
    layout = f"{split.data} data x {split.pipeline} pipeline, experts over {split.expert}"
    inputs = ("micro_batch", "sequence_tokens", "recipe", "recompute", "shard", "reserve_fraction")
    yield Figure(
        name="training_memory_bytes",
        label=f"training, fullest of {split.num_devices} ({layout}; {plan.recipe.name}, {plan.recompute} recompute)",
        value=found.memory.total_bytes,
        unit="bytes",
        formula="weights + master weights + gradients + optimizer + gathered + activations + logits",
        inputs=inputs,
        source=f"{_TRAINING}; {plan.recipe.source}",
    )
    yield Figure(
        name="training_fits",
        label=f"on {question.cluster.name}" if question.is_hardware_given else f"on {split.num_devices}x {name}",
        value=_yes(found.fit.fits and (not question.is_hardware_given or split.num_devices <= question.cluster.count)),
        unit="yes or no",
        formula="training_memory_bytes <= device_bytes x (1 - reserve_fraction)",
        inputs=("training_memory_bytes", "device_bytes", "reserve_fraction"),
        source=_TRAINING,
    )
    yield Figure(
        name="training_devices_min",
        label=f"fewest {name} that hold it, powers of two",
        value=found.devices_min,
        unit="devices",
        formula="the smallest data x pipeline x expert split whose fullest device fits",
        inputs=inputs,
        source=_TRAINING,
        note=""
        if found.devices_min
        else f"training does not fit: one {name} would need {found.memory.total_bytes / 1e9:,.1f} GB",
    )
    if found.devices_min is not None:
        for figure, label, value in (
            (
                "largest_micro_batch",
                "most sequences on a device",
                largest_micro_batch(config, device, plan, reserve_fraction=reserve),
            ),
            (
                "largest_sequence_tokens",
                "longest training row",
                largest_sequence(config, device, plan, reserve_fraction=reserve),
            ),
        ):
            yield Figure(
                name=figure,
                label=f"{label} in this split",
                value=value,
                unit="sequences" if figure == "largest_micro_batch" else "tokens",
                formula="the largest that still fits",
                inputs=inputs,
                source=_TRAINING,
            )


def _serving_figures(question: Question, found: Served) -> Iterator[Figure]:
    config, device = question.model.config, question.cluster.device
    assert config is not None
    plan, reserve, name = found.plan, question.settings.value("reserve_fraction"), device.name
    inputs = ("weights", "context_tokens", "cache_bytes_per_number", "device_bytes", "reserve_fraction")
    yield Figure(
        name="serving_memory_bytes",
        label=f"serving {plan.num_sequences} sequences, fullest of {plan.num_devices} ({plan.weights} weights)",
        value=found.memory.total_bytes,
        unit="bytes",
        formula="weights + cache + working room of a step + logits",
        inputs=inputs,
        source=_SERVING,
    )
    yield Figure(
        name="serving_fits",
        label=f"on {found.cluster.name}",
        value=_yes(found.fit.fits),
        unit="yes or no",
        formula="serving_memory_bytes <= device_bytes x (1 - reserve_fraction)",
        inputs=("serving_memory_bytes", "device_bytes", "reserve_fraction"),
        source=_SERVING,
    )
    yield Figure(
        name="serving_devices_min",
        label=f"fewest {name} that hold one sequence",
        value=found.devices_min,
        unit="devices",
        formula="the smallest number whose fullest device fits",
        inputs=inputs,
        source=_SERVING,
        note=""
        if found.devices_min
        else f"serving does not fit: {found.memory.weights / 1e9:,.1f} GB of {plan.weights} weights",
    )
    yield Figure(
        name="most_sequences",
        label="sequences of context_tokens that fit at once",
        value=found.most_sequences,
        unit="sequences",
        formula="the largest number that still fits",
        inputs=inputs,
        source=_SERVING,
    )
    yield Figure(
        name="longest_context_tokens",
        label="longest context of one sequence",
        value=longest_context(config, device, replace(plan, num_sequences=1), reserve_fraction=reserve),
        unit="tokens",
        formula="the largest that still fits, whatever positions the model knows",
        inputs=("weights", "cache_bytes_per_number", "device_bytes", "reserve_fraction"),
        source=_SERVING,
    )


def _serving_plan(question: Question, config: ModelConfig) -> ServingPlan:
    return ServingPlan(
        cache_bytes_per_number=question.settings.value("cache_bytes_per_number"),
        context_tokens=question.settings.whole("context_tokens"),
        num_devices=question.cluster.count,
        layout="tensor" if config.n_routed_experts is None else "expert",
    )


def _weights(question: Question, config: ModelConfig) -> WeightFormat:
    """`auto` resolved: the widest format that the device multiplies natively and that fits."""
    named = question.settings.words["weights"]
    if named != "auto":
        return cast(WeightFormat, named)
    formats: tuple[WeightFormat, ...] = ("bf16", "int8", "int4")
    if "fp8" in question.cluster.device.flops:
        formats = ("fp8", "int4")
    plan = _serving_plan(question, config)
    reserve = question.settings.value("reserve_fraction")
    most = question.cluster.count if question.is_hardware_given else MOST_SERVING_DEVICES
    for weights in formats:
        least = fewest_devices(
            config, question.cluster.device, replace(plan, weights=weights), max_devices=most, reserve_fraction=reserve
        )
        if least is not None:
            return weights
    return formats[-1]


def _spread(plan: TrainingPlan, count: int) -> TrainingPlan:
    """The same split repeated over as many devices as there are, data parallelism taking the rest."""
    times = count // plan.split.num_devices
    return plan if times < 2 else replace(plan, split=replace(plan.split, data=plan.split.data * times))


def _yes(is_true: bool) -> str:
    return "yes" if is_true else "no"
