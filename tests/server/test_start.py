import socket

import httpx
import pytest

from shoal.errors import ServerError
from shoal.server.app import ServerOptions
from shoal.server.start import check_address, runs_around
from tests.server.conftest import run_server


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


def test_a_model_brings_the_runs_around_it(tmp_path):
    run = tmp_path / "runs" / "one"
    (run / "model").mkdir(parents=True)
    (run / "stages.json").write_text("{}")
    assert runs_around(run / "model") == tmp_path / "runs"
    assert str(runs_around(tmp_path)) == "runs"
    elsewhere = tmp_path / "kept"
    run.rename(elsewhere)
    assert runs_around(elsewhere / "model") == elsewhere


def test_runs_are_shown_only_where_the_operator_has_some(tmp_path):
    for shown, status in ((tmp_path, 200), (None, 404)):
        for server in run_server(ServerOptions(runs_dir=shown)):
            assert httpx.get(f"{server.url}/api/runs").status_code == status
