"""Conversations on the page: branches, settings, several of them, what is kept, what is said when things fail."""

import json
import re
from collections.abc import Iterator

import pytest

from tests.server.page_server import (
    ScriptedModel,
    answered,
    ask,
    chromium,
    expect,
    free_port,
    listening,
    opened_page,
    scripted_app,
    until,
    until_stored,
)

pytestmark = [pytest.mark.browser, pytest.mark.slow]

NUMBER_REACHABLE = """() => {
  const may = "a[href], button:not(:disabled), input:not(:disabled), select, textarea, summary, [tabindex='0']";
  const all = [...document.querySelectorAll(may)].filter((node) => node.checkVisibility() && !node.closest("[inert]"));
  all.forEach((node, turn) => { node.dataset.turn = turn; });
  return all.length;
}"""


@pytest.fixture(scope="module")
def browser():
    with chromium() as found:
        yield found


@pytest.fixture(scope="module")
def served() -> Iterator[tuple[str, ScriptedModel]]:
    model = ScriptedModel()
    with listening(scripted_app(model, None), free_port()) as url:
        yield url, model


@pytest.fixture
def model(served):
    served[1].__init__()
    return served[1]


@pytest.fixture
def page(browser, served, model):
    with opened_page(browser, served[0]) as opened:
        yield opened


def start(page, text):
    """Ask, and return as soon as the answer is on its way."""
    page.fill("#question", text)
    page.press("#question", "Enter")
    page.wait_for_selector("#stop", state="visible")


def texts(page, selector=".bubble"):
    return page.locator(selector).all_inner_texts()


def test_facts_tell_tokens_first_token_cache_cost_and_joules(page, model):
    model.hold_after, model.piece_s = 2, 0.03
    start(page, "how many fish are in the shoal?")
    expect(page.locator(".content")).to_have_text("how many fish")
    model.release()
    answered(page)
    assert re.fullmatch(
        r"12 tokens · \d[\d.]* tokens/s · first after [\d.]+ m?s · prompt 70, 64 from cache · \$0\.000012 · 4\.25 J",
        page.inner_text(".facts"),
    )


def test_facts_leave_out_what_the_server_does_not_say(page, model):
    model.usage = {"prompt_tokens": 70, "completion_tokens": 12}
    ask(page, "how many?")
    assert "$" not in page.inner_text(".facts") and " J" not in page.inner_text(".facts")


def test_speed_is_shown_while_the_answer_grows(page, model):
    model.answer, model.piece_s, model.hold_after = "fish " * 8, 0.03, 5
    start(page, "go")
    expect(page.locator(".facts")).to_have_text(re.compile(r"^≈5 tokens · [\d.]+ tokens/s"))
    page.click("#stop")
    answered(page)
    assert "stopped" in page.inner_text(".facts") and page.inner_text(".content") == ("fish " * 7).strip()


def test_thinking_counts_its_seconds_while_it_lasts_and_stays_open_when_opened(page, model):
    model.thinking, model.piece_s, model.answer = "12+2=14\n" * 6, 0.03, "14, done with thinking about it"
    model.hold_after = 3
    start(page, "go")
    expect(page.locator(".thinking summary")).to_have_text(re.compile(r"^Thinking… \d+ s$"))
    page.click(".thinking summary")
    expect(page.locator(".reasoning")).to_have_text(re.compile(r"12\+2=14"))
    model.release()
    answered(page)
    assert re.fullmatch(r"Thought for [\d.]+ m?s", page.inner_text(".thinking summary"))
    assert page.inner_text(".reasoning").count("12+2=14") == 6


def test_an_edited_question_branches_and_the_switch_brings_each_branch_back(page, model):
    ask(page, "first")
    ask(page, "second")
    page.hover(".question >> nth=0")
    page.click(".question >> nth=0 >> text=Edit")
    page.fill(".editor textarea", "changed")
    page.keyboard.press("Enter")
    answered(page)
    assert texts(page) == ["changed"]
    assert page.inner_text(".question .branches span") == "2/2"
    page.click(".question [aria-label='Previous version']")
    assert texts(page) == ["first", "second"]
    assert page.evaluate("document.activeElement.ariaLabel") == "Next version"
    page.keyboard.press("Enter")
    assert texts(page) == ["changed"]
    assert model.requests[-1]["messages"] == [{"role": "user", "content": "changed"}]


