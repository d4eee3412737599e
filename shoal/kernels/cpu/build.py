"""Compile the C++ kernels for this machine, once, and load them.

The library is built with the machine's own compiler and instruction set (some seconds), kept in the user's cache under a
name that is the hash of everything that went in, and loaded through ctypes. With no compiler, or when the build fails, the
PyTorch reference does the work and one line says why.

`SHOAL_KERNELS` forces a level: `amx` (AVX-512 and matrix tiles), `avx512` (with VNNI and bfloat16 products), `avx2`, `plain` (what
every x86-64 or ARM core has), `sanitize` (address and undefined-behaviour checks, for `make sanitize`) or `off`. One source
serves all levels: vector types of 64 bytes, which the compiler splits where registers are shorter.
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

import torch

from shoal.device import describe_machine
from shoal.errors import ConfigError
from shoal.log import say

ABI_VERSION = 2
FOLDER = Path(__file__).parent
SOURCES = (
    "kernels.cpp",
    "document_attention.cpp",
    "document_attention_bf16.cpp",
    "linear.cpp",
    "experts.cpp",
    "head.cpp",
    "policy_head.cpp",
    "heads.cpp",
    "forward.cpp",
    "packed_linear.cpp",
    "lay_out.cpp",
    "sampling.cpp",
)
HEADERS = (
    "simd.h",
    "norms.h",
    "products.h",
    "wide_attention.h",
    "cross_entropy.h",
    "packed.h",
    "tiles.h",
    "panel_products.h",
    "latent_attention.h",
    "model.h",
    "drawing.h",
    "fp8_entries.h",
    "routing.h",
    "team.h",
)
FLAGS = (
    "-std=c++17",
    "-shared",
    "-fPIC",
    "-fopenmp",
    # Sums keep their order, so that a row gives the same bits in any batch; NaN, infinity and denormals keep their meaning.
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fno-signed-zeros",
)
LEVELS: dict[str, tuple[str, ...]] = {
    "native": ("-O3", "-march=native"),
    "amx": ("-O3", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16", "-mamx-tile", "-mamx-int8", "-mamx-bf16"),
    "avx512": ("-O3", "-march=x86-64-v4", "-mavx512vnni", "-mavx512bf16"),
    "avx2": ("-O3", "-march=x86-64-v3"),
    "plain": ("-O3",),
    "sanitize": ("-O1", "-g", "-march=native", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
}
AVX512 = {"avx512f", "avx512_vnni", "avx512_bf16"}
NEEDED = {"amx": {*AVX512, "amx_int8", "amx_bf16"}, "avx512": AVX512, "avx2": {"avx2"}}
"""What a processor must report before a level is loaded: another one would die of an illegal instruction."""
BUILD_TIMEOUT_S = 300


def library() -> ctypes.CDLL | None:
    """The loaded kernels, built if need be; None where they cannot be had (said once)."""
    return load_level(forced_level())


def forced_level() -> str:
    """What `SHOAL_KERNELS` asks for; `native` when it asks for nothing."""
    return os.environ.get("SHOAL_KERNELS", "").lower() or "native"


@functools.cache
def load_level(level: str) -> ctypes.CDLL | None:
    """The kernels of one level; None for `off`, and where they cannot be built or run (said once).

    Raises:
        ConfigError: there is no such level.
    """
    if level == "off":
        return None
    if level not in LEVELS:
        raise ConfigError(f"SHOAL_KERNELS={level!r} is no level; use {', '.join(LEVELS)} or off, or leave it unset.")
    missing = NEEDED.get(level, set()) - set(describe_machine().instructions)
    if missing:
        say(
            f"cpu kernels {level!r} need {', '.join(sorted(missing))}, which this processor lacks; PyTorch does their work"
        )
        return None
    try:
        return _load(build(level))
    except (OSError, subprocess.SubprocessError) as error:
        say(f"cpu kernels unavailable, PyTorch does their work (slower): {_reason(error)}")
        return None


def build(level: str = "native", sources: tuple[str, ...] = SOURCES) -> Path:
    """Path of the compiled library, compiling when no cached one matches source, flags, compiler and processor.

    Args:
        sources: less than all of them, for a test that needs one kernel at many levels.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, or it failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or clang++")
    name = f"kernels-{len(sources)}-{kernels_digest(level)}.so"
    return _compiled(name, [compiler, *LEVELS[level], *FLAGS, *(str(FOLDER / source) for source in sources)])


def build_with_torch(source: str) -> Path:
    """Path of a library compiled from one file against the headers of the installed PyTorch.

    Raises:
        OSError, subprocess.SubprocessError: no compiler, no headers, or it failed.
    """
    compiler = _compiler()
    if compiler is None:
        raise FileNotFoundError("no C++ compiler found; install g++ or clang++")
    torch_dir = Path(torch.__file__).parent
    abi = f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"
    command = [compiler, "-O2", "-std=c++20", "-shared", "-fPIC", abi, "-I", str(torch_dir / "include")]
    command += [str(FOLDER / source), "-L", str(torch_dir / "lib"), "-lc10"]
    identity = ((FOLDER / source).read_text(encoding="utf-8"), command, torch.__version__, platform.machine())
    digest = hashlib.sha256(repr(identity).encode()).hexdigest()[:16]
    return _compiled(f"{Path(source).stem}-{digest}.so", command)


def _compiled(name: str, command: list[str]) -> Path:
    """Run the compiler unless the cache holds what it would make."""
    target = cache_dir() / name
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
        output = Path(scratch) / name
        subprocess.run(
            [*command, "-o", str(output)], check=True, capture_output=True, text=True, timeout=BUILD_TIMEOUT_S
        )
        output.replace(target)
    return target


def kernels_digest(level: str | None = None) -> str:
    """Digest of everything that decides the kernels' results: source, flags, compiler, processor."""
    sources = [(FOLDER / name).read_text(encoding="utf-8") for name in (*SOURCES, *HEADERS)]
    machine = describe_machine()
    flags = (*LEVELS.get(level or forced_level(), ()), *FLAGS)
    identity = (sources, flags, _compiler(), platform.machine(), machine.processor, machine.instructions)
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
