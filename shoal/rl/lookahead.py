"""Asynchronous rollouts: answers are sampled ahead of the updates, with weights that are a bounded number of steps old.

Sampling for step `t + staleness` starts, in a thread, with a copy of the weights as they are before the update of step `t`.
Exactly so many steps lie between the policy that sampled and the one that learns, never more, and never by chance: so a run
can be repeated and resumed bit for bit, and what the staleness costs can be measured. The ratio to the engine's own
log-probabilities, the clip, the off-policy mask and importance weights are there to pay for it (`objective`).

Samples that are under way are part of a run's state: a checkpoint waits for them and keeps them (`to_state`), since the
weights they were drawn with are gone by the time of a resume.
"""

import copy
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from torch import Tensor

from shoal.engine.request import Completion
from shoal.model.transformer import Transformer
from shoal.rl.engine_replay import EngineReplay
from shoal.rl.grading import Grade, GradedAnswers
from shoal.rl.rollout import EngineMaker, Rollouts
from shoal.rl.sampling import StepSample, StepSampler


class Lookahead:
    """Hands out the samples of steps in order; with staleness 0 it draws them on demand from the model itself."""

    def __init__(
        self, model: Transformer, sampler: StepSampler, engines: EngineMaker, max_rows: int, staleness: int
    ) -> None:
        self.model, self.sampler, self.staleness = model, sampler, staleness
        self.next_problem = 0
        self._waiting: deque[Future[StepSample]] = deque()
        self._thread: ThreadPoolExecutor | None = None
        if staleness:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="rollouts")
            self._copy = copy.deepcopy(model).eval()
            self._asked = 0
            """The walk's place, known to the sampling thread alone while it works."""
        self.engine = engines(self._copy if staleness else model, max_rows)

    def take(self, step: int) -> StepSample:
        """The sample of step `step`; called once for each, in order, before its update."""
        if self._thread is None:
            sample = self.sampler.draw(self.engine, step, self.next_problem)
            self.next_problem = sample.next_problem
            return sample
        while len(self._waiting) <= self.staleness:
            weights = {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}
            self._waiting.append(self._thread.submit(self._draw_with, weights, step + len(self._waiting)))
        sample = self._waiting.popleft().result()
        self.next_problem = sample.next_problem
        return sample

    def close(self) -> None:
        """Stop sampling."""
        if self._thread is not None:
            for waiting in self._waiting:
                waiting.cancel()
            self._thread.shutdown(wait=True)

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a resume needs, as JSON values and tensors; waits for what is being sampled."""
        samples = [waiting.result() for waiting in self._waiting]
        tensors: dict[str, Tensor] = {}
        for number, sample in enumerate(samples):
            if sample.replay is not None:
                tensors |= {f"experts.{number}": sample.replay.expert_LMK, f"kept.{number}": sample.replay.kept_MX}
        return {"next_problem": self.next_problem, "waiting": [_to_state(sample) for sample in samples]}, tensors

    def restore(self, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """The inverse of `state`."""
        self.next_problem = values["next_problem"]
        if self._thread is None:
            return
        self._asked = self.next_problem
        for number, saved in enumerate(values["waiting"]):
            sample = self._from_state(saved, number, tensors)
            done: Future[StepSample] = Future()
            done.set_result(sample)
            self._waiting.append(done)
            self._asked = sample.next_problem

    def _draw_with(self, weights: dict[str, Tensor], step: int) -> StepSample:
        self._copy.load_state_dict(weights)
        sample = self.sampler.draw(self.engine, step, self._asked)
        self._asked = sample.next_problem
        return sample

    def _from_state(self, saved: dict[str, Any], number: int, tensors: dict[str, Tensor]) -> StepSample:
        size = self.sampler.config.group_size
        problems = [self.sampler.problems[place] for place in saved["place"]]
        prompts = [self.sampler.prompter.prompt_ids(problem) for problem in problems]
        completions = [
            Completion(token_ids=ids, logprobs=logprobs, finish_reason=reason)
            for ids, logprobs, reason in saved["completions"]
        ]
        rollouts = Rollouts(
            problems=[problem for problem in problems for _ in range(size)],
            group_size=size,
            prompt_ids=[ids for ids in prompts for _ in range(size)],
            completions=completions,
            texts=[self.sampler.prompter.text(completion.token_ids) for completion in completions],
            wall_s=saved["wall_s"],
        )
        grades = [Grade(score=score, failure=failure, detail=detail) for score, failure, detail in saved["grades"]]
        graded = GradedAnswers(grades=grades, wall_s=saved["grading_s"], slowest_s=saved["slowest_s"])
        graded.failures.update(saved["failures"])
        replay = None
        if "replay" in saved:
            replay = EngineReplay(
                **saved["replay"], expert_LMK=tensors[f"experts.{number}"], kept_MX=tensors[f"kept.{number}"]
            )
        return StepSample(
            rollouts=rollouts,
            graded=graded,
            next_problem=saved["next_problem"],
            groups_sampled=saved["groups_sampled"],
            replay=replay,
            place=saved["place"],
        )


def _to_state(sample: StepSample) -> dict[str, Any]:
    """A sample as JSON values; floats come back exactly."""
    graded, replay = sample.graded, sample.replay
    saved: dict[str, Any] = {
        "place": sample.place,
        "next_problem": sample.next_problem,
        "groups_sampled": sample.groups_sampled,
        "completions": [[c.token_ids, c.logprobs, c.finish_reason] for c in sample.rollouts.completions],
        "wall_s": sample.rollouts.wall_s,
        "grades": [[grade.score, grade.failure, grade.detail] for grade in graded.grades],
        "grading_s": graded.wall_s,
        "slowest_s": graded.slowest_s,
        "failures": dict(graded.failures),
    }
    if replay is not None:
        saved["replay"] = {
            "layers": replay.layers,
            "first_token": replay.first_token,
            "first_response": replay.first_response,
        }
    return saved
