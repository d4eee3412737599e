"""Who may ask and how much: keys from everywhere, rates, concurrency, and nothing without a key."""

import json
from decimal import Decimal

import httpx
import pytest

from shoal.errors import ShoalError
from shoal.server.access import Access, AccessError, Account, Limits, RateError, Turnstile
from shoal.server.app import ServerOptions
from shoal.server.guard import OPEN_PATHS
from shoal.server.keys import KeyStore
from shoal.server.ledger import Ledger
from tests.server.conftest import run_server, tiny_served

BODY = {"messages": [{"role": "user", "content": "fish"}], "max_tokens": 4, "seed": 1}


@pytest.fixture(scope="module")
def paid(tmp_path_factory):
    """A server with a key store and a ledger."""
    path = tmp_path_factory.mktemp("ledger") / "ledger.sqlite"
    store = KeyStore(path)
    secrets = {
        "rich": store.add("rich", Decimal("1")),
        "poor": store.add("poor", Decimal("0.0000001")),
        "slow": store.add("slow", Decimal("1"), requests_per_minute=2),
    }
    served = tiny_served()
    served.ledger = Ledger(path)
    for running in run_server(ServerOptions(access=Access(store=store)), served):
        running.secrets, running.store = secrets, store
        yield running


def ask(running, name, **changes):
    headers = {"Authorization": f"Bearer {running.secrets[name]}"}
    return httpx.post(f"{running.url}/v1/chat/completions", json={**BODY, **changes}, headers=headers, timeout=30)


def test_every_request_is_in_the_ledger_with_the_usage_the_client_saw(paid):
    usage = ask(paid, "rich").json()["usage"]
    key = next(record for record in paid.store.list() if record.name == "rich")
    totals = paid.served.ledger.totals(key.key_id)
    assert (totals.num_requests, totals.num_running) == (1, 0)
    assert totals.hit_tokens == usage["prompt_cache_hit_tokens"]
    assert totals.miss_tokens == usage["prompt_cache_miss_tokens"]
    assert totals.output_tokens == usage["completion_tokens"]
    assert totals.cost_usd == Decimal(usage["cost_usd"]) > 0
    assert key.granted_usd == paid.served.ledger.balance(key.key_id) + totals.cost_usd


def test_a_client_that_leaves_in_the_middle_is_charged_for_what_was_made(paid):
    before = paid.served.ledger.totals()
    headers = {"Authorization": f"Bearer {paid.secrets['rich']}"}
    body = {**BODY, "max_tokens": 200, "stream": True, "logit_bias": {str(paid.served.tokenizer.eos_token_id): -100}}
    with httpx.stream("POST", f"{paid.url}/v1/chat/completions", json=body, headers=headers) as response:
        next(response.iter_lines())
    for _ in range(200):
        after = paid.served.ledger.totals()
        if after.num_requests == before.num_requests + 1 and after.num_running == 0:
            break
        httpx.get(f"{paid.url}/health")
    assert after.num_running == 0
    assert before.output_tokens < after.output_tokens <= before.output_tokens + 200


def test_who_has_no_money_gets_402(paid):
    response = ask(paid, "poor", max_tokens=200)
    assert response.status_code == 402
    assert response.json()["error"]["type"] == "insufficient_balance"


def test_who_asks_too_often_gets_429_and_when_to_come_back(paid):
    assert [ask(paid, "slow").status_code for _ in range(3)] == [200, 200, 429]
    assert int(ask(paid, "slow").headers["retry-after"]) >= 1


def test_the_balance_is_in_deepseeks_shape(paid):
    headers = {"Authorization": f"Bearer {paid.secrets['slow']}"}
    found = httpx.get(f"{paid.url}/user/balance", headers=headers).json()
    assert found["is_available"] is True
    assert found["balance_infos"][0]["currency"] == "USD"


def test_revoked_keys_are_refused(paid):
    secret = paid.store.add("gone", Decimal("1"))
    paid.store.revoke(paid.store.list()[-1].key_id)
    response = httpx.get(f"{paid.url}/v1/models", headers={"Authorization": f"Bearer {secret}"})
    assert response.status_code == 401


def test_every_route_that_is_not_listed_as_open_asks_for_a_key(locked):
    document = httpx.get(f"{locked.url}/openapi.json", headers={"Authorization": "Bearer secret"}).json()
    paths = [*document["paths"], "/openapi.json", "/metrics", "/api/page", "/nowhere", "/docs"]
    for path in paths:
        for method in ("GET", "POST"):
            response = httpx.request(method, locked.url + path.replace("{name}", "x"), json={})
            expected = {200, 405} if path in OPEN_PATHS else {401}
            assert response.status_code in expected, (method, path)


@pytest.mark.parametrize("header", ["Bearer secret", "bearer secret"])
def test_the_key_is_taken_from_a_bearer_header(locked, header):
    assert httpx.get(f"{locked.url}/v1/models", headers={"Authorization": header}).status_code == 200


def test_the_key_is_taken_as_anthropics_clients_send_it(locked):
    assert httpx.get(f"{locked.url}/v1/models", headers={"x-api-key": "secret"}).status_code == 200


@pytest.mark.parametrize("header", ["", "secret", "Basic secret", "Bearer", "Bearer secretx", "Bearer secre"])
def test_anything_else_is_refused(locked, header):
    assert httpx.get(f"{locked.url}/v1/models", headers={"Authorization": header}).status_code == 401


def test_no_origin_is_allowed_in_by_cors(running):
    response = httpx.options(
        f"{running.url}/v1/chat/completions",
        headers={"Origin": "https://example.org", "Access-Control-Request-Method": "POST"},
    )
    assert "access-control-allow-origin" not in response.headers


def test_the_bucket_refills_evenly():
    now = [0.0]
    turnstile = Turnstile(lambda: now[0])
    account = Account(name="a", limits=Limits(requests_per_minute=60))
    for _ in range(60):
        turnstile.enter(account)
    with pytest.raises(RateError) as refusal:
        turnstile.enter(account)
    assert 0 < refusal.value.retry_after_s <= 1
    now[0] += 1.01
    turnstile.enter(account)
    with pytest.raises(RateError):
        turnstile.enter(account)


def test_no_more_than_the_allowed_number_run_at_once():
    turnstile = Turnstile()
    account = Account(name="a", limits=Limits(max_concurrent=2))
    turnstile.enter(account)
    turnstile.enter(account)
    with pytest.raises(RateError, match="2 requests"):
        turnstile.enter(account)
    turnstile.enter(Account(name="b", limits=Limits(max_concurrent=2)))
    turnstile.leave(account)
    turnstile.enter(account)
    assert turnstile.num_open(account) == 2


def test_a_server_without_keys_is_open_and_one_with_keys_is_not():
    assert Access().account("").key_id is None
    with pytest.raises(AccessError):
        Access(["k"]).account("Bearer wrong")
    assert issubclass(AccessError, ShoalError)


def test_the_access_log_has_no_text_of_requests(capfd):
    for running in run_server(ServerOptions(access_log=True)):
        body = {**BODY, "messages": [{"role": "user", "content": "a very secret question"}]}
        assert httpx.post(f"{running.url}/v1/chat/completions?q=1", json=body, timeout=30).status_code == 200
    err = capfd.readouterr().err
    assert "secret question" not in err
    (line,) = [json.loads(line) for line in err.splitlines() if line.startswith("{")]
    assert (line["path"], line["status"], line["method"]) == ("/v1/chat/completions", 200, "POST")
