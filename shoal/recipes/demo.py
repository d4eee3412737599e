"""The whole recipe in minutes on two cores: data, tokenizer, pretraining, R1-Zero, evaluation, report.

A base model reads true documents in which few problems are worked out, then learns by reward alone. Reinforcement learning
runs once per seed from the same base; held-out problems measure the base and every seed. `quick` makes everything smaller
and keeps every stage.
"""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.log import say
from shoal.model.transformer import Transformer
from shoal.presets import preset
from shoal.recipes.document_training import train_on_documents, train_tokenizer, write_documents
from shoal.recipes.model_run import ModelRun
from shoal.recipes.problem_corpus import CorpusConfig, Document, write_corpus
from shoal.recipes.run import only_run, write_json
from shoal.report import write_report
from shoal.rl.evaluation import SkillReport, may_lengthen, measure_skill
from shoal.rl.grpo import train_grpo
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.rewards import R1_ZERO_REWARDS, WeightedReward, format_reward, random_reward
from shoal.rl.rollout import Prompter, SecondQuestion
from shoal.rl.tasks import TASKS, Problem
from shoal.rl.tasks.splits import problems
from shoal.training.loop import TrainingConfig
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

TOKENIZER_DOCUMENTS = 4000
HELD_OUT_DOCUMENTS = 400


@dataclass(frozen=True, kw_only=True)
class DemoConfig:
    """Everything that decides a demo run."""

    corpus: CorpusConfig
    vocab_size: int = 448
    model: ModelConfig
    batch_rows: int = 26
    row_tokens: int = 160
    pretraining: TrainingConfig
    rl: GrpoConfig
    rl_seeds: tuple[int, ...] = (0, 1, 2)
    rl_problems: int = 2000
    second_question_share: float = 0.25
    """Of the problems in reinforcement learning that are asked as the second of a conversation."""
    held_out_problems: int = 200
    samples_per_problem: int = 16
    max_answer_tokens: int = 128
    estimates_s: dict[str, float] = field(default_factory=dict)
    """Seconds each stage took on the machine named in the README; printed before it starts."""


def demo_config(*, quick: bool = False) -> DemoConfig:
    """The recipe `demo`: about 9 minutes on two cores; `quick`: under 3."""
    steps = 450 if quick else 1400
    config = DemoConfig(
        corpus=CorpusConfig(
            documents=30_000 if quick else 100_000,
            difficulty=3 if quick else 6,
            worked_share=0.15,
            history_share=0.1 if quick else 0.15,
        ),
        model=preset("demo").replace(vocab_size=448, initializer_range=0.05),
        pretraining=TrainingConfig(
            steps=steps,
            optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.01, weight_decay=0.05),
            schedule=Schedule(kind="wsd", warmup_steps=20, total_steps=steps, decay_fraction=0.6),
            bias_speed=3e-3,
            log_every=5,
            evaluate_every=100,
            checkpoint_every=100,
        ),
        rl=GrpoConfig(
            steps=48,
            prompts_per_step=16,
            optimizer=OptimizerConfig(learning_rate=5e-4, weight_decay=0.0),
            decay_fraction=0.5,
            max_response_tokens=128,
            bias_speed=3e-3,
            precision="auto",
        ),
        estimates_s={"shards": 11, "pretrain": 270, "evaluate": 3, "rl": 65},
    )
    if quick:
        rl = replace(config.rl, steps=32)
        return replace(
            config,
            rl=rl,
            rl_seeds=(0,),
            held_out_problems=64,
            samples_per_problem=8,
            estimates_s={"pretrain": 95, "rl": 22},
        )
    return config


@dataclass(frozen=True, kw_only=True)
class Arm:
    """One way of training the same base on the same questions."""

    name: str
    title: str
    base: str = "base"
    rewards: tuple[WeightedReward, ...] = R1_ZERO_REWARDS
    advantage: Literal["reward"] | None = None
    """None as the recipe has it; "reward" learns from right answers alone."""


def control_arms(seed: int) -> tuple[Arm, ...]:
    """What reinforcement learning must be compared with before it is believed.

    Two must not teach the task (a coin, the format alone), one has nothing to find (no worked solutions in the base), and
    one asks whether reinforcement learning was needed: fine-tuning on its own right answers, with as many samples and steps.
    """
    coin = WeightedReward(function=random_reward(seed), name="coin")
    form, truth = WeightedReward(function=format_reward, name="format"), R1_ZERO_REWARDS[0]
    return (
        Arm(name="rl-random-reward", title="random reward", rewards=(coin, R1_ZERO_REWARDS[1])),
        Arm(name="rl-format-only", title="format reward only", rewards=(form,)),
        Arm(name="sft-right-answers", title="fine-tuning on right answers", rewards=(truth,), advantage="reward"),
        Arm(name="rl-no-worked", title="no worked solutions in the base", base="base-no-worked"),
    )


