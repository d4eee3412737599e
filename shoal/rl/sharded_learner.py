"""A learner on several processes (FSDP2): each holds a shard of the weights and moments, and computes a share of the answers.

    torchrun --nproc-per-node 2 -m shoal rl --task chain_sum

Rank 0 leads. It runs the recipe as if it were alone; its engine deals prompts to all ranks, and its learner deals answers.
The others follow (`follow`). Answers are normalised by the whole step, so the summed gradient is that of one process, and
a request's tokens depend on nothing but its own seed, so the samples are too.

AdamW works number by number, so it runs on the shards themselves; Muon needs whole matrices and is refused. Every rank also
keeps the whole weights to sample with: FSDP here saves gradients, moments and the activations of other ranks' answers. A
model too large for that samples elsewhere (`ray_rollouts.py`).
"""

from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.request import Completion, Request, SamplingParams
from shoal.errors import ConfigError
from shoal.model.layers import product_dtype, set_compute_dtype
from shoal.model.transformer import Transformer
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.importance import ImportanceConfig
from shoal.rl.learner import LearnerMaker, reference_of, update_options
from shoal.rl.objective import ObjectiveConfig
from shoal.rl.packed_rollouts import PackedRollouts
from shoal.rl.ranks import Ranks
from shoal.rl.rollout import EngineMaker
from shoal.rl.update import MEANS, MicroBatch, UpdateBatch, UpdateOptions, UpdateResult, plan_update, update_policy
from shoal.training.optimizer import OptimizerConfig, OptimizerSet
from shoal.training.step import CountTracker


class ShardedLearner:
    """What the leader's loop talks to; its optimizers are a mirror of the shards', filled for checkpoints."""

    def __init__(self, ranks: Ranks, model: Transformer, config: GrpoConfig) -> None:
        if config.optimizer.kind != "adamw":
            raise ConfigError(
                f"optimizer kind {config.optimizer.kind!r} needs whole matrices; under torchrun use 'adamw'."
            )
        if config.staleness:
            raise ConfigError(
                f"staleness={config.staleness} samples in the background, where ranks cannot follow; under torchrun use 0."
            )
        self.ranks, self.model, self.reference = ranks, model, reference_of(model, config)
        self.optimizers = OptimizerSet(model, config.optimizer)
        dtype, shape = product_dtype(model), model.config.to_dict()
        settings = {name: asdict(value) for name, value in _settings(config).items()}
        ranks.tell(
            do="learn",
            model=shape,
            bf16=dtype == torch.bfloat16,
            has_reference=self.reference is not None,
            **settings,
        )
        self.shard = _ShardOfModel(ranks, model, self.reference, **_settings(config))
        self.after_restoring()

    def update(self, batch: UpdateBatch) -> UpdateResult:
        """One optimizer step of all ranks together."""
        plans = plan_update(
            batch,
            self.shard.objective,
            self.shard.options,
            vocab_size=self.model.config.vocab_size,
            ranks=self.ranks.size,
        )
        self.ranks.tell(do="update", count=len(plans[0]), rate=self.optimizers.multiplier)
        for rank, micro_batches in enumerate(plans[1:], start=1):
            for micro_batch in micro_batches:
                self.ranks.send(_to_tensors(micro_batch), rank)
        return self.shard.update(plans[0], self.optimizers.multiplier)

    def refresh_reference(self) -> None:
        """On every rank."""
        self.ranks.tell(do="refresh")
        self.shard.refresh_reference()

    def before_saving(self) -> None:
        """Gather the moments; weights are gathered after every step."""
        self.ranks.tell(do="gather")
        self.shard.gather_moments(into=self.optimizers)

    def after_restoring(self) -> None:
        """Give weights, reference and moments to the shards."""
        self.ranks.tell(do="load", moments=_moment_specs(self.optimizers))
        self.shard.load(self.optimizers)


