"""A run's report: one page that opens offline, and the same figures as JSON.

The report only reads what a run left behind (config, stages, metrics, evaluation), so it can be written at any time, also
for a run that is still going or was stopped; what is missing is said to be missing.
"""

import html
import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shoal.config import ModelConfig
from shoal.errors import DataError
from shoal.log import duration, read_metrics
from shoal.planner.cost import cpu_assumptions, training_cost
from shoal.planner.counts import (
    cache_bytes_per_token,
    parameter_counts,
    training_flops_per_token,
)
from shoal.report.figures import Series, bar_chart, heat_map, line_chart
from shoal.report.pipeline import pipeline_section

STYLE = """
:root{--paper:#fbfaf7;--ink:#1d2327;--quiet:#626d73;--line:#dedad2;--card:#fff;--a:#0f5f73;--b:#b4541a;--c:#6b7f2a;--band:#0f5f7322}
@media(prefers-color-scheme:dark){:root{--paper:#12171a;--ink:#e6e4de;--quiet:#98a2a7;--line:#2b3338;--card:#1a2125;--a:#6cc3d5;--b:#eda06a;--c:#b7cc74;--band:#6cc3d52b}}
*{box-sizing:border-box}body{margin:0 auto;padding:2rem 1.2rem 4rem;max-width:62rem;background:var(--paper);color:var(--ink);font:16px/1.55 system-ui,sans-serif}
h1,h2{font-family:"Iowan Old Style",Palatino,Georgia,serif;font-weight:600}h1{margin:0;font-size:2rem}h2{margin:2.2rem 0 .6rem;font-size:1.35rem}
p{max-width:44rem}.quiet,figcaption{color:var(--quiet);font-size:.88rem}.tiles{display:grid;gap:.8rem;grid-template-columns:repeat(auto-fit,minmax(9.5rem,1fr));margin:1.4rem 0}
.tile{background:var(--card);border:1px solid var(--line);border-radius:.7rem;padding:.8rem 1rem}.tile b{display:block;font:600 1.5rem/1.2 Georgia,serif;font-variant-numeric:tabular-nums}
.plots{display:grid;gap:1.2rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr))}figure{margin:0}svg{width:100%;max-width:30rem;height:auto;display:block}
svg text{fill:var(--quiet);font:12px system-ui,sans-serif}svg .title{fill:var(--ink);font-weight:600;font-size:13px}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;width:100%;font-size:.93rem}th,td{text-align:right;padding:.3rem .6rem;border-bottom:1px solid var(--line)}
th:first-child,td:first-child{text-align:left}.scroll{overflow-x:auto}pre{white-space:pre-wrap;overflow-wrap:anywhere;background:var(--card);border:1px solid var(--line);border-radius:.6rem;padding:.7rem 1rem;font-size:.84rem}
"""


@dataclass(frozen=True)
class ReportPaths:
    """The two files written."""

    html: Path
    json: Path


def write_report(run_dir: Path) -> ReportPaths:
    """Write `report.html` and `report.json` from what the run left behind.

    Raises:
        DataError: the directory is no run.
    """
    run = RunRecord.read(run_dir)
    summary = summarise(run)
    paths = ReportPaths(run_dir / "report.html", run_dir / "report.json")
    _write(paths.json, json.dumps(summary, indent=1))
    _write(paths.html, _page(run, summary))
    return paths


