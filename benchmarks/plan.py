"""How well the planner foretells this machine: calibrate, run the quick demo, hold one against the other; and how fast it answers.

    python benchmarks/plan.py --output benchmarks/results/plan.json

Three processes, one after the other: the calibration (about a minute), the quick demo (about three), decoding with its model.
The prediction is made from the calibration and the demo's configuration alone. Keep the machine free meanwhile.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shoal.checkpoint.hf_format import load_config
from shoal.device import describe_machine
from shoal.planner.calibration import calibration_from_json
from shoal.planner.plan.charts import charts
from shoal.planner.plan.question import ask
from shoal.planner.plan.sensitivity import sensitivity
from shoal.planner.plan.settings import parse_settings
from shoal.planner.plan.whole import make_plan
from shoal.planner.published_models import RIVALS, rival
from shoal.presets import PRESETS
from shoal.recipes.planned_run import plan_run
from shoal.recipes.run import current_commit, write_json

CONTEXT = 128


def main() -> None:
    """Measure, compare, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--only-speed", action="store_true", help="only how fast plans answer")
    arguments = parser.parse_args()
    result: dict[str, Any] = {
        "command": f"python benchmarks/plan.py --output {arguments.output}",
        "machine": asdict(describe_machine()),
        "commit": current_commit(),
        "answers": answer_times(),
    }
    if not arguments.only_speed:
        with tempfile.TemporaryDirectory(prefix="shoal-plan-") as folder:
            result |= prediction(Path(folder))
    write_json(arguments.output, result)
    sys.stdout.write(
        json.dumps({key: result[key] for key in ("answers", "prediction", "decode") if key in result}, indent=1) + "\n"
    )


def answer_times() -> dict[str, Any]:
    """Seconds of a plan, its charts and a sensitivity, the median of five, for the slowest model."""
    names = [*RIVALS, *(name for name in PRESETS if name not in RIVALS)]
    given = parse_settings(["tokens=14.8T"])
    times: dict[str, dict[str, float]] = {}
    for name in names:
        plan = make_plan(ask(rival(name), None, given))
        times[name] = {
            "plan_s": _median(lambda name=name: make_plan(ask(rival(name), None, given))),
            "charts_s": _median(lambda plan=plan: charts(plan)),
            "sensitivity_s": _median(lambda plan=plan: sensitivity(plan)),
        }
    slowest = {key: max(times, key=lambda name: times[name][key]) for key in ("plan_s", "charts_s", "sensitivity_s")}
    return {
        "slowest": {key: {"model": name, "seconds": times[name][key]} for key, name in slowest.items()},
        "all": times,
    }


def prediction(folder: Path) -> dict[str, Any]:
    """Calibration, demo and decoding, and what the first said of the other two."""
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder / "cache")}
    cached = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "shoal"
    (folder / "cache").mkdir()
    if cached.is_dir():  # compiled kernels: building them again is no part of a measurement
        (folder / "cache" / "shoal").mkdir()
        for kernel in cached.glob("kernels-*.so"):
            (folder / "cache" / "shoal" / kernel.name).symlink_to(kernel)
    measured = _shoal(environment, "plan", "--calibrate", "--json")
    calibration = calibration_from_json(measured)
    _shoal(environment, "demo", "--quick", "--no-serve", "--run-dir", str(folder / "demo"), "--json")
    run = plan_run(folder / "demo", calibration)
    decode = _shoal(environment, "bench", "decode", str(folder / "demo"), "--context", str(CONTEXT), "--json")
    model = load_config(folder / "demo" / "model").replace(num_nextn_predict_layers=0)
    foretold = calibration.decode_tokens_per_s(model, CONTEXT)
    return {
        "calibration": measured,
        "prediction": run.to_json(),
        "decode": {
            "predicted_tokens_per_s": foretold,
            "measured_tokens_per_s": decode["tokens_per_s"],
            "error_fraction": foretold / decode["tokens_per_s"] - 1,
        },
    }


def _shoal(environment: dict[str, str], *arguments: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "shoal", *arguments], env=environment, stdout=subprocess.PIPE, text=True, check=True
    )
    found: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def _median(work: Any) -> float:
    times = []
    for _ in range(5):
        started_s = time.perf_counter()
        work()
        times.append(time.perf_counter() - started_s)
    return statistics.median(times)


if __name__ == "__main__":
    main()
