import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shoal.checkpoint.hf_format import save_model
from shoal.cli import app
from shoal.model.transformer import Transformer, initialise
from tests.model.test_mla import TINY

VERBS = ("demo", "pretrain", "sft", "eval", "rl", "generate", "chat", "serve", "report", "plan", "doctor", "version")


def shoal(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], capture_output=True, text=True, timeout=120, check=False
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself_with_an_example(verb):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0 and f"shoal {verb}" in result.output


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    directory = tmp_path_factory.mktemp("model")
    config = TINY.replace(
        hidden_size=48,
        moe_intermediate_size=16,
        intermediate_size=32,
        qk_nope_head_dim=8,
        qk_rope_head_dim=8,
        v_head_dim=16,
    )
    model = Transformer(config)
    initialise(model, 0)
    save_model(directory, config, model.state_dict())
    return directory


@pytest.mark.slow
def test_generate_prints_one_object_with_token_ids(model_dir):
    arguments = (
        "generate",
        str(model_dir),
        "--prompt-ids",
        "5,9,2",
        "--max-tokens",
        "6",
        "--temperature",
        "0",
        "--json",
    )
    first, second = shoal(*arguments), shoal(*arguments)
    payload = json.loads(first.stdout)
    assert first.returncode == 0 and 1 <= len(payload["token_ids"]) <= 6
    assert json.loads(second.stdout)["token_ids"] == payload["token_ids"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, part",
    [
        (("generate", "nowhere", "--prompt-ids", "1"), "no directory"),
        (("report", "."), "no run directory"),
        (("pretrain", "--data", "nowhere.txt"), "does not exist"),
        (("pretrain", "--data", "x", "--set", "wings=2"), "one of steps"),
        (("serve", "nowhere", "--host", "0.0.0.0"), "--api-key"),
    ],
)
def test_mistakes_end_with_one_message_and_exit_code_two(arguments, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    result = shoal(*arguments)
    assert result.returncode == 2 and part in result.stderr and "Traceback" not in result.stderr


@pytest.mark.slow
def test_bad_prompts_are_named(model_dir):
    for extra, part in (
        (("--prompt-ids", "5,x"), "'x'"),
        (("--prompt-ids", "99999"), "0..60"),
        (("--prompt", "hi"), "no tokenizer.json"),
        ((), "either"),
    ):
        result = shoal("generate", str(model_dir), *extra)
        assert result.returncode == 2 and part in result.stderr


@pytest.mark.slow
def test_doctor_tells_the_machine():
    facts = json.loads(shoal("doctor", "--json").stdout)
    assert {"torch", "cores", "cpu_kernels", "energy_counters"} <= set(facts)
