"""The Runs page's routes, over real run directories written by the same writers that training uses."""

import json
import os

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from shoal.log import MetricsWriter, read_metrics
from shoal.recipes.run import write_json
from shoal.server import run_pages
from shoal.server.run_pages import runs_router

OUTSIDE = '{"stage": "secret", "step": 1, "loss": 1.0}\n'


@pytest.fixture
def runs_dir(tmp_path):
    """One run in a runs directory, and a file beside the directory that nobody may see."""
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "metrics.jsonl").write_text(OUTSIDE)
    runs = tmp_path / "runs"
    writer = MetricsWriter(runs / "demo" / "metrics.jsonl")
    for step in range(1, 6):
        writer.write("pretrain", step, loss=5.0 / step, expert_load=[[0.25, 0.75]])
    write_json(runs / "demo" / "config.json", {"recipe": "demo", "settings": {"seed": 0}})
    stages = {"rl-0": {"started": 20.5, "done": False}, "pretrain": {"started": 10.5, "done": True, "result": "loss 1"}}
    write_json(runs / "demo" / "stages.json", stages)
    return runs


@pytest.fixture
def client(runs_dir):
    app = FastAPI()
    app.include_router(runs_router(runs_dir))
    return TestClient(app)


def metrics(client, **parameters):
    return client.get("/api/runs/demo/metrics", params=parameters).json()


def test_runs_are_listed_with_their_recipe_and_stages_in_the_order_they_began(client):
    (run,) = client.get("/api/runs").json()["runs"]
    assert run["name"] == "demo" and run["recipe"] == "demo" and run["is_live"] and 0 <= run["idle_s"] < 60
    stages = client.get("/api/runs/demo").json()["stages"]
    assert [stage["name"] for stage in stages] == ["pretrain", "rl-0"]
    assert stages[0]["result"] == "loss 1" and stages[1]["done"] is False


def test_a_run_that_wrote_long_ago_is_not_going_on(client, runs_dir):
    for file in (runs_dir / "demo").iterdir():
        os.utime(file, (1_000_000, 1_000_000))
    (run,) = client.get("/api/runs").json()["runs"]
    assert not run["is_live"] and run["idle_s"] > 1e6


def test_a_directory_that_is_itself_a_run_is_listed_under_its_name(runs_dir):
    app = FastAPI()
    app.include_router(runs_router(runs_dir / "demo"))
    assert [run["name"] for run in TestClient(app).get("/api/runs").json()["runs"]] == ["demo"]


def test_a_missing_runs_directory_holds_no_runs(tmp_path):
    app = FastAPI()
    app.include_router(runs_router(tmp_path / "none"))
    assert TestClient(app).get("/api/runs").json() == {"runs": []}


def test_increments_put_together_equal_the_whole_file(client, runs_dir):
    path = runs_dir / "demo" / "metrics.jsonl"
    piece = metrics(client)
    assert piece["restarted"] and len(piece["lines"]) == 5
    seen = piece["lines"]
    for step in range(6, 9):
        MetricsWriter(path).write("pretrain", step, loss=1.0)
        piece = metrics(client, offset=piece["offset"], file=piece["file"])
        assert not piece["restarted"] and len(piece["lines"]) == 1
        seen += piece["lines"]
    assert seen == read_metrics(path)
    assert metrics(client, offset=piece["offset"], file=piece["file"])["lines"] == []


def test_a_large_file_comes_in_pieces_of_bounded_size(client, runs_dir, monkeypatch):
    monkeypatch.setattr(run_pages, "MAX_PIECE_BYTES", 300)
    seen, offset, file, more, pieces = [], 0, "", True, 0
    while more:
        piece = metrics(client, offset=offset, file=file)
        offset, file, more, pieces = piece["offset"], piece["file"], piece["more"], pieces + 1
        seen += piece["lines"]
    assert pieces > 1 and seen == read_metrics(runs_dir / "demo" / "metrics.jsonl")


def test_a_line_larger_than_a_piece_is_passed_over(client, runs_dir, monkeypatch):
    monkeypatch.setattr(run_pages, "MAX_PIECE_BYTES", 300)
    path = runs_dir / "demo" / "metrics.jsonl"
    path.write_text(json.dumps({"step": 1, "long": "x" * 2000}) + "\n" + '{"step": 2}\n')
    offset, file, steps = 0, "", []
    for _ in range(20):
        piece = metrics(client, offset=offset, file=file)
        offset, file = piece["offset"], piece["file"]
        steps += [line.get("step") for line in piece["lines"]]
    assert steps == [2] and offset == path.stat().st_size


def test_a_torn_last_line_waits_until_it_is_whole(client, runs_dir):
    path = runs_dir / "demo" / "metrics.jsonl"
    before = metrics(client)
    with path.open("a") as file:
        file.write('{"stage": "pretrain", "st')
    torn = metrics(client, offset=before["offset"], file=before["file"])
    assert torn["lines"] == [] and torn["offset"] == before["offset"]
    with path.open("a") as file:
        file.write('ep": 6}\n')
    assert metrics(client, offset=before["offset"], file=before["file"])["lines"] == [{"stage": "pretrain", "step": 6}]


