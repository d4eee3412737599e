"""The R1 pipeline in miniature (DeepSeek-R1 §2.3, §2.4), each stage resumable and measured on held-out problems.

    base --RL--> Zero --traces--> SFT of the base = Dev1 --RL, language reward--> Dev2
    Dev2 --rejection sampling--> SFT of the base, with general data = Dev3 --RL on everything--> R1
    the same data --SFT--> a smaller dense model (distilled), beside RL on that small model

What the paper claims is asked of every run: does Zero mix languages, does the cold start cost accuracy, does the language
reward repair the mixing, does general data bring general answers, does distillation beat reinforcement learning of
the small model? `r1.json` and the report say which of these held here.

Differs from the paper: no model rewrites the cold-start traces, filters alone choose them; general answers are judged by rule
(an acceptable reply is known), not by a reward model; everything is a million times smaller.
"""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.errors import ConfigError
from shoal.log import say
from shoal.model.transformer import Transformer
from shoal.presets import preset
from shoal.recipes.bilingual import LanguageShares, in_two_languages
from shoal.recipes.document_training import train_on_documents, train_tokenizer, write_documents
from shoal.recipes.general_talk import GeneralVerifier, general_documents, general_problems, general_reward
from shoal.recipes.model_run import ModelRun
from shoal.recipes.problem_corpus import CorpusConfig, Document, write_corpus
from shoal.recipes.r1_findings import PipelineRow, findings, measure_row
from shoal.recipes.run import only_run, write_json
from shoal.report import write_report
from shoal.rl.grpo import train_grpo
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.language import language_consistency, language_reward
from shoal.rl.rejection import KeptAnswer, RejectionCounts, rejection_sample, repeats_itself
from shoal.rl.rewards import R1_ZERO_REWARDS, WeightedReward
from shoal.rl.tasks import TASKS, Problem
from shoal.rl.tasks.answers import parse_response
from shoal.rl.tasks.splits import problems
from shoal.text.shards import Shards
from shoal.training.loop import TrainingConfig, TrainingResult
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

TOKENIZER_DOCUMENTS = 4000
HELD_OUT_DOCUMENTS = 200

MODELS = ("base", "zero", "dev1", "dev2", "dev3", "r1", "small-base", "small-rl", "distilled")
"""In the order of the table."""


@dataclass(frozen=True, kw_only=True)
class R1Config:
    """Everything that decides a pipeline run."""

    corpus: CorpusConfig
    languages: LanguageShares = field(default_factory=LanguageShares)
    vocab_size: int = 480
    model: ModelConfig
    small_model: ModelConfig
    """What is distilled into: smaller, dense."""
    batch_rows: int = 26
    fine_tuning_rows: int = 16
    """Fewer where the kept answers do not fill as many."""
    row_tokens: int = 160
    pretraining: TrainingConfig
    small_pretraining: TrainingConfig
    fine_tuning: TrainingConfig
    zero: GrpoConfig
    reasoning_rl: GrpoConfig
    final_rl: GrpoConfig
    small_rl: GrpoConfig
    rl_problems: int = 2000
    cold_start_problems: int = 400
    rejection_problems: int = 1200
    general_share: float = 0.25
    """Of the second fine-tuning set and of the last RL's prompts; the paper's set has 178 k of 805 k."""
    held_out_problems: int = 160
    samples_per_problem: int = 8
    max_answer_tokens: int = 112
    estimates_s: dict[str, float] = field(default_factory=dict)


