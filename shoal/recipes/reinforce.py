"""Reinforcement learning on any task: a base, its measure, the training by reward, the measure again, the report.

The base is a model the user names, or is made here: from scratch on the task's own problems of the "pretrain" set, those
with worked solutions written out (all of them for a dataset such as GSM8K, which makes it fine-tuning on worked answers; a
share for tasks that can make problems without end). Reinforcement learning then asks problems of another set, and a third
is held out.

A base that never succeeds cannot learn from reward: every group scores the same. So it is measured first, 64 answers to
each held-out problem, and the run ends there with pass@64 and what to change, before hours are spent.
"""

import contextlib
import json
import random
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shoal.checkpoint.hf_format import load_config
from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.engine.loading import find_model, load_for_generation
from shoal.errors import ConfigError, TaskError
from shoal.log import say
from shoal.model.transformer import Transformer
from shoal.presets import preset
from shoal.recipes.document_training import train_on_documents, train_tokenizer, write_documents
from shoal.recipes.model_run import ModelRun
from shoal.recipes.problem_corpus import CorpusConfig, Document, write_corpus
from shoal.recipes.run import only_run, write_json
from shoal.report import write_report
from shoal.rl.algorithms import fit_algorithm
from shoal.rl.evaluation import SkillReport, may_lengthen, measure_skill
from shoal.rl.grpo import train_grpo
from shoal.rl.ray_rollouts import ray_engines
from shoal.rl.rewards import R1_ZERO_REWARDS
from shoal.rl.rollout import Prompter
from shoal.rl.task_source import TaskSource, open_task
from shoal.rl.tasks.task import Problem
from shoal.rl.verifier_pool import PoolConfig
from shoal.rl.vllm_rollouts import vllm_engines
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer
from shoal.training.loop import TrainingConfig
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

if TYPE_CHECKING:
    from shoal.rl.ranks import Ranks

LONGEST_DOCUMENT = 500
"""Tokens; the small preset sees 512. Longer documents are left out of the base's corpus, and counted."""
HELD_OUT_SHARE = 0.02


@dataclass(frozen=True, kw_only=True)
class BaseConfig:
    """The base that is made when no model is named."""

    model: ModelConfig
    steps: int = 400
    documents: int = 30_000
    worked_share: float | None = None
    """Share of the documents that show their work, where the task knows it; None: all of a dataset's, 0.2 of others."""
    vocab_size: int = 448
    batch_tokens: int = 4160

    def __post_init__(self) -> None:
        if self.steps < 1 or self.documents < 10 or self.batch_tokens < 64:
            raise ConfigError("a base needs at least 1 step, 10 documents and 64 tokens a step.")
        if self.worked_share is not None and not 0 <= self.worked_share <= 1:
            raise ConfigError(f"worked_share={self.worked_share} must be between 0 and 1.")


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig:
    """Everything that decides a run."""

    task: str
    difficulty: int | None = None
    model: Path | None = None
    """A model directory or run; None makes a base."""
    base: BaseConfig
    algorithm: str = "grpo"
    published_sizes: bool = False
    steps: int = 60
    prompts_per_step: int | None = None
    group_size: int | None = None
    max_response_tokens: int = 128
    learning_rate: float | None = None
    staleness: int = 0
    rollouts: str = "local"
    """"local" samples in this process, "ray" in worker processes (the tokens are the same), "vllm:URL" on a server."""
    num_workers: int = 2
    on_reward_error: str = "stop"
    instruction: str = ""
    """Put before every question: how a foreign base learns of the answer format."""
    seed: int = 0
    rl_problems: int = 2000
    held_out_problems: int = 64
    samples_per_problem: int = 64
    pool: PoolConfig

    def __post_init__(self) -> None:
        if self.rollouts not in ("local", "ray") and not self.rollouts.startswith("vllm:"):
            raise ConfigError(f"rollouts={self.rollouts!r} is unknown; use 'local', 'ray' or 'vllm:URL'.")
        if self.num_workers < 1:
            raise ConfigError(f"num_workers={self.num_workers} must be at least 1.")


def reinforce_config(task: str, **choices: Any) -> ReinforceConfig:
    """The defaults for a task, with the user's choices; those that are None are left at their defaults."""
    is_dataset = task.startswith(("jsonl:", "math:"))
    base = BaseConfig(model=preset("demo").replace(initializer_range=0.05), vocab_size=1024 if is_dataset else 448)
    given = {name: value for name, value in choices.items() if value is not None}
    of_base = {name.removeprefix("base_"): given.pop(name) for name in list(given) if name.startswith("base_")}
    pool = PoolConfig(**{name: given.pop(name) for name in ("workers", "timeout_s", "memory_bytes") if name in given})
    if is_dataset:
        given.setdefault("max_response_tokens", 256)
    return ReinforceConfig(task=task, base=replace(base, **of_base), pool=pool, **given)


