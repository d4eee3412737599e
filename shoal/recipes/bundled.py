"""The model that comes with the package: all task families, visible checked reasoning, friendly about the rest.

Unlike the demo, whose base hardly ever shows its work so that reinforcement learning has something to find, this recipe
wants the best small model: every problem it reads is worked out, in many wordings; reinforcement learning on fresh
problems of all families then removes slips. Held-out accuracy per family goes into the model card, whatever it is.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from shoal import __version__
from shoal.config import ModelConfig
from shoal.engine.engine import Engine
from shoal.errors import TaskError
from shoal.presets import preset
from shoal.recipes.document_training import train_on_documents, train_tokenizer, write_documents
from shoal.recipes.model_run import ModelRun
from shoal.recipes.run import current_commit, only_run, write_json
from shoal.recipes.small_talk import ABILITIES, EXAMPLES
from shoal.recipes.task_mixture import MixtureConfig, Share, write_mixture
from shoal.rl.evaluation import measure_skill
from shoal.rl.grpo import train_grpo
from shoal.rl.grpo_config import GrpoConfig
from shoal.rl.tasks import TASKS, Problem
from shoal.rl.tasks.splits import problems
from shoal.training.loop import TrainingConfig
from shoal.training.optimizer import OptimizerConfig
from shoal.training.schedule import Schedule

TOKENIZER_DOCUMENTS = 8000
HELD_OUT_DOCUMENTS = 400
WEAK = 0.75
"""pass@1 below which the card warns of a family."""

SHARES = (
    Share(family="chain_sum", difficulties=(2, 3, 4, 5, 6, 7), weight=3),
    Share(family="addition", difficulties=(1, 2, 3, 4), weight=4),
    Share(family="multiplication", difficulties=(1, 2), weight=3),
    Share(family="sorting", difficulties=(2, 3, 4, 5, 6, 7), weight=3),
    Share(family="parity", difficulties=tuple(range(4, 17)), weight=1),
    Share(family="countdown", difficulties=(2, 3), weight=2),
    Share(family="knights", difficulties=(3,), weight=1),
    Share(family="grid_path", difficulties=(3, 4), weight=1.5),
)


@dataclass(frozen=True, kw_only=True)
class BundledConfig:
    """Everything that decides the bundled model."""

    mixture: MixtureConfig
    vocab_size: int = 512
    model: ModelConfig
    batch_rows: int = 12
    row_tokens: int = 512
    training: TrainingConfig
    rl: GrpoConfig
    rl_problems_per_level: int = 400
    held_out_per_family: int = 100
    samples_per_problem: int = 4
    max_answer_tokens: int = 220
    estimates_s: dict[str, float] = field(default_factory=dict)


def bundled_config(*, steps: int = 4000, rl_steps: int = 250, documents: int = 330_000) -> BundledConfig:
    """The recipe `bundled`."""
    return BundledConfig(
        mixture=MixtureConfig(shares=SHARES, documents=documents),
        model=preset("demo").replace(
            hidden_size=160,
            num_hidden_layers=4,
            intermediate_size=480,
            max_position_embeddings=1024,
            initializer_range=0.05,
        ),
        training=TrainingConfig(
            steps=steps,
            optimizer=OptimizerConfig(kind="muon", learning_rate=3e-3, muon_learning_rate=0.01, weight_decay=0.05),
            schedule=Schedule(kind="wsd", warmup_steps=30, total_steps=steps, decay_fraction=0.6),
            bias_speed=3e-3,
            log_every=10,
            evaluate_every=200,
            checkpoint_every=100,
        ),
        rl=GrpoConfig(
            steps=rl_steps,
            prompts_per_step=32,
            group_size=8,
            optimizer=OptimizerConfig(learning_rate=2e-4, weight_decay=0.0),
            decay_fraction=0.5,
            max_response_tokens=220,
            bias_speed=3e-3,
            precision="auto",
            checkpoint_every=25,
        ),
    )


def train_bundled(run_dir: Path, config: BundledConfig) -> Path:
    """Run the stages that are not done yet; returns the finished model's directory.

    Raises:
        ConfigError: another run holds this machine.
        CheckpointError: the directory belongs to another configuration.
    """
    with only_run():
        return _Bundled(run_dir, config).run()


class _Bundled:
    """The stages, each of which leaves files that the next reads."""

    def __init__(self, run_dir: Path, config: BundledConfig) -> None:
        self.config, self.dir = config, run_dir
        settings = {"recipe": "bundled", "seed": config.training.seed, **asdict(config)}
        self.models = ModelRun(run_dir, settings, config.estimates_s, config.rl.precision)

    def run(self) -> Path:
        self.models.stage("data", "write the text, train the tokenizer, shard", self._write_data)
        self.models.stage("pretrain", "train from scratch", self._train)
        self.models.stage(
            "evaluate", "measure every family on held-out problems", lambda facts: self._measure(facts, "base")
        )
        self.models.stage("rl", "reinforcement learning on fresh problems of all families", self._reinforce)
        self.models.stage("evaluate-rl", "measure again", lambda facts: self._measure(facts, "rl"))
        self.models.stage("export", "write the model with its card", self._export)
        return self.dir / "model"

    def _write_data(self, facts: dict[str, Any]) -> None:
        first = write_mixture(replace(self.config.mixture, documents=TOKENIZER_DOCUMENTS))
        tokenizer = train_tokenizer(first, self.config.vocab_size)
        tokenizer.save(self.dir / "tokenizer")
        template = self.models.template()
        documents = list(write_mixture(self.config.mixture))
        parts = {"held_out": documents[:HELD_OUT_DOCUMENTS], "train": documents[HELD_OUT_DOCUMENTS:]}
        for name, part in parts.items():
            facts["tokens"] = write_documents(self.dir / "shards" / name, part, tokenizer, template)
        facts["result"] = f"{len(documents)} documents, {facts['tokens']} tokens"

    def _train(self, facts: dict[str, Any]) -> None:
        tokenizer = self.models.tokenizer()
        model = self.models.new(self.config.model, self.config.training.seed)
        result = train_on_documents(
            model,
            self.config.training,
            self.dir / "shards",
            tokenizer,
            self.dir,
            stage="pretrain",
            batch_rows=self.config.batch_rows,
            row_tokens=self.config.row_tokens,
        )
        self.models.save("base", model)
        facts["tokens"] = result.tokens
        if result.evaluation:
            facts["result"] = f"held-out loss {result.evaluation.loss:.3f} nats"

    def _reinforce(self, facts: dict[str, Any]) -> None:
        model = self.models.load("base")
        asked = [
            problem
            for share in self.config.mixture.shares
            for level in share.difficulties
            for problem in _fresh(share.family, "rl", self.config.rl_problems_per_level, level)
        ]
        result = train_grpo(model, self.config.rl, asked, self.models.prompter(), self.dir, stage="rl")
        self.models.save("rl", model)
        facts["result"] = f"accuracy {result.first_accuracy} -> {result.last_accuracy} on training problems"

    def _measure(self, facts: dict[str, Any], name: str) -> None:
        """pass@1 of each family on held-out problems of all its difficulties."""
        engine, prompter = Engine(self.models.load(name)), self.models.prompter()
        skill = {}
        for share in self.config.mixture.shares:
            per_level = max(1, self.config.held_out_per_family // len(share.difficulties))
            asked = [p for level in share.difficulties for p in _fresh(share.family, "eval", per_level, level)]
            report = measure_skill(
                engine,
                prompter,
                asked,
                samples_per_problem=self.config.samples_per_problem,
                max_tokens=self.config.max_answer_tokens,
            )
            skill[share.family] = report.to_dict()
        write_json(self.dir / f"skill-{name}.json", skill)
        facts["result"] = ", ".join(f"{family} {each['pass_at']['1']:.0%}" for family, each in skill.items())

    def _export(self, facts: dict[str, Any]) -> None:
        """The better of the two models as a self-contained directory."""
        skills = {name: json.loads((self.dir / f"skill-{name}.json").read_text("utf-8")) for name in ("base", "rl")}
        best = max(skills, key=lambda name: sum(each["pass_at"]["1"] for each in skills[name].values()))
        target = self.models.export(best, self._card(best, skills[best]), dtype=torch.bfloat16)
        facts["result"] = f"{sum(file.stat().st_size for file in target.iterdir()) / 2**20:.1f} MiB, from {best}"

    def _card(self, stage: str, skill: dict[str, Any]) -> dict[str, Any]:
        families = {
            family: {
                "pass@1": round(each["pass_at"]["1"], 4),
                "interval": each["pass_at_1_interval"],
                "difficulties": next(s.difficulties for s in self.config.mixture.shares if s.family == family),
                "asks": TASKS[family].description,
            }
            for family, each in skill.items()
        }
        return {
            "name": "shoal-nano",
            "description": f"The small model that comes with Shoal, trained from scratch on a CPU. {ABILITIES}",
            "suggestions": list(EXAMPLES),
            "max_tokens": self.config.max_answer_tokens,
            "recipe": "bundled",
            "stage": stage,
            "seed": self.config.training.seed,
            "commit": current_commit(),
            "version": __version__,
            "held_out": families,
            "weak_at": [family for family, each in families.items() if each["pass@1"] < WEAK],
        }


def _fresh(family: str, split: str, count: int, difficulty: int) -> Sequence[Problem]:
    """Up to `count` problems of a split; small families have fewer."""
    while count > 1:
        try:
            return problems(TASKS[family], split, count, difficulty, seed=0)
        except TaskError:
            count //= 2
    return problems(TASKS[family], split, 1, difficulty, seed=0)