def r1_config(*, quick: bool = False) -> R1Config:
    """The recipe `r1`; `quick` keeps every stage and makes all of them smaller, too small to show what the paper shows."""
    steps, rl_steps = (240, 6) if quick else (500, 40)
    zero = GrpoConfig(
        steps=rl_steps,
        prompts_per_step=16,
        optimizer=OptimizerConfig(learning_rate=4e-4, weight_decay=0.0),
        decay_fraction=0.5,
        max_response_tokens=112,
        bias_speed=3e-3,
        precision="auto",
    )
    large = preset("demo").replace(initializer_range=0.05)
    config = R1Config(
        corpus=CorpusConfig(documents=24_000 if quick else 50_000, difficulty=3, worked_share=0.2),
        model=large,
        small_model=_dense(large),
        pretraining=_training(steps),
        small_pretraining=_training(steps),
        fine_tuning=_fine_tuning(30 if quick else 120),
        zero=zero,
        reasoning_rl=replace(zero, steps=max(4, rl_steps * 3 // 4)),
        final_rl=replace(zero, steps=max(4, rl_steps // 2), temperature=0.7),
        small_rl=zero,
    )
    if quick:
        return replace(
            config,
            rl_problems=400,
            cold_start_problems=60,
            rejection_problems=120,
            held_out_problems=32,
            samples_per_problem=4,
        )
    return config


def run_r1(run_dir: Path, config: R1Config) -> Path:
    """Run the stages that are not done yet; returns the report's path.

    Raises:
        ConfigError: another run holds this machine.
        CheckpointError: the directory belongs to another configuration.
    """
    with only_run():
        return _Pipeline(run_dir, config).run()


class _Pipeline:
    """The stages, each of which leaves a model or data by name."""

    def __init__(self, run_dir: Path, config: R1Config) -> None:
        self.config, self.dir = config, run_dir
        settings = {"recipe": "r1", "seed": config.pretraining.seed, **asdict(config)}
        self.models = ModelRun(run_dir, settings, config.estimates_s, config.zero.precision)
        self.task = TASKS[config.corpus.family]
        self.language = WeightedReward(function=language_reward("en"), name="language")

    def run(self) -> Path:
        stage, config = self.models.stage, self.config
        stage("data", "write the corpus in two languages, train the tokenizer, shard", self._write_data)
        stage(
            "base", "pretrain the base", lambda facts: self._pretrain(facts, "base", config.model, config.pretraining)
        )
        stage(
            "zero",
            "Zero: RL on the base, accuracy and format",
            lambda facts: self._zero(facts, "base", "zero", config.zero),
        )
        stage("cold-start", "cold start: readable traces of Zero", self._cold_start)
        stage(
            "dev1",
            "Dev1: fine-tune the base on them",
            lambda facts: self._fine_tune(facts, "base", "dev1", "cold-start"),
        )
        stage("dev2", "Dev2: RL with the language reward", self._reasoning_rl)
        stage("rejection", "rejection sampling from Dev2, and general data", self._reject)
        stage(
            "dev3",
            "Dev3: fine-tune the base on both",
            lambda facts: self._fine_tune(facts, "base", "dev3", "rejection"),
        )
        stage("r1", "R1: RL on reasoning and general prompts", self._final_rl)
        small = (config.small_model, config.small_pretraining)
        stage(
            "small-base", "pretrain the smaller dense model", lambda facts: self._pretrain(facts, "small-base", *small)
        )
        stage(
            "small-rl",
            "RL on the smaller model",
            lambda facts: self._zero(facts, "small-base", "small-rl", config.small_rl),
        )
        stage(
            "distilled",
            "distil: fine-tune it on the same data",
            lambda facts: self._fine_tune(facts, "small-base", "distilled", "rejection"),
        )
        with self.models.log.stage("report", "write the report"):
            self._conclude()
        return write_report(self.dir).html

    def _write_data(self, facts: dict[str, Any]) -> None:
        config = self.config
        corpus = write_corpus(replace(config.corpus, documents=config.corpus.documents + HELD_OUT_DOCUMENTS))
        documents = list(in_two_languages(corpus, config.languages, config.corpus.seed))
        general = general_documents(TOKENIZER_DOCUMENTS // 8, seed=1)
        tokenizer = train_tokenizer([*documents[:TOKENIZER_DOCUMENTS], *general], config.vocab_size)
        tokenizer.save(self.dir / "tokenizer")
        self._shard("pretrain", documents[HELD_OUT_DOCUMENTS:], documents[:HELD_OUT_DOCUMENTS])
        facts["result"] = f"{len(documents)} documents, {tokenizer.vocab_size} tokens in the vocabulary"

    def _pretrain(self, facts: dict[str, Any], name: str, shape: ModelConfig, training: TrainingConfig) -> None:
        model = self.models.new(shape, training.seed)
        result = self._train(model, training, "pretrain", f"pretrain-{name}", self.config.batch_rows)
        facts["tokens"] = result.tokens
        self._keep(facts, name, model)

    def _zero(self, facts: dict[str, Any], start: str, name: str, config: GrpoConfig) -> None:
        model = self.models.load(start)
        train_grpo(model, config, self._asked(), self.models.prompter(), self.dir, stage=f"rl-{name}")
        self._keep(facts, name, model)

    def _cold_start(self, facts: dict[str, Any]) -> None:
        """R1's filters: right, one language, no repetition."""
        kept, counts = self._sample("zero", self.config.cold_start_problems, keep_per_problem=1, seed=11)
        self._shard_answers("cold-start", kept, [])
        facts |= {"result": str(counts), **asdict(counts)}

    def _reasoning_rl(self, facts: dict[str, Any]) -> None:
        model = self.models.load("dev1")
        rewards = (*R1_ZERO_REWARDS, self.language)
        asked, prompter = self._asked(), self.models.prompter()
        train_grpo(model, self.config.reasoning_rl, asked, prompter, self.dir, stage="rl-dev2", rewards=rewards)
        self._keep(facts, "dev2", model)

    def _reject(self, facts: dict[str, Any]) -> None:
        kept, counts = self._sample("dev2", self.config.rejection_problems, keep_per_problem=2, seed=12)
        share = self.config.general_share
        general = general_documents(int(len(kept) * share / (1 - share)), seed=2)
        self._shard_answers("rejection", kept, general)
        facts |= {"result": f"{counts}; {len(general)} general", "general": len(general), **asdict(counts)}

    def _final_rl(self, facts: dict[str, Any]) -> None:
        """Rule rewards on reasoning, a rule for general prompts, and the language reward on all thinking."""
        model = self.models.load("dev3")
        share = self.config.general_share
        asked = self._asked()
        mixed = [*asked, *general_problems(int(len(asked) * share / (1 - share)), seed=3)]
        random.Random(self.config.final_rl.seed).shuffle(mixed)
        rewards = (*R1_ZERO_REWARDS, self.language, WeightedReward(function=general_reward, name="general"))
        train_grpo(
            model,
            self.config.final_rl,
            mixed,
            self.models.prompter(),
            self.dir,
            stage="rl-r1",
            rewards=rewards,
            verifier=GeneralVerifier(),
        )
        self._keep(facts, "r1", model)

    def _fine_tune(self, facts: dict[str, Any], start: str, name: str, data: str) -> None:
        model = self.models.load(start)
        filled = (
            int(Shards.open(self.dir / "shards" / data / "train").document_lengths().sum()) // self.config.row_tokens
        )
        rows = max(1, min(self.config.fine_tuning_rows, filled))
        result = self._train(model, self.config.fine_tuning, data, f"sft-{name}", rows)
        facts["tokens"] = result.tokens
        self._keep(facts, name, model)

    def _train(self, model: Transformer, training: TrainingConfig, data: str, stage: str, rows: int) -> TrainingResult:
        return train_on_documents(
            model,
            training,
            self.dir / "shards" / data,
            self.models.tokenizer(),
            self.dir,
            stage=stage,
            batch_rows=rows,
            row_tokens=self.config.row_tokens,
        )

    def _keep(self, facts: dict[str, Any], name: str, model: Transformer) -> None:
        """Measure a model on held-out problems, and save it."""
        config = self.config
        row = measure_row(
            Engine(model),
            self.models.prompter(),
            problems(self.task, "eval", config.held_out_problems, config.corpus.difficulty, seed=0),
            samples_per_problem=config.samples_per_problem,
            max_tokens=config.max_answer_tokens,
        )
        write_json(self.dir / f"skill-{name}.json", asdict(row))
        self.models.save(name, model)
        facts["result"] = str(row)

    def _sample(
        self, name: str, count: int, *, keep_per_problem: int, seed: int
    ) -> tuple[list[KeptAnswer], RejectionCounts]:
        return rejection_sample(
            Engine(self.models.load(name)),
            self.models.prompter(),
            problems(self.task, "rl", count, self.config.corpus.difficulty, seed=seed),
            samples_per_problem=4,
            keep_per_problem=keep_per_problem,
            is_readable=is_readable,
            max_tokens=self.config.max_answer_tokens,
            seed=seed * 1000,
        )

    def _shard_answers(self, name: str, kept: Sequence[KeptAnswer], general: Sequence[Document]) -> None:
        """Shard what is to be learnt from.

        Raises:
            ConfigError: nothing was right and readable.
        """
        if not kept:
            raise ConfigError(
                f"no right and readable answer for {name}: the model before it solves nothing yet. Pretrain longer "
                "(pretraining.steps), show more worked solutions (corpus.worked_share) or ask easier problems (corpus.difficulty)."
            )
        documents = [Document(question=each.problem.prompt, response=each.text) for each in kept] + list(general)
        random.Random(name).shuffle(documents)
        held_out = max(1, len(documents) // 10)
        self._shard(name, documents[held_out:], documents[:held_out])

    def _shard(self, name: str, training: list[Document], held_out: list[Document]) -> None:
        tokenizer, template = self.models.tokenizer(), self.models.template()
        for part, documents in (("train", training), ("held_out", held_out)):
            write_documents(self.dir / "shards" / name / part, documents, tokenizer, template)

    def _asked(self) -> list[Problem]:
        return problems(self.task, "rl", self.config.rl_problems, self.config.corpus.difficulty, seed=0)

    def _conclude(self) -> None:
        rows = {
            name: PipelineRow(**json.loads((self.dir / f"skill-{name}.json").read_text(encoding="utf-8")))
            for name in MODELS
        }
        said = findings(rows)
        for finding in said:
            say(f"  {finding.verdict}: {finding.claim} ({finding.evidence})")
        table = {name: asdict(row) for name, row in rows.items()}
        write_json(self.dir / "r1.json", {"models": table, "findings": [asdict(finding) for finding in said]})
        card = {
            "name": "shoal-r1",
            "description": f"The R1 pipeline in miniature, on one thing: {self.task.description}",
            "suggestions": [p.prompt for p in problems(self.task, "eval", 4, self.config.corpus.difficulty, seed=0)],
            "max_tokens": self.config.max_answer_tokens,
        }
        self.models.export("r1", card)


def is_readable(text: str) -> bool:
    """R1's cold-start filter: the thinking is there, in English alone, and does not go in circles."""
    parsed = parse_response(text)
    if parsed is None or not parsed.thinking.strip() or repeats_itself(parsed.thinking):
        return False
    return language_consistency(parsed.thinking, "en") == 1.0


def _dense(large: ModelConfig) -> ModelConfig:
    """About a third of the active parameters, and no experts."""
    return large.replace(
        hidden_size=96, num_hidden_layers=2, intermediate_size=256, n_routed_experts=None, num_nextn_predict_layers=0
    )


def _training(steps: int) -> TrainingConfig:
    return TrainingConfig(
        steps=steps,
        optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.01, weight_decay=0.05),
        schedule=Schedule(kind="wsd", warmup_steps=20, total_steps=steps, decay_fraction=0.6),
        bias_speed=3e-3,
        log_every=5,
        checkpoint_every=100,
    )


def _fine_tuning(steps: int) -> TrainingConfig:
    """A cosine to a tenth, as the paper fine-tunes; rates as large as these models want."""
    return TrainingConfig(
        steps=steps,
        optimizer=OptimizerConfig(learning_rate=1e-3, weight_decay=0.0),
        schedule=Schedule(kind="cosine", warmup_steps=5, total_steps=steps, min_fraction=0.1),
        bias_speed=1e-3,
        log_every=5,
        checkpoint_every=100,
    )
