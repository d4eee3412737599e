"""`/v1/messages` with Anthropic's own client, unchanged."""

import json

import anthropic
import httpx
import pytest

TOOLS = [
    {
        "name": "weather",
        "description": "Weather of a city.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
    }
]
GREEDY = {"temperature": 0}
TURNS = [{"role": "user", "content": "how many fish?"}]


@pytest.fixture
def client(roomy):
    return anthropic.Anthropic(base_url=roomy.url, api_key="none", max_retries=0)


def ask(client, **fields):
    given = {"model": "tiny", "max_tokens": 24, "messages": TURNS, **fields}
    given["extra_body"] = {"temperature": 0, **fields.get("extra_body", {})}
    return client.messages.create(**given)


def test_text_comes_in_blocks_with_anthropics_counts(client, roomy):
    answer = ask(client, system="Be brief.")
    prompt = [{"role": "system", "content": "Be brief."}, *TURNS]
    count = len(roomy.served.template.encode(roomy.served.tokenizer, prompt))
    assert answer.usage.input_tokens + answer.usage.cache_read_input_tokens == count
    assert answer.stop_reason in ("end_turn", "max_tokens") and answer.role == "assistant"
    chat = {"messages": prompt, "max_tokens": 24, "temperature": 0}
    same = httpx.post(f"{roomy.url}/v1/chat/completions", json=chat).json()["choices"][0]["message"]
    assert "".join(block.text for block in answer.content if block.type == "text") == same["content"]


def test_a_stream_adds_up_to_the_whole_message(client):
    for extra in ({}, {"thinking": {"type": "enabled", "budget_tokens": 6}}):
        whole = ask(client, **extra)
        with client.messages.stream(model="tiny", max_tokens=24, messages=TURNS, extra_body=GREEDY, **extra) as stream:
            kinds = [event.type for event in stream]
            final = stream.get_final_message()
        shape = [(block.type, getattr(block, "text", ""), getattr(block, "thinking", "")) for block in whole.content]
        assert shape == [
            (block.type, getattr(block, "text", ""), getattr(block, "thinking", "")) for block in final.content
        ]
        assert kinds[0] == "message_start" and kinds[-1] == "message_stop"
        assert final.stop_reason == whole.stop_reason
        assert final.usage.output_tokens == whole.usage.output_tokens


def test_thinking_comes_in_a_block_of_its_own(client):
    answer = ask(client, thinking={"type": "enabled", "budget_tokens": 5})
    assert answer.content[0].type == "thinking" and answer.content[0].thinking
    assert all(block.type == "text" for block in answer.content[1:])
    later = [*TURNS, {"role": "assistant", "content": answer.content}, {"role": "user", "content": "and?"}]
    assert ask(client, messages=later).usage.output_tokens > 0


def test_tool_use_and_its_result_make_a_round_trip(client, roomy):
    answer = ask(client, tools=TOOLS, tool_choice={"type": "any", "disable_parallel_tool_use": True}, max_tokens=200)
    (use,) = [block for block in answer.content if block.type == "tool_use"]
    assert answer.stop_reason == "tool_use"
    assert use.name == "weather" and use.input["city"] in ("Oslo", "Rome")
    history = [
        *TURNS,
        {"role": "assistant", "content": answer.content},
        {"role": "user", "content": [{"type": "tool_result", "tool_use_id": use.id, "content": "rain"}]},
    ]
    counted = client.messages.count_tokens(model="tiny", messages=history, tools=TOOLS).input_tokens
    final = ask(client, messages=history, tools=TOOLS, max_tokens=4)
    assert final.usage.input_tokens + final.usage.cache_read_input_tokens == counted


def test_streamed_tool_input_is_the_whole_one(client):
    fields = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 200}
    with client.messages.stream(model="tiny", messages=TURNS, extra_body=GREEDY, **fields) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        final = stream.get_final_message()
    assert json.loads("".join(pieces)) == final.content[-1].input
    assert final.stop_reason == "tool_use"


def test_a_stop_sequence_is_named(client):
    text = ask(client).content[0].text
    answer = ask(client, stop_sequences=[text[2:4]])
    assert (answer.stop_reason, answer.stop_sequence) == ("stop_sequence", text[2:4])
    assert answer.content[0].text == text[: text.find(text[2:4])]


def test_a_last_assistant_turn_is_the_beginning_of_the_answer(client):
    plain = client.messages.count_tokens(model="tiny", messages=TURNS).input_tokens
    begun = [*TURNS, {"role": "assistant", "content": "There are"}]
    assert client.messages.count_tokens(model="tiny", messages=begun).input_tokens > plain
    assert ask(client, messages=begun).usage.output_tokens > 0


def test_errors_have_anthropics_shape(client, roomy):
    picture = [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "x"}}]}]
    for fields, kind in [
        ({"messages": picture}, anthropic.BadRequestError),
        ({"max_tokens": 0}, anthropic.UnprocessableEntityError),
        ({"messages": [{"role": "user", "content": "x" * 20000}]}, anthropic.BadRequestError),
    ]:
        with pytest.raises(kind) as caught:
            ask(client, **fields)
        assert caught.value.body["type"] == "error" and caught.value.body["error"]["message"]


def test_a_key_may_come_in_anthropics_header(locked):
    good = anthropic.Anthropic(base_url=locked.url, api_key="secret", max_retries=0)
    assert ask(good, max_tokens=2).usage.output_tokens > 0
    assert [model.id for model in good.models.list()] == ["tiny"]
    with pytest.raises(anthropic.AuthenticationError):
        ask(anthropic.Anthropic(base_url=locked.url, api_key="wrong", max_retries=0))
