"""Matrix tiles: the compiled instructions themselves, carried out by the processor or, where it has none, by an emulator."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from shoal.device import describe_machine
from shoal.kernels.cpu.build import AVX512, NEEDED, library

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
INSTRUCTIONS = set(describe_machine().instructions)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(library() is None, reason="no C++ compiler: the PyTorch path does this work"),
    pytest.mark.skipif(
        platform.system() != "Linux" or not AVX512 <= INSTRUCTIONS, reason="the kernels around the tiles need AVX-512"
    ),
]


def run_cases(environment):
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-q",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:faulthandler",
        str(HERE / "amx_cases.py"),
    ]
    env = {**os.environ, "SHOAL_KERNELS": "amx", **environment}
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=400)


def emulator(folder):
    target = folder / "amx_emulator.so"
    source = str(HERE / "amx_emulator.cpp")
    compiler = os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")
    subprocess.run([compiler, "-O2", "-std=c++17", "-shared", "-fPIC", "-o", str(target), source, "-ldl"], check=True)
    return target


def test_tiles_give_what_the_reference_gives(tmp_path):
    native = NEEDED["amx"] <= INSTRUCTIONS
    done = run_cases({} if native else {"LD_PRELOAD": str(emulator(tmp_path))})
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
