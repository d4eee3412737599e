"""Verbs of reinforcement learning: `shoal rl`, `shoal task`."""

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, app

task_app = typer.Typer(help="Look at tasks before a model learns to exploit them.", no_args_is_help=True)
app.add_typer(task_app, name="task")

DifficultyOption = Annotated[int | None, typer.Option(help="Of a built-in family; default the family's own.")]
WorkersOption = Annotated[
    int | None, typer.Option(help="Verifier processes for tasks that are not built in; default 2.")
]
TimeoutOption = Annotated[float | None, typer.Option(help="Seconds a verifier may take for one answer; default 2.")]


@app.command()
def rl(
    task: Annotated[
        str | None,
        typer.Option(help="A family's name, my_task.py, jsonl:FILE, math:FILE or gym:NAME; default the demo."),
    ] = None,
    model: Annotated[
        Path | None, typer.Option(help="The base: a model or run directory; default: made from scratch.")
    ] = None,
    algorithm: Annotated[
        str, typer.Option(help="grpo, grpo-r1, dr-grpo, dapo, gspo, rloo or v3.2: published choices, sizes fitted.")
    ] = "grpo",
    published_sizes: Annotated[
        bool, typer.Option("--published-sizes", help="Batch, rate and length from the source too: for large models.")
    ] = False,
    difficulty: DifficultyOption = None,
    steps: Annotated[int, typer.Option(help="Rollouts to learn from.")] = 60,
    prompts: Annotated[int | None, typer.Option(help="Problems a step.")] = None,
    group_size: Annotated[int | None, typer.Option(help="Answers to each problem.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Longest answer; default 128, datasets 256.")] = None,
    learning_rate: Annotated[float | None, typer.Option(help="Default: by the model's size.")] = None,
    staleness: Annotated[int, typer.Option(help="Sample in the background with weights so many steps old; 0: no.")] = 0,
    rollouts: Annotated[
        str, typer.Option(help="local; ray: worker processes, on a cluster too, same tokens; vllm:URL: a vLLM server.")
    ] = "local",
    num_workers: Annotated[int, typer.Option(help="With --rollouts ray.")] = 2,
    base_steps: Annotated[
        int | None, typer.Option(help="Training steps of a base made from scratch; default 400.")
    ] = None,
    worked_share: Annotated[
        float | None, typer.Option(help="Share of the base's problems that show their work; default 0.2, datasets 1.")
    ] = None,
    instruction: Annotated[
        str, typer.Option(help="Put before every question, to tell a foreign base of the format.")
    ] = "",
    held_out: Annotated[int, typer.Option(help="Held-out problems to measure on.")] = 64,
    samples: Annotated[int, typer.Option(help="Answers to each held-out problem: pass@1 up to pass@this.")] = 64,
    workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    skip_reward_errors: Annotated[
        bool, typer.Option("--skip-reward-errors", help="Leave out what a broken reward returns, count it, go on.")
    ] = False,
    seed: Annotated[int, typer.Option(help="The same seed repeats the run bit for bit on this machine.")] = 0,
    controls: Annotated[
        bool,
        typer.Option("--controls", help="Demo: also a coin, format alone, right answers alone, a base without work."),
    ] = False,
    quick: Annotated[bool, typer.Option(help="Demo: the recipe that demo --quick runs.")] = False,
    study: Annotated[
        list[str] | None,
        typer.Option(help="The R1-Zero figure of a family, three seeds and all controls; may be repeated."),
    ] = None,
    run_dir: Annotated[Path | None, typer.Option(help="The same directory resumes; default runs/NAME-OF-TASK.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Teach a model a task by reward alone: yours, a dataset, or a built-in one.

    With --task, torchrun --nproc-per-node N -m shoal rl ... samples and learns on N processes, with the same outcome.

    Example: shoal rl --task my_task.py --algorithm dapo
    """
    from shoal.log import print_json, say
    from shoal.rl.ranks import torchrun_ranks, torchrun_size

    if task is None and torchrun_size() > 1:
        raise typer.BadParameter("torchrun needs --task: the demo and the studies run in one process.")
    if study:
        from shoal.recipes.r1_zero import describe_study, run_study

        summary = run_study(run_dir or Path("runs/r1-zero"), study)
        say(describe_study(summary))
        if json_output:
            print_json(summary)
        return
    if task is None:
        from shoal.recipes.demo import demo_config, run_demo

        demo = run_demo(run_dir or Path("runs/demo"), demo_config(quick=quick), controls=controls)
        say(f"report: {demo.report}")
        if json_output:
            print_json({key: str(value) for key, value in asdict(demo).items()})
        return
    if controls or quick:
        raise typer.BadParameter("--controls and --quick belong to the demo; with --task leave them out.")
    from shoal.recipes.reinforce import reinforce_config, run_reinforce

    config = reinforce_config(
        task,
        model=model,
        algorithm=algorithm,
        published_sizes=published_sizes,
        difficulty=difficulty,
        steps=steps,
        prompts_per_step=prompts,
        group_size=group_size,
        max_response_tokens=max_tokens,
        learning_rate=learning_rate,
        staleness=staleness,
        rollouts=rollouts,
        num_workers=num_workers,
        base_steps=base_steps,
        base_worked_share=worked_share,
        instruction=instruction,
        held_out_problems=held_out,
        samples_per_problem=samples,
        workers=workers,
        timeout_s=timeout,
        on_reward_error="skip" if skip_reward_errors else "stop",
        seed=seed,
    )
    with torchrun_ranks() as ranks:
        if ranks is not None and ranks.rank > 0:
            from shoal.rl.sharded_learner import follow

            follow(ranks)
            return
        result = run_reinforce(run_dir or Path("runs") / f"rl-{task_slug(task)}", config, ranks)
    say(f"before: {result.before.describe()}")
    say(f"after:  {result.after.describe()}")
    say(f"report: {result.report}")
    if json_output:
        values = {"before": result.before.to_dict(), "after": result.after.to_dict()}
        print_json(
            {**values, "run_dir": str(result.run_dir), "model": str(result.model_dir), "report": str(result.report)}
        )


@task_app.command()
def check(
    task: Annotated[str, typer.Argument(help="A family's name, my_task.py, jsonl:FILE, math:FILE or gym:NAME.")],
    difficulty: DifficultyOption = None,
    problems: Annotated[int, typer.Option(help="How many problems to try.")] = 100,
    workers: WorkersOption = None,
    timeout: TimeoutOption = None,
    json_output: JsonOption = False,
) -> None:
    """Check a task: right answers score 1, tricks score 0, guessing does not pay, the verifier is quick.

    Example: shoal task check my_task.py
    """
    from shoal.log import print_json, say
    from shoal.rl.task_check import check_task
    from shoal.rl.verifier_pool import PoolConfig

    limits = {"workers": workers, "timeout_s": timeout}
    pool = PoolConfig(**{name: value for name, value in limits.items() if value is not None})  # type: ignore[arg-type]
    report = check_task(task, difficulty=difficulty, count=problems, pool=pool)
    say(report.table())
    if json_output:
        print_json(report.to_dict())
    if not report.passed:
        raise typer.Exit(1)


def task_slug(task: str) -> str:
    """`jsonl:data/gsm8k.jsonl` -> `gsm8k`: a task's name as part of a directory's."""
    stem = Path(task.rpartition(":")[2]).stem
    return "".join(letter if letter.isalnum() or letter in "-_" else "-" for letter in stem) or "task"
