"""uvicorn as we need it: an end that lets answers finish, and connections that say nothing closed.

After SIGTERM no new request is taken, running answers go on for the drain's seconds, and what is left then is told so
with a last event instead of a torn connection.
"""

import asyncio
import socket
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from shoal.server.generation import ServedModel

LAST_WORDS_S = 5
"""For sending the last events after the drain."""
HEADERS_S = 30.0
"""How long a connection may take to send a whole request head."""


class DrainingServer(uvicorn.Server):
    """A server that ends its requests before it ends itself."""

    def __init__(self, config: uvicorn.Config, served: ServedModel, drain_s: float) -> None:
        super().__init__(config)
        self.served, self.drain_s = served, drain_s

    def handle_exit(self, sig: int, frame: Any) -> None:
        """Refuse new requests from the moment of the signal."""
        self.served.is_draining = True
        super().handle_exit(sig, frame)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain, then end."""
        self.served.is_draining = True
        message = "the server was stopped before this answer was finished; try again in a moment."
        timer = asyncio.get_running_loop().call_later(self.drain_s, self.served.worker.end_all, message)
        try:
            await super().shutdown(sockets)
        finally:
            timer.cancel()


class HeaderTimeout(H11Protocol):
    """HTTP/1.1 that closes a connection on which no request head arrives in time: uvicorn itself would wait for ever."""

    def connection_made(self, transport: Any) -> None:
        """Start the clock."""
        super().connection_made(transport)
        self._head_timer = self.loop.call_later(HEADERS_S, self._close_unless_asked)

    def connection_lost(self, exc: Exception | None) -> None:
        """Stop it."""
        self._head_timer.cancel()
        super().connection_lost(exc)

    def _close_unless_asked(self) -> None:
        if getattr(self, "cycle", None) is None and not self.transport.is_closing():
            self.transport.close()
