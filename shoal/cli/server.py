"""Verbs of the server and its book-keeping: `shoal serve`, `shoal keys`, `shoal ledger`."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from shoal.cli.root import JsonOption, ModelArgument, app


@app.command()
def serve(
    model: ModelArgument = None,
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    host: Annotated[str, typer.Option(help="Address; others than 127.0.0.1 need a key.")] = "127.0.0.1",
    weights: Annotated[
        str, typer.Option(help="Format in memory: f32, bf16, fp8, int8, int4, or auto: as stored, else bf16.")
    ] = "auto",
    cache_gib: Annotated[float, typer.Option(help="RAM for the context cache, GiB.")] = 1.0,
    cache_dir: Annotated[Path | None, typer.Option(help="Context cache on disk; default in the user's cache.")] = None,
    disk_cache: Annotated[bool, typer.Option(help="Keep the context cache on disk.")] = True,
    disk_gib: Annotated[float, typer.Option(help="Bound of the cache on disk, GiB.")] = 20.0,
    fp8_cache: Annotated[
        bool, typer.Option(help="Keep cached latents in FP8: 656 bytes for 1152 at V3's widths.")
    ] = False,
    fast_prefill: Annotated[
        bool,
        typer.Option(help="Read long prompts faster; last bits of answers then depend on how a prompt was cut."),
    ] = False,
    max_context: Annotated[int | None, typer.Option(help="Prompt and answer together, tokens.")] = None,
    max_running: Annotated[int, typer.Option(help="Sequences computed at once.")] = 64,
    speculative: Annotated[
        bool | None,
        typer.Option(
            "--speculative/--no-speculative",
            help="Guess tokens with the model's own prediction module; default: where it has one and guessing gains.",
        ),
    ] = None,
    speculative_tokens: Annotated[int, typer.Option(help="Guesses per step at most, 1 to 4.")] = 1,
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
    runs_dir: Annotated[
        Path | None, typer.Option(help="Runs to show on the page; default: those around the model, on 127.0.0.1 only.")
    ] = None,
    profile: Annotated[
        str, typer.Option(help="Rules for reasoning: lenient, r1 or current (docs/serving.md).")
    ] = "lenient",
    limit: Annotated[
        list[str] | None, typer.Option(help="NAME=VALUE, as often as needed: a bound of docs/serving.md.")
    ] = None,
    drain_s: Annotated[int, typer.Option(help="Seconds that running answers get after SIGTERM.")] = 30,
    insecure: Annotated[bool, typer.Option(help="Listen on other addresses without a key.")] = False,
) -> None:
    """Serve the chat page and an OpenAI- and DeepSeek-compatible API.

    Example: shoal serve runs/demo --port 8000
    """
    from shoal.engine.making import GIB, EngineOptions
    from shoal.kernels.array_pool import pool_arrays
    from shoal.server.limits import limits_from
    from shoal.server.start import ServeOptions, serve_model

    engine = EngineOptions(
        weights=weights,
        cache_bytes=int(cache_gib * GIB),
        fp8_cache=fp8_cache,
        fast_prefill=fast_prefill,
        disk_dir=cache_dir,
        use_disk=disk_cache,
        disk_bytes=int(disk_gib * GIB),
        max_context=max_context,
        max_running=max_running,
        speculative=speculative,
        speculative_tokens=speculative_tokens,
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
        limits=limits_from(limit or []),
        profile=profile,
        access_log=access_log,
        runs_dir=runs_dir,
        drain_s=drain_s,
    )
    pool_arrays()
    serve_model(model, options)


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