class RankedEngine:
    """The leader's engine: every rank answers a share of the requests with its own copy of the weights."""

    def __init__(self, ranks: Ranks, model: Transformer, max_rows: int) -> None:
        self.ranks, self.model, self.max_rows = ranks, model, max_rows
        self._engine = Engine(model, max_rows=max_rows)

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of every request, in order, one per sample."""
        self.ranks.tell(do="generate", requests=[asdict(request) for request in requests], max_rows=self.max_rows)
        return _answer_together(self.ranks, self._engine, requests)


def sharded_makers(ranks: Ranks) -> tuple[LearnerMaker, EngineMaker]:
    """What the leader hands to `train_grpo`: makers of its learner and its engine."""
    return partial(ShardedLearner, ranks), partial(RankedEngine, ranks)


def follow(ranks: Ranks) -> None:
    """Do what the leader says until it says stop."""
    model: Transformer | None = None
    engine: Engine | None = None
    while (message := ranks.hear())["do"] != "stop":
        if message["do"] == "learn":
            (model, shard), engine = _join(ranks, message), None
            continue
        assert model is not None, "the leader begins with 'learn'"
        if message["do"] == "generate":
            requests = [_request(values) for values in message["requests"]]
            engine = engine or Engine(model, max_rows=message["max_rows"])
            _answer_together(ranks, engine, requests)
        elif message["do"] == "update":
            shard.update([_from_tensors(ranks.receive()) for _ in range(message["count"])], message["rate"])
        elif message["do"] == "refresh":
            shard.refresh_reference()
        elif message["do"] == "gather":
            shard.gather_moments(into=None)
        elif message["do"] == "load":
            shard.load(None, message["moments"])


class _ShardOfModel:
    """This rank's part of weights and moments, beside the whole model that it samples with."""

    def __init__(
        self,
        ranks: Ranks,
        model: Transformer,
        reference: Transformer | None,
        *,
        objective: ObjectiveConfig,
        optimizer: OptimizerConfig,
        options: UpdateOptions,
    ) -> None:
        self.ranks, self.model, self.reference = ranks, model, reference
        self.objective, self.options = objective, options
        self.module = _sharded_copy(model, ranks)
        self.optimizers = _ShardOptimizers(self.module, optimizer, ranks)

    def update(self, micro_batches: Sequence[MicroBatch], rate: float) -> UpdateResult:
        """This rank's answers, everybody's gradient; then the whole model has the new weights."""
        self.optimizers.set_rate(rate)
        result = update_policy(
            self.module,
            self.optimizers,
            micro_batches,
            self.objective,
            self.options,
            reference=self.reference,
            combine=self._combine,
        )
        self._publish()
        return result

    def refresh_reference(self) -> None:
        assert self.reference is not None
        self.reference.load_state_dict(self.model.state_dict())

    @torch.no_grad()
    def load(self, mirror: OptimizerSet | None, specs: dict[str, dict[str, Any]] | None = None) -> None:
        """Weights, reference and moments from the leader, who alone has a `mirror`; others know what comes by `specs`."""
        for module in filter(None, (self.model, self.reference)):
            for tensor in module.state_dict().values():
                self.ranks.share(tensor)
        self.module.load_state_dict(
            {name: tensor for name, tensor in self.model.state_dict().items() if name in self._buffers()}, strict=False
        )
        whole = dict(self.model.named_parameters())
        for name, local in self.optimizers.named_parameters.items():
            local.copy_(self._slice(whole[name]))
        states = _states_by_name(mirror) if mirror else {}
        for name, entries in (_moment_specs(mirror) if mirror else specs or {}).items():
            local = self.optimizers.named_parameters[name]
            for entry, dtype in entries.items():
                tensor = (
                    states[name][entry] if mirror else torch.empty(_shape(entry, whole[name]), dtype=_DTYPES[dtype])
                )
                self.ranks.share(tensor)
                kept = tensor if entry == "step" else self._slice(tensor)
                self.optimizers.optimizer_of(local).state[local][entry] = kept.clone()

    @torch.no_grad()
    def gather_moments(self, into: OptimizerSet | None) -> None:
        """The moments of all shards, put together in the leader's mirror."""
        whole = dict(self.model.named_parameters())
        for name, local in self.optimizers.named_parameters.items():
            for entry, tensor in self.optimizers.optimizer_of(local).state[local].items():
                full = tensor if entry == "step" else self._whole(tensor, whole[name])
                if into is not None:
                    into.optimizer_of(whole[name]).state[whole[name]][entry] = full.clone()

    def _buffers(self) -> set[str]:
        return {name for name, _ in self.module.named_buffers()}

    def _slice(self, full: Tensor) -> Tensor:
        """This rank's rows, as FSDP deals them."""
        parts = full.detach().chunk(self.ranks.size)
        return parts[self.ranks.rank] if self.ranks.rank < len(parts) else full.detach()[:0]

    def _whole(self, local: Tensor, like: Tensor) -> Tensor:
        shards = DTensor.from_local(
            local, self.ranks.mesh, [Shard(0)], run_check=False, shape=like.shape, stride=like.stride()
        )
        return shards.full_tensor()

    def _combine(self, result: UpdateResult, tracker: CountTracker) -> None:
        """What every rank found, added up; means are still sums over tokens here."""
        names = ("loss", *MEANS, "num_tokens")
        sums = self.ranks.add_up(torch.tensor([float(getattr(result, name)) for name in names], dtype=torch.float64))
        for name, value in zip(names, sums.tolist()):
            setattr(result, name, value)
        result.num_tokens = int(result.num_tokens)
        if tracker.layers:
            self.ranks.add_up(tracker.count_LE)

    @torch.no_grad()
    def _publish(self) -> None:
        """The whole weights into the model that samples."""
        target = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for name, parameter in self.module.named_parameters():
            target[name].copy_(parameter.full_tensor())  # type: ignore[attr-defined]
        for name, buffer in self.module.named_buffers():
            target[name].copy_(buffer)


