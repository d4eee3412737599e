import json
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from shoal.cli import app, main
from shoal.errors import ShoalError

PROMISED = ("total_params", "active_params", "kv_bytes_per_token", "checkpoint_bytes_fp8", "training_flops_per_token")
WITH_TOKENS = ("training_gpu_hours", "training_usd", "training_kwh")


def planned(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], terminal_width=200, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def test_json_is_one_object_with_the_promised_figures():
    found = json.loads(planned("v3", "--json"))
    assert all(isinstance(found[name], int | float) for name in PROMISED)
    assert not set(WITH_TOKENS) & set(found)
    trained = json.loads(planned("v3", "--tokens", "14.8e12", "--json"))
    assert all(trained[name] > 0 for name in (*PROMISED, *WITH_TOKENS))


def test_the_table_names_every_figure_with_its_unit():
    text = planned("v3", "--tokens", "14.8T")
    for part in (
        "total_params",
        "671 B",
        "training_usd",
        "USD",
        "training_kwh",
        "kWh",
        "kv_bytes_per_token",
        "70.27 kB",
    ):
        assert part in text


MISTAKES = [
    (("nowhere",), "neither a known model nor a config.json"),
    ((), "name a model"),
    (("v3", "--fit", "h900"), "unknown hardware 'h900'"),
    (("v3", "--set", "power_w=1.2"), "1.2 kW would be power_w=1200"),
    (("v3", "--set", "utilisation_fraction=-0.1"), "cannot be"),
    (("v3", "--tokens", "many"), "is not a number"),
]


@pytest.mark.parametrize("arguments, part", MISTAKES)
def test_mistakes_say_what_to_do(arguments, part):
    result = CliRunner().invoke(app, ["plan", *arguments])
    assert isinstance(result.exception, ShoalError) and part in str(result.exception)


def test_a_mistake_ends_with_exit_code_two(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shoal", "plan", "v3", "--set", "power_w=1.2"])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "power_w" in capsys.readouterr().err


def test_a_plan_never_loads_torch():
    program = "import sys; from shoal.cli import main; sys.argv = ['shoal', 'plan', 'v3', '--json']; main.__globals__['app'](standalone_mode=False); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, timeout=60, check=False)
    assert done.returncode == 0
