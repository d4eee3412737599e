"""Guessing ahead changes no token, guesses what the prediction module says, and is judged by what it gains."""

import pytest
import torch

from shoal.engine.logit_rules import LogitRules
from shoal.engine.packed_model import PackedModel
from shoal.engine.request import Request, SamplingParams
from shoal.engine.serving import ServingConfig, ServingEngine
from shoal.engine.speculation_gauge import LEAST_GAIN, OFF_STEPS, TRIAL_STEPS, SpeculationGauge
from shoal.engine.speculative import MAX_GUESSES, Drafter, Speculation
from shoal.errors import ConfigError
from shoal.kernels.cpu.build import library
from shoal.model.layers import set_compute_dtype
from tests.engine.running import generate

pytestmark = pytest.mark.skipif(library() is None, reason="no C++ compiler: the simple engine serves")


class Always(SpeculationGauge):
    """Never gives up, whatever it measures; one step in five leaves the guesses out."""

    steps = 0

    def way(self, num_decoding):
        self.steps += 1
        return "plain" if self.steps % 5 == 0 else "guess"


def speculating(trained, num_guesses, format_name="bf16", **sizes):
    source = trained.model.state_dict().__getitem__
    packed = PackedModel(trained.model.config, source, format_name)
    speculation = Speculation(Drafter(packed, source), num_guesses, Always(num_guesses))
    return ServingEngine(packed, ServingConfig(cache_bytes=1 << 24, **sizes), speculation=speculation)


def plain(trained, **sizes):
    packed = PackedModel(trained.model.config, trained.model.state_dict().__getitem__, "bf16")
    return ServingEngine(packed, ServingConfig(cache_bytes=1 << 24, **sizes))


def requests_of(trained, **sampling):
    prompts = [trained.token_ids[start : start + length] for start, length in ((0, 12), (500, 64), (900, 150))]
    return [
        Request(prompt_ids=tuple(prompt), sampling=SamplingParams(max_tokens=70, seed=index, **sampling))
        for index, prompt in enumerate(prompts)
    ]


@pytest.mark.parametrize("num_guesses", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_no_token_greedy_or_sampled(trained, num_guesses, temperature):
    requests = requests_of(trained, temperature=temperature, num_samples=2)
    expected = generate(plain(trained), requests)[0]
    engine = speculating(trained, num_guesses)
    for _ in range(2):  # the second time from the cache
        assert generate(engine, requests)[0] == expected
    assert engine.stats.drafted[0] > 100
    assert engine.speculation.gauge.acceptance() > (0.15 if temperature else 0.3), (
        "a trained module is right often enough to test both ways"
    )
    assert sorted(engine.stats.accepted, reverse=True) == list(engine.stats.accepted), "a later guess needs the earlier"


@pytest.mark.parametrize(
    "sampling",
    [
        {"rules": LogitRules(frequency_penalty=0.7, presence_penalty=0.3, repetition_penalty=1.2)},
        {"rules": LogitRules(min_p=0.2), "temperature": 1.5},
        {"rules": LogitRules(thinking_budget=9, end_think_id=7, thinks_from_start=True)},
        {"rules": LogitRules(min_tokens=30), "stop_token_ids": tuple(range(20, 120))},
        {"top_p": 0.8, "top_k": 5},
    ],
    ids=str,
)
def test_guesses_change_no_token_under_rules(trained, sampling):
    requests = requests_of(trained, **sampling)
    assert generate(speculating(trained, 2), requests)[0] == generate(plain(trained), requests)[0]


def test_guesses_change_no_token_in_chunks_or_under_pressure(trained):
    requests = requests_of(trained) * 2
    expected = generate(plain(trained), requests)[0]
    for sizes in ({"step_tokens": 20}, {"step_tokens": 2}, {"max_running": 2}):
        assert generate(speculating(trained, 2, **sizes), requests)[0] == expected


def test_the_guesses_are_what_the_prediction_module_says(trained):
    """The packed drafter against the module in PyTorch, on the same text."""
    model = trained.model
    engine = speculating(trained, 1, "f32")
    set_compute_dtype(model, None)
    try:
        sampling = SamplingParams(max_tokens=30, temperature=0.0)
        engine.add(Request(prompt_ids=tuple(trained.token_ids[:9]), sampling=sampling))
        for _ in range(8):
            engine.step()
            (sample,) = engine.scheduler.running
            token_BS = torch.tensor([sample.token_ids])
            with torch.no_grad():
                ahead_BSD = model.predict_ahead(model(token_BS), token_BS)[0]
                # Position i of the module stands for what follows token i + 1.
                expected = int(model.logits(ahead_BSD[0, len(sample.token_ids) - 2]).argmax())
            assert sample.draft == [expected]
    finally:
        set_compute_dtype(model, torch.bfloat16)


def test_further_guesses_are_the_module_fed_with_its_own(trained):
    engine = speculating(trained, 3)
    engine.add(Request(prompt_ids=tuple(trained.token_ids[:30]), sampling=SamplingParams(max_tokens=3)))
    engine.step()
    (sample,) = engine.scheduler.running
    assert len(sample.draft) == 1, "two more tokens may come, and one comes anyway"
    engine.add(Request(prompt_ids=tuple(trained.token_ids[:63]), sampling=SamplingParams(max_tokens=30)))
    engine.step()
    longer = engine.scheduler.running[-1]
    assert len(longer.draft) == 2, "the latents of a third would need another page"


@pytest.mark.parametrize("num_guesses", [0, MAX_GUESSES + 1])
def test_an_impossible_number_of_guesses_is_refused(trained, num_guesses):
    with pytest.raises(ConfigError, match="between 1 and 4"):
        Speculation(None, num_guesses)


def trial(gauge, seconds_with, drafting_s=0.2, tokens=2.0, sequences=1, steps=2 * TRIAL_STEPS):
    for _ in range(steps):
        way = gauge.way(sequences)
        seconds = seconds_with if way == "guess" else 1.0 + drafting_s
        per = tokens if way == "guess" else 1.0
        gauge.note(way, sequences=sequences, tokens=per * sequences, seconds=seconds, drafting_s=drafting_s)


def test_the_gauge_keeps_guessing_only_where_it_gains():
    gauge = SpeculationGauge()
    trial(gauge, 1.6, sequences=1)
    trial(gauge, 1.95, sequences=16)
    assert gauge.gain(1) == pytest.approx(2 / 1.6)
    assert gauge.gain(16) == pytest.approx(2 / 1.95) and gauge.gain(16) < LEAST_GAIN
    ways = [gauge.way(1) for _ in range(8)]
    assert "guess" in ways and "off" not in ways
    assert {gauge.way(16) for _ in range(OFF_STEPS)} == {"off"}
    assert gauge.way(16) == "guess", "tried again much later"


def test_a_gain_that_is_lost_later_turns_guessing_off():
    gauge = SpeculationGauge()
    trial(gauge, 1.2)
    assert gauge.way(1) != "off"
    trial(gauge, 1.2, tokens=1.1, steps=40)
    assert gauge.way(1) == "off"


def test_acceptance_is_counted_by_place():
    gauge = SpeculationGauge(3)
    for drafted, accepted in ((3, 3), (3, 1), (2, 0), (1, 1)):
        gauge.count(drafted, accepted)
    assert gauge.drafted == [4, 3, 2]
    assert gauge.accepted == [3, 1, 1]
    assert gauge.acceptance(1) == pytest.approx(1 / 3)
    assert SpeculationGauge().acceptance() is None
