"""Fields of chat and text requests, each seen to do what it says."""

import json
import time

import httpx
import pytest

MESSAGES = [{"role": "user", "content": "how many fish?"}]


def chat(running, **fields):
    body = {"messages": MESSAGES, "max_tokens": 12, "seed": 3, **fields}
    response = httpx.post(f"{running.url}/v1/chat/completions", json=body, timeout=30)
    assert response.status_code == 200, response.text
    return response.json()


def complete(running, **fields):
    response = httpx.post(f"{running.url}/v1/completions", json={"max_tokens": 8, "seed": 3, **fields}, timeout=30)
    return response


def no_end(running, **more):
    return {str(running.served.tokenizer.eos_token_id): -100, **more}


def test_usage_says_what_was_found_and_what_it_cost(running):
    first = chat(running, user_id="usage", messages=[{"role": "user", "content": "fish " * 90}])["usage"]
    again = chat(running, user_id="usage", messages=[{"role": "user", "content": "fish " * 90}])["usage"]
    assert first["prompt_cache_hit_tokens"] == 0
    assert again["prompt_cache_hit_tokens"] == again["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["prompt_cache_hit_tokens"] % 64 == 0
    for usage in (first, again):
        assert usage["prompt_cache_hit_tokens"] + usage["prompt_cache_miss_tokens"] == usage["prompt_tokens"]
        assert usage["joules"] >= 0
    assert float(again["cost_usd"]) < float(first["cost_usd"])


def test_other_users_find_nothing(running):
    messages = [{"role": "user", "content": "shoal " * 90}]
    chat(running, user_id="one", messages=messages)
    assert chat(running, user_id="two", messages=messages)["usage"]["prompt_cache_hit_tokens"] == 0


def test_logprobs_name_the_drawn_token_and_the_likeliest(running):
    answer = chat(running, logprobs=True, top_logprobs=3, temperature=0, logit_bias=no_end(running))
    content = answer["choices"][0]["logprobs"]["content"]
    assert content
    for token in content:
        assert len(token["top_logprobs"]) == 3
        assert token["logprob"] <= 0
        assert token["token"] in [one["token"] for one in token["top_logprobs"]] or token["bytes"] == []


def test_a_bias_can_force_and_ban(running):
    token = running.served.tokenizer.encode("fish")[0]
    spelled = running.served.tokenizer.decode([token])
    text = chat(running, logit_bias=no_end(running, **{str(token): 100}), max_tokens=3)["choices"][0]["message"]
    assert text["content"] == spelled * 3


def test_an_answer_can_be_made_to_fit_a_schema(running):
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    content = chat(running, response_format=form, max_tokens=60, temperature=0)["choices"][0]["message"]["content"]
    assert json.loads(content)["n"] in (1, 2)


def test_an_answer_can_be_made_to_match_an_expression(running):
    form = {"type": "regex", "pattern": "(fish|cat) [0-9]{2}"}
    content = chat(running, response_format=form, n=2)["choices"][1]["message"]["content"]
    assert content.split()[0] in ("fish", "cat")
    assert len(content.split()[1]) == 2


def test_a_form_that_cannot_be_is_refused(running):
    body = {"messages": MESSAGES, "response_format": {"type": "regex", "pattern": "("}}
    response = httpx.post(f"{running.url}/v1/chat/completions", json=body)
    assert response.status_code == 400
    assert "regex" in response.json()["error"]["message"]


def test_thinking_ends_when_its_budget_is_used(running):
    answer = chat(running, thinking={"type": "enabled", "budget_tokens": 4}, max_tokens=40, logit_bias=no_end(running))
    assert answer["usage"]["completion_tokens_details"]["reasoning_tokens"] <= 4 + 2


def test_an_answer_goes_on_from_a_prefix(running):
    messages = [*MESSAGES, {"role": "assistant", "content": "There are ", "prefix": True}]
    with_prefix = chat(running, messages=messages, temperature=0)
    plain = chat(running, temperature=0)
    assert with_prefix["usage"]["prompt_tokens"] > plain["usage"]["prompt_tokens"]
    wrong = httpx.post(
        f"{running.url}/beta/chat/completions", json={"messages": [{"role": "user", "content": "x", "prefix": True}]}
    )
    assert wrong.status_code == 400


def test_what_the_model_wrote_comes_back_as_the_tokens_it_wrote(running):
    """Random models write texts that no tokenizer would cut like that; the memory of answers still finds them."""
    served = running.served
    text = chat(running, max_tokens=40, logit_bias=no_end(running), temperature=1)["choices"][0]["message"]["content"]
    known = served.answers.recall(text)
    if known is not None:
        assert served.tokenizer.decode(list(known)) == text
    ids = [served.tokenizer.encode("f")[0], served.tokenizer.encode("i")[0]]
    served.answers.remember("fi", ids)
    body = {"messages": [*MESSAGES, {"role": "assistant", "content": "fi"}, *MESSAGES]}
    tokens = httpx.post(f"{running.url}/tokenize", json=body).json()["tokens"]
    encoded = served.template.encode(served.tokenizer, body["messages"], recall=served.answers.recall)
    assert any(encoded[place : place + 2] == ids for place in range(len(encoded)))
    assert len(encoded) >= len(tokens)


def test_text_completion_continues_a_text_and_echoes_it(running):
    plain = complete(running, prompt="fish").json()
    echoed = complete(running, prompt="fish", echo=True).json()
    assert echoed["choices"][0]["text"] == "fish" + plain["choices"][0]["text"]
    assert plain["object"] == "text_completion"
    ids = complete(running, prompt=[0, *running.served.tokenizer.encode("fish")]).json()
    assert ids["choices"][0]["text"] == plain["choices"][0]["text"]


def test_several_prompts_give_several_choices(running):
    answer = complete(running, prompt=["fish", "cat"], n=2).json()
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]


