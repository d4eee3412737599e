import pytest
import torch

from shoal.engine.engine import Engine
from shoal.engine.request import Request, SamplingParams
from shoal.errors import RequestError
from shoal.model.transformer import Transformer, initialise
from tests.model.test_mla import TINY

VARIANTS = {
    "moe": TINY,
    "dense": TINY.replace(n_routed_experts=None),
    "gqa": TINY.replace(attention="gqa", head_dim=12, num_attention_heads=4, num_key_value_heads=2),
}


def _engine(name="moe", **options):
    model = Transformer(VARIANTS[name])
    initialise(model, 0)
    return Engine(model.eval(), **options)


def _prompt(length, seed):
    return tuple(torch.randint(0, 61, (length,), generator=torch.Generator().manual_seed(seed)).tolist())


def _requests():
    return [
        Request(
            prompt_ids=_prompt(3 + 2 * i, i),
            sampling=SamplingParams(max_tokens=4 + i, temperature=float(i % 3), seed=i, num_samples=1 + i % 2),
        )
        for i in range(6)
    ]


def _tokens(groups):
    return [[completion.token_ids for completion in group] for group in groups]


@pytest.mark.parametrize("name", VARIANTS)
def test_greedy_equals_the_naive_loop_without_a_cache(name):
    engine = _engine(name)
    prompt = _prompt(7, 1)
    got = engine.generate([Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=12, temperature=0))])[0][0]
    ids = list(prompt)
    for _ in range(12):
        ids.append(int(engine.model.logits(engine.model(torch.tensor([ids])))[0, -1].argmax()))
    assert got.token_ids == ids[7:] and got.finish_reason == "length"


def test_batched_equals_single():
    engine = _engine()
    assert _tokens(engine.generate(_requests())) == [_tokens(engine.generate([request]))[0] for request in _requests()]


def test_neighbours_that_join_and_leave_change_nobodys_tokens():
    engine = _engine()
    wanted = _tokens(engine.generate([_requests()[5]]))[0]
    main = engine.add(_requests()[5])
    samples: dict[int, list[int]] = {0: [], 1: []}
    step = 0
    while not engine.is_idle:
        if step in (1, 3):
            engine.add(_requests()[step])
        for event in engine.step():
            if event.request_id == main:
                samples[event.sample].append(event.token_id)
        step += 1
    assert list(samples.values()) == wanted


def test_samples_of_one_prompt_differ_and_repeat_with_the_seed():
    engine = _engine()
    request = Request(prompt_ids=_prompt(5, 0), sampling=SamplingParams(max_tokens=10, seed=3, num_samples=4))
    first, second = engine.generate([request]), engine.generate([request])
    assert _tokens(first) == _tokens(second)
    assert len({tuple(completion.token_ids) for completion in first[0]}) == 4


def test_requests_beyond_the_rows_wait_their_turn():
    narrow, wide = _engine(max_rows=2), _engine()
    assert _tokens(narrow.generate(_requests())) == _tokens(wide.generate(_requests()))


def test_a_stop_token_ends_and_is_the_last():
    engine = _engine()
    free = engine.generate([Request(prompt_ids=_prompt(5, 0), sampling=SamplingParams(max_tokens=10, temperature=0))])[
        0
    ][0].token_ids
    stop = free[4]
    params = SamplingParams(max_tokens=10, temperature=0, stop_token_ids=(stop,))
    got = engine.generate([Request(prompt_ids=_prompt(5, 0), sampling=params)])[0][0]
    assert got.token_ids == free[: free.index(stop) + 1] and got.finish_reason == "stop"


def test_a_cancelled_request_is_gone_before_the_next_step():
    engine = _engine()
    first, second = engine.add(_requests()[4]), engine.add(_requests()[2])
    engine.step()
    engine.cancel(first)
    assert {event.request_id for event in engine.step()} == {second}
    engine.cancel(second)
    assert engine.step() == [] and engine.is_idle


def test_streaming_gives_the_same_tokens_and_closing_cancels():
    engine = _engine()
    request = _requests()[4]
    assert [event.token_id for event in engine.stream(request)] == _tokens(engine.generate([request]))[0][0]
    stream = engine.stream(request)
    next(stream)
    stream.close()
    assert engine.is_idle


def test_logits_that_are_not_finite_fail_that_request_alone():
    engine = _engine()
    head = engine.model.lm_head.weight
    with torch.no_grad():
        engine.model.embed_tokens.weight[60] = float("nan")
    good = Request(prompt_ids=(1, 2, 3), sampling=SamplingParams(max_tokens=3, temperature=0))
    bad = Request(prompt_ids=(1, 60), sampling=SamplingParams(max_tokens=3, temperature=0))
    reasons = [group[0].finish_reason for group in engine.generate([good, bad])]
    assert reasons == ["length", "error"] and head.isfinite().all()


@pytest.mark.parametrize(
    "prompt, tokens, message",
    [((), 1, "empty"), ((61,), 1, r"0\.\.60"), ((-1,), 1, r"0\.\.60"), ((1,) * 60, 10, "max_tokens to 4")],
)
def test_requests_that_cannot_be_served_are_refused(prompt, tokens, message):
    with pytest.raises(RequestError, match=message):
        _engine().add(Request(prompt_ids=prompt, sampling=SamplingParams(max_tokens=tokens)))


def test_the_measured_cache_is_the_latent_one():
    assert _engine().cache_bytes_per_token == 2 * (20 + 6) * 4
