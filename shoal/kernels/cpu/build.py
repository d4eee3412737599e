"""Compile the C++ kernels for this machine, once, and load them.

The library is built with the machine's own compiler and instruction set (a second or two), kept in the user's cache under
a name that is the hash of everything that went in, and loaded through ctypes. With no compiler, or when the build fails,
the PyTorch reference does the work and one line says why. `SHOAL_KERNELS=off` forces that.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

from shoal.device import describe_machine
from shoal.log import say

ABI_VERSION = 2
FOLDER = Path(__file__).parent
SOURCES = ("kernels.cpp", "forward.cpp", "linear.cpp", "experts.cpp", "head.cpp", "heads.cpp")
HEADERS = ("simd.h", "packed.h", "latent_attention.h", "products.h", "cross_entropy.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    # Sums keep their order, so that a row gives the same bits in any batch; NaN, infinity and denormals keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
)
BUILD_TIMEOUT_S = 120


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded kernels, built if need be; None where they cannot be had (said once)."""
    if os.environ.get("SHOAL_KERNELS", "").lower() == "off":
        return None
    try:
        return _load(build())
    except (OSError, subprocess.SubprocessError) as error:
        say(f"cpu kernels unavailable, PyTorch does their work (slower): {_reason(error)}")
        return None


def build() -> Path:
    """Path of the compiled library, compiling when no cached one matches source, flags, compiler and processor.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or clang++")
    target = cache_dir() / f"kernels-{kernels_digest()}.so"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / target.name
        command = [compiler, *FLAGS, *(str(FOLDER / name) for name in SOURCES), "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S)
        output.replace(target)
    return target


def kernels_digest() -> str:
    """Digest of everything that decides the kernels' results: source, flags, compiler, processor."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    machine = describe_machine()
    identity = (sources, FLAGS, _compiler(), platform.machine(), machine.processor, machine.instructions)
    return hashlib.sha256(repr(identity).encode()).hexdigest()[:16]


def cache_dir() -> Path:
    """Where compiled kernels are kept between runs."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "shoal"


def _compiler() -> str | None:
    return os.environ.get("CXX") or shutil.which("g++") or shutil.which("clang++")


def _load(path: Path) -> ctypes.CDLL:
    loaded = ctypes.CDLL(str(path))
    found = loaded.shoal_abi_version()
    if found != ABI_VERSION:
        raise OSError(f"{path.name} has interface {found}, this version needs {ABI_VERSION}; delete it")
    return loaded


def _reason(error: Exception) -> str:
    if isinstance(error, subprocess.CalledProcessError):
        lines = (error.stderr or "").strip().splitlines()
        return f"the compiler failed: {lines[0] if lines else error}"
    return str(error)
