import pytest

from shoal.errors import RequestError
from shoal.server.profiles import under_profile, under_text_profile, wants_thinking
from shoal.server.schemas import ChatRequest, TextRequest

CALL = {"id": "c", "function": {"name": "f", "arguments": "{}"}}


def body(**fields):
    return ChatRequest.model_validate({"messages": [{"role": "user", "content": "x"}], **fields})


@pytest.mark.parametrize(
    "fields, lenient, r1, current",
    [
        ({}, None, True, True),
        ({"model": "deepseek-chat"}, False, False, False),
        ({"model": "deepseek-reasoner"}, True, True, True),
        ({"thinking": {"type": "disabled"}}, False, True, False),
        ({"thinking": {"type": "enabled"}, "model": "deepseek-chat"}, True, False, True),
        ({"thinking": {"type": "adaptive"}}, None, True, True),
        ({"reasoning_effort": "none"}, False, True, False),
        ({"reasoning_effort": "low"}, True, True, True),
        ({"chat_template_kwargs": {"thinking": True}}, True, True, True),
        ({"chat_template_kwargs": {"enable_thinking": False}}, False, True, False),
    ],
)
def test_who_decides_about_thinking(fields, lenient, r1, current):
    asked = body(**fields)
    assert [wants_thinking(asked, profile) for profile in ("lenient", "r1", "current")] == [lenient, r1, current]


@pytest.mark.parametrize(
    "profile, fields, part",
    [
        ("r1", {"logprobs": True}, "logprobs"),
        ("r1", {"tools": [{"function": {"name": "f"}}]}, "tools"),
        ("r1", {"messages": [{"role": "assistant", "content": "x", "reasoning_content": "y"}]}, "reasoning_content"),
        ("r1", {"response_format": {"type": "json_object"}}, "word 'json'"),
        ("current", {"messages": [{"role": "assistant", "tool_calls": [CALL]}]}, "must be passed back to the API"),
        ("current", {"response_format": {"type": "json_object"}, "thinking": {"type": "disabled"}}, "word 'json'"),
    ],
)
def test_what_an_era_refuses_is_fine_where_nothing_is_refused(profile, fields, part):
    assert under_profile(body(**fields), "lenient") == body(**fields)
    with pytest.raises(RequestError, match=part):
        under_profile(body(**fields), profile)


def test_temperature_and_its_kin_have_no_effect_on_thinking():
    hot = {"temperature": 2, "top_p": 0.1, "presence_penalty": 1, "frequency_penalty": 1, "seed": 3}
    for profile in ("r1", "current"):
        calm = under_profile(body(**hot), profile)
        assert (calm.temperature, calm.top_p, calm.presence_penalty, calm.frequency_penalty) == (None,) * 4
        assert calm.seed == 3
        chat = body(**hot, model="deepseek-chat")
        assert under_profile(chat, profile) == chat
    assert under_profile(body(**hot), "lenient").temperature == 2


def test_calls_that_come_back_with_their_thinking_are_taken():
    calls = body(messages=[{"role": "assistant", "tool_calls": [CALL], "reasoning_content": "hm"}])
    assert under_profile(calls, "current").messages == calls.messages


def test_the_reasoner_does_not_fill_in():
    with pytest.raises(RequestError, match="FIM"):
        under_text_profile(TextRequest(prompt="a", model="deepseek-reasoner"), "r1", has_suffix=True)
    under_text_profile(TextRequest(prompt="a", model="deepseek-chat"), "r1", has_suffix=True)