@dataclass(frozen=True, kw_only=True)
class ReinforceResult:
    """What came of it."""

    run_dir: Path
    model_dir: Path
    report: Path
    before: SkillReport
    after: SkillReport


def run_reinforce(run_dir: Path, config: ReinforceConfig, ranks: "Ranks | None" = None) -> ReinforceResult:
    """Run the stages that are not done yet.

    Args:
        ranks: processes that follow this one (torchrun): they sample and learn with it, and do nothing else.
    Raises:
        TaskError: the task cannot be used, or the base never succeeds.
        ConfigError, CheckpointError: settings that do not fit together, or another run's directory.
    """
    if ranks is not None and config.rollouts != "local":
        raise ConfigError(f"under torchrun the ranks sample themselves; leave --rollouts {config.rollouts} out.")
    with only_run(), open_task(config.task, difficulty=config.difficulty, pool=config.pool) as source:
        return _Reinforce(run_dir, config, source, ranks).run()


class _Reinforce:
    """The stages of one run."""

    def __init__(self, run_dir: Path, config: ReinforceConfig, source: TaskSource, ranks: "Ranks | None") -> None:
        self.dir, self.config, self.source, self.ranks = run_dir, config, source, ranks
        self.stage = f"rl-{config.seed}"
        shape = load_config(find_model(config.model)) if config.model else config.base.model
        self.context = shape.max_position_embeddings
        values = {**asdict(config), "base_model": str(config.model) if config.model else None, "model": shape.to_dict()}
        for outcome_is_the_same in ("pool", "rollouts", "num_workers"):
            values.pop(outcome_is_the_same)
        settings = {"recipe": "reinforce", **values, "source": source.identity}
        self.models = ModelRun(run_dir, settings, {})

    def run(self) -> ReinforceResult:
        """Base, measure, train, measure, report."""
        if self.config.model is None:
            self.models.stage("data", "write the base's corpus, train the tokenizer", self._write_corpus)
            self.models.stage("pretrain", "train the base from scratch", self._pretrain)
        else:
            self.models.stage("base", f"take {self.config.model} as the base", self._take_model)
        self.models.stage("evaluate", "measure the base on held-out problems", self._measure_base)
        self._stop_if_hopeless()
        self.models.stage(self.stage, "reinforcement learning from reward alone", self._reinforce)
        with self.models.log.stage("report", "write the report"):
            self._write_evaluation()
            model_dir = self._export()
        paths = write_report(self.dir)
        return ReinforceResult(
            run_dir=self.dir,
            model_dir=model_dir,
            report=paths.html,
            before=self._skill("base"),
            after=self._skill(self.stage),
        )

    def _write_corpus(self, facts: dict[str, Any]) -> None:
        documents = list(self._documents())
        tokenizer = train_tokenizer(documents[:8000], self.config.base.vocab_size)
        tokenizer.save(self.dir / "tokenizer")
        template = ChatTemplate.default(tokenizer)
        frame = sum(map(len, template.frame(tokenizer)))
        sizes = [
            frame + len(question) + len(response) + 1
            for question, response in zip(
                tokenizer.encode_batch([document.question or "" for document in documents]),
                tokenizer.encode_batch([document.response for document in documents], allow_special=True),
            )
        ]
        kept = [document for document, size in zip(documents, sizes) if size <= LONGEST_DOCUMENT]
        if len(kept) < 10:
            raise TaskError(
                f"only {len(kept)} of {len(documents)} worked problems fit into {LONGEST_DOCUMENT} tokens; name a base "
                "with --model, or make the problems shorter."
            )
        held_out = max(int(HELD_OUT_SHARE * len(kept)), 1)
        tokens = write_documents(self.dir / "shards" / "train", kept[held_out:], tokenizer, template)
        write_documents(self.dir / "shards" / "held_out", kept[:held_out], tokenizer, template)
        worked = sum("<think></think>" not in document.response for document in kept) / len(kept)
        row_tokens = min(max(160, *(size for size in sizes if size <= LONGEST_DOCUMENT)), LONGEST_DOCUMENT)
        facts |= {"tokens": tokens, "row_tokens": row_tokens}
        left_out = f", {len(documents) - len(kept)} too long and left out" if len(kept) < len(documents) else ""
        facts["result"] = f"{len(kept)} documents, {tokens} tokens, {worked:.0%} show their work{left_out}"

    def _documents(self) -> Iterator[Document]:
        """What the base reads: problems of the "pretrain" set with their answers, some or all worked out."""
        config, source = self.config, self.source
        share = config.base.worked_share
        if source.family is not None:
            corpus = CorpusConfig(
                family=source.family.name,
                difficulty=source.identity["difficulty"],
                worked_share=0.2 if share is None else share,
                arithmetic_share=0.0,
                documents=config.base.documents,
                seed=config.seed,
            )
            yield from write_corpus(corpus)
            return
        if share is None:
            share = 1.0 if source.identity["task"] == "dataset" else 0.2
        rng = random.Random(f"documents-{config.seed}")
        found = source.sets.problems("pretrain", config.base.documents)
        rng.shuffle(found)
        for problem in found:
            work = source.worked(problem) if rng.random() < share else None
            yield Document(
                question=self._asked(problem).prompt,
                response=f"<think>{work or ''}</think><answer>{problem.answer}</answer>",
            )

    def _pretrain(self, facts: dict[str, Any]) -> None:
        config = self.config.base
        row_tokens = int(self.models.log.stages["data"]["row_tokens"])
        training = TrainingConfig(
            steps=config.steps,
            optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.01, weight_decay=0.05),
            schedule=Schedule(
                kind="wsd", warmup_steps=min(20, config.steps // 4), total_steps=config.steps, decay_fraction=0.6
            ),
            bias_speed=3e-3,
            seed=self.config.seed,
            log_every=5,
            checkpoint_every=100,
        )
        model = self.models.new(config.model, self.config.seed)
        result = train_on_documents(
            model,
            training,
            self.dir / "shards",
            self.models.tokenizer(),
            self.dir,
            stage="pretrain",
            batch_rows=max(config.batch_tokens // row_tokens, 1),
            row_tokens=row_tokens,
        )
        self.models.save("base", model)
        facts["tokens"] = result.tokens
        if result.evaluation:
            facts["result"] = f"held-out loss {result.evaluation.loss:.3f} nats"

    def _take_model(self, facts: dict[str, Any]) -> None:
        loaded = load_for_generation(self.config.model)
        if loaded.tokenizer is None or loaded.template is None:
            raise ConfigError(
                f"{loaded.path} has no tokenizer.json; reinforcement learning needs one to write prompts."
            )
        loaded.tokenizer.save(self.dir / "tokenizer")
        loaded.template.save(self.dir / "tokenizer")
        self.models.save("base", loaded.model)
        facts["result"] = f"{_parameters(loaded.model):,} parameters"

    def _measure_base(self, facts: dict[str, Any]) -> None:
        skill = self._measure(self.models.load("base"))
        write_json(self.dir / "skill-base.json", skill.to_dict())
        facts["result"] = skill.describe()
        if not may_lengthen(skill):
            say("  showing work does not pay on this base, so reward will not lengthen answers")

    def _stop_if_hopeless(self) -> None:
        """Raises TaskError when no answer was right: reward then has nothing to choose from."""
        skill = self._skill("base")
        most = max(skill.pass_at, key=int)
        if skill.pass_at[most] > 0:
            return
        answers = skill.problems * skill.samples_per_problem
        failures = f" ({skill.verifier_failures} could not be judged)" if skill.verifier_failures else ""
        raise TaskError(
            f"the base never succeeds: pass@{most} is 0 % over {skill.problems} held-out problems, {answers} answers"
            f"{failures}, {skill.truncated:.0%} of them cut off at {self.config.max_response_tokens} tokens. Reward cannot "
            "teach what never happens. Ask easier problems (--difficulty), train the base longer (--base-steps) or on more "
            "worked solutions (--worked-share), allow longer answers (--max-tokens), or name a better base (--model). "
            "The answers are in skill-base.json."
        )

    def _reinforce(self, facts: dict[str, Any]) -> None:
        config, model = self.config, self.models.load("base")
        fitted = fit_algorithm(
            config.algorithm,
            parameters=_parameters(model),
            max_response_tokens=config.max_response_tokens,
            published_sizes=config.published_sizes,
            learning_rate=config.learning_rate,
            steps=config.steps,
            prompts_per_step=config.prompts_per_step,
            group_size=config.group_size,
            staleness=config.staleness,
            on_reward_error=config.on_reward_error,
            bias_speed=3e-3,
            precision="auto",
            seed=config.seed,
        )
        say(f"  {config.algorithm}: {fitted.source}")
        for name, (published, used) in fitted.changed.items():
            say(f"  {name} is {used}, published {published}")
        stage = fitted.config
        if stage.keep_routing and not any(map(model.config.is_moe_layer, range(model.config.num_hidden_layers))):
            say("  keep_routing is off: this model has no routed experts")
            stage = replace(stage, keep_routing=False)
        asked = self._problems("rl", config.rl_problems)
        if left_out := len(self.source.sets.problems("rl", config.rl_problems)) - len(asked):
            say(f"  {left_out} problems leave no room for {self._room}; left out")
        with self._makers() as makers:
            train_grpo(
                model,
                stage,
                asked,
                self._prompter(),
                self.dir,
                stage=self.stage,
                rewards=self.source.rewards or R1_ZERO_REWARDS,
                verifier=self.source.verifier,
                **makers,
            )
        skill = self._measure(model)
        write_json(self.dir / f"skill-{self.stage}.json", skill.to_dict())
        self.models.save(self.stage, model)
        facts["result"] = skill.describe()

    @contextlib.contextmanager
    def _makers(self) -> Iterator[dict[str, Any]]:
        """Who samples and who learns, for as long as the block lasts, as arguments of `train_grpo`."""
        rollouts, tokenizer = self.config.rollouts, Tokenizer.load(self.dir / "tokenizer")
        if self.ranks is not None:
            from shoal.rl.sharded_learner import sharded_makers

            learners, engines = sharded_makers(self.ranks)
            yield {"learners": learners, "engines": engines}
        elif rollouts == "ray":
            with ray_engines(self.config.num_workers) as workers:
                yield {"engines": workers}
        elif rollouts.startswith("vllm:"):
            url = rollouts.removeprefix("vllm:")
            yield {"engines": vllm_engines(url, self.dir / "rollout-model", [tokenizer])}
        else:
            yield {}

    def _measure(self, model: Transformer) -> SkillReport:
        return measure_skill(
            Engine(model),
            self._prompter(),
            self._held_out(),
            samples_per_problem=self.config.samples_per_problem,
            max_tokens=self.config.max_response_tokens,
            verifier=self.source.verifier,
        )

    def _held_out(self) -> list[Problem]:
        return self._problems("eval", self.config.held_out_problems)

    def _problems(self, split: str, count: int) -> list[Problem]:
        """As they are asked; those whose prompt leaves too little of the context for an answer are left out.

        Raises:
            TaskError: none is left.
        """
        prompter, longest = self._prompter(), self.context - self.config.max_response_tokens
        found = [self._asked(problem) for problem in self.source.sets.problems(split, count)]
        kept = [problem for problem in found if len(prompter.prompt_ids(problem)) <= longest]
        if found and not kept:
            raise TaskError(f"no problem of the {split!r} set leaves room for {self._room}; lower --max-tokens.")
        return kept

    @property
    def _room(self) -> str:
        return f"an answer of {self.config.max_response_tokens} tokens in a context of {self.context}"

    def _asked(self, problem: Problem) -> Problem:
        if not self.config.instruction:
            return problem
        return replace(problem, prompt=f"{self.config.instruction}\n{problem.prompt}")

    def _prompter(self) -> Prompter:
        tokenizer = Tokenizer.load(self.dir / "tokenizer")
        return Prompter(tokenizer, ChatTemplate.load(self.dir / "tokenizer", tokenizer))

    def _skill(self, name: str) -> SkillReport:
        values = json.loads((self.dir / f"skill-{name}.json").read_text(encoding="utf-8"))
        return SkillReport(**{**values, "pass_at_1_interval": tuple(values["pass_at_1_interval"])})

    def _write_evaluation(self) -> None:
        before, after, held_out = self._skill("base"), self._skill(self.stage), self._held_out()
        samples = [
            {"prompt": problem.prompt, "answer": problem.answer, "before": first, "after": later}
            for problem, first, later in zip(held_out, before.examples, after.examples)
        ]
        gathered = {
            "family": self.source.name,
            "samples_per_problem": self.config.samples_per_problem,
            "problems": len(held_out),
            "before": before.to_dict(),
            "after": [{"seed": self.config.seed, **after.to_dict()}],
            "controls": [],
            "samples": samples,
        }
        write_json(self.dir / "evaluation.json", gathered)

    def _export(self) -> Path:
        card = {
            "name": f"shoal-{self.source.name}",
            "description": f"Trained by reward on one thing: {self.source.description}",
            "suggestions": [problem.prompt for problem in self._held_out()[:4]],
            "max_tokens": self.config.max_response_tokens,
        }
        target = self.models.export(self.stage, card)
        self._prompter().template.save(target)
        return target


def _parameters(model: Transformer) -> int:
    return sum(parameter.numel() for parameter in model.parameters())
