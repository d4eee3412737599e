"""Text completions: continue a text as it stands, or fill the middle between a text and a suffix.

Filling in needs the three tokens that DeepSeek's models were trained with (V3 §4.1: prefix, suffix, middle, at document
level with rate 0.1); a tokenizer without them cannot ask for it.
"""

from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

from shoal.engine.request import Request, TokenEvent
from shoal.errors import RequestError
from shoal.server.access import ANYBODY, Account
from shoal.server.chat import DONE, event
from shoal.server.generation import Generation, Sample, ServedModel
from shoal.server.reasoning import PlainReader
from shoal.server.sampling_fields import sampling_params
from shoal.server.schemas import TextRequest
from shoal.text.tokenizer import Tokenizer

FIM_BEGIN, FIM_HOLE, FIM_END = "<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>"
MAX_PROMPTS = 16


class TextCompletion:
    """One text request: a prompt, or several, each with `n` samples."""

    def __init__(self, served: ServedModel, body: TextRequest, account: Account = ANYBODY) -> None:
        self.served, self.body = served, body
        prompts = [body.prompt] if isinstance(body.prompt, str) or _is_ids(body.prompt) else list(body.prompt)
        if not 0 < len(prompts) <= MAX_PROMPTS:
            raise RequestError(f"{len(prompts)} prompts given; 1 to {MAX_PROMPTS} are allowed.")
        self.prompts = [prompt if isinstance(prompt, str) else "" for prompt in prompts]
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
                choices.append(self._choice(len(choices), text, sample.finish_reason, self._logprobs(sample)))
        return {**self._head(), "choices": choices, "usage": self._usage()}

    async def events(self) -> AsyncIterator[bytes]:
        """Server-sent events, ending with [DONE]."""
        for index, generation in enumerate(self.generations):
            if self.body.echo:
                for sample in range(self.body.n):
                    yield self._chunk(index * self.body.n + sample, self.prompts[index], None)
            async with aclosing(generation.steps()) as steps:
                async for step in steps:
                    number = index * self.body.n + step.sample
                    text = "".join(piece.text for piece in step.pieces)
                    reason = generation.samples[step.sample].finish_reason if step.is_end else None
                    if text or reason:
                        yield self._chunk(number, text, reason)
        if self.body.stream_options and self.body.stream_options.include_usage:
            yield event({**self._head(), "choices": [], "usage": self._usage()})
        yield DONE

    def _generation(self, prompt: Any, account: Account) -> Generation:
        served, body = self.served, self.body
        ids = self._prompt_ids(prompt)
        isolation = account.name + "/" + (body.user_id or "")
        request = Request(
            prompt_ids=tuple(ids),
            sampling=sampling_params(served, body, len(ids), top_logprobs=body.logprobs or 0),
            tenant=isolation,
            priority=body.priority,
            isolation=isolation,
        )
        readers = [PlainReader(served.tokenizer, stop=tuple(body.stop)) for _ in range(body.n)]
        return Generation(
            served, request, readers, account=account, id_prefix="cmpl-", keep_logprobs=body.logprobs is not None
        )

    def _prompt_ids(self, prompt: Any) -> list[int]:
        tokenizer = self.served.tokenizer
        if isinstance(prompt, list):
            return [int(token) for token in prompt]
        before = tokenizer.encode(prompt)
        if self.body.suffix is None:
            return [tokenizer.bos_token_id, *before]
        begin, hole, end = (_fim_token(tokenizer, name) for name in (FIM_BEGIN, FIM_HOLE, FIM_END))
        return [tokenizer.bos_token_id, begin, *before, hole, *tokenizer.encode(self.body.suffix), end]

    def _head(self) -> dict[str, Any]:
        return self.generations[0].head("text_completion")

    def _chunk(self, index: int, text: str, reason: str | None) -> bytes:
        return event({**self._head(), "choices": [self._choice(index, text, reason, None)]})

    def _choice(self, index: int, text: str, reason: str | None, logprobs: dict[str, Any] | None) -> dict[str, Any]:
        return {"index": index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, sample: Sample) -> dict[str, Any] | None:
        if self.body.logprobs is None:
            return None
        events = [one for one in sample.logprobs if one.token_id is not None]
        tokens = [
            self.served.tokenizer.token_bytes(one.token_id).decode("utf-8", "replace")
            for one in events
            if one.token_id is not None
        ]
        return {"tokens": tokens, "token_logprobs": [one.logprob for one in events], "top_logprobs": self._top(events)}

    def _top(self, events: list[TokenEvent]) -> list[dict[str, float]] | None:
        if not self.body.logprobs:
            return None
        spell = self.served.tokenizer.token_bytes
        return [{spell(token).decode("utf-8", "replace"): value for token, value in one.top} for one in events]

    def _usage(self) -> dict[str, Any]:
        """Usage of all prompts together."""
        parts = [generation.usage() for generation in self.generations]
        total: dict[str, Any] = dict(parts[0])
        for part in parts[1:]:
            for key, value in part.items():
                if isinstance(value, (int, float)):
                    total[key] += value
        total["cost_usd"] = format(sum(generation.cost_usd for generation in self.generations), "f")
        found = sum(generation.counts.found_tokens for generation in self.generations)
        total["prompt_tokens_details"] = {"cached_tokens": found}
        return total


def _is_ids(prompt: Any) -> bool:
    return isinstance(prompt, list) and bool(prompt) and isinstance(prompt[0], int)


def _fim_token(tokenizer: Tokenizer, name: str) -> int:
    found = tokenizer.token_id(name)
    if found is None:
        raise RequestError(f"this model's tokenizer has no {name}: it never learnt to fill in; leave out 'suffix'.")
    return found
