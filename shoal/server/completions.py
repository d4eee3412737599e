"""Text completions: continue a text as it stands, or fill the middle between a text and a suffix.

Filling in needs the three tokens that DeepSeek's models were trained with (V3 §4.1: prefix, suffix, middle, at document
level with rate 0.1); a tokenizer without them cannot ask for it.
"""

from collections.abc import AsyncIterator, Sequence
from contextlib import aclosing
from decimal import Decimal
from typing import Any

from shoal.engine.request import Request, TokenEvent
from shoal.errors import RequestError
from shoal.server.access import ANYBODY, Account
from shoal.server.billing import Counts
from shoal.server.events import DONE, error_body, event
from shoal.server.generation import Generation, ServedModel, usage_of
from shoal.server.profiles import under_text_profile
from shoal.server.reasoning import PlainReader
from shoal.server.sampling_fields import sampling_params
from shoal.server.schemas import TextRequest
from shoal.text.tokenizer import Tokenizer

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"


class TextCompletion:
    """One text request: a prompt, or several, each with `n` samples."""

    def __init__(self, served: ServedModel, body: TextRequest, account: Account = ANYBODY) -> None:
        self.served, self.body = served, body
        under_text_profile(body, served.profile, has_suffix=body.suffix is not None)
        prompts = _prompts(body.prompt)
        self.prompts = [prompt if isinstance(prompt, str) else served.tokenizer.decode(prompt) for prompt in prompts]
        self.generations = [self._generation(prompt, account) for prompt in prompts]

    async def whole(self) -> dict[str, Any]:
        """The finished completion."""
        choices: list[dict[str, Any]] = []
        for index, generation in enumerate(self.generations):
            async with aclosing(generation.steps()) as steps:
                async for _ in steps:
                    pass
            for sample in generation.samples:
                text = (self.prompts[index] if self.body.echo else "") + sample.content
                choices.append(self._choice(len(choices), text, sample.finish_reason, sample.logprobs))
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, ending with [DONE]. The last chunk carries the usage, as DeepSeek's does; with `include_usage`
        it comes once more alone, as OpenAI's clients expect."""
        count = self.body.num_samples
        for index, generation in enumerate(self.generations):
            if self.body.echo:
                for sample in range(count):
                    yield self._chunk(index * count + sample, self.prompts[index])
            async with aclosing(generation.steps()) as steps:
                async for step in steps:
                    text = "".join(piece.text for piece in step.pieces)
                    sample_of_step = generation.samples[step.sample]
                    shown = [step.event] if step.event in sample_of_step.logprobs else []
                    if text or shown or step.is_end:
                        reason = sample_of_step.finish_reason if step.is_end else None
                        yield self._chunk(index * count + step.sample, text, reason, shown)
        if self.body.wants_usage_alone:
            yield event({**self._head(), "choices": [], "usage": self._usage()})
        yield DONE

    def failure(self, status: int, message: str, kind: str) -> list[bytes]:
        """How a stream ends that cannot go on."""
        return [event(error_body(message, kind)), DONE]

    def _generation(self, prompt: str | list[int], account: Account) -> Generation:
        served, body = self.served, self.body
        ids = self._prompt_ids(prompt)
        isolation = account.name + "/" + (body.user_id or "")
        request = Request(
            prompt_ids=tuple(ids),
            sampling=sampling_params(served, body, len(ids), top_logprobs=body.logprobs or 0),
            tenant=isolation,
            priority=body.priority or 0,
            isolation=isolation,
        )
        readers = [PlainReader(served.tokenizer, stop=body.stops) for _ in range(body.num_samples)]
        return Generation(
            served, request, readers, account=account, id_prefix="cmpl-", keep_logprobs=body.logprobs is not None
        )

    def _prompt_ids(self, prompt: str | list[int]) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(prompt, list):
            return prompt
        before = tokenizer.encode(prompt)
        if self.body.suffix is None:
            return [tokenizer.bos_token_id, *before]
        begin, hole, end = (_fim_token(tokenizer, name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        return [tokenizer.bos_token_id, begin, *before, hole, *tokenizer.encode(self.body.suffix), end]

    def _head(self) -> dict[str, Any]:
        return self.generations[0].head("text_completion")

    def _chunk(self, index: int, text: str, reason: str | None = None, shown: Sequence[TokenEvent] = ()) -> bytes:
        chunk = {**self._head(), "choices": [self._choice(index, text, reason, shown)]}
        if all(sample.finish_reason for generation in self.generations for sample in generation.samples):
            chunk["usage"] = self._usage()
        return event(chunk)

    def _choice(self, index: int, text: str, reason: str | None, shown: Sequence[TokenEvent]) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": self._logprobs(shown), "finish_reason": reason}

    def _logprobs(self, shown: Sequence[TokenEvent]) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        events = [one for one in shown if one.token_id is not None]
        tokens = [self._spelled(one.token_id) for one in events if one.token_id is not None]
        return {"tokens": tokens, "token_logprobs": [one.logprob for one in events], "top_logprobs": self._top(events)}

    def _top(self, events: list[TokenEvent]) -> list[dict[str, float]] | None:
        if not self.body.logprobs:
            return None
        return [{self._spelled(token): value for token, value in one.top} for one in events]

    def _spelled(self, token_id: int) -> str:
        return self.served.tokenizer.token_bytes(token_id).decode("utf-8", "replace")

    def _usage(self) -> dict[str, Any]:
        """Usage of all prompts together."""
        counts = sum((generation.counts for generation in self.generations), Counts(prompt_tokens=0))
        return usage_of(counts, sum((generation.cost_usd for generation in self.generations), Decimal(0)))


def _prompts(given: str | list[int] | list[str] | list[list[int]]) -> list[str | list[int]]:
    """The prompts of a request, each as text or token ids."""
    if isinstance(given, str):
        return [given]
    ids = [item for item in given if isinstance(item, int)]
    return [ids] if ids else [item for item in given if not isinstance(item, int)]


def _fim_token(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_id(name)
    if found is None:
        raise RequestError(f"this model's tokenizer has no {name}: it never learnt to fill in; leave out 'suffix'.")
    return found
