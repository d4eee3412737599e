"""Answers under a form: random walks under the mask always end in something that fits."""

import json
import random
import time

import pytest

from shoal.engine.grammar import MAX_FORM_CHARACTERS, Form, GrammarConstraint
from shoal.errors import RequestError
from shoal.text.tokenizer import Tokenizer

pytest.importorskip("llguidance", reason="structured output needs llguidance")

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"enum": ["a", "b"]}, "maxItems": 2},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.train(['{"name": "Mia", "age": 12, "tags": ["a", "b"]} <think>'] * 4, 300)


def walk(tokenizer, form, seed, limit=400):
    """A text drawn evenly from what the mask allows."""
    constraint, rng, ids = GrammarConstraint(tokenizer, form), random.Random(seed), []
    while len(ids) < limit:
        allowed = constraint.mask().nonzero().squeeze(1).tolist()
        assert allowed
        token = (
            tokenizer.eos_token_id if tokenizer.eos_token_id in allowed and rng.random() < 0.3 else rng.choice(allowed)
        )
        if token == tokenizer.eos_token_id:
            return tokenizer.decode(ids)
        assert token not in tokenizer.special_tokens.values()
        constraint.advance(token)
        ids.append(token)
    return None


def test_walks_under_a_schema_give_json_that_fits_it(tokenizer):
    jsonschema = pytest.importorskip("jsonschema")
    form = Form("json_schema", json.dumps(PERSON))
    ended = [text for text in (walk(tokenizer, form, seed) for seed in range(20)) if text is not None]
    assert len(ended) > 5
    for text in ended:
        jsonschema.validate(json.loads(text), PERSON)


def test_walks_under_an_expression_and_a_grammar_match(tokenizer):
    for seed in range(10):
        assert walk(tokenizer, Form("regex", r"(yes|no), [0-9]{2}"), seed)[-2:].isdigit()
        assert walk(tokenizer, Form("grammar", 'start: "a" "b"+ "."'), seed).rstrip(".").strip("b") == "a"


def test_a_json_object_starts_with_a_brace(tokenizer):
    constraint = GrammarConstraint(tokenizer, Form("json_object"))
    allowed = constraint.mask().nonzero().squeeze(1).tolist()
    assert {tokenizer.decode([token]).strip()[:1] for token in allowed} <= {"{", ""}


def test_thinking_before_the_form_is_free_but_may_not_end_the_answer(tokenizer):
    end_think = tokenizer.token_id("</think>")
    constraint = GrammarConstraint(tokenizer, Form("regex", "a"), starts_after=end_think)
    mask = constraint.mask()
    assert int(mask.sum()) == tokenizer.vocab_size - 1
    assert not mask[tokenizer.eos_token_id]
    constraint.advance(tokenizer.encode("x")[0])
    constraint.advance(end_think)
    assert tokenizer.decode(constraint.mask().nonzero().squeeze(1).tolist()) == "a"


@pytest.mark.parametrize(
    "form",
    [
        ("json_schema", '{"type": "nonsense"}'),
        ("json_schema", "no json"),
        ("regex", "("),
        ("grammar", "start: nowhere"),
    ],
)
def test_forms_that_cannot_be_used_are_refused(tokenizer, form):
    with pytest.raises(RequestError, match=f"the {form[0]}"):
        GrammarConstraint(tokenizer, Form(*form))


def test_a_form_that_is_too_long_is_refused():
    with pytest.raises(RequestError, match="characters"):
        Form("regex", "a" * (MAX_FORM_CHARACTERS + 1))


@pytest.mark.parametrize(
    "form",
    [
        ("regex", "(a{1,1000}){1,1000}b{1,5000}"),
        ("regex", "(x+x+)+y" * 200),
        ("json_schema", json.dumps({"$ref": "#"})),
        ("json_schema", json.dumps({"anyOf": [{"maxLength": 10**9, "type": "string"}] * 200})),
        ("grammar", 'start: start start | start start start | "a"'),
    ],
    ids=str,
)
def test_expensive_forms_are_refused_or_cheap(tokenizer, form):
    started_s = time.process_time()
    try:
        constraint = GrammarConstraint(tokenizer, Form(*form))
        for _ in range(20):
            allowed = constraint.mask().nonzero().squeeze(1).tolist()
            constraint.advance(allowed[0])
    except RequestError:
        pass
    assert time.process_time() - started_s < 5