@dataclass(frozen=True)
class RunRecord:
    """Everything a run directory says."""

    name: str
    config: dict[str, Any]
    stages: dict[str, Any]
    metrics: list[dict[str, Any]]
    evaluation: dict[str, Any]
    pipeline: dict[str, Any]
    """Models and findings of an R1 pipeline; empty for other runs."""

    @classmethod
    def read(cls, run_dir: Path) -> "RunRecord":
        """Read a run directory; only config and metrics must be there."""
        if not (run_dir / "config.json").is_file() or not (run_dir / "metrics.jsonl").is_file():
            raise DataError(
                f"{run_dir} is no run directory (config.json and metrics.jsonl); name one, such as runs/demo."
            )
        metrics = read_metrics(run_dir / "metrics.jsonl")
        if not metrics:
            raise DataError(f"{run_dir}/metrics.jsonl holds no lines yet; let the run take a few steps first.")
        return cls(
            name=run_dir.resolve().name,
            config=_json(run_dir / "config.json"),
            stages=_json(run_dir / "stages.json"),
            metrics=metrics,
            evaluation=_json(run_dir / "evaluation.json"),
            pipeline=_json(run_dir / "r1.json"),
        )

    def series(self, stage: str, key: str) -> list[tuple[float, float]]:
        """(step, value) of one metric."""
        return [
            (line["step"], line[key]) for line in self.metrics if line["stage"] == stage and line.get(key) is not None
        ]

    def stage_names(self, prefix: str) -> list[str]:
        """Stages with metrics whose name begins so, in order of appearance."""
        return list(dict.fromkeys(line["stage"] for line in self.metrics if line["stage"].startswith(prefix)))

    @property
    def seed_stages(self) -> list[str]:
        return [name for name in self.stage_names("rl-") if name.removeprefix("rl-").isdigit()]

    @property
    def pretrain_stages(self) -> list[str]:
        found = self.stage_names("pretrain")
        return found or [name for name in ("moe", "dense", "gqa") if name in self.stages]

    @property
    def model(self) -> ModelConfig:
        return ModelConfig.from_dict(self.config["model"])


