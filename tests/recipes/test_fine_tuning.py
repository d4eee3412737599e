"""Fine-tuning and measuring a model on one's own data, as small as it goes."""

import json
import math

import pytest
import torch

from shoal.checkpoint.hf_format import load_model, save_model
from shoal.errors import ConfigError, DataError, TaskError
from shoal.model.transformer import Transformer, initialise
from shoal.presets import preset
from shoal.recipes.evaluating import evaluate_task, evaluate_text
from shoal.recipes.fine_tuning import FineTuningConfig, fine_tune
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer

TEXT = "the shoal swims in a ring and the ring swims in the sea. "


@pytest.fixture(autouse=True)
def own_lock(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("base")
    tokenizer = Tokenizer.train([TEXT] * 5, 280)
    config = preset("demo").replace(
        vocab_size=tokenizer.vocab_size,
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        moe_intermediate_size=16,
        kv_lora_rank=16,
        max_position_embeddings=96,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = Transformer(config)
    initialise(model, 0)
    save_model(directory, config, model.state_dict())
    tokenizer.save(directory)
    ChatTemplate.default(tokenizer).save(directory)
    return directory


def chats(tmp_path, count=24):
    path = tmp_path / "chats.jsonl"
    lines = [{"prompt": f"say {n}", "response": f"<think>{n}</think>{n}{n}"} for n in range(count)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_fine_tuning_learns_the_answers_and_keeps_drafting(model_dir, tmp_path):
    run = tmp_path / "run"
    config = FineTuningConfig(steps=40, learning_rate=3e-3, batch_rows=4, held_out_fraction=0.2)
    result = fine_tune(run, model_dir, [chats(tmp_path)], config)
    assert result["loss"] < 3.5 < math.log(280)
    assert result["mtp_acceptance"] is not None and 0 < result["mtp_acceptance"] <= 1
    assert (run / "report.html").is_file() and (run / "model" / "tokenizer.json").is_file()
    assert fine_tune(run, model_dir, [chats(tmp_path)], config) == result  # done already: nothing is trained again
    before, after = (load_model(directory)[1]["embed_tokens.weight"] for directory in (model_dir, run / "model"))
    assert not torch.equal(before, after)


@pytest.mark.parametrize(
    "lines, message",
    [
        ([{"prompt": "a", "response": "b"}], "at least two"),
        ([{"prompt": "a", "response": "ring " * 200}, {"prompt": "c", "response": "d"}], "rows have room for 96"),
    ],
)
def test_data_that_cannot_be_learnt_is_named(model_dir, tmp_path, lines, message):
    path = tmp_path / "chats.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pytest.raises(DataError, match=message):
        fine_tune(tmp_path / "run", model_dir, [path], FineTuningConfig(steps=1))


@pytest.mark.parametrize("changes", [{"steps": 0}, {"held_out_fraction": 1.0}, {"learning_rate": 0.0}])
def test_impossible_settings_are_refused(changes):
    with pytest.raises(ConfigError):
        FineTuningConfig(**changes)


def test_text_is_measured_to_the_last_token_in_units_that_agree(model_dir, tmp_path):
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 8)
    found = evaluate_text(model_dir, [path])
    tokenizer = Tokenizer.load(model_dir)
    assert found["tokens"] == len(tokenizer.encode(TEXT * 8)) and found["window"] == 96
    assert found["perplexity"] == pytest.approx(math.exp(found["nats_per_token"]))
    # Plain ASCII: a character is a byte.
    assert found["bits_per_byte"] == pytest.approx(found["nats_per_character"] / math.log(2))
    # A model that has learnt nothing gives every token about the same share.
    assert found["nats_per_token"] == pytest.approx(math.log(tokenizer.vocab_size), rel=0.1)


def test_a_task_is_measured_with_an_interval_and_the_same_seed_gives_the_same(model_dir):
    settings = {"num_problems": 3, "samples": 2, "max_tokens": 8}
    found = evaluate_task(model_dir, "addition", **settings)
    assert found["problems"] == 3 and found["task"] == "addition"
    low, high = found["pass_at_1_interval"]
    assert low <= found["pass_at_1"] <= high
    assert evaluate_task(model_dir, "addition", **settings) == found


def test_what_cannot_be_measured_is_named(model_dir, tmp_path):
    with pytest.raises(TaskError, match="astrology"):
        evaluate_task(model_dir, "astrology")
    with pytest.raises(ConfigError, match="at least 1"):
        evaluate_task(model_dir, "addition", samples=0)
    with pytest.raises(DataError, match="does not exist"):
        evaluate_text(model_dir, [tmp_path / "nothing.txt"])
