"""Rules on scores against their definitions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.engine.logit_rules import BANNED, LogitRules, apply_rules, top_logprobs
from shoal.errors import RequestError

SCORES = [1.0, -2.0, 0.5, 3.0, -1.0, 0.0]


def applied(rules, *, scores=SCORES, prompt=(), generated=(), stop=(), temperature=1.0, constraint=None):
    return apply_rules(
        torch.tensor(scores),
        rules,
        constraint,
        prompt_ids=list(prompt),
        generated_ids=list(generated),
        stop_ids=frozenset(stop),
        temperature=temperature,
    ).tolist()


tokens = st.lists(st.integers(0, 5), max_size=20)


@given(
    scores=st.lists(st.floats(-10, 10, width=32), min_size=6, max_size=6),
    prompt=tokens,
    generated=tokens,
    frequency=st.floats(-2, 2),
    presence=st.floats(-2, 2),
    repetition=st.floats(0.1, 3),
)
def test_penalties_are_their_definitions(scores, prompt, generated, frequency, presence, repetition):
    rules = LogitRules(frequency_penalty=frequency, presence_penalty=presence, repetition_penalty=repetition)
    expected = []
    for token, score in enumerate(scores):
        if token in prompt or token in generated:
            score = score / repetition if score > 0 else score * repetition
        times = generated.count(token)
        expected.append(score - frequency * times - (presence if times else 0.0))
    assert applied(rules, scores=scores, prompt=prompt, generated=generated) == pytest.approx(
        expected, abs=1e-3, rel=1e-4
    )


def test_default_rules_change_nothing():
    assert applied(LogitRules(), prompt=[1], generated=[2, 2]) == SCORES
    assert applied(None) == SCORES


def test_bias_is_added_and_a_hundred_bans_or_forces():
    out = applied(LogitRules(logit_bias=((0, 2.5), (3, -100.0), (4, 100.0))))
    assert out[0] == 3.5
    assert out[3] < BANNED / 2
    assert out[4] > -BANNED / 2


def test_stop_tokens_are_banned_until_the_minimum_is_reached():
    rules = LogitRules(min_tokens=2)
    assert applied(rules, generated=[1], stop=[3])[3] == BANNED
    assert applied(rules, generated=[1, 1], stop=[3]) == SCORES


@given(scores=st.lists(st.floats(-5, 5, width=32), min_size=6, max_size=6), min_p=st.floats(0.01, 1))
def test_min_p_keeps_what_is_likely_enough_beside_the_likeliest(scores, min_p):
    likely = torch.tensor(scores).softmax(0)
    out = applied(LogitRules(min_p=min_p), scores=scores)
    for token, score in enumerate(out):
        if likely[token] > 1.0001 * min_p * likely.max():
            assert score == pytest.approx(scores[token])
        elif likely[token] < 0.9999 * min_p * likely.max():
            assert score == BANNED


def test_the_end_of_thinking_is_forced_when_its_budget_is_used():
    rules = LogitRules(thinking_budget=2, think_id=0, end_think_id=1)
    assert applied(rules, generated=[]) == SCORES, "not thinking yet"
    assert applied(rules, generated=[5, 0, 4]) == SCORES
    forced = applied(rules, generated=[5, 0, 4, 4])
    assert max(range(6), key=forced.__getitem__) == 1
    assert sum(score > BANNED for score in forced) == 1
    assert applied(rules, generated=[5, 0, 4, 4, 1, 3, 3, 3]) == SCORES, "the thinking has ended"
    opened = LogitRules(thinking_budget=0, think_id=0, end_think_id=1, thinks_from_start=True)
    assert max(range(6), key=applied(opened).__getitem__) == 1


@pytest.mark.parametrize(
    "wrong",
    [
        {"frequency_penalty": 3.0},
        {"presence_penalty": float("nan")},
        {"repetition_penalty": 0.0},
        {"min_p": 1.5},
        {"min_tokens": -1},
        {"logit_bias": ((0, float("inf")),)},
        {"thinking_budget": 3},
    ],
    ids=str,
)
def test_impossible_rules_are_refused(wrong):
    with pytest.raises(RequestError, match=next(iter(wrong)).replace("thinking_budget", "budget")):
        LogitRules(**wrong)


def test_a_bias_on_a_token_the_model_has_not_got_is_refused():
    with pytest.raises(RequestError, match="token 6"):
        LogitRules(logit_bias=((6, 1.0),)).check(6)


def test_top_logprobs_are_the_likeliest_in_order():
    found = top_logprobs(torch.tensor([SCORES]), 2)[0]
    expected = torch.tensor(SCORES).log_softmax(0)
    assert [token for token, _ in found] == [3, 0]
    assert [value for _, value in found] == pytest.approx([float(expected[3]), float(expected[0])])


@pytest.mark.parametrize("padded", [0, 3])
def test_ids_beyond_the_tokenizer_never_fit_a_form(padded):
    class Form:
        def mask(self):
            return torch.tensor([True, False, True])

        def advance(self, token_id):
            raise AssertionError

    score_V = torch.zeros(3 + padded)
    found_V = apply_rules(score_V, None, Form(), prompt_ids=[], generated_ids=[], stop_ids=frozenset(), temperature=1.0)
    assert (found_V == 0).nonzero().flatten().tolist() == [0, 2]