def test_a_text_stream_is_the_whole_text_in_pieces(running):
    whole = complete(running, prompt="fish").json()["choices"][0]["text"]
    lines = complete(running, prompt="fish", stream=True).text.splitlines()
    events = [line.removeprefix("data: ") for line in lines if line.startswith("data: ")]
    assert events[-1] == "[DONE]"
    assert "".join(json.loads(event)["choices"][0]["text"] for event in events[:-1]) == whole


def test_filling_in_needs_tokens_that_this_model_has_not_got(running):
    response = complete(running, prompt="a", suffix="b")
    assert response.status_code == 400
    assert "fim" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "prompt, status", [([], 422), (["a"] * 17, 422), ([-1], 422), ([10**9], 400), ([[1], [10**9]], 400), ([[]], 422)]
)
def test_impossible_prompts_are_refused(running, prompt, status):
    assert complete(running, prompt=prompt).status_code == status


def test_tokenize_gives_the_ids_that_a_chat_would_be_charged_for(running):
    found = httpx.post(f"{running.url}/tokenize", json={"messages": MESSAGES}).json()
    assert found["count"] == chat(running)["usage"]["prompt_tokens"]
    text = httpx.post(f"{running.url}/tokenize", json={"text": "fish"}).json()
    assert text["tokens"] == running.served.tokenizer.encode("fish")
    assert httpx.post(f"{running.url}/tokenize", json={}).status_code == 400


def test_metrics_count_requests_tokens_and_times(running):
    chat(running)
    text = httpx.get(f"{running.url}/metrics").text
    for name in (
        "vllm:num_requests_running",
        "vllm:kv_cache_usage_perc",
        "vllm:generation_tokens_total",
        "vllm:prefix_cache_hits_total",
        "vllm:time_to_first_token_seconds_bucket",
        "vllm:inter_token_latency_seconds_count",
        'vllm:request_success_total{finished_reason="',
        'shoal:http_responses_total{route="/v1/chat/completions",status="200"}',
    ):
        assert name in text, name


def test_the_model_is_listed_by_name(running):
    assert httpx.get(f"{running.url}/v1/models/tiny").json()["id"] == "tiny"
    assert httpx.get(f"{running.url}/v1/models/other").status_code == 404


def test_health_fails_when_a_step_hangs(running, monkeypatch):
    assert httpx.get(f"{running.url}/health").status_code == 200
    monkeypatch.setattr(running.served.worker, "_step_began_s", time.monotonic() - 1e6)
    response = httpx.get(f"{running.url}/health")
    assert response.status_code == 503
    assert "step" in response.json()["status"]
