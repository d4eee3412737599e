"""What clients may send: OpenAI's chat and text requests with DeepSeek's additions, unknown fields ignored.

Every number has bounds and every list a length; those that an operator may change are in `limits.py`. JSON's own extras,
NaN and infinities, are refused before they get here (`body.py`).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from shoal.server.bounds import Bound

TokenId = Annotated[int, Field(ge=0, lt=1 << 31)]
StopString = Annotated[str, StringConstraints(min_length=1), Bound("max_stop_characters", "maxLength")]
StopStrings = Annotated[list[StopString], Bound("max_stops", "maxItems")]
UserId = Annotated[str, Bound("max_user_id_bytes", "maxLength")]
FormText = Annotated[str, Bound("max_schema_characters", "maxLength")]


class Lenient(BaseModel):
    """Fields that nobody here knows are ignored: clients send what other servers want."""

    model_config = ConfigDict(extra="ignore")


class FunctionCall(Lenient):
    """A call that the model made, as it comes back in the history."""

    name: str = Field(max_length=256)
    arguments: str | dict[str, Any] = ""


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
    """Of earlier turns: the template decides whether it is shown; DeepSeek's published one leaves it out. Beside `prefix`
    it is the thinking that the answer goes on from."""
    tool_calls: Annotated[list[ToolCall], Bound("max_tools", "maxItems")] | None = None
    tool_call_id: str | None = Field(default=None, max_length=256)
    prefix: bool | None = None
    """Of a last assistant message (beta): the answer goes on from this text."""

    def for_template(self) -> dict[str, Any]:
        """The message as the chat template takes it."""
        message: dict[str, Any] = {"role": self.role, "content": self.content if self.content is not None else ""}
        if self.tool_calls:
            message["tool_calls"] = [call.model_dump() for call in self.tool_calls]
        if self.tool_call_id:
            message["tool_call_id"] = self.tool_call_id
        if self.reasoning_content:
            message["reasoning_content"] = self.reasoning_content
        return message


class Function(Lenient):
    """What a tool is called and takes."""

    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(default=None, max_length=16384)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Lenient):
    """A function that the model may ask for."""

    type: Literal["function"] = "function"
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
    pattern: FormText | None = None
    grammar: FormText | None = None


class StreamOptions(Lenient):
    """What a stream should carry beside text."""

    include_usage: bool | None = None


class Thinking(Lenient):
    """Whether the template opens the thinking itself, and how long it may be."""

    type: Literal["enabled", "disabled", "adaptive", "auto"] = "enabled"
    budget_tokens: int | None = Field(default=None, ge=0)


class TemplateSwitches(Lenient):
    """What vLLM's and SGLang's clients say under `chat_template_kwargs`."""

    thinking: bool | None = None
    enable_thinking: bool | None = None


class SamplingFields(Lenient):
    """What every kind of completion shares. Null is the same as absent."""

    model: str | None = Field(default=None, max_length=256)
    max_tokens: int | None = Field(default=None, ge=1)
    min_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    min_p: float | None = Field(default=None, ge=0, le=1)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    repetition_penalty: float | None = Field(default=None, gt=0, le=10)
    logit_bias: (
        Annotated[dict[str, Annotated[float, Field(ge=-100, le=100)]], Bound("max_logit_biases", "maxProperties")]
        | None
    ) = None
    """Keys are token ids in digits."""
    n: Annotated[int, Field(ge=1), Bound("max_samples", "maximum")] | None = None
    seed: int | None = None
    stop: StopString | StopStrings | None = None
    stop_token_ids: Annotated[list[TokenId], Bound("max_stops", "maxItems")] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    priority: int | None = Field(default=None, ge=-100, le=100)
    user_id: UserId | None = None
    """Isolates the context cache and takes turns apart from others."""
    user: UserId | None = None

    @property
    def num_samples(self) -> int:
        """`n`, 1 where it is absent."""
        return self.n or 1

    @property
    def stops(self) -> tuple[str, ...]:
        """The stop strings."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def wants_usage_alone(self) -> bool:
        """Whether a stream ends with a chunk of nothing but usage."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(SamplingFields):
    """Body of `POST /v1/chat/completions`."""

    messages: Annotated[list[Message], Field(min_length=1), Bound("max_messages", "maxItems")]
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0), Bound("max_top_logprobs", "maximum")] | None = None
    thinking: Thinking | None = None
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max", "ultra"] | None = None
    chat_template_kwargs: TemplateSwitches | None = None
    response_format: ResponseFormat | None = None
    tools: Annotated[list[Tool], Bound("max_tools", "maxItems")] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None


class TextRequest(SamplingFields):
    """Body of `POST /v1/completions` and of fill-in-the-middle at `/beta/completions`."""

    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1), Bound("max_prompts", "maxItems")]
        | Annotated[
            list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1), Bound("max_prompts", "maxItems")
        ]
    )
    suffix: str | None = None
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0), Bound("max_top_logprobs", "maximum")] | None = None


class TokenizeRequest(Lenient):
    """Body of `POST /tokenize`: a text, or messages as the template would set them."""

    text: str | None = None
    messages: Annotated[list[Message], Bound("max_messages", "maxItems")] | None = None
    tools: Annotated[list[Tool], Bound("max_tools", "maxItems")] | None = None


class DetokenizeRequest(Lenient):
    """Body of `POST /detokenize`."""

    tokens: list[TokenId]
