"""Which era's rules for reasoning a server keeps: R1's, today's, or whatever a client sends.

    r1        `deepseek-reasoner` of 2025: thinks unless asked for `deepseek-chat`; temperature and its kin are taken and have
              no effect; log-probabilities, tools and `reasoning_content` in the input are refused
    current   `thinking` and `reasoning_effort`, on where nothing is said; while thinking, temperature and its kin have no
              effect, and calls must come back with their `reasoning_content`
    lenient   everything takes effect and nothing of the above is refused; thinks where the request or the template says so

Sources: DeepSeek's guides reasoning_model, thinking_mode and json_mode, as excerpted in the project's facts.
"""

from typing import Literal, get_args

from shoal.errors import RequestError
from shoal.server.schemas import ChatRequest, SamplingFields

Profile = Literal["lenient", "r1", "current"]
PROFILES: tuple[Profile, ...] = get_args(Profile)

_WITHOUT_EFFECT = ("temperature", "top_p", "presence_penalty", "frequency_penalty")


def wants_thinking(body: ChatRequest, profile: Profile) -> bool | None:
    """Whether the template should open the thinking; None leaves it to the template."""
    if profile == "r1":
        return body.model != "deepseek-chat"
    asked = _asked_to_think(body)
    if asked is None and profile == "current":
        return True
    return asked


def under_profile(body: ChatRequest, profile: Profile) -> ChatRequest:
    """The request as this era serves it.

    Raises:
        RequestError: the era's API refuses it.
    """
    if profile == "lenient":
        return body
    _check_json_word(body)
    if not wants_thinking(body, profile):
        return body
    if profile == "r1":
        _check_r1(body)
    else:
        _check_current(body)
    return body.model_copy(update=dict.fromkeys(_WITHOUT_EFFECT))


def under_text_profile(body: SamplingFields, profile: Profile, *, has_suffix: bool) -> None:
    """Refuse what an era's text completion does not have.

    Raises:
        RequestError: `deepseek-reasoner` does not fill in.
    """
    if profile == "r1" and has_suffix and body.model == "deepseek-reasoner":
        raise RequestError("deepseek-reasoner does not support suffix (FIM completion); use deepseek-chat.")


def _asked_to_think(body: ChatRequest) -> bool | None:
    if body.thinking:
        return None if body.thinking.type in ("adaptive", "auto") else body.thinking.type == "enabled"
    switches = body.chat_template_kwargs
    if switches and (switches.thinking is not None or switches.enable_thinking is not None):
        return bool(switches.thinking or switches.enable_thinking)
    if body.reasoning_effort is not None:
        return body.reasoning_effort != "none"
    return {"deepseek-reasoner": True, "deepseek-chat": False}.get(body.model or "")


def _check_r1(body: ChatRequest) -> None:
    for name in ("logprobs", "top_logprobs", "tools"):
        if getattr(body, name):
            raise RequestError(f"deepseek-reasoner does not support {name}; leave it out or use deepseek-chat.")
    for number, message in enumerate(body.messages, start=1):
        if message.reasoning_content and not message.prefix:
            raise RequestError(f"message {number}: reasoning_content is not taken as input; leave it out.")


def _check_current(body: ChatRequest) -> None:
    if any(message.tool_calls and message.reasoning_content is None for message in body.messages):
        raise RequestError("The `reasoning_content` in the thinking mode must be passed back to the API.")


def _check_json_word(body: ChatRequest) -> None:
    if not body.response_format or body.response_format.type != "json_object":
        return
    texts = [message.content if isinstance(message.content, str) else str(message.content) for message in body.messages]
    if not any("json" in text.lower() for text in texts):
        raise RequestError("response_format json_object needs the word 'json' in the prompt.")
