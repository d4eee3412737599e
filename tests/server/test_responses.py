"""`/v1/responses` with OpenAI's own client, unchanged."""

import json
from typing import Literal

import openai
import pydantic
import pytest

TOOLS = [
    {
        "type": "function",
        "name": "weather",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}},
            "required": ["city"],
            "additionalProperties": False,
        },
        "strict": True,
    }
]


@pytest.fixture
def client(roomy):
    return openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0)


def ask(client, **fields):
    return client.responses.create(**{"model": "tiny", "input": "how many fish?", "max_output_tokens": 24, **fields})


def test_an_answer_is_the_chat_answer_in_items(client):
    answer = ask(client, temperature=0, instructions="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "how many fish?"}]
    chat = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=24)
    assert answer.output_text == chat.choices[0].message.content
    assert answer.usage.input_tokens == chat.usage.prompt_tokens
    assert answer.usage.total_tokens == answer.usage.input_tokens + answer.usage.output_tokens
    assert answer.status == ("incomplete" if chat.choices[0].finish_reason == "length" else "completed")


@pytest.mark.parametrize("effort", [None, "high"])
def test_a_stream_adds_up_to_the_whole_response(client, effort):
    reasoning = {"effort": effort} if effort else openai.omit
    whole = ask(client, temperature=0, reasoning=reasoning)
    kinds, text, thought, final = [], "", "", None
    for number, event in enumerate(ask(client, temperature=0, reasoning=reasoning, stream=True)):
        assert event.sequence_number == number
        kinds.append(event.type)
        text += event.delta if event.type == "response.output_text.delta" else ""
        thought += event.delta if event.type == "response.reasoning_text.delta" else ""
        final = event.response if event.type.startswith("response.") and hasattr(event, "response") else final
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] in ("response.completed", "response.incomplete")
    assert text == whole.output_text == final.output_text
    told = "".join(part.text for item in whole.output if item.type == "reasoning" for part in item.content)
    assert thought == told and bool(thought) == bool(effort)
    assert [item.type for item in final.output] == [item.type for item in whole.output]
    assert kinds.count("response.output_item.added") == kinds.count("response.output_item.done") == len(final.output)


class Count(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="forbid")
    n: Literal[1, 2]


def test_the_clients_own_stream_helper_parses_what_it_asked_for(client):
    with client.responses.stream(model="tiny", input="how many fish?", temperature=0, text_format=Count) as stream:
        text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
        final = stream.get_final_response()
    assert final.output_text == text
    assert final.output_parsed.n == json.loads(text)["n"]


def test_calls_are_items_and_their_outputs_go_back(client):
    answer = ask(client, tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_output_tokens=200)
    (call,) = [item for item in answer.output if item.type == "function_call"]
    assert json.loads(call.arguments)["city"] in ("Oslo", "Rome")
    output = {"type": "function_call_output", "call_id": call.call_id, "output": "rain"}
    by_hand = [{"role": "user", "content": "how many fish?"}, *[item.model_dump() for item in answer.output], output]
    first = ask(client, input=by_hand, tools=TOOLS)
    second = ask(client, input=[output], previous_response_id=answer.id, tools=TOOLS)
    assert first.usage.input_tokens == second.usage.input_tokens > answer.usage.input_tokens


def test_streamed_arguments_are_the_whole_ones(client):
    fields = {"tools": TOOLS, "tool_choice": {"type": "function", "name": "weather"}, "max_output_tokens": 200}
    pieces, done = "", None
    for event in ask(client, stream=True, **fields):
        pieces += event.delta if event.type == "response.function_call_arguments.delta" else ""
        done = event.arguments if event.type == "response.function_call_arguments.done" else done
    assert pieces == done and json.loads(done)["city"] in ("Oslo", "Rome")


def test_an_answer_can_be_made_to_fit_a_schema(client):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"format": {"type": "json_schema", "name": "n", "schema": schema, "strict": True}}
    assert json.loads(ask(client, text=form, temperature=0, max_output_tokens=80).output_text)["n"] in (1, 2)


def test_earlier_answers_are_remembered_unless_not_stored(client):
    first = ask(client, temperature=0)
    second = ask(client, previous_response_id=first.id, input="and?")
    assert second.usage.input_tokens > first.usage.input_tokens and second.previous_response_id == first.id
    unkept = ask(client, store=False)
    for name in (unkept.id, "resp_unknown"):
        with pytest.raises(openai.BadRequestError, match="not kept"):
            ask(client, previous_response_id=name)


@pytest.mark.parametrize(
    "items",
    [
        [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}],
        [{"role": "king", "content": "x"}],
        [{"type": "item_reference", "id": "x"}],
        [{"type": "function_call_output", "output": "x"}],
        [{"type": "reasoning", "summary": []}],
    ],
)
def test_items_that_nobody_can_read_are_refused(client, items):
    with pytest.raises(openai.BadRequestError):
        ask(client, input=items)
