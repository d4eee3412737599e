"""The command line: one verb per room. It parses, calls and prints; nothing is decided here.

Results for programs go to standard output as one JSON object (`--json`), everything for people to standard error.
Users' mistakes end with one message and exit code 2; a traceback is a bug of ours.
"""

import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal import __version__
from shoal.errors import ShoalError

app = typer.Typer(
    help="The DeepSeek V3/R1 recipe, whole: train, reason, serve, chat, and see what it cost.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)

ModelArgument = Annotated[
    Path | None,
    typer.Argument(help="Model directory or run directory; default: the newest run under runs/."),
]
JsonOption = Annotated[bool, typer.Option("--json", help="Print one JSON object on standard output.")]


def main() -> None:
    """Entry point of the `shoal` command."""
    prepare_memory()
    try:
        app()
    except ShoalError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        sys.stderr.write("\nstopped; the same command goes on from the last checkpoint.\n")
        raise SystemExit(130) from None


@app.command()
def demo(
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/demo"
    ),
    quick: Annotated[bool, typer.Option(help="Smaller everywhere, same stages: at most 3 minutes.")] = False,
    serve_after: Annotated[bool, typer.Option("--serve/--no-serve", help="Serve the chat page at the end.")] = True,
    port: Annotated[int, typer.Option(help="Port of the chat page.")] = 8000,
    json_output: JsonOption = False,
) -> None:
    """Train, reason, report and chat: the whole recipe on this machine.

    Example: shoal demo --quick --no-serve
    """
    from shoal.log import print_json, say
    from shoal.recipes.demo import demo_config, run_demo

    result = run_demo(run_dir, demo_config(quick=quick))
    say(f"report: {result.report}")
    if json_output:
        print_json({key: str(value) for key, value in asdict(result).items()})
    if serve_after:
        from shoal.server.start import ServeOptions, serve_model

        serve_model(result.model_dir, ServeOptions(port=port))


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="Text files or folders (.txt, .jsonl, .parquet); may be repeated.")],
    recipe: Annotated[str, typer.Option(help="Only 'text' so far.")] = "text",
    run_dir: Annotated[Path, typer.Option(help="Where the run is kept; the same directory resumes.")] = Path(
        "runs/text"
    ),
    variant: Annotated[
        str, typer.Option(help="'moe', 'dense', 'gqa', or 'both' for moe and dense side by side.")
    ] = "moe",
    set_: Annotated[
        list[str] | None, typer.Option("--set", help="Override a setting, key=value; may be repeated.")
    ] = None,
    text_key: Annotated[str, typer.Option(help="Field that holds the text in JSON lines and Parquet.")] = "text",
    json_output: JsonOption = False,
) -> None:
    """Pretrain a small model on your own text and measure it on the held-out last tenth.

    Example: shoal pretrain --recipe text --data book.txt --set steps=200
    """
    from shoal.log import print_json
    from shoal.recipes.text import run_text, text_config

    config = text_config(recipe, variant=variant, overrides=set_ or [])
    result = run_text(run_dir, data, config, text_key=text_key)
    if json_output:
        print_json(result)


@app.command()
def rl(
    controls: Annotated[
        bool,
        typer.Option(
            "--controls", help="Also run what must not work: no worked solutions in the base; a random reward."
        ),
    ] = False,
    run_dir: Annotated[Path, typer.Option(help="A demo run to go on from, or a new directory.")] = Path("runs/demo"),
    quick: Annotated[bool, typer.Option(help="The recipe that demo --quick runs.")] = False,
    json_output: JsonOption = False,
) -> None:
    """R1-Zero reinforcement learning on the demo's task, and its controls.

    Example: shoal rl --controls
    """
    from shoal.log import print_json, say
    from shoal.recipes.demo import demo_config, run_demo

    result = run_demo(run_dir, demo_config(quick=quick), controls=controls)
    say(f"report: {result.report}")
    if json_output:
        print_json({key: str(value) for key, value in asdict(result).items()})