@dataclass(frozen=True, kw_only=True)
class DemoResult:
    """Where the results are."""

    run_dir: Path
    model_dir: Path
    report: Path


def run_demo(run_dir: Path, config: DemoConfig, *, controls: bool = False) -> DemoResult:
    """Run the stages that are not done yet, then write the report.

    Args:
        controls: also run `control_arms`: what must not work, and what might work as well.
    Raises:
        ConfigError: another run holds this machine.
        CheckpointError: the directory belongs to another configuration.
    """
    with only_run():
        return _Demo(run_dir, config).run(controls=controls)


class _Demo:
    """The stages, each of which leaves files that the next reads."""

    def __init__(self, run_dir: Path, config: DemoConfig) -> None:
        self.config, self.dir = config, run_dir
        settings = {"recipe": "demo", "seed": config.pretraining.seed, **asdict(config)}
        self.models = ModelRun(run_dir, settings, config.estimates_s, config.rl.precision)
        self.task = TASKS[config.corpus.family]

    def run(self, *, controls: bool) -> DemoResult:
        """The recipe from data to report."""
        self.models.stage("data", "write the corpus, train the tokenizer", self._make_tokenizer)
        self._make_base("base", self.config.corpus)
        for seed in self.config.rl_seeds:
            self._reinforce(f"rl-{seed}", seed, "base", Arm(name=f"rl-{seed}", title="R1-Zero"))
        if controls:
            seed = self.config.rl_seeds[0]
            for control in control_arms(seed):
                if control.base == "base-no-worked":
                    self._make_base("base-no-worked", replace(self.config.corpus, worked_share=0.0))
                self._reinforce(control.name, seed, control.base, control)
        with self.models.log.stage("report", "write the report"):
            self._write_evaluation()
            self._export_chat_model()
        paths = write_report(self.dir)
        return DemoResult(run_dir=self.dir, model_dir=self.dir / "model", report=paths.html)

    def _make_base(self, base: str, corpus: CorpusConfig) -> None:
        """Data, pretraining and evaluation of one base model."""
        suffix = base.removeprefix("base")
        self.models.stage(
            f"shards{suffix}", "tokenise the corpus into shards", lambda facts: self._write_shards(facts, base, corpus)
        )
        self.models.stage(
            f"pretrain{suffix}", "pretrain the base from scratch", lambda facts: self._pretrain(facts, base)
        )
        self.models.stage(
            f"evaluate{suffix}", "measure the base on held-out problems", lambda facts: self._evaluate(facts, base)
        )

    def _reinforce(self, name: str, seed: int, base: str, arm: "Arm") -> None:
        self.models.stage(
            name,
            "R1-Zero: reward alone, no worked solution shown" if arm.title == "R1-Zero" else f"control: {arm.title}",
            lambda facts: self._rl(facts, name, seed, base, arm),
        )

    def _make_tokenizer(self, facts: dict[str, Any]) -> None:
        documents = write_corpus(replace(self.config.corpus, documents=TOKENIZER_DOCUMENTS))
        tokenizer = train_tokenizer(documents, self.config.vocab_size)
        tokenizer.save(self.dir / "tokenizer")
        facts["result"] = f"{tokenizer.vocab_size} tokens"

    def _write_shards(self, facts: dict[str, Any], base: str, corpus: CorpusConfig) -> None:
        """Held-out and training shards of one corpus."""
        tokenizer = self.models.tokenizer()
        template = self.models.template()
        documents, answers = write_corpus(corpus), Counter[bool]()

        def counted() -> Iterator[Document]:
            for document in documents:
                if document.question is not None:
                    answers["<think></think>" not in document.response] += 1
                yield document

        stream = counted()
        where = self.dir / "shards" / base
        write_documents(where / "held_out", islice(stream, HELD_OUT_DOCUMENTS), tokenizer, template)
        facts["tokens"] = write_documents(where / "train", stream, tokenizer, template)
        worked = answers[True] / max(answers.total(), 1)
        facts["result"] = (
            f"{corpus.documents} documents, {facts['tokens']} tokens, {worked:.0%} of the problems worked out"
        )

    def _pretrain(self, facts: dict[str, Any], base: str) -> None:
        tokenizer = self.models.tokenizer()
        model = self.models.new(self.config.model, self.config.pretraining.seed)
        result = train_on_documents(
            model,
            self.config.pretraining,
            self.dir / "shards" / base,
            tokenizer,
            self.dir,
            stage=base.replace("base", "pretrain"),
            batch_rows=self.config.batch_rows,
            row_tokens=self.config.row_tokens,
        )
        self.models.save(base, model)
        facts["tokens"] = result.tokens
        if result.evaluation:
            held_out = result.evaluation
            facts["result"] = f"held-out loss {held_out.loss:.3f} nats, {held_out.bits_per_byte:.3f} bits per byte"

    def _evaluate(self, facts: dict[str, Any], base: str) -> None:
        skill = self._measure(self.models.load(base))
        write_json(self.dir / f"skill-{base}.json", skill.to_dict())
        facts["result"] = skill.describe()
        if not may_lengthen(skill):
            say("  the gate fails: showing work does not pay on this base, so reward will not lengthen answers")

    def _rl(self, facts: dict[str, Any], name: str, seed: int, base: str, arm: "Arm") -> None:
        model = self.models.load(base)
        config = replace(self.config.rl, seed=seed, advantage=arm.advantage or self.config.rl.advantage)
        asked = problems(self.task, "rl", self.config.rl_problems, self.config.corpus.difficulty, seed=0)
        prompter = SecondQuestion(self.models.prompter(), asked, share=self.config.second_question_share)
        train_grpo(model, config, asked, prompter, self.dir, stage=name, rewards=arm.rewards)
        skill = self._measure(model)
        write_json(self.dir / f"skill-{name}.json", skill.to_dict())
        self.models.save(name, model)
        facts["result"] = skill.describe()
        if name == f"rl-{self.config.rl_seeds[0]}":
            second = self._measure(model, SecondQuestion(self.models.prompter(), asked))
            write_json(self.dir / "skill-second-question.json", second.to_dict())
            facts["result"] += f"; asked as the second question of a conversation: pass@1 {second.pass_at['1']:.1%}"

    def _write_evaluation(self) -> None:
        """Gather the skill files into evaluation.json."""
        base = self._skill("base")
        after = [{"seed": seed, **self._skill(f"rl-{seed}")} for seed in self.config.rl_seeds]
        held_out = self._held_out()
        samples = [
            {"prompt": problem.prompt, "answer": problem.answer, "before": before, "after": later}
            for problem, before, later in zip(held_out, base["examples"], after[0]["examples"])
        ]
        controls = [
            {"name": title, "before": self._skill(start), **self._skill(stage)}
            for title, start, stage in ((arm.title, arm.base, arm.name) for arm in control_arms(0))
            if self.models.log.is_done(stage)
        ]
        facts = {"family": self.config.corpus.family, "samples_per_problem": self.config.samples_per_problem}
        gathered = {
            **facts,
            "problems": len(held_out),
            "before": base,
            "after": after,
            "second_question": self._skill("second-question"),
            "controls": controls,
            "samples": samples,
        }
        write_json(self.dir / "evaluation.json", gathered)

    def _skill(self, name: str) -> dict[str, Any]:
        values: dict[str, Any] = json.loads((self.dir / f"skill-{name}.json").read_text(encoding="utf-8"))
        return values

    def _export_chat_model(self) -> None:
        """The first seed's model as a self-contained directory, with what its page suggests."""
        card = {
            "name": "shoal-demo",
            "description": f"Trained from scratch on this machine, on one thing: {self.task.description}",
            "suggestions": [problem.prompt for problem in self._held_out()[:4]],
            "max_tokens": self.config.max_answer_tokens,
        }
        self.models.export(f"rl-{self.config.rl_seeds[0]}", card)

    def _measure(self, model: Transformer, prompter: Prompter | None = None) -> SkillReport:
        return measure_skill(
            Engine(model),
            prompter or self.models.prompter(),
            self._held_out(),
            samples_per_problem=self.config.samples_per_problem,
            max_tokens=self.config.max_answer_tokens,
        )

    def _held_out(self) -> list[Problem]:
        return problems(self.task, "eval", self.config.held_out_problems, self.config.corpus.difficulty, seed=0)
