"""What this machine can do: device, matrix-product precision, instructions, memory.

The CPU path multiplies in bfloat16 where the processor has instructions for it (AMX or AVX-512 BF16) and keeps float32
elsewhere; float16 is never used on a CPU, where nothing accelerates it.
"""

import os
import platform
import resource
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Facts about the machine, as printed by `shoal doctor` and written into every result."""

    device: str
    processor: str
    num_cores: int
    memory_bytes: int
    instructions: tuple[str, ...]
    torch_version: str


def pick_device(wanted: str | None = None) -> torch.device:
    """`cuda` when there is one, else `cpu`; `wanted` overrides.

    Raises:
        ConfigError: `wanted` is no device, or one that this machine does not have.
    """
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if wanted is None:
        return torch.device("cuda" if num_gpus else "cpu")
    allowed = ["cpu", *(["cuda"] if num_gpus else []), *(f"cuda:{index}" for index in range(num_gpus))]
    if wanted not in allowed:
        raise ConfigError(f"device {wanted!r} is not to be had on this machine; use {' or '.join(allowed)}.")
    return torch.device(wanted)


def describe_machine() -> Machine:
    """Read the machine's facts; what cannot be read is left empty, never guessed."""
    flags, name = _cpu_info()
    known = ("amx_bf16", "amx_int8", "avx512_bf16", "avx512_vnni", "avx512f", "avx2")
    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "cpu"
    return Machine(
        device=device,
        processor=name,
        num_cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory_bytes=_memory_bytes(),
        instructions=tuple(flag for flag in known if flag in flags),
        torch_version=torch.__version__,
    )


def fast_dtype(device: torch.device) -> torch.dtype:
    """The dtype for large matrix products: bfloat16 where hardware multiplies it, else float32."""
    if device.type == "cuda":
        return torch.bfloat16
    flags, _ = _cpu_info()
    return torch.bfloat16 if flags & {"amx_bf16", "avx512_bf16"} else torch.float32


def peak_memory_bytes() -> int:
    """Highest resident memory of this process so far."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _cpu_info() -> tuple[set[str], str]:
    path = Path("/proc/cpuinfo")
    if not path.exists():
        return set(), platform.processor()
    text = path.read_text(encoding="utf-8", errors="replace")
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in text.splitlines())}
    return set(fields.get("flags", "").split()), fields.get("model name", platform.processor())


def _memory_bytes(limit_file: Path = Path("/sys/fs/cgroup/memory.max")) -> int:
    """Memory this process may use: the machine's, or less where its container has a limit."""
    try:
        physical_bytes = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0
    try:
        return min(physical_bytes, int(limit_file.read_text()))
    except (OSError, ValueError):  # no container, or the word "max"
        return physical_bytes
