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
    result = CliRunner(env={"COLUMNS": "200"}).invoke(app, ["plan", *arguments], catch_exceptions=False)
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


def test_two_cores_can_serve_v2_lite_and_the_table_says_how():
    text = planned("v2_lite", "--fit", "2 cores, 24 GiB")
    for part in ("serving_fits", "int8 weights", "longest_context_tokens", "training does not fit", "tokens/s"):
        assert part in text


def test_models_are_laid_side_by_side():
    rows = {row["name"]: row for row in json.loads(planned("--compare", "v3", "llama-3.1-405b", "--json"))["rows"]}
    assert rows["kv_bytes_per_token"]["values"] == [70_272, 516_096]
    assert "7.34x" in planned("--compare", "v3", "llama-3.1-405b")


def test_names_to_type_are_whole_on_a_narrow_terminal():
    runner = CliRunner(env={"COLUMNS": "80"})
    for arguments in (("v3", "--tokens", "14.8T"), ("v3", "--tokens", "14.8T", "--sensitivity")):
        assert (
            "utilisation_fraction" in runner.invoke(app, ["plan", *arguments, "--explain", "training_gpu_hours"]).stdout
        )
    assert "training_flops_per_token_full_square" in runner.invoke(app, ["plan", "v3"]).stdout


def test_a_figure_is_explained_with_formula_inputs_and_sources():
    text = planned("v3", "--tokens", "14.8T", "--explain", "training_kwh")
    for part in ("training_gpu_hours x power_w / 1000 x pue", "range", "utilisation_fraction", "Uptime Institute"):
        assert part in text
    found = json.loads(planned("v3", "--explain", "total_params", "--json"))
    assert found["value"] == 671_026_419_200 and found["formula"]


def test_sensitivity_names_the_assumption_that_matters_most_first():
    found = json.loads(planned("v3", "--tokens", "14.8T", "--sensitivity", "--json"))
    assert found["figure"] == "training_usd" and found["effects"][0]["key"] == "utilisation_fraction"
    assert "utilisation_fraction" in planned("v3", "--tokens", "14.8T", "--sensitivity")


def test_claims_are_recomputed_one_by_one_and_all_together():
    assert all(row["agrees"] for row in json.loads(planned("--claims", "--json"))["claims"])
    text = planned("--claim", "14")
    assert "not recomputable" in text and "444.86" in text


def test_networks_and_expert_placement_have_tables():
    text = planned("--network", "16384")
    assert "multi-plane fat tree" in text and "768" in text and "two-layer fat tree: at most 2,048" in text
    text = planned("v3", "--place")
    assert "288 slots on 32 devices" in text and "hierarchical" in text


def test_a_run_takes_no_hardware_and_says_so(run_without_metrics):
    result = CliRunner().invoke(app, ["plan", run_without_metrics, "--fit", "h800"])
    assert isinstance(result.exception, ShoalError) and "leave out --fit" in str(result.exception)


def test_numbers_of_the_hardware_can_be_set():
    plain = json.loads(planned("v3", "--fit", "16x h800", "--json"))
    faster = json.loads(planned("v3", "--fit", "16x h800", "--set", "memory_bytes_per_s=6.7TB/s", "--json"))
    assert plain["decode_limited_by"] == "memory" and faster["decode_tokens_per_s"] > 1.3 * plain["decode_tokens_per_s"]
    larger = json.loads(planned("v3", "--fit", "16x h800", "--set", "device_bytes=141GiB", "--json"))
    assert larger["most_sequences"] > plain["most_sequences"]


def test_hardware_of_your_own_comes_from_a_file(tmp_path):
    row = {
        "memory_bytes": 200e9,
        "bandwidth_bytes_per_s": 4e12,
        "flops": {"bf16": 1e15},
        "power_w": 1000,
        "price_usd_per_h": 1,
    }
    row |= {"link_bytes_per_s": 1e11, "network_bytes_per_s": 5e10, "source": "mine"}
    path = tmp_path / "hardware.json"
    path.write_text(json.dumps({"my-gpu": row}), encoding="utf-8")
    found = json.loads(
        planned("v2_lite", "--fit", "8x my-gpu", "--hardware-file", str(path), "--tokens", "1T", "--json")
    )
    assert found["hardware"] == "8x my-gpu" and found["training_usd"] == pytest.approx(found["training_gpu_hours"])


@pytest.fixture
def run_without_metrics(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"recipe": "demo", "model": {}}), encoding="utf-8")
    return str(tmp_path)


def test_a_run_directory_without_metrics_ends_with_exit_code_two(run_without_metrics, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["shoal", "plan", run_without_metrics])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2 and "metrics.jsonl" in capsys.readouterr().err


MISTAKES = [
    (("nowhere",), "neither a known model nor a config.json"),
    ((), "name a model"),
    (("v3", "--fit", "h900"), "unknown hardware 'h900'"),
    (("v3", "--set", "power_w=1.2"), "1.2 kW would be power_w=1200"),
    (("v3", "--set", "utilisation_fraction=-0.1"), "cannot be"),
    (("v3", "--tokens", "many"), "is not a number"),
    (("v3", "--fit", "h900"), "To add one, write a JSON file"),
    (("v3", "--set", "pue=-1"), "cannot use less than its machines"),
    (("v3", "--set", "utilisation_fraction=40"), "40 % would be utilisation_fraction=0.4"),
    (("v3", "llama-3.1-405b"), "compare them with --compare"),
    (("--compare", "v3"), "1 models cannot be compared"),
    (("v3", "--explain", "training_usd"), "need --tokens"),
    (("--claim", "9"), "no claim 9"),
    (("v3", "--claims"), "leave out model"),
    (("--claims", "--network", "64"), "different questions"),
    (("v3", "--markdown"), "use it with --claims"),
    (("v3", "--hardware-file", "x.json"), "no --fit names a device"),
    (("v3", "--compare", "--explain", "total_params"), "different questions"),
    (("--network", "1"), "endpoints=1"),
    (("llama-2-7b", "--place"), "no routed experts"),
    (("v3", "--loads", "nowhere"), "cannot read"),
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


def test_a_narrow_terminal_gets_lines_that_fit_and_whole_meanings():
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", "v3", "--tokens", "14.8T"], catch_exceptions=False)
    assert all(len(line) <= 80 for line in result.stdout.splitlines())
    lines = [line.strip() for line in result.stdout.splitlines()]
    assert "parameters of multi-token-prediction modules" in lines
    assert any(line.startswith("training_usd ") and line.count("USD") >= 1 for line in lines)


def test_networks_are_whole_on_a_narrow_terminal():
    result = CliRunner(env={"COLUMNS": "80"}).invoke(app, ["plan", "--network", "2048"], catch_exceptions=False)
    assert "…" not in result.stdout and "9,014," in result.stdout and "transceivers" in result.stdout