def test_a_resumed_run_that_dropped_lines_is_read_again_from_the_start(client, runs_dir):
    before = metrics(client)
    MetricsWriter(runs_dir / "demo" / "metrics.jsonl").rewind("pretrain", 3)
    after = metrics(client, offset=before["offset"], file=before["file"])
    assert after["restarted"] and [line["step"] for line in after["lines"]] == [1, 2, 3]


def test_an_offset_inside_a_line_begins_again_and_an_impossible_one_is_refused(client):
    piece = metrics(client)
    assert metrics(client, offset=piece["offset"] - 3, file=piece["file"])["restarted"]
    assert metrics(client, offset=10**15, file=piece["file"])["restarted"]
    for offset in ("-1", "x", "9" * 30):
        assert client.get("/api/runs/demo/metrics", params={"offset": offset}).status_code == 422


@pytest.mark.parametrize(
    "name", ["..", "../outside", "..%2foutside", "%2e%2e", "outside", "%00", "a" * 5000, "demo%2f.."]
)
def test_no_name_leads_out_of_the_runs_directory(client, name):
    for tail in ("", "/metrics", "/samples"):
        response = client.get(f"/api/runs/{name}{tail}")
        assert response.status_code == 404 and "secret" not in response.text


def test_links_that_lead_out_lead_nowhere(client, runs_dir):
    (runs_dir / "linked").symlink_to(runs_dir.parent / "outside")
    (runs_dir / "demo" / "metrics.jsonl").unlink()
    (runs_dir / "demo" / "metrics.jsonl").symlink_to(runs_dir.parent / "outside" / "metrics.jsonl")
    (runs_dir / "circle").symlink_to(runs_dir / "circle")
    assert client.get("/api/runs/linked").status_code == 404
    assert metrics(client)["lines"] == []


def test_a_pipe_in_place_of_a_file_blocks_nobody(client, runs_dir):
    (runs_dir / "demo" / "metrics.jsonl").unlink()
    os.mkfifo(runs_dir / "demo" / "metrics.jsonl")
    assert metrics(client)["lines"] == []


@pytest.mark.parametrize(
    "line", [b'{"loss": NaN, "step": 1}', b'{"loss": 1e999, "step": 1}', b'{"loss": -Infinity, "step": 1}']
)
def test_numbers_that_json_has_not_become_null(client, runs_dir, line):
    (runs_dir / "demo" / "metrics.jsonl").write_bytes(line + b"\n")
    assert metrics(client)["lines"] == [{"loss": None, "step": 1}]


@pytest.mark.parametrize(
    "line",
    [b"", b"[1]", b"null", b"{", b"\xff\xfe", b'{"a": ' + b"9" * 5000 + b"}", b'{"a":' * 3000, b'{"a":' + b"[" * 700],
)
def test_what_is_no_json_object_is_left_out(client, runs_dir, line):
    (runs_dir / "demo" / "metrics.jsonl").write_bytes(line + b'\n{"step": 2}\n')
    (runs_dir / "demo" / "stages.json").write_bytes(line)
    assert metrics(client)["lines"] == [{"step": 2}]
    assert client.get("/api/runs/demo").json()["stages"] == []


def test_nesting_that_python_reads_but_cannot_walk_is_left_out(client, runs_dir):
    deep = b'{"a":' + b"[" * 600 + b"]" * 600 + b"}\n"
    (runs_dir / "demo" / "metrics.jsonl").write_bytes(deep + b'{"step": 2}\n')
    assert client.get("/api/runs/demo/metrics").json()["lines"][-1] == {"step": 2}


def test_half_a_surrogate_in_a_file_reaches_the_page_as_an_escape(client, runs_dir):
    write_json(runs_dir / "demo" / "skill-base.json", {"examples": ["fine"]})
    (runs_dir / "demo" / "skill-base.json").write_text('{"examples": ["half \\ud800"]}')
    response = client.get("/api/runs/demo/samples")
    assert response.status_code == 200 and "half \\ud800" in response.text


def test_samples_are_the_examples_of_evaluations_and_the_last_lines_of_the_sample_log(client, runs_dir):
    write_json(runs_dir / "demo" / "skill-base.json", {"examples": ["<think></think><answer>60</answer>", 7]})
    with (runs_dir / "demo" / "samples.jsonl").open("w") as file:
        for step in range(250):
            file.write(json.dumps({"stage": "rl-0", "step": step, "prompt": "1+1?", "text": "2", "reward": 1.0}) + "\n")
        file.write('{"stage": "rl-0", "text": 5}\n')
    base, rl = client.get("/api/runs/demo/samples").json()["groups"]
    assert base == {"name": "base", "samples": [{"text": "<think></think><answer>60</answer>"}]}
    assert rl["name"] == "rl-0" and len(rl["samples"]) == run_pages.MAX_SAMPLES
    assert rl["samples"][-1] == {"text": "2", "prompt": "1+1?", "reward": 1.0, "step": 249}