def summarise(run: RunRecord) -> dict[str, Any]:
    """The figures of the report, as JSON values; absent ones are left out."""
    model = run.model
    counts = parameter_counts(model)
    tokens = sum(line.get("tokens") or 0 for stage in run.pretrain_stages for line in _last(run, stage, "tokens"))
    wall_s = sum(stage.get("wall_s", 0.0) for stage in run.stages.values())
    joules = sum(stage.get("energy_j") or 0.0 for stage in run.stages.values())
    kinds = sorted({str(stage.get("energy_kind")) for stage in run.stages.values()})
    cores = int(run.config.get("machine", {}).get("num_cores") or 1)
    row_tokens = int(run.config.get("row_tokens") or 128)
    summary: dict[str, Any] = {
        "recipe": run.config.get("recipe"),
        "commit": run.config.get("commit"),
        "wall_s": wall_s,
        "parameters": counts.total,
        "active_parameters": counts.active,
        "kv_bytes_per_token": cache_bytes_per_token(model, 4),
        "kv_bytes_per_token_mha": cache_bytes_per_token(_baseline(model, model.num_attention_heads), 4),
        "kv_bytes_per_token_gqa": cache_bytes_per_token(_baseline(model, max(1, model.num_attention_heads // 2)), 4),
        "maxvio": _final(run, "max_vio_global"),
        "bits_per_byte": _final(run, "eval_bits_per_byte"),
        "mtp_acceptance": _final(run, "eval_mtp_acceptance"),
        "pretraining_tokens": tokens,
        "flops": tokens * training_flops_per_token(model, row_tokens),
        "joules": joules,
        "joules_kind": ", ".join(kinds),
        "usd": training_cost(wall_s, cpu_assumptions(cores)).rent_usd,
    }
    if run.evaluation:
        summary["rl"] = _rl_summary(run.evaluation)
    return summary


def _baseline(model: ModelConfig, key_value_heads: int) -> ModelConfig:
    """The same shape with ordinary heads of `hidden_size / heads`: the baseline that Shoal itself would train."""
    return model.replace(attention="gqa", num_key_value_heads=key_value_heads)


def _rl_summary(evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Before and after over the seeds, and the gain split into choosing to work and working better."""
    before, after = evaluation["before"], evaluation["after"]
    largest = str(max(int(k) for k in before["pass_at"]))
    worked_before, worked_after = before["worked_fraction"], _mean([one["worked_fraction"] for one in after])
    right = before["accuracy_worked"] or 0.0
    choice = (worked_after - worked_before) * (right - (before["accuracy_direct"] or 0.0))
    total = _mean([one["pass_at"]["1"] for one in after]) - before["pass_at"]["1"]
    return {
        "family": evaluation["family"],
        "pass_at_1_before": before["pass_at"]["1"],
        "pass_at_1_after": [one["pass_at"]["1"] for one in after],
        f"pass_at_{largest}_before": before["pass_at"][largest],
        f"pass_at_{largest}_after": [one["pass_at"][largest] for one in after],
        "length_before": before["response_tokens"],
        "length_after": [one["response_tokens"] for one in after],
        "mtp_acceptance_before": before.get("mtp_acceptance"),
        "mtp_acceptance_after": [one.get("mtp_acceptance") for one in after],
        "seeds": [one["seed"] for one in after],
        "gain_mode_choice": choice,
        "gain_execution": total - choice,
    }


def _page(run: RunRecord, summary: Mapping[str, Any]) -> str:
    parts = [f"<h1>{_text(run.name)}</h1><p class=quiet>{_text(_origin(run))}</p>", _tiles(summary)]
    if "rl" in summary:
        parts.append(_rl_section(run, summary["rl"]))
    if run.pipeline:
        parts.append(pipeline_section(run.pipeline))
    parts += [
        _pretraining_section(run),
        _balance_section(run),
        _memory_section(summary),
        _cost_section(run, summary),
        _samples(run),
    ]
    head = f"<meta charset=utf-8><meta name=viewport content='width=device-width,initial-scale=1'><title>{_text(run.name)} - Shoal</title>"
    return f"<!doctype html><html lang=en><head>{head}<style>{STYLE}</style></head><body>{''.join(parts)}</body></html>"


def _tiles(summary: Mapping[str, Any]) -> str:
    tiles = []
    rl = summary.get("rl")
    if rl:
        tiles.append(
            (
                f"{rl['pass_at_1_before']:.0%} → {_mean(rl['pass_at_1_after']):.0%}",
                "pass@1 on held-out problems, before and after",
            )
        )
        tiles.append((f"{rl['length_before']:.0f} → {_mean(rl['length_after']):.0f}", "tokens per answer"))
    if summary["bits_per_byte"] is not None:
        tiles.append((f"{summary['bits_per_byte']:.3f}", "bits per byte, held out"))
    if summary["maxvio"] is not None:
        tiles.append((f"{summary['maxvio']:.2f}", "MaxVio over the whole run (0 is perfect balance)"))
    ratio = summary["kv_bytes_per_token_mha"] / summary["kv_bytes_per_token"]
    tiles.append((f"{ratio:.1f}x", "smaller cache per token than multi-head attention"))
    tiles.append((duration(summary["wall_s"]), "from nothing to this page"))
    tiles.append((f"{summary['joules'] / 3.6e6:.3f} kWh", f"electricity, {summary['joules_kind']}"))
    return (
        "<div class=tiles>"
        + "".join(f"<div class=tile><b>{_text(a)}</b><span class=quiet>{_text(b)}</span></div>" for a, b in tiles)
        + "</div>"
    )


def _rl_section(run: RunRecord, rl: Mapping[str, Any]) -> str:
    seeds = [Series(f"seed {name.removeprefix('rl-')}", run.series(name, "accuracy")) for name in run.seed_stages]
    lengths = [
        Series(f"seed {name.removeprefix('rl-')}", run.series(name, "response_tokens")) for name in run.seed_stages
    ]
    worked = [
        Series(f"seed {name.removeprefix('rl-')}", run.series(name, "worked_fraction")) for name in run.seed_stages
    ]
    entropy = [Series(f"seed {name.removeprefix('rl-')}", run.series(name, "entropy")) for name in run.seed_stages]
    before, after = run.evaluation["before"], run.evaluation["after"]
    bars = [
        (f"pass@{k}", [before["pass_at"][k], _mean([one["pass_at"][k] for one in after])]) for k in before["pass_at"]
    ]
    total = rl["gain_mode_choice"] + rl["gain_execution"]
    text = (
        f"Reward alone took pass@1 on held-out {rl['family']} problems from {rl['pass_at_1_before']:.1%} to "
        f"{_mean(rl['pass_at_1_after']):.1%} (mean of {len(rl['seeds'])} seeds). Of the {100 * total:.0f} points, "
        f"{100 * rl['gain_mode_choice']:.0f} are choosing to show the work more often (valued at the base's own accuracy when "
        f"it does), and {round(100 * rl['gain_execution'])} are the rest: working better. Reinforcement learning here amplifies a rare way of "
        "working that the base already had; it does not create reasoning from nothing."
    )
    plots = [
        line_chart("Accuracy of sampled answers", "step", "share right", seeds, band=True),
        line_chart("Length of answers", "step", "tokens", lengths, band=True),
        line_chart("Answers that show their work", "step", "share", worked, band=True),
        line_chart("Entropy of the policy", "step", "nats per token", entropy, band=True),
        bar_chart("Held-out pass@k", "share", bars, ["before", "after"]),
    ]
    return f"<h2>What reinforcement learning did</h2><p>{_text(text)}</p>{_plots(plots)}{_skill_table(run)}"


def _skill_table(run: RunRecord) -> str:
    rows = [("base", run.evaluation["before"])] + [(f"seed {one['seed']}", one) for one in run.evaluation["after"]]
    if second := run.evaluation.get("second_question"):
        rows.append((f"seed {run.evaluation['after'][0]['seed']}, as a second question", second))
    for control in run.evaluation.get("controls", []):
        rows += [
            (f"control: {control['name']}, before", control["before"]),
            (f"control: {control['name']}, after", control),
        ]
    cells = []
    for name, skill in rows:
        low, high = skill["pass_at_1_interval"]
        values = [
            f"{skill['pass_at']['1']:.1%}",
            f"{low:.1%} to {high:.1%}",
            f"{skill['response_tokens']:.1f}",
            f"{skill['worked_fraction']:.0%}",
            _share(skill["accuracy_worked"]),
            _share(skill["accuracy_direct"]),
            _share(skill.get("mtp_acceptance")),
        ]
        cells.append(f"<tr><td>{_text(name)}</td>" + "".join(f"<td>{value}</td>" for value in values) + "</tr>")
    heads = (
        "",
        "pass@1",
        "95 % interval",
        "tokens",
        "show work",
        "right when worked",
        "right when direct",
        "drafts accepted",
    )
    return (
        "<div class=scroll><table><tr>"
        + "".join(f"<th>{head}</th>" for head in heads)
        + "</tr>"
        + "".join(cells)
        + "</table></div>"
    )


def _pretraining_section(run: RunRecord) -> str:
    stages = run.pretrain_stages
    plots = [
        line_chart(
            "Training loss", "step", "nats per token", [Series(name, run.series(name, "loss")) for name in stages]
        ),
        line_chart(
            "Held-out loss",
            "step",
            "bits per byte",
            [Series(name, run.series(name, "eval_bits_per_byte")) for name in stages],
        ),
        line_chart(
            "Draft acceptance of multi-token prediction",
            "step",
            "share",
            [Series(name, run.series(name, "mtp_acceptance")) for name in stages],
        ),
        line_chart(
            "Speed", "step", "tokens per second", [Series(name, run.series(name, "tokens_per_s")) for name in stages]
        ),
    ]
    return f"<h2>Pretraining</h2>{_plots(plots)}"


def _balance_section(run: RunRecord) -> str:
    stages = run.pretrain_stages
    loads = [line["expert_load"] for stage in stages for line in _last(run, stage, "expert_load")]
    violation = [Series(name, run.series(name, "max_vio")) for name in stages]
    plots = [line_chart("MaxVio per batch, worst layer", "step", "(max - mean) / mean", violation)]
    if loads:
        plots.append(heat_map("Share of tokens per layer and expert, whole run", loads[0]))
    return f"<h2>Expert load</h2>{_plots(plots)}" if any(plots) else ""


def _memory_section(summary: Mapping[str, Any]) -> str:
    bars = [
        ("latent (MLA)", "kv_bytes_per_token"),
        ("grouped (GQA)", "kv_bytes_per_token_gqa"),
        ("multi-head (MHA)", "kv_bytes_per_token_mha"),
    ]
    chart = bar_chart(
        "Cache per token, float32, same shape",
        "bytes",
        [(name, [float(summary[key])]) for name, key in bars],
        ["bytes"],
    )
    return f"<h2>Memory of the past</h2>{_plots([chart])}"


def _cost_section(run: RunRecord, summary: Mapping[str, Any]) -> str:
    rows = [
        (name, duration(stage.get("wall_s", 0.0)), f"{(stage.get('energy_j') or 0.0) / 1000:.1f} kJ")
        for name, stage in run.stages.items()
    ]
    table = "".join(f"<tr><td>{_text(a)}</td><td>{_text(b)}</td><td>{_text(c)}</td></tr>" for a, b, c in rows)
    text = (
        f"{summary['parameters']:,} parameters, {summary['active_parameters']:,} active per token; {summary['pretraining_tokens']:,} "
        f"pretraining tokens; {summary['flops']:.3g} floating-point operations (6 x active + 3 x causal attention per token). "
        f"Money: {summary['usd']:.4f} USD at the planner's default core-hour price. Joules are {summary['joules_kind']}: where the machine "
        "has no counter they are busy core seconds times stated watts (`shoal/planner/energy.py` names the source)."
    )
    return f"<h2>What it cost</h2><p>{_text(text)}</p><div class=scroll><table><tr><th>stage</th><th>time</th><th>energy</th></tr>{table}</table></div>"


def _samples(run: RunRecord) -> str:
    parts = []
    for sample in run.evaluation.get("samples", [])[:4]:
        parts.append(
            f"<p><b>{_text(sample['prompt'])}</b> <span class=quiet>right: {_text(sample['answer'])}</span></p><div class=plots>"
        )
        parts += [
            f"<figure><figcaption>{name}</figcaption><pre>{_text(sample[name])}</pre></figure>"
            for name in ("before", "after")
        ]
        parts.append("</div>")
    return "<h2>Samples</h2>" + "".join(parts) if parts else ""


def _plots(plots: Sequence[str]) -> str:
    return "<div class=plots>" + "".join(f"<figure>{plot}</figure>" for plot in plots if plot) + "</div>"


def _origin(run: RunRecord) -> str:
    machine = run.config.get("machine", {})
    return (
        f"recipe {run.config.get('recipe')}, seed {run.config.get('seed')}, commit {run.config.get('commit') or 'unknown'}, "
        f"{machine.get('processor')}, {machine.get('num_cores')} cores, torch {machine.get('torch_version')}"
    )


def _last(run: RunRecord, stage: str, key: str) -> list[dict[str, Any]]:
    return [line for line in run.metrics if line["stage"] == stage and line.get(key) is not None][-1:]


def _final(run: RunRecord, key: str) -> float | None:
    found = [line[key] for stage in run.pretrain_stages[:1] for line in _last(run, stage, key)]
    return found[0] if found else None


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _share(value: float | None) -> str:
    return "none seen" if value is None else f"{value:.0%}"


def _text(value: object) -> str:
    return html.escape(str(value))


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is damaged ({error}); run the recipe again to write it anew.") from error
    return values if isinstance(values, dict) else {}


def _write(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    with temporary.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
