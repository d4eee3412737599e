"""What OpenAI's clients send to `/v1/responses`, and how it is said as a chat request."""

from typing import Annotated, Any, Literal

from pydantic import Field

from shoal.errors import RequestError
from shoal.server.bounds import Bound
from shoal.server.schemas import (
    ChatRequest,
    Function,
    FunctionCall,
    JsonSchema,
    Lenient,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    Tool,
    ToolCall,
    UserId,
)

Items = Annotated[list[dict[str, Any]], Field(min_length=1), Bound("max_messages", "maxItems")]


class ResponsesTool(Lenient):
    """A function that the model may call. Tools that only OpenAI's own servers run are told to nobody."""

    type: str
    name: str | None = Field(default=None, pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(default=None, max_length=16384)
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class ResponsesNamedTool(Lenient):
    """`tool_choice` that names one."""

    type: Literal["function"]
    name: str = Field(max_length=64)


class ResponsesReasoning(Lenient):
    """How much to think."""

    effort: Literal["none", "minimal", "low", "medium", "high", "xhigh", "max"] | None = None
    summary: str | None = None


class ResponsesFormat(Lenient):
    """Free text, any JSON object, or JSON of a schema."""

    type: Literal["text", "json_object", "json_schema"] = "text"
    name: str | None = None
    json_schema: dict[str, Any] | None = Field(default=None, alias="schema")
    strict: bool | None = None


class ResponsesText(Lenient):
    """The form of the answer."""

    format: ResponsesFormat | None = None


class ResponsesRequest(Lenient):
    """Body of `POST /v1/responses`."""

    model: str | None = Field(default=None, max_length=256)
    input: str | Items
    instructions: str | None = None
    max_output_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    stream: bool | None = None
    tools: Annotated[list[ResponsesTool], Bound("max_tools", "maxItems")] | None = None
    tool_choice: Literal["none", "auto", "required"] | ResponsesNamedTool | None = None
    parallel_tool_calls: bool | None = None
    previous_response_id: str | None = Field(default=None, max_length=64)
    store: bool | None = None
    reasoning: ResponsesReasoning | None = None
    text: ResponsesText | None = None
    metadata: dict[str, Any] | None = None
    user: UserId | None = None
    prompt_cache_key: UserId | None = None
    safety_identifier: UserId | None = None

    def as_chat(self, earlier: list[Message]) -> ChatRequest:
        """The request in the words of chat completions.

        Args:
            earlier: what was said before, of `previous_response_id`.
        Raises:
            RequestError: an item that this server cannot read.
        """
        instructions = [Message(role="system", content=self.instructions)] if self.instructions else []
        choice, form = self.tool_choice, self.text.format if self.text else None
        return ChatRequest(
            model=self.model,
            messages=[*instructions, *earlier, *self.own_messages()],
            max_tokens=self.max_output_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            stream=self.stream,
            tools=[_chat_tool(tool) for tool in self.tools or () if tool.type == "function"],
            tool_choice=_chat_choice(choice) if isinstance(choice, ResponsesNamedTool) else choice,
            parallel_tool_calls=self.parallel_tool_calls,
            reasoning_effort=self.reasoning.effort if self.reasoning else None,
            response_format=_chat_format(form) if form else None,
            user_id=self.user or self.safety_identifier,
        )

    def own_messages(self) -> list[Message]:
        """The input as messages, without what was said before."""
        if isinstance(self.input, str):
            return [Message(role="user", content=self.input)]
        messages: list[Message] = []
        for number, item in enumerate(self.input, start=1):
            _add_item(messages, item, f"input item {number}")
        if not messages:
            raise RequestError("the input holds no message; add one.")
        return messages


def _add_item(messages: list[Message], item: dict[str, Any], where: str) -> None:
    """Add an item; calls join the assistant's message before them."""
    kind = item.get("type") or "message"
    if kind == "message":
        role = item.get("role")
        if role not in ("user", "assistant", "system", "developer"):
            raise RequestError(f"{where}: role={str(role)[:50]!r}; use system, developer, user or assistant.")
        messages.append(Message(role=role, content=_text(item.get("content"), where)))
    elif kind == "function_call":
        call = ToolCall(
            id=_short(item.get("call_id"), where),
            function=FunctionCall(name=_short(item.get("name"), where), arguments=str(item.get("arguments") or "{}")),
        )
        if messages and messages[-1].role == "assistant":
            messages[-1].tool_calls = [*(messages[-1].tool_calls or []), call]
        else:
            messages.append(Message(role="assistant", content="", tool_calls=[call]))
    elif kind == "function_call_output":
        text = _text(item.get("output"), where)
        messages.append(Message(role="tool", content=text, tool_call_id=_short(item.get("call_id"), where)))
    elif kind != "reasoning":  # thinking of earlier turns is not shown to the model
        raise RequestError(
            f"{where}: type {str(kind)[:50]!r}; use message, function_call, function_call_output or reasoning."
        )


def _text(content: Any, where: str) -> str:
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RequestError(f"{where}: the content is text or a list of text parts.")
    texts = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind not in ("input_text", "output_text", "text") or not isinstance(part.get("text"), str):
            raise RequestError(f"{where}: a part of type {str(kind)[:50]!r}; this model reads text alone.")
        texts.append(part["text"])
    return "".join(texts)


def _short(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise RequestError(f"{where}: {str(value)[:50]!r} is no name or id; use a text of 1 to 256 characters.")
    return value


def _chat_tool(tool: ResponsesTool) -> Tool:
    if not tool.name:
        raise RequestError("a tool of type 'function' needs a name.")
    function = Function(name=tool.name, description=tool.description, parameters=tool.parameters, strict=tool.strict)
    return Tool(function=function)


def _chat_choice(choice: ResponsesNamedTool) -> NamedTool:
    return NamedTool(type="function", function=NamedFunction(name=choice.name))


def _chat_format(wanted: ResponsesFormat) -> ResponseFormat:
    schema = JsonSchema(schema=wanted.json_schema) if wanted.json_schema is not None else None
    return ResponseFormat(type=wanted.type, json_schema=schema)
