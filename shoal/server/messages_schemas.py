"""What Anthropic's clients send to `/v1/messages`, and how it is said as a chat request."""

import json
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
    StopStrings,
    Thinking,
    Tool,
    ToolCall,
    UserId,
)

Blocks = list[dict[str, Any]]


class MessagesTurn(Lenient):
    """One turn: text, or blocks of text, thinking, tool use and tool results."""

    role: Literal["user", "assistant", "system"]
    content: str | Blocks


class MessagesTool(Lenient):
    """A function that the model may call. Tools that only Anthropic's own servers run are told to nobody."""

    type: str | None = None
    name: str = Field(pattern=r"^[a-zA-Z0-9_-]{1,64}$")
    description: str | None = Field(default=None, max_length=16384)
    input_schema: dict[str, Any] | None = None
    strict: bool | None = None


class MessagesToolChoice(Lenient):
    """Whether and what to call."""

    type: Literal["auto", "any", "tool", "none"]
    name: str | None = Field(default=None, max_length=64)
    disable_parallel_tool_use: bool | None = None


class MessagesMetadata(Lenient):
    """Who it is for."""

    user_id: UserId | None = None


class MessagesFormat(Lenient):
    """JSON of a schema."""

    type: Literal["json_schema"]
    json_schema: dict[str, Any] = Field(alias="schema")


class MessagesOutput(Lenient):
    """How much effort, and in what form."""

    effort: Literal["low", "medium", "high", "xhigh", "max"] | None = None
    format: MessagesFormat | None = None


class CountRequest(Lenient):
    """Body of `POST /v1/messages/count_tokens`."""

    model: str | None = Field(default=None, max_length=256)
    messages: Annotated[list[MessagesTurn], Field(min_length=1), Bound("max_messages", "maxItems")]
    system: str | Blocks | None = None
    tools: Annotated[list[MessagesTool], Bound("max_tools", "maxItems")] | None = None
    tool_choice: MessagesToolChoice | None = None
    thinking: Thinking | None = None
    output_config: MessagesOutput | None = None

    def as_chat(self) -> ChatRequest:
        """The request in the words of chat completions.

        Raises:
            RequestError: a block that this server cannot read.
        """
        messages = [Message(role="system", content=text)] if (text := _texts(self.system, "system")) else []
        for number, turn in enumerate(self.messages, start=1):
            messages += _chat_messages(turn, f"message {number}")
        if len(messages) > 1 and messages[-1].role == "assistant" and not messages[-1].tool_calls:
            messages[-1].prefix = True  # Anthropic's way to put words into the model's mouth
        choice = self.tool_choice
        output = self.output_config
        return ChatRequest(
            model=self.model,
            messages=messages,
            tools=[_chat_tool(tool) for tool in self.tools or () if tool.type in (None, "custom")],
            tool_choice=_chat_choice(choice) if choice else None,
            parallel_tool_calls=not (choice and choice.disable_parallel_tool_use),
            thinking=self.thinking,
            reasoning_effort=output.effort if output else None,
            response_format=_chat_format(output.format) if output and output.format else None,
        )


class MessagesRequest(CountRequest):
    """Body of `POST /v1/messages`."""

    max_tokens: int = Field(ge=1)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0)
    stop_sequences: StopStrings | None = None
    stream: bool | None = None
    metadata: MessagesMetadata | None = None

    def as_chat(self) -> ChatRequest:
        """The request in the words of chat completions."""
        given = {
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "top_k": self.top_k,
            "stop": self.stop_sequences,
            "stream": self.stream,
            "user_id": self.metadata.user_id if self.metadata else None,
        }
        return super().as_chat().model_copy(update=given)


def _texts(content: str | Blocks | None, where: str) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "\n\n".join(_text_of(block, where) for block in content)


def _text_of(block: dict[str, Any], where: str) -> str:
    text = block.get("text")
    if block.get("type") != "text" or not isinstance(text, str):
        raise RequestError(f"{where}: a block of type {str(block.get('type'))[:50]!r}; this model reads text alone.")
    return text


def _chat_messages(turn: MessagesTurn, where: str) -> list[Message]:
    """The turn as messages: tool results are messages of their own, and come before what else the turn says."""
    if isinstance(turn.content, str):
        return [Message(role=turn.role, content=turn.content)]
    results, texts, thinking, calls = [], [], [], []
    for block in turn.content:
        kind = block.get("type")
        if kind == "tool_result":
            results.append(_tool_result(block, where))
        elif kind == "tool_use":
            calls.append(_tool_use(block, where))
        elif kind == "thinking":
            thinking.append(str(block.get("thinking") or ""))
        elif kind != "redacted_thinking":
            texts.append(_text_of(block, where))
    if not texts and not calls and (results or thinking):
        return results
    message = Message(
        role=turn.role,
        content="".join(texts),
        tool_calls=calls or None,
        reasoning_content="".join(thinking) or None,
    )
    return [*results, message]


def _tool_result(block: dict[str, Any], where: str) -> Message:
    content = block.get("content")
    if content is not None and not isinstance(content, (str, list)):
        raise RequestError(f"{where}: the content of a tool_result is text or a list of text blocks.")
    blocks = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else content
    return Message(role="tool", content=_texts(blocks, where), tool_call_id=_short(block.get("tool_use_id"), where))


def _tool_use(block: dict[str, Any], where: str) -> ToolCall:
    arguments = json.dumps(block.get("input") or {}, ensure_ascii=False)
    name = _short(block.get("name"), where)
    return ToolCall(id=_short(block.get("id"), where), function=FunctionCall(name=name, arguments=arguments))


def _short(value: Any, where: str) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= 256:
        raise RequestError(f"{where}: {str(value)[:50]!r} is no name or id; use a text of 1 to 256 characters.")
    return value


def _chat_tool(tool: MessagesTool) -> Tool:
    function = Function(name=tool.name, description=tool.description, parameters=tool.input_schema, strict=tool.strict)
    return Tool(function=function)


def _chat_choice(choice: MessagesToolChoice) -> Literal["none", "auto", "required"] | NamedTool:
    if choice.type == "tool":
        if not choice.name:
            raise RequestError("tool_choice of type 'tool' needs the tool's name.")
        return NamedTool(type="function", function=NamedFunction(name=choice.name))
    return "required" if choice.type == "any" else choice.type


def _chat_format(wanted: MessagesFormat) -> ResponseFormat:
    return ResponseFormat(type="json_schema", json_schema=JsonSchema(schema=wanted.json_schema))
