"""Two agent frameworks, unchanged, in a loop of their own: ask, call, answer. Grammar makes even a random model play along.

pydantic-ai speaks chat completions and asks for its structured output as a tool; openai-agents speaks Responses and streams.
"""

import asyncio
from typing import Literal

import openai
import pytest

WHY = "not installed; pip install 'shoal[agents]' runs this test"


def test_pydantic_ai_calls_a_tool_and_gets_its_structured_output(roomy):
    pydantic = pytest.importorskip("pydantic")
    agents = pytest.importorskip("pydantic_ai", reason=f"pydantic-ai is {WHY}")
    from pydantic_ai.models.openai import OpenAIChatModel
    from pydantic_ai.providers.openai import OpenAIProvider

    class Count(pydantic.BaseModel):
        n: Literal[1, 2]

    model = OpenAIChatModel("tiny", provider=OpenAIProvider(base_url=f"{roomy.url}/v1", api_key="none"))
    agent = agents.Agent(model, output_type=Count, model_settings={"seed": 3, "max_tokens": 200})
    result = asyncio.run(agent.run("how many fish?"))
    assert result.output.n in (1, 2)
    assert result.usage.output_tokens > 0


def test_openai_agents_run_their_loop_over_responses(roomy):
    agents = pytest.importorskip("agents", reason=f"openai-agents is {WHY}")
    agents.set_tracing_disabled(True)
    asked = []

    @agents.function_tool
    def weather(city: Literal["Oslo", "Rome"]) -> str:
        """Weather of a city."""
        asked.append(city)
        return "rain"

    client = openai.AsyncOpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0)
    agent = agents.Agent(
        name="meteorologist",
        instructions="Be brief.",
        model=agents.OpenAIResponsesModel(model="tiny", openai_client=client),
        tools=[weather],
        model_settings=agents.ModelSettings(
            tool_choice="required", parallel_tool_calls=False, max_tokens=200, temperature=0
        ),
        tool_use_behavior="stop_on_first_tool",
    )

    async def run():
        streamed = agents.Runner.run_streamed(agent, "how is the weather?", max_turns=3)
        kinds = [event.type async for event in streamed.stream_events()]
        return streamed.final_output, kinds

    output, kinds = asyncio.run(run())
    assert output == "rain" and asked and set(asked) <= {"Oslo", "Rome"}
    assert "run_item_stream_event" in kinds