def test_branches_and_the_one_in_sight_survive_a_reload(page):
    ask(page, "first")
    page.click(".again")
    answered(page)
    page.click(".answer [aria-label='Previous version']")
    chosen = page.get_attribute(".answer", "data-node")
    until_stored(page, f"Object.values(records[0].chosen).includes({chosen!r})")
    page.reload()
    page.wait_for_selector(".answer")
    assert page.inner_text(".answer .branches span") == "1/2"


def test_a_follow_up_sends_the_branch_in_sight_without_its_thinking(page, model):
    model.thinking, model.answer = "hm", "one"
    ask(page, "first")
    model.answer = "two"
    page.click(".again")
    answered(page)
    page.click(".answer [aria-label='Previous version']")
    ask(page, "next")
    assert model.requests[-1]["messages"] == [
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "one"},
        {"role": "user", "content": "next"},
    ]


def test_escape_leaves_an_edit_and_the_text_is_as_before(page):
    ask(page, "first")
    page.focus("#question")
    page.keyboard.press("ArrowUp")
    page.fill(".editor textarea", "other")
    page.keyboard.press("Escape")
    assert texts(page) == ["first"] and page.locator(".editor").count() == 0


def test_settings_reach_the_request_and_wrong_ones_do_not(page, model):
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#temperature", "0")
    page.fill("#top_p", "0.5")
    page.fill("#max_tokens", "64")
    page.fill("#seed", "7")
    page.select_option("#thinking", "off")
    page.fill("#temperature", "5")
    assert "0 to 2" in page.inner_text("#temperature-note")
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    ask(page, "hello")
    sent = model.requests[-1]
    assert sent["messages"][0] == {"role": "system", "content": "Be brief."}
    wanted = {"temperature": 0, "top_p": 0.5, "max_tokens": 64, "seed": 7, "thinking": {"type": "disabled"}}
    assert {key: sent[key] for key in wanted} == wanted


def test_further_sampling_settings_reach_the_request_only_when_set(page, model):
    page.click("#open-settings")
    page.click("text=More sampling")
    page.fill("#top_k", "40")
    page.fill("#repetition_penalty", "1.1")
    page.fill("#presence_penalty", "-3")
    assert "-2 to 2" in page.inner_text("#presence_penalty-note")
    page.fill("#presence_penalty", "")
    ask(page, "hello")
    sent = model.requests[-1]
    assert sent["top_k"] == 40 and sent["repetition_penalty"] == 1.1
    assert not {"presence_penalty", "frequency_penalty", "min_p", "seed", "tools", "thinking"} & set(sent)


