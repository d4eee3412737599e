"""Start serving a model: load it, check the address, say where it is."""

import ipaddress
import socket
from pathlib import Path

import uvicorn

from shoal.engine.engine import Engine
from shoal.engine.loading import LoadedModel, load_for_generation
from shoal.errors import ServerError
from shoal.log import say
from shoal.server.app import build_app
from shoal.server.chat import ServedModel
from shoal.server.worker import EngineWorker


def serve_model(path: Path | None, *, host: str, port: int, api_key: str | None) -> None:
    """Serve until stopped.

    Raises:
        ServerError: unsafe address without a key, port in use, or a model without a tokenizer.
    """
    check_address(host, port, api_key)
    served = served_model(load_for_generation(path))
    say(
        f"serving {served.name} at http://{host}:{port} (chat page) and http://{host}:{port}/v1 (API); stop with Ctrl-C"
    )
    uvicorn.run(
        build_app(served, api_key=api_key), host=host, port=port, log_level="warning", timeout_graceful_shutdown=5
    )


def served_model(loaded: LoadedModel) -> ServedModel:
    """A loaded model with its engine in a worker."""
    if loaded.tokenizer is None or loaded.template is None:
        raise ServerError(f"{loaded.path} has no tokenizer.json; a chat server needs one beside the weights.")
    engine = Engine(loaded.model)
    return ServedModel(
        name=str(loaded.card.get("name") or loaded.path.resolve().name),
        worker=EngineWorker(engine),
        tokenizer=loaded.tokenizer,
        template=loaded.template,
        max_context=engine.max_context,
        description=str(loaded.card.get("description") or ""),
        suggestions=[str(text) for text in loaded.card.get("suggestions") or []][:8],
    )


def check_address(host: str, port: int, api_key: str | None) -> None:
    """Refuse what would be unsafe or cannot work.

    Raises:
        ServerError: an address that others reach without a key, or a port that is taken or impossible.
    """
    if not 0 < port < 65536:
        raise ServerError(f"port {port} is impossible; use 1 to 65535.")
    if not _is_loopback(host) and not api_key:
        raise ServerError(f"{host} can be reached by others; give --api-key (or SHOAL_API_KEY), or stay on 127.0.0.1.")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ServerError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another with --port."
            ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