@app.command()
def generate(
    model: ModelArgument = None,
    prompt: Annotated[str | None, typer.Option(help="Text of one user turn.")] = None,
    prompt_ids: Annotated[str | None, typer.Option(help="Token ids instead, comma-separated.")] = None,
    max_tokens: Annotated[int, typer.Option(help="Generated tokens at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Keep the likeliest tokens that reach this together.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Equal seeds give equal tokens.")] = None,
    json_output: JsonOption = False,
) -> None:
    """Complete one prompt.

    Example: shoal generate runs/demo --prompt "Mia has 37 shells, finds 8. How many shells now?"
    """
    from shoal.engine.one_prompt import complete_one
    from shoal.log import print_json

    result = complete_one(
        model,
        prompt=prompt,
        prompt_ids=prompt_ids,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
    )
    if json_output:
        print_json(result)
    else:
        sys.stdout.write((str(result["text"]) if result["text"] is not None else str(result["token_ids"])) + "\n")


@app.command()
def chat(
    model: ModelArgument = None,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.6,
    max_tokens: Annotated[int, typer.Option(help="Tokens per answer at most.")] = 256,
) -> None:
    """Talk to a model in the terminal.

    Example: shoal chat runs/demo
    """
    from shoal.engine.terminal_chat import chat_in_terminal

    chat_in_terminal(model, temperature=temperature, max_tokens=max_tokens)