def test_calls_of_tools_are_shown_and_what_came_of_them_goes_back(page, model):
    weather = {"name": "weather", "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}
    page.click("#open-settings")
    page.click("summary >> text=Tools")
    page.fill("#tools", "[{]")
    assert "Not used" in page.inner_text("#tools-note")
    page.fill("#tools", json.dumps([weather]))
    assert page.inner_text("#marks") == "1 tool offered"
    model.answer, model.calls = "", [("weather", '{"city": "<b>Oslo</b>"}'), ("weather", '{"city": "Bergen"')]
    ask(page, "which is warmer?")
    assert model.requests[-1]["tools"] == [{"type": "function", "function": weather}]
    assert texts(page, ".call pre") == ['{\n  "city": "<b>Oslo</b>"\n}', '{"city": "Bergen"']
    page.fill(".call textarea >> nth=0", "12 C")
    page.click("text=Send results")
    assert page.evaluate("() => document.activeElement === document.querySelectorAll('.call textarea')[1]")
    page.fill(".call textarea >> nth=1", "9 C")
    model.answer, model.calls = "Oslo", []
    page.click("text=Send results")
    answered(page)
    calls = [
        {"id": f"call-{index}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
        for index, arguments in enumerate(['{"city": "<b>Oslo</b>"}', '{"city": "Bergen"'])
    ]
    history = [
        {"role": "user", "content": "which is warmer?"},
        {"role": "assistant", "content": "", "tool_calls": calls},
        {"role": "tool", "tool_call_id": "call-0", "content": "12 C"},
        {"role": "tool", "tool_call_id": "call-1", "content": "9 C"},
    ]
    assert model.requests[-1]["messages"] == history
    page.reload()
    page.wait_for_selector(".answer")
    assert texts(page, ".results pre") == ["12 C", "9 C"] and page.inner_text(".answer .content >> nth=-1") == "Oslo"
    assert page.locator(".call textarea, .calls button:visible").count() == 0


def test_settings_stay_with_their_conversation_and_the_next_one_inherits_all_but_the_system_prompt(page, model):
    page.click("#open-settings")
    page.fill("#system", "Be brief.")
    page.fill("#seed", "7")
    ask(page, "hello")
    page.click("#new-chat")
    assert page.input_value("#system") == "" and page.input_value("#seed") == "7"
    page.fill("#seed", "")
    page.click("#conversations .title >> nth=-1")
    assert page.input_value("#system") == "Be brief." and page.input_value("#seed") == "7"
    page.reload()
    page.click("#open-settings")
    expect(page.locator("#system")).to_have_value("Be brief.")


def test_conversations_are_listed_searched_renamed_deleted_and_brought_back(page):
    ask(page, "alpha question")
    page.click("#new-chat")
    ask(page, "beta question")
    assert texts(page, "#conversations .title") == ["beta question", "alpha question"]
    page.fill("#search", "ALPHA")
    assert texts(page, "#conversations .title") == ["alpha question"]
    page.fill("#search", "")
    page.click("#conversations li >> nth=0 >> [aria-label^=Rename]")
    page.keyboard.type("Fish <b>")
    page.keyboard.press("Enter")
    assert texts(page, "#conversations .title")[0] == "Fish <b>"
    page.click("#conversations li >> nth=0 >> [aria-label^=Delete]")
    assert texts(page, "#conversations .title") == ["alpha question"]
    page.click("#toast button")
    assert texts(page) == ["beta question"]
    until_stored(page, "records.some(({ title }) => title === 'Fish <b>')")
    page.reload()
    page.wait_for_selector(".bubble")
    assert texts(page, "#conversations .title") == ["Fish <b>", "alpha question"]


def test_an_answer_goes_on_while_another_conversation_is_open(page, model):
    model.answer, model.hold_after = "fish " * 20, 2
    start(page, "slow")
    page.click("#new-chat")
    expect(page.locator("#send")).to_be_visible()
    expect(page.locator("#conversations .busy")).to_have_count(1)
    model.release()
    page.wait_for_selector("#conversations .busy", state="detached")
    page.click("#conversations .title >> text=slow")
    assert page.inner_text(".content").count("fish") == 20


def test_two_tabs_on_one_conversation_lose_nothing(browser, served, model):
    with opened_page(browser, served[0]) as one:
        ask(one, "from one")
        two = one.context.new_page()
        two.goto(served[0])
        two.wait_for_selector(".bubble")
        ask(two, "from two")
        expect(one.locator(".bubble")).to_have_count(2)
        ask(one, "from one again")
        expect(two.locator(".bubble")).to_have_count(3)
        two.reload()
        two.wait_for_selector(".bubble")
        assert texts(two) == ["from one", "from two", "from one again"]


def test_typed_text_survives_reload_and_change_of_conversation(page):
    page.fill("#question", "half a thou")
    page.reload()
    assert page.input_value("#question") == "half a thou"
    ask(page, "sent")
    page.fill("#question", "draft in the first")
    page.click("#new-chat")
    assert page.input_value("#question") == ""
    page.click("#conversations .title >> text=sent")
    assert page.input_value("#question") == "draft in the first"


def test_an_edit_survives_a_reload(page):
    ask(page, "first")
    page.focus("#question")
    page.keyboard.press("ArrowUp")
    page.fill(".editor textarea", "much better text")
    page.reload()
    page.wait_for_selector(".bubble")
    page.focus("#question")
    page.keyboard.press("ArrowUp")
    assert page.input_value(".editor textarea") == "much better text"


def test_an_answer_cut_short_by_closing_the_page_is_kept_and_said_to_be_unfinished(page, model):
    model.answer, model.hold_after = "fish " * 100, 4
    start(page, "slow")
    until_stored(page, "Object.values(records[0]?.nodes ?? {}).some(({ content }) => content.startsWith('fish fish'))")
    page.reload()
    model.release()
    page.wait_for_selector(".answer .facts")
    assert "unfinished" in page.inner_text(".facts")
    assert page.inner_text(".content").startswith("fish fish")


def test_exports_hold_every_branch_as_json_and_what_is_in_sight_as_markdown(page, model):
    model.thinking = "let me think"
    ask(page, "first <b>")
    page.click(".again")
    answered(page)
    page.click("#open-settings")
    with page.expect_download() as waiting:
        page.click("#export-json")
    assert waiting.value.suggested_filename == "shoal-first-b.json"
    tree = json.loads(waiting.value.path().read_text())
    assert sorted(node["role"] for node in tree["nodes"].values()) == ["assistant", "assistant", "user"]
    with page.expect_download() as waiting:
        page.click("#export-markdown")
    text = waiting.value.path().read_text()
    assert (
        text.startswith("# first <b>\n\n## You\n\nfirst <b>\n\n## scripted\n\n> **Thought for")
        and "> let me think" in text
    )
    assert text.count("## scripted") == 1
    with page.expect_download() as waiting:
        page.click("#export-all")
    assert len(json.loads(waiting.value.path().read_text())["conversations"]) == 1


@pytest.mark.parametrize(
    "status, message, shown",
    [
        (400, "the conversation is 900 tokens long", "900 tokens long."),
        (402, "", "balance of this key is used up"),
        (422, "temperature: too hot", "temperature: too hot."),
        (429, "", "wait a moment"),
        (503, "256 requests are waiting", "The server is busy; wait a moment, then try again. It said: 256 requests"),
    ],
)
def test_a_refusal_is_said_in_words_and_trying_again_works(browser, served, model, status, message, shown):
    model.refusal = (status, message)
    with opened_page(browser, served[0], allowed=(str(status),)) as page:
        ask(page, "hello")
        assert shown in page.inner_text(".error")
        model.refusal = None
        page.click(".again >> text=Try again")
        answered(page)
        assert page.inner_text(".content") == "hello"
        assert page.locator(".error:visible, .answer .branches:visible").count() == 0


@pytest.mark.parametrize("ending, shown", [("error", "the engine fell over"), ("cut", "connection broke")])
def test_an_answer_that_breaks_keeps_what_had_come(browser, served, model, ending, shown):
    model.ending = ending
    with opened_page(browser, served[0], allowed=("ERR_",)) as page:
        ask(page, "a long question")
        assert shown in page.inner_text(".error") and page.inner_text(".content") == "a long"


def test_a_lost_server_is_noticed_and_so_is_its_return(browser, model):
    port = free_port()
    with listening(scripted_app(model, None), port) as url, opened_page(browser, url, allowed=("ERR_",)) as page:
        page.wait_for_selector("#suggestions button")
        page.route("**/*", lambda route: route.abort("connectionrefused"))
        ask(page, "are you there?")
        expect(page.locator(".error")).to_contain_text("cannot be reached")
        expect(page.locator("#connection")).to_be_visible()
        assert texts(page) == ["are you there?"]
        page.unroute("**/*")
        page.wait_for_selector("#connection", state="hidden")
        page.click(".again >> text=Try again")
        answered(page)
        assert page.inner_text(".content") == "are you there?"


def test_sending_while_an_answer_is_written_keeps_the_text(page, model):
    model.answer, model.hold_after = "fish " * 40, 1
    start(page, "slow")
    page.fill("#question", "the next")
    page.press("#question", "Enter")
    assert page.input_value("#question") == "the next" and texts(page) == ["slow"]
    page.keyboard.press("Escape")
    answered(page)


def test_everything_can_be_reached_and_used_by_keyboard(page):
    page.wait_for_selector("#suggestions button")
    assert page.evaluate("document.activeElement.id") == "question"
    page.keyboard.type("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert page.input_value("#question") == "one\ntwo"
    page.keyboard.press("Enter")
    answered(page)
    page.evaluate("document.activeElement.blur()")
    page.keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "question"
    page.fill("#question", "then")
    count = page.evaluate(NUMBER_REACHABLE)
    first = seen = int(page.evaluate("() => document.activeElement.dataset.turn"))
    for _ in range(count + 1):  # one turn belongs to the browser itself, between the end and the start
        page.keyboard.press("Tab")
        turn = page.evaluate("() => document.activeElement.dataset.turn")
        if turn is not None:
            assert int(turn) == (seen + 1) % count
            seen = int(turn)
    assert seen in (first, (first + 1) % count)
    turns = {page.get_attribute(f"#{name}", "data-turn") for name in ("new-chat", "search", "to-runs", "send")}
    assert None not in turns


def test_every_button_and_field_has_a_name(page):
    ask(page, "hello")
    page.click("#open-settings")
    nameless = page.evaluate(
        """() => [...document.querySelectorAll("button, input, textarea, select, a")].filter((node) =>
        !(node.ariaLabel || node.textContent.trim() || node.labels?.length)).map((node) => node.outerHTML)"""
    )
    assert nameless == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_ground_in_both_schemes(browser, served, model, scheme):
    """WCAG 2 AA wants 4.5 : 1."""
    with opened_page(browser, served[0], color_scheme=scheme) as page:
        ask(page, "hello")
        ratios = page.evaluate(
            """() => [[".content", "body"], [".facts", "body"], [".bubble", ".bubble"], [".title", ".current"]].map(([text, ground]) => {
              const light = (selector, property) => {
                const parts = getComputedStyle(document.querySelector(selector))[property].match(/[\\d.]+/g).slice(0, 3);
                const [r, g, b] = parts.map((part) => part / 255).map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4));
                return 0.2126 * r + 0.7152 * g + 0.0722 * b;
              };
              const [a, b] = [light(text, "color"), light(ground, "backgroundColor")];
              return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
            })"""
        )
        assert min(ratios) > 4.5


def test_on_a_phone_nothing_is_wider_than_the_screen_and_the_list_is_a_drawer(browser, served, model):
    model.answer = (
        "| a | b |\n|---|---|\n| "
        + "wide " * 40
        + "| x |\n\n```\n"
        + "long " * 60
        + "\n```\n\n$$"
        + "x+" * 60
        + "x$$\n"
        + "w" * 300
    )
    viewport = {"width": 360, "height": 740}
    with opened_page(browser, served[0], viewport=viewport, is_mobile=True, has_touch=True) as page:
        ask(page, "m" * 200)
        assert page.evaluate("document.documentElement.scrollWidth") == 360
        assert page.evaluate("document.querySelector('#log').scrollWidth <= 360")
        assert page.evaluate("document.querySelector('#sidebar').inert")
        page.click("#open-sidebar")
        page.click("#new-chat")
        expect(page.locator("#welcome")).to_be_visible()
        assert page.evaluate("document.querySelector('#sidebar').inert")
        page.click("#open-settings")
        assert page.evaluate("document.querySelector('#settings').getBoundingClientRect().right <= 360")


def test_the_view_follows_the_end_until_one_scrolls_away(page, model):
    at_end = """() => { const log = document.querySelector('#log');
        return log.scrollTop > 300 && log.scrollHeight - log.scrollTop - log.clientHeight < 2; }"""
    model.answer, model.hold_after = "line\n\n" * 200, 80
    start(page, "long")
    until(page, "() => document.querySelectorAll('.content p').length >= 92")
    until(page, at_end)
    page.evaluate("() => { document.querySelector('#log').scrollTop = 0; }")
    page.wait_for_selector("#jump", state="visible")
    model.hold_after = 160
    until(page, "() => document.querySelectorAll('.content p').length >= 184")
    assert page.evaluate("() => document.querySelector('#log').scrollTop") == 0
    page.click("#jump")
    until(page, at_end)
    model.release()
    answered(page)
    until(page, "() => document.querySelectorAll('.content p').length", 200)
    until(page, at_end)


def test_without_storage_the_page_works_and_says_that_nothing_is_kept(browser, served, model):
    with opened_page(browser, served[0]) as page:
        page.add_init_script(
            "Object.defineProperty(window, 'indexedDB', { value: { open() { throw new Error('no'); } } })"
        )
        page.reload()
        page.wait_for_selector("#toast p")
        assert "keeps no data" in page.inner_text("#toast")
        ask(page, "hello")
        assert page.inner_text(".content") == "hello"


def test_damaged_records_in_the_browser_do_not_break_the_page(page, served):
    ask(page, "whole")
    page.evaluate(
        """() => new Promise((resolve) => { const opening = indexedDB.open("shoal", 1); opening.onsuccess = () => {
        const records = opening.result.transaction("conversations", "readwrite").objectStore("conversations");
        const parts = { title: "", updated: 0, chosen: {}, settings: {} };
        const message = { role: "user", content: "round and round" };
        const circle = { a: { ...message, id: "a", parent: null }, b: { ...message, id: "a", parent: "a" } };
        for (const bad of [{ id: "x" }, { id: "y", title: 5, nodes: null, chosen: {}, settings: {} },
          { ...parts, id: "v", nodes: circle }, { ...parts, id: "w", nodes: {}, chosen: null },
          { id: "z", title: "", updated: 0, nodes: { a: { id: "a", role: "system", content: 3 } }, chosen: {}, settings: {} }]) records.put(bad);
        records.transaction.oncomplete = () => { opening.result.close(); resolve(); }; }; })"""
    )
    page.reload()
    page.wait_for_selector(".bubble")
    assert texts(page, "#conversations .title") == ["whole"]
