"""Peak memory and time of converting a checkpoint of DeepSeek-V2-Lite's shape (15.7 billion parameters, 31 GB of bfloat16).

The source is a sparse file: it has the size and layout of the real one and reads as zeros, so that it takes no disk. What
is streamed, allocated and written does not depend on the numbers.

    python benchmarks/convert_memory.py --scratch DIRECTORY --weights int4 --out benchmarks/results/convert_memory.json
"""

import argparse
import json
import resource
import shutil
import struct
import time
from pathlib import Path

import torch

from shoal.checkpoint.convert import convert
from shoal.checkpoint.hf_config import config_to_hf
from shoal.checkpoint.hf_layout import layout
from shoal.checkpoint.quantised import Scheme
from shoal.config import ModelConfig
from shoal.presets import preset
from shoal.recipes.run import current_commit


def sparse_model(directory: Path, config: ModelConfig) -> int:
    """A model directory whose weights are holes; returns its size in bytes."""
    directory.mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(config_to_hf(config)))
    header, offset = {}, 0
    for entry in layout(config):
        for part in entry.parts:
            size = torch.Size(part.shape).numel() * (4 if entry.is_float32 else 2)
            header[part.key] = {
                "dtype": "F32" if entry.is_float32 else "BF16",
                "shape": list(part.shape),
                "data_offsets": [offset, offset + size],
            }
            offset += size
    text = json.dumps(header).encode()
    with (directory / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--scratch", type=Path, required=True)
    parser.add_argument("--weights", default="int4")
    parser.add_argument("--preset", default="v2_lite")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    config = preset(options.preset)
    source, target = options.scratch / "source", options.scratch / "target"
    try:
        size = sparse_model(source, config)
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        started_s, cpu_s = time.perf_counter(), time.process_time()
        report = convert(
            source,
            target,
            config,
            Scheme(weights=options.weights),
            command="",
            done=lambda unit: print(unit, round(time.perf_counter() - started_s), flush=True),
        )
        result = {
            "commit": current_commit(),
            "command": f"python benchmarks/convert_memory.py --preset {options.preset} --weights {options.weights}",
            "source_bytes": size,
            "target_bytes": sum(unit["bytes"] for unit in report["units"].values()),
            "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "peak_rss_before_bytes": before,
            "wall_s": time.perf_counter() - started_s,
            "cpu_s": time.process_time() - cpu_s,
        }
        options.out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(result))
    finally:
        shutil.rmtree(options.scratch, ignore_errors=True)


if __name__ == "__main__":
    main()
