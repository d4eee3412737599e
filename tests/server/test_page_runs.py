"""The Runs page: curves, expert load, stages and samples of runs whose files this test writes."""

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.server.page_server import ScriptedModel, chromium, expect, free_port, listening, opened_page, scripted_app

pytestmark = [pytest.mark.browser, pytest.mark.slow]
HOSTILE = "<img src=x onerror=alert(1)> <b>12</b>"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


def metrics_line(stage, step, **values):
    load = [[0.5, 0.25, 0.25, 0.0], [0.25, 0.25, 0.25, 0.25]]
    return json.dumps({"stage": stage, "step": step, "expert_load": load, **values}) + "\n"


@pytest.fixture
def runs_dir(tmp_path):
    run = tmp_path / "alpha"
    run.mkdir()
    lines = [metrics_line("pretrain", step, loss=6 / step, tokens=1500 * step, max_vio=1.0) for step in range(1, 11)]
    lines += [metrics_line("rl-0", step, reward=step / 10, kl=0.0) for step in range(1, 6)]
    (run / "metrics.jsonl").write_text("".join(lines))
    stages = {
        "pretrain": {"started": 1.0, "wall_s": 75.0, "energy_j": 2500.0, "energy_kind": "modelled", "done": True},
        "rl-0": {"started": 2.0, "wall_s": 3.0, "done": False},
    }
    (run / "stages.json").write_text(json.dumps(stages))
    (run / "skill-base.json").write_text(json.dumps({"examples": [HOSTILE, "plain"]}))
    return tmp_path


@contextmanager
def runs_page(browser, runs_dir, path="/#/runs/alpha", **options) -> Iterator:
    app = scripted_app(ScriptedModel(), runs_dir)
    with listening(app, free_port()) as url, opened_page(browser, url, path=path, **options) as opened:
        yield opened


@pytest.fixture
def page(browser, runs_dir) -> Iterator:
    with runs_page(browser, runs_dir) as opened:
        opened.wait_for_selector(".figure:visible")
        yield opened


def titles(page):
    return page.locator(".figure:visible .chart-title").all_inner_texts()


def test_curves_stages_and_samples_of_a_run_are_shown(page):
    assert titles(page) == ["Loss", "Reward", "MaxVio", "Expert load"]
    assert page.get_attribute(".chart >> nth=0", "aria-label").startswith("Loss. Last values: pretrain: 0.6 at step 10")
    assert page.inner_text(".now") == "rl-0 · step 5"
    rows = page.locator("#run tbody tr").all_inner_texts()
    assert rows == ["pretrain\t1 min 15 s\t2.5 kJ (modelled)\tdone", "rl-0\t3.0 s\t\tnot finished"]
    assert page.locator(".sample pre").all_inner_texts() == ["plain", HOSTILE]
    assert page.locator("#run img, #run b").count() == 0


def test_the_busiest_expert_stands_out_in_the_heat_map(page):
    shown = page.locator(".heat-map .share").all_text_contents()
    assert shown == ["2.00", "1.00", "1.00", "0.00", "1.00", "1.00", "1.00", "1.00"]
    assert page.locator(".heat-map .busy-cell").count() == 1
    assert "the busiest has 2.00 times an even share" in page.get_attribute(".heat-map", "aria-label")


def test_arrow_keys_read_earlier_values_and_a_stage_can_be_hidden(page):
    page.focus(".chart >> nth=0")
    page.keyboard.press("ArrowLeft")
    page.keyboard.press("ArrowLeft")
    assert page.inner_text(".readout >> nth=0").split() == ["0.667", "step", "9"]
    page.uncheck(".legend input >> nth=1")
    assert titles(page) == ["Loss", "MaxVio", "Expert load"]


def test_a_run_that_goes_on_is_drawn_on_without_a_reload(page, runs_dir):
    with (runs_dir / "alpha" / "metrics.jsonl").open("a") as stream:
        stream.write(metrics_line("rl-0", 6, reward=0.9, accuracy=0.5) + metrics_line("rl-0", 7, reward=1.0)[:20])
    expect(page.locator(".now")).to_have_text("rl-0 · step 6")
    assert titles(page) == ["Loss", "Accuracy", "Reward", "MaxVio", "Expert load"]
    page.click("#to-chat")
    expect(page.locator("#chat")).to_be_visible()
    expect(page.locator("#runs")).to_be_hidden()


def test_a_server_without_runs_says_how_to_show_some(browser, tmp_path):
    with runs_page(browser, None, "/#/runs", allowed=("404",)) as page:
        expect(page.locator("#runs-note")).to_contain_text("--runs-dir")
    with runs_page(browser, tmp_path, "/#/runs") as page:
        expect(page.locator("#runs-note")).to_contain_text("no runs yet")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_runs_are_no_wider_than_the_screen(browser, runs_dir, scheme):
    view = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    with runs_page(browser, runs_dir, **view) as page:
        page.wait_for_selector(".sample:visible")
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        assert page.evaluate("() => document.querySelector('#runs').scrollWidth") == 360
