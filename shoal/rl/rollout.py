"""Rollouts: groups of answers to the same question, sampled by the engine from the module that is being trained.

One module serves both wings: the trainer lends it to the engine between updates, so there is no copy to keep in step and
the policy that samples is the policy that learns (R1-Zero on one machine).
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from shoal.engine.engine import Engine
from shoal.engine.request import Completion, Request, SamplingParams
from shoal.model.transformer import Transformer
from shoal.rl.tasks.task import Problem
from shoal.text.chat_template import ChatTemplate
from shoal.text.tokenizer import Tokenizer


class RolloutEngine(Protocol):
    """Who samples: `engine.Engine` in this process, or `ray_rollouts.RayEngine` in others."""

    model: Transformer
    max_rows: int

    def generate(self, requests: Sequence[Request]) -> list[list[Completion]]:
        """Completions of every request, in order, one per sample, with the model's weights as they are now."""


EngineMaker = Callable[[Transformer, int], RolloutEngine]
"""Makes an engine over a model that runs so many samples at once."""


def engine_here(model: Transformer, max_rows: int) -> RolloutEngine:
    """The engine of this process."""
    return Engine(model, max_rows=max_rows)


@dataclass(frozen=True, kw_only=True)
class Rollouts:
    """Sampled answers; entry `i` belongs to problem `i // group_size`."""

    problems: list[Problem]
    """One per answer: each problem `group_size` times."""
    group_size: int
    prompt_ids: list[tuple[int, ...]]
    completions: list[Completion]
    texts: list[str]
    """Decoded answers, special tokens spelled out, the end token left off."""
    wall_s: float

    @property
    def num_response_tokens(self) -> int:
        return sum(len(completion.token_ids) for completion in self.completions)


class Prompter:
    """Turns problems into prompts and token ids into the text a verifier reads."""

    def __init__(self, tokenizer: Tokenizer, template: ChatTemplate) -> None:
        self.tokenizer, self.template = tokenizer, template

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The question as one user turn, ready for the assistant."""
        return self.conversation_ids([{"role": "user", "content": problem.prompt}])

    def conversation_ids(self, messages: list[dict[str, str]]) -> tuple[int, ...]:
        """A conversation, ready for the assistant."""
        return tuple(self.template.encode(self.tokenizer, messages, add_generation_prompt=True))

    def text(self, token_ids: Sequence[int]) -> str:
        """Answer text with think and answer tags spelled out, without the end token."""
        ids = [token for token in token_ids if token != self.tokenizer.eos_token_id]
        return self.tokenizer.decode(ids, skip_special=False)


class SecondQuestion(Prompter):
    """Asks problems after another one that was answered right: what a chat is from its second turn on.

    Args:
        firsts: what may have been asked before; a problem is always asked after the same one.
        share: of the problems; the rest is asked alone.
    """

    def __init__(self, prompter: Prompter, firsts: Sequence[Problem], *, share: float = 1.0) -> None:
        super().__init__(prompter.tokenizer, prompter.template)
        self.firsts, self.share = firsts, share

    def prompt_ids(self, problem: Problem) -> tuple[int, ...]:
        """The question as the second user turn, or alone."""
        draw = random.Random(problem.prompt)
        if draw.random() >= self.share:
            return super().prompt_ids(problem)
        first = draw.choice(self.firsts)
        turns = [{"role": "user", "content": first.prompt}, {"role": "assistant", "content": first.answer}]
        return self.conversation_ids([*turns, {"role": "user", "content": problem.prompt}])


def sample_rollouts(
    engine: RolloutEngine,
    prompter: Prompter,
    problems: Sequence[Problem],
    *,
    group_size: int,
    max_tokens: int,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    seed: int = 0,
) -> Rollouts:
    """`group_size` answers to each problem. The same seed and weights give the same tokens."""
    started_s = time.monotonic()
    params = partial(
        SamplingParams,
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        num_samples=group_size,
        stop_token_ids=(prompter.tokenizer.eos_token_id,),
    )
    prompts = [prompter.prompt_ids(problem) for problem in problems]
    requests = [
        Request(prompt_ids=ids, sampling=params(seed=seed * 1_000_003 + index)) for index, ids in enumerate(prompts)
    ]
    groups = engine.generate(requests)
    completions = [completion for group in groups for completion in group]
    return Rollouts(
        problems=[problem for problem in problems for _ in range(group_size)],
        group_size=group_size,
        prompt_ids=[ids for ids in prompts for _ in range(group_size)],
        completions=completions,
        texts=[prompter.text(completion.token_ids) for completion in completions],
        wall_s=time.monotonic() - started_s,
    )
