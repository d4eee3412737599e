"""The page, clicked through in a real browser against the real server with a real (tiny, untrained) model."""

import re
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from shoal.server.guard import PAGE_POLICY
from tests.server.page_server import PATIENCE_MS, WEB, answered, ask, chromium, expect, opened_page

NAMESPACES = {"http://www.w3.org/2000/svg", "http://www.w3.org/1998/Math/MathML"}


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture
def page(browser, running) -> Iterator:
    with opened_page(browser, running.url) as opened:
        opened.wait_for_selector("#suggestions button")
        yield opened


def test_the_page_forbids_everything_foreign(running):
    assert httpx.get(running.url).headers["content-security-policy"] == PAGE_POLICY
    assert "unsafe" not in PAGE_POLICY and "default-src 'none'" in PAGE_POLICY
    for file in WEB.iterdir():
        response = httpx.get(f"{running.url}/web/{file.name}")
        assert response.status_code == 200 and response.headers["content-security-policy"] == PAGE_POLICY
        assert set(re.findall(r"https?://[\w./]+", response.text)) <= NAMESPACES


def test_no_script_of_the_page_writes_markup_or_runs_text():
    doors = re.compile(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|\beval\(|new Function|createContextualFragment"
    )
    for file in WEB.glob("*.js"):
        assert not doors.search(file.read_text()), file.name
    html = (WEB / "index.html").read_text()
    assert not re.search(r"\son\w+=|\sstyle=|<style|<script(?! type=\"module\" src=)", html)


@pytest.mark.browser
@pytest.mark.slow
def test_a_suggestion_is_asked_and_answered_and_asking_again_makes_a_second_version(page):
    page.click("#suggestions button >> nth=0")
    answered(page)
    assert page.inner_text(".bubble") == "how many fish?"
    assert re.search(r"\d+ tokens · .*first after .* · prompt \d+", page.inner_text(".facts"))
    page.click(".again")
    answered(page)
    assert page.locator(".message.answer").count() == 1
    assert page.inner_text(".answer .branches span") == "2/2"


@pytest.mark.browser
@pytest.mark.slow
def test_the_joules_and_the_cost_of_the_answer_are_those_the_server_counted(page):
    answers = []

    def pass_on(route):
        answers.append(route.fetch())
        route.fulfill(response=answers[-1])

    page.route("**/v1/chat/completions", pass_on)
    ask(page, "how many fish?")
    cost, joules = re.findall(r'"cost_usd": ?"([\d.]+)", ?"joules": ?([\d.]+)', answers[0].text())[-1]
    shown_cost, shown_joules, kilo = re.search(r"\$([\d.]+) · ([\d.]+) (k?)J", page.inner_text(".facts")).groups()
    assert float(shown_cost) == pytest.approx(float(cost), rel=0.06)
    assert float(shown_joules) * (1000 if kilo else 1) == pytest.approx(float(joules), rel=0.006)


@pytest.mark.browser
@pytest.mark.slow
def test_markup_in_a_question_and_in_a_suggestion_stays_text(page):
    assert page.locator("#suggestions b").count() == 0
    hostile = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
    ask(page, hostile)
    assert page.inner_text(".bubble") == hostile
    assert page.locator("#messages img, #messages script").count() == 0 and page.title() == "Shoal"


@pytest.mark.browser
@pytest.mark.slow
def test_thinking_that_is_always_on_is_folded_with_its_duration(page):
    page.click("#open-settings")
    page.select_option("#thinking", "on")
    page.fill("#temperature", "0")
    page.fill("#max_tokens", "40")
    page.click("#close-settings")
    ask(page, "how many fish?")
    details = page.locator(".thinking")
    assert details.is_visible() and details.get_attribute("open") is None
    assert page.inner_text(".thinking summary").startswith("Thought for ")
    assert not page.is_visible(".reasoning")
    page.click(".thinking summary")
    expect(page.locator(".reasoning")).to_have_text(re.compile(r"\S"))


@pytest.mark.browser
@pytest.mark.slow
def test_escape_stops_an_answer_and_the_server_is_told(page, running, monkeypatch):
    worker, has_begun = running.served.worker, threading.Event()
    step, tokens = worker.engine.step, []

    def step_without_end():
        if len(tokens) < 2:
            tokens.extend(events := step())
            return events
        has_begun.set()
        time.sleep(0.005)
        return []

    monkeypatch.setattr(worker.engine, "step", step_without_end)
    page.fill("#question", "count")
    page.press("#question", "Enter")
    assert has_begun.wait(PATIENCE_MS / 1000)
    page.keyboard.press("Escape")
    answered(page)
    assert "stopped" in page.inner_text(".facts")
    deadline = time.monotonic() + PATIENCE_MS / 1000
    while worker.num_open:
        assert time.monotonic() < deadline, "the engine still works on an answer that nobody reads"
        time.sleep(0.01)


@pytest.mark.browser
@pytest.mark.slow
def test_a_conversation_survives_a_reload(page):
    page.click("#open-settings")
    page.fill("#max_tokens", "20")
    page.click("#close-settings")
    ask(page, "how many fish?")
    before = page.locator("#messages").inner_text()
    page.reload()
    page.wait_for_selector(".message.answer")
    assert page.locator("#messages").inner_text() == before
    ask(page, "and now?")
    assert page.locator(".message").count() == 4


@pytest.mark.browser
@pytest.mark.slow
def test_a_question_too_long_for_the_context_is_refused_in_words_and_kept(browser, running):
    with opened_page(browser, running.url, allowed=("400",)) as page:
        long = "how many fish are there? " * 200
        ask(page, long)
        assert "256" in page.inner_text(".error")
        assert page.inner_text(".bubble") == long.strip()


@pytest.mark.browser
@pytest.mark.slow
def test_a_server_with_keys_is_asked_with_the_key_the_person_gives(browser, locked):
    with opened_page(browser, locked.url, allowed=("401",)) as page:
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "wrong")
        page.keyboard.press("Enter")
        page.wait_for_selector("#key-dialog[open]")
        page.fill("#key", "secret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#suggestions button")
        ask(page, "how many fish?")
        assert page.locator(".error:visible").count() == 0
        page.reload()
        page.wait_for_selector("#suggestions button", state="attached")
        assert not page.is_visible("#key-dialog")
        assert page.evaluate("Object.values(localStorage).includes('secret')") is False
