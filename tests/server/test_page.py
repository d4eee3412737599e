"""The page, clicked through in a real browser against a real server."""

import shutil

import httpx
import pytest

from shoal.server.app import PAGE_POLICY

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@pytest.fixture
def page(running):
    if CHROMIUM is None:
        pytest.skip("no chromium on this machine; install Debian's package 'chromium' to run browser tests")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed (extra 'dev')")
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        page = browser.new_page()
        page.problems = []
        page.on("pageerror", lambda error: page.problems.append(str(error)))
        page.on("console", lambda message: page.problems.append(message.text) if message.type == "error" else None)
        page.goto(running.url)
        yield page
        assert page.problems == []
        browser.close()


def test_the_page_forbids_everything_foreign(running):
    response = httpx.get(running.url)
    assert response.headers["content-security-policy"] == PAGE_POLICY
    for path in ("/", "/web/chat.js", "/web/style.css"):
        assert (
            "http://" not in httpx.get(running.url + path).text and "https://" not in httpx.get(running.url + path).text
        )


@pytest.mark.browser
@pytest.mark.slow
def test_a_suggestion_is_asked_and_answered_and_can_be_asked_again(page):
    page.click("#suggestions button >> nth=0")
    page.wait_for_selector(".again:visible", timeout=30_000)
    assert page.inner_text(".question") == "how many fish?"
    assert "tokens/s" in page.inner_text(".facts")
    page.click(".again:visible")
    page.wait_for_selector(".again:visible", timeout=30_000)
    assert page.locator(".answer").count() == 1


@pytest.mark.browser
@pytest.mark.slow
def test_markup_stays_text(page):
    assert page.locator("#suggestions b").count() == 0
    hostile = "<img src=x onerror=alert(1)><script>document.title='owned'</script>"
    page.fill("#question", hostile)
    page.keyboard.press("Enter")
    page.wait_for_selector(".again:visible", timeout=30_000)
    assert page.inner_text(".question") == hostile
    assert page.locator("main img, main script").count() == 0 and page.title() == "Shoal"


@pytest.mark.browser
@pytest.mark.slow
def test_escape_stops_an_answer(page):
    page.fill("#question", "count")
    page.keyboard.press("Enter")
    page.wait_for_selector("#stop:visible")
    page.keyboard.press("Escape")
    page.wait_for_selector("#send:visible", timeout=5_000)
    page.click("#clear")
    assert page.locator(".answer").count() == 0 and page.is_visible("#welcome")
