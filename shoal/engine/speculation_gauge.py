"""Whether guessing ahead pays, by measuring it beside plain steps, and how often guesses of each place are right.

What a guess costs depends on how many sequences decode at once, so every power of two of them is judged by itself. While
guessing is on, some steps leave the guesses out and the prediction module's time is not counted: that is what the step
would have cost without. Where guessing gains less than it must it is turned off, and tried again much later.
"""

import statistics
from collections import deque
from dataclasses import dataclass, field
from typing import Literal

TRIAL_STEPS = 24
"""Steps of each way that a judgement rests on."""
PLAIN_EVERY_STEPS = 16
"""While guessing is on: one step in so many is a plain one."""
OFF_STEPS = 20_000
"""Steps until a way that lost is tried again."""
LEAST_GAIN = 1.05

Way = Literal["off", "plain", "guess"]
"""off: no module at all. plain: it runs, but its guesses are left out of the step. guess: they are computed along."""


@dataclass
class _Pace:
    """What steps of one way took and gave."""

    seconds: deque[float] = field(default_factory=lambda: deque(maxlen=TRIAL_STEPS))
    tokens: deque[float] = field(default_factory=lambda: deque(maxlen=TRIAL_STEPS))
    """Per sequence."""

    @property
    def is_known(self) -> bool:
        return len(self.seconds) == TRIAL_STEPS

    @property
    def tokens_per_s(self) -> float:
        # Times have outliers, tokens have none: a median of the one, a mean of the other.
        return statistics.fmean(self.tokens) / statistics.median(self.seconds)


@dataclass
class _Load:
    """The judgement for one number of sequences."""

    plain: _Pace = field(default_factory=_Pace)
    guess: _Pace = field(default_factory=_Pace)
    steps: int = 0
    off_steps: int = 0

    @property
    def gain(self) -> float | None:
        if not (self.plain.is_known and self.guess.is_known):
            return None
        return self.guess.tokens_per_s / self.plain.tokens_per_s


class SpeculationGauge:
    """Chooses the way of every step and keeps the counts.

    Args:
        num_guesses: places that are counted.
    """

    def __init__(self, num_guesses: int = 1) -> None:
        self.drafted = [0] * num_guesses
        """Guesses checked, by their place after the drawn token."""
        self.accepted = [0] * num_guesses
        self._loads: dict[int, _Load] = {}

    def acceptance(self, place: int = 0) -> float | None:
        """Share of the guesses of a place that were right; None before the first."""
        return self.accepted[place] / self.drafted[place] if self.drafted[place] else None

    def gain(self, num_decoding: int) -> float | None:
        """Tokens per second with guesses over without, as last measured for about so many sequences."""
        return self._load(num_decoding).gain

    def way(self, num_decoding: int) -> Way:
        """How the next step should go."""
        load = self._load(num_decoding)
        if load.off_steps:
            load.off_steps -= 1
            if not load.off_steps:
                self._loads[num_decoding.bit_length()] = _Load()
            return "off"
        every = 2 if load.gain is None else PLAIN_EVERY_STEPS
        return "plain" if load.steps % every == every - 1 else "guess"

    def count(self, drafted: int, accepted: int) -> None:
        """So many guesses of a sequence were checked, and the first so many of them were right."""
        for place in range(drafted):
            self.drafted[place] += 1
            self.accepted[place] += place < accepted

    def note(self, way: Way, *, sequences: int, tokens: int, seconds: float, drafting_s: float) -> None:
        """Record a step in which `sequences` decoded and nothing else happened."""
        load = self._load(sequences)
        if way == "off" or load.off_steps:
            return
        load.steps += 1
        pace = load.guess if way == "guess" else load.plain
        pace.seconds.append(seconds - drafting_s if way == "plain" else seconds)
        pace.tokens.append(tokens / sequences)
        gain = load.gain
        if gain is not None and gain < LEAST_GAIN:
            load.off_steps = OFF_STEPS

    def _load(self, num_decoding: int) -> _Load:
        return self._loads.setdefault(num_decoding.bit_length(), _Load())