class _ShardOptimizers(OptimizerSet):
    """AdamW on the shards; only the norm needs the others."""

    def __init__(self, module: Transformer, config: OptimizerConfig, ranks: Ranks) -> None:
        self._ranks, self._sharded = ranks, dict(module.named_parameters())
        super().__init__(
            {name: nn.Parameter(p.to_local().detach()) for name, p in self._sharded.items()},  # type: ignore[attr-defined]
            config,
        )

    def step(self) -> float | None:
        """Take the reduced gradients over, then as usual."""
        for name, parameter in self._sharded.items():
            grad = parameter.grad
            self.named_parameters[name].grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]
            parameter.grad = None
        return super().step()

    def _norm(self, grads: Sequence[Tensor]) -> float:
        square = torch.tensor([super()._norm(grads) ** 2 if grads else 0.0], dtype=torch.float64)
        return float(self._ranks.add_up(square)) ** 0.5


def _sharded_copy(model: Transformer, ranks: Ranks) -> Transformer:
    """The same model in shards: every layer for itself, the rest (embedding, head, prediction modules) together."""
    module = Transformer(model.config)
    module.load_state_dict(model.state_dict())
    set_compute_dtype(module, product_dtype(model))
    for part in (*module.layers, module):
        fully_shard(part, mesh=ranks.mesh)
    for part in module.modules():
        if isinstance(part, FSDPModule):
            part.set_gradient_divide_factor(1.0)  # gradients are sums: answers are normalised by the whole step
            part.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it adds
    return module.train()


def _join(ranks: Ranks, message: dict[str, Any]) -> tuple[Transformer, _ShardOfModel]:
    """A follower's model and shard; the numbers come with "load"."""
    model = Transformer(ModelConfig.from_dict(message["model"])).eval()
    set_compute_dtype(model, torch.bfloat16 if message["bf16"] else None)
    reference = Transformer(model.config).eval() if message["has_reference"] else None
    if reference is not None:
        set_compute_dtype(reference, product_dtype(model))
    objective = dict(message["objective"])
    if objective["importance"] is not None:
        objective["importance"] = ImportanceConfig(**objective["importance"])
    shard = _ShardOfModel(
        ranks,
        model,
        reference,
        objective=ObjectiveConfig(**objective),
        optimizer=OptimizerConfig(**message["optimizer"]),
        options=UpdateOptions(**message["options"]),
    )
    return model, shard


def _settings(config: GrpoConfig) -> dict[str, Any]:
    return {"objective": config.objective, "optimizer": config.optimizer, "options": update_options(config)}


def _answer_together(ranks: Ranks, engine: Engine, requests: Sequence[Request]) -> list[list[Completion]]:
    """Each rank answers every so-many-th request; all get all answers."""
    mine = engine.generate(requests[ranks.rank :: ranks.size])
    found = ranks.gather([[asdict(completion) for completion in completions] for completions in mine])
    return [
        [Completion(**values) for values in found[place % ranks.size][place // ranks.size]]
        for place in range(len(requests))
    ]


def _request(values: dict[str, Any]) -> Request:
    sampling = SamplingParams(
        **{**values["sampling"], "stop_token_ids": tuple(values["sampling"]["stop_token_ids"])},
    )
    return Request(**{**values, "prompt_ids": tuple(values["prompt_ids"]), "sampling": sampling})


def _to_tensors(micro_batch: MicroBatch) -> dict[str, Tensor]:
    packed = micro_batch.packed
    numbers = (micro_batch.step_tokens, micro_batch.step_answers, micro_batch.has_old_logprobs, micro_batch.weight)
    tensors = {name: value for name, value in vars(packed).items() if isinstance(value, Tensor)}
    tensors |= {f"replay.{layer}": experts for layer, experts in packed.replay.items()}
    return tensors | {"advantage_M": micro_batch.advantage_M, "numbers": torch.tensor(numbers, dtype=torch.float64)}


def _from_tensors(tensors: dict[str, Tensor]) -> MicroBatch:
    tokens, answers, has_old, weight = tensors.pop("numbers").tolist()
    advantage_M = tensors.pop("advantage_M")
    replay = {
        int(name.removeprefix("replay.")): tensors.pop(name) for name in list(tensors) if name.startswith("replay.")
    }
    packed = PackedRollouts(replay=replay, kept_NV=tensors.pop("kept_NV", None), **tensors)
    return MicroBatch(packed, advantage_M, int(tokens), int(answers), bool(has_old), int(weight))


_DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.bfloat16)}


def _states_by_name(optimizers: OptimizerSet) -> dict[str, dict[str, Tensor]]:
    return {name: optimizers.optimizer_of(p).state.get(p, {}) for name, p in optimizers.named_parameters.items()}


def _moment_specs(optimizers: OptimizerSet) -> dict[str, dict[str, str]]:
    """Names and dtypes of every parameter's moments."""
    states = _states_by_name(optimizers)
    return {name: {entry: str(t.dtype) for entry, t in state.items()} for name, state in states.items()}


def _shape(entry: str, parameter: Tensor) -> torch.Size:
    return torch.Size() if entry == "step" else parameter.shape
