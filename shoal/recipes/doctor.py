"""What this machine can do and what is missing, for `shoal doctor`."""

import importlib.util
import shutil
from typing import Any

from shoal import __version__
from shoal.device import describe_machine, fast_dtype, pick_device
from shoal.kernels.cpu.build import library
from shoal.planner.energy import find_counters

OPTIONAL = {
    "pyarrow": "Parquet corpora",
    "transformers": "parity tests",
    "playwright": "browser tests",
}


def examine() -> dict[str, Any]:
    """Facts about the machine and its software; what is missing says what it would be for."""
    machine = describe_machine()
    missing = [f"{name} ({use})" for name, use in OPTIONAL.items() if importlib.util.find_spec(name) is None]
    return {
        "shoal": __version__,
        "torch": machine.torch_version,
        "device": machine.device,
        "processor": machine.processor,
        "cores": machine.num_cores,
        "memory_gib": round(machine.memory_bytes / 2**30, 1),
        "instructions": " ".join(machine.instructions) or "none known",
        "matrix_products_in": str(fast_dtype(pick_device())).removeprefix("torch."),
        "cpu_kernels": "built" if library() is not None else "not built: PyTorch does their work",
        "compiler": shutil.which("g++") or shutil.which("clang++") or "none: install g++ for the CPU kernels",
        "energy_counters": " ".join(counter.name for counter in find_counters())
        or "none: joules are modelled, and said to be",
        "chromium": shutil.which("chromium") or "none: browser tests are skipped",
        "missing_optional": ", ".join(missing) or "nothing",
    }
