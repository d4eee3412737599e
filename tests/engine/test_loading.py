"""Which model is meant: the one that is named, or the newest run."""

import hashlib
import json
import os

import pytest

from shoal.engine.loading import find_model
from shoal.engine.one_prompt import complete_one
from shoal.errors import CheckpointError


def make_run(directory, seconds):
    model = directory / "model"
    model.mkdir(parents=True)
    (model / "config.json").write_text("{}")
    (model / "model.safetensors").write_bytes(b"")
    os.utime(model / "config.json", (seconds, seconds))
    return model


def test_without_a_name_the_newest_finished_run_is_meant(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    newest = make_run(tmp_path / "runs" / "a", 2000)
    make_run(tmp_path / "runs" / "b", 1000)
    (tmp_path / "runs" / "unfinished").mkdir()
    assert find_model(None).resolve() == newest


def test_a_run_directory_means_its_model_and_a_model_directory_itself(tmp_path):
    model = make_run(tmp_path / "run", 1000)
    assert find_model(tmp_path / "run") == model == find_model(model)


def test_what_is_no_model_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="is no directory"):
        find_model(tmp_path / "nothing")
    with pytest.raises(CheckpointError, match=r"no config\.json with safetensors"):
        find_model(tmp_path)


def test_without_a_name_and_without_runs_the_bundled_model_answers_and_its_card_tells_the_truth_of_its_weights(
    tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    directory = find_model(None)
    card = json.loads((directory / "shoal.json").read_text(encoding="utf-8"))
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == card["weights_sha256"]
    assert sum(file.stat().st_size for file in directory.iterdir()) < 20 * 2**20
    answer = complete_one(
        None, prompt="What is 27 + 45?", prompt_ids=None, max_tokens=64, temperature=0.0, top_p=1.0, seed=None
    )
    assert "72" in str(answer["text"]) and answer["finish_reason"] == "stop"
