"""A conversation's next turn: from a validated chat request to a generation, whatever the API it came by.

Chat completions, Responses and Messages differ in how they spell a request and an answer. What lies between is the same:
the conversation through the template, tools told and calls read, thinking opened or not, forms, limits and prices.
"""

from shoal.engine.request import Request
from shoal.errors import RequestError
from shoal.server.access import ANYBODY, Account
from shoal.server.generation import Generation, ServedModel
from shoal.server.profiles import under_profile, wants_thinking
from shoal.server.reasoning import AnswerReader
from shoal.server.sampling_fields import sampling_params, thinking_budget_of
from shoal.server.schemas import ChatRequest, Message
from shoal.server.tool_forms import form_of_answer, offered_tools
from shoal.text.tokenizer import END_THINK, THINK


def generation_of(
    served: ServedModel, body: ChatRequest, account: Account = ANYBODY, id_prefix: str = "chatcmpl-"
) -> Generation:
    """The generation that answers a request. Slow for long prompts: call it in a thread.

    Raises:
        RequestError: the prompt does not fit the context, or something asked for cannot be.
        TokenizerError: the model's template refuses the messages.
    """
    body = under_profile(body, served.profile)
    prompt_ids = prompt_of(served, body)
    opened = _ends_in_thinking(served, prompt_ids)
    tools = offered_tools(body)
    sampling = sampling_params(
        served,
        body,
        len(prompt_ids),
        max_tokens=body.max_completion_tokens,
        top_logprobs=(body.top_logprobs or 0) if body.logprobs else 0,
        form=form_of_answer(served.tokenizer, body),
        thinking_budget=thinking_budget_of(body, served.limits.default_max_tokens),
        thinks_from_start=opened,
    )
    isolation = account.name + "/" + (body.user_id or "")
    request = Request(
        prompt_ids=tuple(prompt_ids),
        sampling=sampling,
        tenant=isolation,
        priority=body.priority or 0,
        isolation=isolation,
    )
    readers = [
        AnswerReader(served.tokenizer, starts_thinking=opened, stop=body.stops, reads_calls=bool(tools))
        for _ in range(body.num_samples)
    ]
    return Generation(served, request, readers, account=account, id_prefix=id_prefix, keep_logprobs=bool(body.logprobs))


def prompt_of(served: ServedModel, body: ChatRequest) -> list[int]:
    """The conversation as token ids. A last message with `prefix` is the beginning of the answer (DeepSeek's beta)."""
    messages = [message.for_template() for message in body.messages]
    prefix = body.messages[-1] if body.messages[-1].prefix else None
    if prefix is not None and (prefix.role != "assistant" or len(messages) == 1):
        raise RequestError("prefix=true belongs to a last message of the role assistant, after at least one other.")
    ids = served.template.encode(
        served.tokenizer,
        messages[:-1] if prefix else messages,
        thinking=False if prefix else wants_thinking(body, served.profile),
        tools=[tool.model_dump(exclude_none=True) for tool in offered_tools(body)],
        recall=served.answers.recall,
    )
    return [*ids, *_prefix_ids(served, prefix)] if prefix else ids


def _prefix_ids(served: ServedModel, prefix: Message) -> list[int]:
    """What the answer begins with: thinking that was handed over, closed when there is content after it."""
    if not isinstance(prefix.content, str):
        raise RequestError("a message with prefix=true needs its content as a string.")
    tokenizer, ids = served.tokenizer, []
    if prefix.reasoning_content:
        ids = tokenizer.encode(THINK, allow_special=True) + tokenizer.encode(prefix.reasoning_content)
        if not prefix.content:
            return ids
        ids += tokenizer.encode(END_THINK, allow_special=True)
    return ids + tokenizer.encode(prefix.content)


def _ends_in_thinking(served: ServedModel, ids: list[int]) -> bool:
    """Whether the prompt leaves the thinking open: its last thinking token opens, and nothing but a turn's end could have
    closed it before."""
    think, end_think = served.tokenizer.token_id(THINK), served.tokenizer.token_id(END_THINK)
    if think is None:
        return False
    for token in reversed(ids):
        if token == think:
            return True
        if token in (end_think, served.tokenizer.eos_token_id, served.tokenizer.bos_token_id):
            return False
    return False
