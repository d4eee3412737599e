"""How long a stored int4 model of DeepSeek-V2-Lite's shape (15.7 billion parameters, 8.9 GB) takes to open, and what it then holds.

    python benchmarks/load.py --scratch DIRECTORY [--out benchmarks/results/load.json]

The directory holds random words in the layout of `shoal convert`, with checksums. Opening is what `shoal serve` does before it
answers: verify every file, read, lay out for the kernels. It is opened twice, each time by a process of its own; the files
are in the page cache by then ("warm").
"""

import argparse
import json
import math
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from torch import Tensor

from shoal.checkpoint.atomic import sums_of
from shoal.checkpoint.hf_config import config_to_hf
from shoal.checkpoint.hf_layout import layout
from shoal.checkpoint.quantised import Scheme, quantization_config, stored_specs
from shoal.checkpoint.tensor_file import TensorSpec, write_tensors
from shoal.config import ModelConfig
from shoal.device import describe_machine
from shoal.presets import preset
from shoal.recipes.run import current_commit

FILE_BYTES = 1 << 30


def write_model(directory: Path, config: ModelConfig, scheme: Scheme) -> None:
    """A quantised directory of random codes."""
    directory.mkdir(parents=True, exist_ok=True)
    values = {**config_to_hf(config), "quantization_config": quantization_config(scheme)}
    (directory / "config.json").write_text(json.dumps(values))
    specs: dict[str, TensorSpec] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for entry in layout(config):
        for part in entry.parts:
            shape = tuple(part.shape)
            found = stored_specs(part.key, shape, scheme.format_of(part.key, shape), scheme.group)
            specs |= found
            shapes |= dict.fromkeys(found, shape)
    files: list[dict[str, TensorSpec]] = [{}]
    for key, spec in specs.items():
        if sum(each.num_bytes for each in files[-1].values()) > FILE_BYTES:
            files.append({})
        files[-1][key] = spec
    pattern = torch.randint(-(2**62), 2**62, (1 << 23,), generator=torch.Generator().manual_seed(0))
    weight_map = {}
    for number, part_specs in enumerate(files, start=1):
        name = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        write_tensors(directory / name, part_specs, lambda key: tensor_of(key, specs[key], shapes[key], pattern))
        weight_map |= dict.fromkeys(part_specs, name)
        print(name, file=sys.stderr)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    names = [path.name for path in directory.iterdir()]
    (directory / "checksums.json").write_text(json.dumps(sums_of(directory, names)))


def tensor_of(key: str, spec: TensorSpec, shape: tuple[int, ...], pattern: Tensor) -> Tensor:
    """Something plausible: random words, small scales, unit norms."""
    if key.endswith("_shape"):
        return torch.tensor(shape)
    if key.endswith("_packed"):
        count = math.prod(spec.shape)
        return pattern.view(torch.int32).repeat(-(-count // (2 * len(pattern))))[:count].view(spec.shape)
    value = 0.02 / 4.6 if key.endswith("_scale") else 1.0 if "norm" in key else 0.0
    tensor = torch.full(spec.shape, value, dtype=spec.dtype)
    return tensor.normal_(0, 0.02) if value == 0.0 and spec.dtype == torch.bfloat16 else tensor


def open_it(directory: Path) -> dict[str, float]:
    """One process that opens the model and decodes."""
    command = [sys.executable, __file__, "--scratch", str(directory), "--child"]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)


def child(directory: Path) -> None:
    started_s = time.perf_counter()
    from shoal.kernels.array_pool import pool_arrays
    from shoal.recipes.bench import bench_decode, load_packed

    pool_arrays()
    imported_s = time.perf_counter()
    bench = load_packed(str(directory), None, "auto", 640)
    result = bench_decode(bench, batch=1, context=128)
    kept = ("load_s", "tokens_per_s", "peak_rss_bytes", "weight_bytes")
    print(json.dumps({"import_s": imported_s - started_s, **{name: result[name] for name in kept}}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scratch", type=Path, required=True, help="kept: 9 GB")
    parser.add_argument("--preset", default="v2_lite")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        child(options.scratch)
        return
    if not (options.scratch / "checksums.json").is_file():
        write_model(options.scratch, preset(options.preset), Scheme(weights="int4"))
    runs = [open_it(options.scratch) for _ in range(2)]
    result = {
        "command": f"python benchmarks/load.py --scratch DIRECTORY --preset {options.preset}",
        "commit": current_commit(),
        "machine": asdict(describe_machine()),
        "stored_bytes": sum(path.stat().st_size for path in options.scratch.glob("*.safetensors")),
        "runs": runs,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(result))


if __name__ == "__main__":
    main()
