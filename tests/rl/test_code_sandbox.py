import time

import pytest

from shoal.errors import ConfigError
from shoal.rl.code_sandbox import SandboxLimits, network_isolation, passed_fraction, run_program

QUICK = SandboxLimits(time_s=2.0, memory_bytes=256 << 20, output_bytes=1000)


def test_a_program_reads_and_prints():
    result = run_program("print(sum(map(int, input().split())))", stdin="3 4\n", limits=QUICK)
    assert (result.outcome, result.output) == ("ok", "7\n")


def test_cases_are_passed_or_not():
    program = "n = int(input())\nprint(n * n if n < 5 else 0, ' ')"
    assert passed_fraction(program, [("2", "4"), ("3", "9\n"), ("7", "49"), ("x", "1")], QUICK) == 0.5
    with pytest.raises(ConfigError, match="at least one test case"):
        passed_fraction(program, [])


@pytest.mark.parametrize(
    "program, outcome, error",
    [
        ("raise ValueError('no')", "failed", "ValueError: no"),
        ("x = bytearray(1 << 30)", "failed", "MemoryError"),
        ("print('x' * 10**6)", "failed", ""),
        ("import os; print(sorted(os.environ)); os._exit(0)", "ok", ""),
        ("import sys; sys.exit(3)", "failed", ""),
        ("import numpy", "failed", "ModuleNotFoundError: No module named 'numpy'"),
    ],
)
def test_what_a_program_does_is_its_outcome_and_no_exception_of_ours(program, outcome, error):
    result = run_program(program, limits=QUICK)
    assert result.outcome == outcome and error in result.error and len(result.output) <= 1000


def test_the_environment_is_empty(monkeypatch):
    monkeypatch.setenv("SHOAL_TEST_SECRET", "1")
    assert "SECRET" not in run_program("import os; print(os.environ)", limits=QUICK).output


def test_a_program_that_hangs_is_killed_with_what_it_started():
    started = time.perf_counter()
    hanging = "import os, time\nif os.fork() == 0:\n    os.setsid(); time.sleep(60)\ntime.sleep(60)"
    assert run_program(hanging, limits=SandboxLimits(time_s=0.5)).outcome == "timeout"
    assert time.perf_counter() - started < 3


def test_a_program_has_no_network_where_the_system_allows():
    if not network_isolation():
        pytest.skip("this system does not let users make network namespaces")
    result = run_program("import socket\nprint([name for _, name in socket.if_nameindex()])", limits=QUICK)
    assert result.output == "['lo']\n" and not result.has_network
    listening = "import socket\ns = socket.socket(); s.settimeout(1); s.connect(('127.0.0.1', 80))"
    assert run_program(listening, limits=QUICK).outcome == "failed"


def test_programs_too_long_to_be_honest_are_not_run():
    assert run_program("#" * 200_000, limits=QUICK).outcome == "too_long"


@pytest.mark.parametrize("changes", [{"time_s": 0.0}, {"memory_bytes": 1}, {"output_bytes": 0}])
def test_impossible_limits_are_refused(changes):
    with pytest.raises(ConfigError, match="sandbox limits"):
        SandboxLimits(**changes)
