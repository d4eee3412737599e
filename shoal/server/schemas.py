"""What clients may send: OpenAI's chat and text requests with DeepSeek's additions, unknown fields ignored.

Every number has bounds and every list a length, because each is a lever on somebody else's memory or time (CVE-2026-34756:
an unbounded `n`). JSON's own extras, NaN and infinities, are refused before they get here (`body.py`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints

MAX_MESSAGES = 2000
MAX_TOOLS = 128
MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 16

StopString = Annotated[str, StringConstraints(min_length=1, max_length=256)]
Stops = Annotated[
    list[StopString],
    Field(max_length=MAX_STOPS),
    BeforeValidator(lambda value: [] if value is None else [value] if isinstance(value, str) else value),
]
"""One string or several; null is none."""


class Lenient(BaseModel):
    """Fields that nobody here knows are ignored: clients send what other servers want."""

    model_config = ConfigDict(extra="ignore")


class FunctionCall(Lenient):
    """A call that the model made, as it comes back in the history."""

    name: str = Field(max_length=256)
    arguments: str = ""


class ToolCall(Lenient):
    """One of the calls of an assistant's message."""

    id: str = Field(default="", max_length=256)
    type: Literal["function"] = "function"
    function: FunctionCall


class Message(Lenient):
    """One turn."""

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[dict[str, Any]] | None = None
    reasoning_content: str | None = None
    """Of earlier turns: accepted, and left out of the prompt, as the published template does."""
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=MAX_TOOLS)
    tool_call_id: str | None = Field(default=None, max_length=256)
    prefix: bool = False
    """Of a last assistant message (beta): the answer goes on from this text."""

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content if self.content is not None else ""}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        return message


class Function(Lenient):
    """What a tool is called and takes."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str = Field(default="", max_length=16384)
    parameters: dict[str, Any] = Field(default_factory=dict)
    strict: bool | None = None


class Tool(Lenient):
    """A function that the model may ask for."""

    type: Literal["function"]
    function: Function


class NamedFunction(Lenient):
    """Which function must be called."""

    name: str


class NamedTool(Lenient):
    """`tool_choice` that names one."""

    type: Literal["function"]
    function: NamedFunction


class JsonSchema(Lenient):
    """A schema that the answer must fit."""

    name: str = "answer"
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponseFormat(Lenient):
    """Free text, any JSON object, JSON of a schema, or (an extension) a regular expression or a Lark grammar."""

    type: Literal["text", "json_object", "json_schema", "regex", "grammar"] = "text"
    json_schema: JsonSchema | None = None
    pattern: str | None = Field(default=None, max_length=4096)
    grammar: str | None = Field(default=None, max_length=65536)


class StreamOptions(Lenient):
    """What a stream should carry beside text."""

    include_usage: bool = False


class Thinking(Lenient):
    """Whether the template opens the thinking itself, and how long it may be."""

    type: Literal["enabled", "disabled"] = "enabled"
    budget_tokens: int | None = Field(default=None, ge=0)


class SamplingFields(Lenient):
    """What every kind of completion shares."""

    model: str | None = Field(default=None, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int = Field(default=0, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: dict[str, Annotated[float, Field(ge=-100, le=100)]] | None = Field(default=None, max_length=1024)
    n: int = Field(default=1, ge=1, le=MAX_SAMPLES)
    seed: int | None = None
    stop: Stops = Field(default_factory=list)
    stop_token_ids: list[int] = Field(default_factory=list, max_length=MAX_STOPS)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = Field(default=0, ge=-100, le=100)
    user_id: Annotated[str, StringConstraints(max_length=512)] | None = None
    """Isolates the context cache and takes turns apart from others."""
    user: Annotated[str, StringConstraints(max_length=512)] | None = None


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0, le=MAX_TOP_LOGPROBS)
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Tool] = Field(default_factory=list, max_length=MAX_TOOLS)
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool = True


class TextRequest(SamplingFields):
    """Body of `POST /v1/completions` and of fill-in-the-middle at `/beta/completions`."""

    prompt: str | list[int] | list[str] = Field(max_length=10_000_000)
    suffix: str | None = None
    echo: bool = False
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)


class TokenizeRequest(Lenient):
    """Body of `POST /tokenize`: a text, or messages as the template would set them."""

    text: str | None = None
    messages: list[Message] | None = Field(default=None, max_length=MAX_MESSAGES)
