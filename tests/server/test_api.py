import json
import threading

import httpx
import openai
import pytest

from shoal.engine.request import Request, SamplingParams

MESSAGES = [{"role": "user", "content": "how many fish?"}]


@pytest.fixture
def client(running):
    return openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0)


def test_the_openai_client_gets_what_the_engine_generates(running, client):
    answer = client.chat.completions.create(model="tiny", messages=MESSAGES, temperature=0, max_tokens=12)
    served = running.served
    prompt = tuple(served.template.encode(served.tokenizer, MESSAGES))
    assert answer.usage.prompt_tokens == len(prompt)
    assert answer.usage.completion_tokens <= 12
    assert answer.usage.total_tokens == len(prompt) + answer.usage.completion_tokens
    assert answer.usage.prompt_cache_miss_tokens == len(prompt)
    assert answer.choices[0].finish_reason in ("stop", "length")
    assert answer.object == "chat.completion" and answer.model == "tiny"


def test_streamed_text_equals_whole_text(client):
    whole = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=7, max_tokens=30)
    content, reasoning, usage, reasons = "", "", None, []
    stream = client.chat.completions.create(
        model="tiny", messages=MESSAGES, seed=7, max_tokens=30, stream=True, stream_options={"include_usage": True}
    )
    for chunk in stream:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            content += choice.delta.content or ""
            reasoning += getattr(choice.delta, "reasoning_content", None) or ""
            reasons += [choice.finish_reason] if choice.finish_reason else []
    assert content == whole.choices[0].message.content
    assert reasoning == (whole.choices[0].message.reasoning_content or "")
    assert usage.completion_tokens == whole.usage.completion_tokens
    assert reasons == [whole.choices[0].finish_reason]


def test_several_samples_and_a_stop_string(client):
    free = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, max_tokens=40, n=3)
    assert len({choice.message.content for choice in free.choices}) == 3
    text = max((choice.message.content for choice in free.choices), key=len)
    index = next(choice.index for choice in free.choices if choice.message.content == text)
    stop = text[3:5]
    cut = client.chat.completions.create(model="tiny", messages=MESSAGES, seed=3, max_tokens=40, n=3, stop=[stop])
    assert cut.choices[index].message.content == text[: text.find(stop)]
    assert cut.choices[index].finish_reason == "stop"


def test_many_clients_at_once_each_get_their_own_answer(client):
    def ask(seed):
        return (
            client.chat.completions.create(model="tiny", messages=MESSAGES, seed=seed, max_tokens=20)
            .choices[0]
            .message.content
        )

    alone = [ask(seed) for seed in range(6)]
    together = [""] * 6
    threads = [threading.Thread(target=lambda i=i: together.__setitem__(i, ask(i))) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert together == alone


def test_models_and_health(running, client):
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert httpx.get(f"{running.url}/health").json() == {"status": "ok"}


@pytest.mark.parametrize(
    "body, status, part",
    [
        (b"{", 400, "not valid JSON"),
        (b"\xff\xfe", 400, "not UTF-8"),
        (b"[" * 100_000, 400, "nested"),
        (b"[]", 400, "JSON object"),
        (b'{"messages": []}', 422, "messages"),
        (b'{"messages": [{"role": "king", "content": "x"}]}', 422, "role"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": 9}', 422, "temperature"),
        (b'{"messages": [{"role": "user", "content": "x"}], "max_tokens": 0}', 422, "max_tokens"),
        (b'{"messages": [{"role": "user", "content": "x"}], "n": 99}', 422, "n"),
        (json.dumps({"messages": [{"role": "user", "content": "x" * 5000}]}).encode(), 400, "context of 256"),
        (json.dumps({"messages": MESSAGES, "stop": ["x"] * 17}).encode(), 422, "16"),
        (b" " * (9 << 20), 413, "larger than"),
        (b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}', 400, "NaN"),
        (b'{"seed": ' + b"1" * 100_000 + b"}", 400, "digits"),
    ],
)
def test_bad_requests_get_an_error_one_can_act_on(running, body, status, part):
    response = httpx.post(f"{running.url}/v1/chat/completions", content=body, timeout=20)
    assert response.status_code == status
    assert part in response.json()["error"]["message"]
    assert httpx.get(f"{running.url}/health").status_code == 200


def test_an_oversized_chunked_body_is_refused_while_reading(running):
    def chunks():
        for _ in range(200):
            yield b" " * 65536

    assert httpx.post(f"{running.url}/v1/chat/completions", content=chunks()).status_code == 413


def test_unknown_routes_have_the_error_shape(running):
    response = httpx.get(f"{running.url}/nowhere")
    assert response.status_code == 404 and response.json()["error"]["type"] == "invalid_request_error"


def test_a_client_that_leaves_frees_its_rows(running):
    payload = {"messages": MESSAGES, "stream": True, "max_tokens": 200, "seed": 1}
    with httpx.stream("POST", f"{running.url}/v1/chat/completions", json=payload) as response:
        next(response.iter_lines())
    for _ in range(200):
        if running.served.worker.num_open == 0:
            break
        threading.Event().wait(0.02)
    assert running.served.worker.num_open == 0


def test_a_key_is_asked_for_everywhere_but_the_page(locked):
    assert httpx.get(f"{locked.url}/health").status_code == 200
    assert httpx.get(f"{locked.url}/").status_code == 200
    for path in ("/v1/models", "/models", "/api/page", "/openapi.json"):
        assert httpx.get(f"{locked.url}{path}").status_code == 401
        assert httpx.get(f"{locked.url}{path}", headers={"Authorization": "Bearer wrong"}).status_code == 401
        assert httpx.get(f"{locked.url}{path}", headers={"Authorization": "Bearer secret"}).status_code == 200


def test_a_step_that_fails_ends_its_requests_and_the_server_goes_on(running, monkeypatch):
    engine = running.served.worker.engine
    step, broken = type(engine).step, threading.Event()

    def fail_once(self):
        if not broken.is_set():
            broken.set()
            raise RuntimeError("injected")
        return step(self)

    monkeypatch.setattr(type(engine), "step", fail_once)
    payload = {"messages": MESSAGES, "max_tokens": 5, "seed": 1}
    first = httpx.post(f"{running.url}/v1/chat/completions", json=payload)
    assert first.json()["choices"][0]["finish_reason"] == "insufficient_system_resource"
    second = httpx.post(f"{running.url}/v1/chat/completions", json=payload)
    assert second.json()["choices"][0]["finish_reason"] in ("stop", "length")


def test_the_worker_refuses_when_too_many_wait(running):
    import asyncio

    from shoal.errors import ServerError
    from shoal.server.worker import EngineWorker

    async def overflow():
        worker = EngineWorker(running.served.worker.engine, max_waiting=0)
        worker.submit(Request(prompt_ids=(1,), sampling=SamplingParams(max_tokens=1)))

    with pytest.raises(ServerError, match="waiting"):
        asyncio.run(overflow())
