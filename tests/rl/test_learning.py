"""Reinforcement learning learns: it finds a way of working that the base has, and finds nothing where the base has none."""

from dataclasses import replace

import pytest

from shoal.engine.engine import Engine
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.recipes.demo import demo_config
from shoal.recipes.document_training import train_on_documents, train_tokenizer, write_documents
from shoal.recipes.problem_corpus import CorpusConfig, write_corpus
from shoal.rl.evaluation import measure_skill
from shoal.rl.grpo import train_grpo
from shoal.rl.rollout import Prompter
from shoal.rl.tasks import TASKS
from shoal.rl.tasks.splits import problems
from shoal.text.chat_template import ChatTemplate
from shoal.training.schedule import Schedule

CORPUS = CorpusConfig(family="dial", difficulty=10, documents=6000, worked_share=0.25, arithmetic_share=0.0)
BASE_STEPS, RL_STEPS = 150, 16


def base_of(corpus, tmp_path):
    """A base trained from scratch on the corpus, and who writes its prompts."""
    documents = list(write_corpus(corpus))
    tokenizer = train_tokenizer(documents[:2000], 320)
    template = ChatTemplate.default(tokenizer)
    for name, part in (("held_out", documents[:100]), ("train", documents[100:])):
        write_documents(tmp_path / "shards" / name, part, tokenizer, template)
    config = preset("demo").replace(
        vocab_size=tokenizer.vocab_size,
        initializer_range=0.05,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Transformer(config)
    initialise(model, 0)
    training = replace(
        demo_config().pretraining,
        steps=BASE_STEPS,
        schedule=Schedule(kind="wsd", warmup_steps=10, total_steps=BASE_STEPS, decay_fraction=0.6),
    )
    train_on_documents(
        model, training, tmp_path / "shards", tokenizer, tmp_path, stage="pretrain", batch_rows=16, row_tokens=160
    )
    return model.eval(), Prompter(tokenizer, template)


def skill(model, prompter):
    held_out = problems(TASKS["dial"], "eval", 48, CORPUS.difficulty, seed=0)
    return measure_skill(Engine(model), prompter, held_out, samples_per_problem=8, max_tokens=64)


@pytest.mark.slow
@pytest.mark.parametrize("worked_share", [CORPUS.worked_share, 0.0], ids=["worked solutions", "none"])
def test_reward_alone_finds_the_way_of_working_that_the_base_has(worked_share, tmp_path):
    model, prompter = base_of(replace(CORPUS, worked_share=worked_share), tmp_path)
    before = skill(model, prompter)
    config = replace(demo_config().rl, steps=RL_STEPS, max_response_tokens=64)
    asked = problems(TASKS["dial"], "rl", 400, CORPUS.difficulty, seed=0)
    train_grpo(model, config, asked, prompter, tmp_path / "run")
    after = skill(model, prompter)
    print(before.describe(), after.describe(), sep="\n")
    if worked_share:
        assert before.pass_at["1"] < 0.6 and after.pass_at["1"] > 0.8 and after.worked_fraction > 0.8
    else:
        assert after.pass_at["1"] < 0.5 and after.worked_fraction < 0.1