@app.command()
def serve(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = "127.0.0.1",
    weights: Annotated[str, typer.Option(help="Format in memory: f32, bf16, fp8, int8 or int4.")] = "bf16",
    cache_gib: Annotated[float, typer.Option(help="RAM for the context cache, GiB.")] = 1.0,
    cache_dir: Annotated[Path | None, typer.Option(help="Context cache on disk; default in the user's cache.")] = None,
    disk_cache: Annotated[bool, typer.Option(help="Keep the context cache on disk.")] = True,
    disk_gib: Annotated[float, typer.Option(help="Bound of the cache on disk, GiB.")] = 20.0,
    max_context: Annotated[int | None, typer.Option(help="Prompt and answer together, tokens.")] = None,
    max_running: Annotated[int, typer.Option(help="Sequences computed at once.")] = 64,
    max_waiting: Annotated[int, typer.Option(help="Open requests; more get 503.")] = 256,
    api_key: Annotated[str | None, typer.Option(envvar="SHOAL_API_KEY", help="Ask this key of every request.")] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Ask for one of the keys in this file, one a line.")] = None,
    ledger: Annotated[
        Path | None, typer.Option(help="SQLite file that keeps what every request used, and the keys of 'shoal keys'.")
    ] = None,
    prices: Annotated[Path | None, typer.Option(help="JSON price table in the place of the built-in one.")] = None,
    requests_per_minute: Annotated[int | None, typer.Option(help="Per key, unless the key has its own.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="Per key, unless the key has its own.")] = None,
    access_log: Annotated[bool, typer.Option(help="A JSON line per request on standard error, without texts.")] = False,
    drain_s: Annotated[int, typer.Option(help="Seconds that running answers get after SIGTERM.")] = 30,
    insecure: Annotated[bool, typer.Option(help="Listen on other addresses without a key.")] = False,
) -> None:
    """Serve the chat page and an OpenAI- and DeepSeek-compatible API.

    Example: shoal serve runs/demo --port 8000
    """
    from shoal.engine.making import GIB, EngineOptions
    from shoal.server.start import ServeOptions, serve_model

    engine = EngineOptions(
        weights=weights,
        cache_bytes=int(cache_gib * GIB),
        disk_dir=cache_dir,
        use_disk=disk_cache,
        disk_bytes=int(disk_gib * GIB),
        max_context=max_context,
        max_running=max_running,
    )
    options = ServeOptions(
        host=host,
        port=port,
        api_key=api_key,
        api_key_file=api_key_file,
        ledger=ledger,
        prices=prices,
        insecure=insecure,
        engine=engine,
        requests_per_minute=requests_per_minute,
        max_concurrent=max_concurrent,
        max_waiting=max_waiting,
        access_log=access_log,
        drain_s=drain_s,
    )
    serve_model(model, options)


@app.command()
def report(
    run_dir: Annotated[Path, typer.Argument(help="A run directory.")] = Path("runs/demo"),
    json_output: JsonOption = False,
) -> None:
    """Write report.html and report.json of a run.

    Example: shoal report runs/demo
    """
    from shoal.log import print_json, say
    from shoal.report import write_report

    paths = write_report(run_dir)
    say(f"wrote {paths.html} and {paths.json}")
    if json_output:
        print_json({"html": str(paths.html), "json": str(paths.json)})


bench_app = typer.Typer(help="Measure this machine: decoding, prefill, the context cache.", no_args_is_help=True)
app.add_typer(bench_app, name="bench")

BenchModelArgument = Annotated[str | None, typer.Argument(help="Model directory or run directory; or use --preset.")]
PresetOption = Annotated[str | None, typer.Option("--preset", help="Random weights in this preset's shape.")]
WeightsOption = Annotated[str, typer.Option(help="f32, bf16, fp8, int8 or int4.")]


@bench_app.command("decode")
def bench_decode(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "bf16",
    batch: Annotated[int, typer.Option(help="Sequences at once.")] = 1,
    context: Annotated[int, typer.Option(help="Tokens each has in its cache.")] = 128,
    json_output: JsonOption = False,
) -> None:
    """Tokens per second of decoding, beside the measured limit of memory.

    Example: shoal bench decode --preset nano --weights int8
    """
    from shoal.log import print_json
    from shoal.recipes.bench import bench_decode as measure
    from shoal.recipes.bench import load_packed

    result = measure(load_packed(model, preset, weights, context + 512), batch=batch, context=context)
    if json_output:
        print_json(result)


@bench_app.command("prefill")
def bench_prefill(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "bf16",
    tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 512,
    json_output: JsonOption = False,
) -> None:
    """Tokens per second of reading a prompt, beside the measured limit of arithmetic.

    Example: shoal bench prefill --preset nano --weights bf16 --tokens 512
    """
    from shoal.log import print_json
    from shoal.recipes.bench import bench_prefill as measure
    from shoal.recipes.bench import load_packed

    result = measure(load_packed(model, preset, weights, tokens), tokens=tokens)
    if json_output:
        print_json(result)


@bench_app.command("cache")
def bench_cache(
    model: BenchModelArgument = None,
    preset: PresetOption = None,
    weights: WeightsOption = "bf16",
    prompt_tokens: Annotated[int, typer.Option(help="Length of the prompt.")] = 4096,
    rounds: Annotated[int, typer.Option(help="Prompts to take the median of.")] = 3,
    json_output: JsonOption = False,
) -> None:
    """Time to first token: computed, found in RAM, found on disk after a restart.

    Example: shoal bench cache --preset nano --prompt-tokens 1024
    """
    from shoal.log import print_json
    from shoal.recipes.bench import load_packed
    from shoal.recipes.bench_cache import bench_cache as measure

    result = measure(
        load_packed(model, preset, weights, prompt_tokens + 64), prompt_tokens=prompt_tokens, rounds=rounds
    )
    if json_output:
        print_json(result)


keys_app = typer.Typer(help="API keys with money and limits, for 'shoal serve --ledger'.", no_args_is_help=True)
app.add_typer(keys_app, name="keys")

LedgerOption = Annotated[Path, typer.Option("--ledger", help="The ledger's SQLite file.")]


@keys_app.command("add")
def keys_add(
    name: Annotated[str, typer.Argument(help="Whose key it is.")],
    ledger: LedgerOption = Path("ledger.sqlite"),
    balance_usd: Annotated[str, typer.Option(help="Money on it, USD.")] = "0",
    requests_per_minute: Annotated[int | None, typer.Option(help="None is no limit.")] = None,
    max_concurrent: Annotated[int | None, typer.Option(help="None is no limit.")] = None,
) -> None:
    """Make a key and print its secret, which is shown this once.

    Example: shoal keys add alice --balance-usd 5 --ledger ledger.sqlite
    """
    from shoal.planner.prices import parse_usd
    from shoal.server.keys import KeyStore

    secret = KeyStore(ledger).add(name, parse_usd(balance_usd), requests_per_minute, max_concurrent)
    sys.stdout.write(secret + "\n")


@keys_app.command("list")
def keys_list(ledger: LedgerOption = Path("ledger.sqlite"), json_output: JsonOption = False) -> None:
    """List the keys, without their secrets.

    Example: shoal keys list --ledger ledger.sqlite
    """
    from shoal.log import print_json
    from shoal.server.keys import KeyStore

    records = [{name: str(value) for name, value in asdict(record).items()} for record in KeyStore(ledger).list()]
    if json_output:
        print_json({"keys": records})
        return
    for record in records:
        state = "live" if record["revoked_at"] == "None" else "revoked"
        sys.stdout.write(f"{record['key_id']}  {state:<8} {record['balance_usd']:>16} USD  {record['name']}\n")


@keys_app.command("revoke")
def keys_revoke(
    key_id: Annotated[str, typer.Argument(help="As 'shoal keys list' shows it.")],
    ledger: LedgerOption = Path("ledger.sqlite"),
) -> None:
    """Refuse a key from now on.

    Example: shoal keys revoke key-0123456789ab --ledger ledger.sqlite
    """
    from shoal.log import say
    from shoal.server.keys import KeyStore

    KeyStore(ledger).revoke(key_id)
    say(f"{key_id} is revoked; what it already runs is still settled")


@keys_app.command("top-up")
def keys_top_up(
    key_id: Annotated[str, typer.Argument(help="As 'shoal keys list' shows it.")],
    amount_usd: Annotated[str, typer.Argument(help="USD to add.")],
    ledger: LedgerOption = Path("ledger.sqlite"),
) -> None:
    """Add money to a key.

    Example: shoal keys top-up key-0123456789ab 5 --ledger ledger.sqlite
    """
    from shoal.log import say
    from shoal.planner.prices import parse_usd
    from shoal.server.keys import KeyStore

    say(f"{key_id} has {KeyStore(ledger).top_up(key_id, parse_usd(amount_usd))} USD now")


@app.command("ledger")
def ledger_report(
    ledger: LedgerOption = Path("ledger.sqlite"),
    csv: Annotated[Path | None, typer.Option(help="Write every entry to this file.")] = None,
    json_output: JsonOption = False,
) -> None:
    """What was used and what it cost, per key and in all; every entry as CSV.

    Example: shoal ledger --ledger ledger.sqlite --csv entries.csv
    """
    from shoal.log import print_json, say
    from shoal.server.keys import KeyStore
    from shoal.server.ledger import Ledger

    book = Ledger(ledger)
    totals = {record.name: book.totals(record.key_id) for record in KeyStore(ledger).list()} | {"all": book.totals()}
    if csv is not None:
        with csv.open("w", newline="", encoding="utf-8") as out:
            say(f"wrote {book.export_csv(out)} entries to {csv}")
    if json_output:
        print_json({name: {key: str(value) for key, value in asdict(each).items()} for name, each in totals.items()})
        return
    for name, each in totals.items():
        tokens = f"{each.hit_tokens} hit, {each.miss_tokens} miss, {each.output_tokens} output tokens"
        sys.stdout.write(
            f"{name:<20} {each.num_requests:>6} requests  {tokens}  {each.joules:.0f} J  {each.cost_usd} USD\n"
        )


@app.command()
def doctor(json_output: JsonOption = False) -> None:
    """Say what this machine can do and what is missing.

    Example: shoal doctor
    """
    from shoal.log import print_json
    from shoal.recipes.doctor import examine

    findings = examine()
    if json_output:
        print_json(findings)
    else:
        for name, value in findings.items():
            sys.stdout.write(f"{name:<22} {value}\n")


@app.command()
def version() -> None:
    """Print the version.

    Example: shoal version
    """
    sys.stdout.write(__version__ + "\n")


def prepare_memory() -> None:
    """Let the C allocator keep freed memory: training frees and takes the same large arrays every step."""
    if sys.platform != "linux" or "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return
    import ctypes

    trim_threshold, top_pad, mmap_threshold = -1, -2, -3
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(mmap_threshold, 1 << 30)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 64 << 20)
