import socket

import pytest

from shoal.errors import ServerError
from shoal.server.start import check_address


def test_a_port_in_use_is_named():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"{port}.*--port"):
            check_address("127.0.0.1", port, may_be_reached=False)


def test_addresses_that_others_reach_need_a_key():
    with pytest.raises(ServerError, match="--api-key"):
        check_address("0.0.0.0", 1, may_be_reached=False)
    with pytest.raises(ServerError, match="--api-key"):
        check_address("example.org", 1, may_be_reached=False)


def test_impossible_ports_are_refused():
    with pytest.raises(ServerError, match="1 to 65535"):
        check_address("127.0.0.1", 70000, may_be_reached=False)
