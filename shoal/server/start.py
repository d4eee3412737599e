"""Start serving a model: load it, choose the engine, check the address, say where it is."""

import ipaddress
import os
import signal
import socket
import sys
from dataclasses import dataclass, field
from pathlib import Path

import uvicorn

from shoal.engine.engine import Engine
from shoal.engine.loading import LoadedModel, load_for_generation
from shoal.engine.making import EngineOptions, make_engine
from shoal.engine.serving import ServingEngine
from shoal.errors import ServerError
from shoal.log import say
from shoal.planner.prices import PRICES, load_prices
from shoal.server.access import Access, Limits
from shoal.server.app import ServerOptions, build_app
from shoal.server.generation import ServedModel
from shoal.server.keys import KeyStore, load_key_file
from shoal.server.ledger import Ledger
from shoal.server.limits import RequestLimits
from shoal.server.profiles import PROFILES
from shoal.server.shutdown import LAST_WORDS_S, DrainingServer, HeaderTimeout
from shoal.server.worker import EngineWorker

SWITCH_INTERVAL_S = 0.0005
"""How long the event loop may keep the interpreter from the engine's thread; Python's own 5 ms are several steps."""


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What `shoal serve` can be told."""

    host: str = "127.0.0.1"
    port: int = 8000
    api_key: str | None = None
    api_key_file: Path | None = None
    ledger: Path | None = None
    """SQLite file with keys, balances and entries."""
    prices: Path | None = None
    insecure: bool = False
    """Listen on other addresses without a key."""
    engine: EngineOptions = field(default_factory=EngineOptions)
    requests_per_minute: int | None = None
    max_concurrent: int | None = None
    max_waiting: int = 256
    limits: RequestLimits = field(default_factory=RequestLimits)
    profile: str = "lenient"
    access_log: bool = False
    runs_dir: Path | None = None
    """What the Runs page shows; None: the runs around the model, where nobody else can reach the server."""
    drain_s: int = 30
    """After SIGTERM: how long running answers may go on."""


def serve_model(path: Path | None, options: ServeOptions) -> None:
    """Serve until stopped; SIGTERM and Ctrl-C let running answers finish first.

    Raises:
        ServerError: unsafe address without a key, port in use, or a model without a tokenizer.
        KeyStoreError, PriceError: a key file, ledger or price table that is missing or damaged.
    """
    access = _access(options)
    check_address(options.host, options.port, may_be_reached=not access.is_open or options.insecure)
    loaded = load_for_generation(path)
    served = served_model(loaded, options)
    served.prices = load_prices(options.prices) if options.prices else PRICES
    served.ledger = Ledger(options.ledger, served.prices) if options.ledger else None
    runs_dir = options.runs_dir or (runs_around(loaded.path) if _is_loopback(options.host) else None)
    app = build_app(served, ServerOptions(access=access, access_log=options.access_log, runs_dir=runs_dir))
    config = uvicorn.Config(
        app,
        host=options.host,
        port=options.port,
        log_level="warning",
        http=HeaderTimeout,
        timeout_graceful_shutdown=options.drain_s + LAST_WORDS_S,
        timeout_keep_alive=30,
        h11_max_incomplete_event_size=64 << 10,
    )
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    where = f"http://{options.host}:{options.port}"
    say(f"serving {served.name} at {where} (chat page) and {where}/v1 (API); stop with Ctrl-C")
    # uvicorn raises the signal again when it has drained: that is a clean end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    DrainingServer(config, served, options.drain_s).run()


def served_model(loaded: LoadedModel, options: ServeOptions) -> ServedModel:
    """A loaded model with its engine in a worker.

    Raises:
        ServerError: the model has no tokenizer, or there is no such profile.
    """
    if loaded.tokenizer is None or loaded.template is None:
        raise ServerError(f"{loaded.path} has no tokenizer.json; a chat server needs one beside the weights.")
    if options.profile not in PROFILES:
        raise ServerError(f"profile={options.profile!r} is unknown; use {', '.join(PROFILES)}.")
    made = make_engine(loaded, options.engine)
    return ServedModel(
        name=str(loaded.card.get("name") or loaded.path.resolve().name),
        worker=EngineWorker(
            made.engine,
            max_waiting=options.max_waiting,
            watchdog_s=options.limits.watchdog_s,
            remake=lambda: made_anew(made.engine),
        ),
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        max_context=made.engine.max_context,
        description=str(loaded.card.get("description") or ""),
        suggestions=[str(text) for text in loaded.card.get("suggestions") or []][:8],
        disk_cache=made.disk,
        limits=options.limits,
        profile=options.profile,
    )


def runs_around(model_dir: Path) -> Path:
    """The run that a model belongs to, or the folder `runs` that this run lies in; `runs` here for a model without a run."""
    model_dir = model_dir.resolve()
    for directory in (model_dir, *model_dir.parents[:2]):
        if any((directory / name).is_file() for name in ("metrics.jsonl", "stages.json")):
            return directory.parent if directory.parent.name == "runs" else directory
    return Path("runs")


def made_anew(engine: Engine | ServingEngine) -> Engine | ServingEngine:
    """The same model with nothing held and nothing waiting, for when a failure left the old engine's books in disorder."""
    if isinstance(engine, Engine):
        return Engine(engine.model, max_context=engine.max_context)
    fresh = ServingEngine(engine.model, engine.config, identity=engine.identity, speculation=engine.speculation)
    fresh.disk = engine.disk
    return fresh


def check_address(host: str, port: int, *, may_be_reached: bool) -> None:
    """Refuse what would be unsafe or cannot work.

    Args:
        may_be_reached: whether others may reach the server, because it asks for a key or the operator insists.
    Raises:
        ServerError: an address that others reach without a key, or a port that is taken or impossible.
    """
    if not 0 < port < 65536:
        raise ServerError(f"port {port} is impossible; use 1 to 65535.")
    if not _is_loopback(host) and not may_be_reached:
        raise ServerError(
            f"{host} can be reached by others; give --api-key, --api-key-file or --ledger (or --insecure), or stay on 127.0.0.1."
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port} ({error.strerror or os.strerror(error.errno or 0)}); "
                "choose another with --port."
            ) from error


def _access(options: ServeOptions) -> Access:
    secrets = [*([options.api_key] if options.api_key else [])]
    if options.api_key_file:
        secrets += load_key_file(options.api_key_file)
    limits = Limits(requests_per_minute=options.requests_per_minute, max_concurrent=options.max_concurrent)
    store = KeyStore(options.ledger) if options.ledger else None
    # A ledger without keys counts what an open server on the loopback used.
    return Access(secrets, store if store and store.list() else None, limits)


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
