"""The Plan page, against the planner itself."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from tests.server.page_server import ScriptedModel, chromium, expect, free_port, listening, opened_page, scripted_app

pytestmark = [pytest.mark.browser, pytest.mark.slow]
V3 = "/#/plan?model=v3&tokens=14.8T"


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with listening(scripted_app(ScriptedModel(), None), free_port()) as address:
        yield address


@contextmanager
def plan_page(browser, url, path=V3, **options) -> Iterator:
    with opened_page(browser, url, path=path, **options) as page:
        expect(page.locator(".tiles, #plan-note:visible").first).to_be_visible()
        yield page


def tile(page, name):
    return page.inner_text(f".tiles div:has(dt:text-is('{name}')) dd")


def chart_titles(page):
    return page.locator("#plan .chart-title").all_inner_texts()


def test_the_figures_of_v3_are_those_of_its_report(browser, url):
    with plan_page(browser, url) as page:
        assert (tile(page, "Parameters"), tile(page, "Active per token")) == ("671 B", "36.63 B")
        assert tile(page, "Cache per token") == "70.27 kB"
        rent = float(tile(page, "Rent of training").replace("$", "").replace(",", ""))
        assert rent == pytest.approx(2.664e6 * 2, rel=0.01)


def test_every_chart_is_drawn_and_says_its_values(browser, url):
    with plan_page(browser, url) as page:
        assert chart_titles(page) == [
            "Cost of training by part",
            "Cost of serving by part",
            "Memory by part",
            "Cache over context",
            "Million prompt tokens over cache hits",
            "What moves it",
        ]
        shares = [float(found) for found in re.findall(r"([\d.]+) %", page.inner_text(".figure >> nth=0"))]
        assert sum(shares) == pytest.approx(100, abs=0.5) and shares == sorted(shares, reverse=True)
        cache = page.get_attribute(".chart >> nth=0", "aria-label")
        assert f"v3: {70272 * 2**20 / 1e9:.4g} GB at 1 Mi tokens" in cache and "llama-2-7b: 549.8 GB" in cache
        page.focus(".chart >> nth=1")
        page.keyboard.press("ArrowRight")
        for _ in range(30):
            page.keyboard.press("ArrowLeft")
        assert page.inner_text(".readout >> nth=1").split("\n")[0] == "at 0 % hits"


def test_a_model_that_does_not_fit_is_said_not_to(browser, url):
    with plan_page(browser, url, "/#/plan?model=v3&hardware=1x+rtx4090") as page:
        assert "does not fit" in page.inner_text(".figure:has-text('Memory by part')")


def test_a_changed_assumption_changes_the_plan_and_the_address(browser, url):
    with plan_page(browser, url) as page:
        before = tile(page, "Rent of training")
        page.click(".assumptions summary")
        page.fill("#set-price_usd_per_device_h", "4")
        page.keyboard.press("Enter")
        expect(page.locator(".assumptions summary")).to_contain_text("1 changed")
        expect(page.locator(".tiles")).not_to_contain_text(before)
        after = tile(page, "Rent of training")
        assert page.evaluate("() => location.hash").endswith("set=price_usd_per_device_h%3D4")
        page.reload()
        expect(page.locator(".tiles")).to_contain_text(after)
        assert page.input_value("#set-price_usd_per_device_h") == "4"
        page.click(".assumptions summary")
        page.click("text=Back to the defaults")
        expect(page.locator(".tiles")).to_contain_text(before)


@pytest.mark.parametrize(
    "question, said",
    [
        ("model=%3Cimg%20src=x%3E", "<img src=x>"),
        ("model=v3&set=pue%3D9", "pue"),
        ("model=v3&hardware=toaster", "known: h800"),
        ("model=v3&set=nonsense%3D1", "nonsense"),
    ],
)
def test_a_mistake_is_said_in_words_with_what_is_allowed(browser, url, question, said):
    with plan_page(browser, url, f"/#/plan?{question}", allowed=("400",)) as page:
        expect(page.locator("#plan-note")).to_contain_text(said)
        assert page.locator("#plan img").count() == 0 and not page.is_visible("#plan-result")


def test_a_figure_opens_to_its_formula_inputs_and_source_by_keyboard(browser, url):
    with plan_page(browser, url) as page:
        page.focus(".figure-name[title=training_gpu_hours]")
        page.keyboard.press("Enter")
        why = page.inner_text(".why:visible")
        assert "training_flops / " in why and "operations in all: 3.707 YFLOP" in why
        assert "utilisation (MFU), of the dense bf16 peak: 38.9 % (DeepSeek-V3 on 2048 H800" in why
        page.keyboard.press("Enter")
        assert page.locator(".why:visible").count() == 0


def test_two_models_stand_side_by_side(browser, url):
    with plan_page(browser, url) as page:
        page.select_option("#plan-beside", "llama-3.1-405b")
        row = page.locator("tr:has(.figure-name[title=active_params])")
        expect(row).to_have_text(re.compile(r"36\.63 B\s*403\.8 B\s*× 11"))


def test_what_moves_a_figure_most_comes_first(browser, url):
    with plan_page(browser, url) as page:
        page.select_option("select[aria-label=Figure]", "training_kwh")
        first = page.locator(".figure:has-text('What moves it') li").first
        expect(first).to_have_attribute("title", re.compile("utilisation_fraction from 0.2 to 0.4"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_the_plan_is_no_wider_than_the_screen(browser, url, scheme):
    view = {"viewport": {"width": 360, "height": 740}, "is_mobile": True, "has_touch": True, "color_scheme": scheme}
    with plan_page(browser, url, V3 + "&beside=llama-3.1-405b", **view) as page:
        assert page.evaluate("() => document.documentElement.scrollWidth") == 360
        assert page.evaluate("() => document.querySelector('#plan').scrollWidth") == 360
        page.click(".assumptions summary")
        assert page.evaluate("() => document.querySelector('#plan').scrollWidth") == 360
