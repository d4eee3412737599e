"""What the server answers, field by field: the response schemas of `/openapi.json`.

Answers are built as plain dictionaries where they arise; the tests hold every one of them against these models, in which
nothing may be missing and nothing may be more.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict


class Exact(BaseModel):
    """No field but these."""

    model_config = ConfigDict(extra="forbid")


class CachedTokens(Exact):
    """Part of the prompt."""

    cached_tokens: int


class ReasoningTokens(Exact):
    """Part of the output."""

    reasoning_tokens: int


class Usage(Exact):
    """OpenAI's and DeepSeek's counts; `cost_usd` and `joules` are Shoal's. Hits and misses add up to the prompt."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_cache_hit_tokens: int
    prompt_cache_miss_tokens: int
    prompt_tokens_details: CachedTokens
    completion_tokens_details: ReasoningTokens
    cost_usd: str
    joules: float


class AnsweredFunction(Exact):
    """What is called, with JSON as text."""

    name: str
    arguments: str


class AnsweredCall(Exact):
    """A call."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class TokenLogprob(Exact):
    """A token, its natural log-probability, and its bytes."""

    token: str
    logprob: float
    bytes: list[int]


class DrawnLogprob(TokenLogprob):
    """A drawn token with the likeliest ones."""

    top_logprobs: list[TokenLogprob]


class ChatLogprobs(Exact):
    """Of the content's tokens."""

    content: list[DrawnLogprob]
    refusal: None


class ChatMessage(Exact):
    """The answer; `reasoning_content` is what was thought before."""

    role: Literal["assistant"]
    content: str
    reasoning_content: str | None
    tool_calls: list[AnsweredCall] | None = None


FinishReason = Literal["stop", "length", "tool_calls", "insufficient_system_resource"]


class ChatChoice(Exact):
    """One sample."""

    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatAnswer(Exact):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class TextLogprobs(Exact):
    """One entry a token."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]] | None


class TextChoice(Exact):
    """One sample."""

    index: int
    text: str
    logprobs: TextLogprobs | None
    finish_reason: FinishReason


class TextAnswer(Exact):
    """Answer of `/v1/completions`."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[TextChoice]
    usage: Usage


class MessagesUsage(Exact):
    """Anthropic's counts: `input_tokens` are those that no cache gave."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int
    cost_usd: str
    joules: float


class MessagesAnswerBody(Exact):
    """Answer of `/v1/messages`; blocks are of type thinking, text or tool_use."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: Literal["end_turn", "max_tokens", "stop_sequence", "tool_use"]
    stop_sequence: str | None
    usage: MessagesUsage


class TokenCount(Exact):
    """Answer of `/v1/messages/count_tokens`."""

    input_tokens: int


class ResponsesUsage(Exact):
    """The counts of `/v1/responses`."""

    input_tokens: int
    input_tokens_details: CachedTokens
    output_tokens: int
    output_tokens_details: ReasoningTokens
    total_tokens: int
    cost_usd: str
    joules: float


class ResponsesAnswerBody(Exact):
    """Answer of `/v1/responses`; items are of type reasoning, message or function_call."""

    id: str
    object: Literal["response"]
    created_at: int
    completed_at: int | None
    status: Literal["completed", "incomplete", "failed"]
    error: dict[str, str] | None
    incomplete_details: dict[str, str] | None
    instructions: str | None
    max_output_tokens: int | None
    model: str
    output: list[dict[str, Any]]
    parallel_tool_calls: bool
    previous_response_id: str | None
    reasoning: dict[str, str | None]
    store: bool
    temperature: float
    text: dict[str, Any]
    tool_choice: str | dict[str, Any]
    tools: list[dict[str, Any]]
    top_p: float
    truncation: Literal["disabled"]
    usage: ResponsesUsage
    user: str | None
    metadata: dict[str, Any]


class ModelCard(Exact):
    """A model, for OpenAI's clients and (type, display_name, created_at) for Anthropic's."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int
    type: Literal["model"]
    display_name: str
    created_at: str


class ModelList(Exact):
    """The served models."""

    object: Literal["list"]
    data: list[ModelCard]
    has_more: bool
    first_id: str
    last_id: str


class BalanceInfo(Exact):
    """Money in one currency, two decimals as DeepSeek writes it."""

    currency: Literal["USD"]
    total_balance: str
    granted_balance: str
    topped_up_balance: str


class BalanceAnswer(Exact):
    """Answer of `/user/balance`."""

    is_available: bool
    balance_infos: list[BalanceInfo]


class TokensAnswer(Exact):
    """Answer of `/tokenize`."""

    count: int
    tokens: list[int]
    max_model_len: int


class DetokenizeAnswer(Exact):
    """Answer of `/detokenize`."""

    text: str


class StatusAnswer(Exact):
    """Answer of `/health` and `/ready`."""

    status: str


class ErrorDetail(Exact):
    """What is wrong and what to do."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorAnswer(Exact):
    """Any refusal."""

    error: ErrorDetail


class MessagesErrorDetail(Exact):
    """What is wrong and what to do."""

    type: str
    message: str


class MessagesErrorAnswer(Exact):
    """Any refusal of `/v1/messages`."""

    type: Literal["error"]
    error: MessagesErrorDetail
