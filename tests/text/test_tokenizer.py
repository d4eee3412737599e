import copy
import json
import pickle
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.errors import TokenizerError
from shoal.text.tokenizer import SPECIAL_TOKENS, StreamDecoder, Tokenizer

TEXTS = ["the shoal swims to the shore, 12 fish in 3 rows; über Fische 日本語", "the other shoal of 47 fish"] * 5
TOKENIZER = Tokenizer.train(TEXTS, 320)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_text_survives_the_round_trip(text):
    assert TOKENIZER.decode(TOKENIZER.encode(text)) == text
    decoder = StreamDecoder(TOKENIZER)
    assert "".join(decoder.push(token) for token in TOKENIZER.encode(text)) + decoder.finish() == text
    assert sum(TOKENIZER.num_bytes(token) for token in TOKENIZER.encode(text)) == len(text.encode())


@settings(max_examples=50, deadline=None)
@given(st.lists(st.sampled_from([*SPECIAL_TOKENS, "a", "9", " x"]), max_size=8))
def test_what_a_user_types_never_becomes_a_control_token(parts):
    specials = set(TOKENIZER.special_tokens.values())
    assert not specials & set(TOKENIZER.encode("".join(parts)))


def test_control_tokens_are_single_ids_when_allowed():
    ids = TOKENIZER.encode("<think>9</think>", allow_special=True)
    assert ids == [TOKENIZER.token_id("<think>"), TOKENIZER.token_id("9"), TOKENIZER.token_id("</think>")]


def test_threads_that_allow_special_tokens_do_not_change_what_others_encode():
    text = "<think>fish " * 50
    wanted = {allow: TOKENIZER.encode(text, allow_special=allow) for allow in (True, False)}
    assert len(wanted[True]) != len(wanted[False])
    end_s = time.monotonic() + 0.5

    def encode(allow: bool) -> int:
        wrong = 0
        while time.monotonic() < end_s:
            wrong += sum(ids != wanted[allow] for ids in TOKENIZER.encode_batch([text] * 8, allow_special=allow))
        return wrong

    with ThreadPoolExecutor(4) as threads:
        assert sum(threads.map(encode, [True, False, True, False])) == 0


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda tokenizer: pickle.loads(pickle.dumps(tokenizer))])
def test_copies_do_not_take_text_for_control_tokens_either(copied):
    TOKENIZER.encode("both encoders are in use"), TOKENIZER.encode("now", allow_special=True)
    other = copied(TOKENIZER)
    assert other.encode("<think>9") == TOKENIZER.encode("<think>9")
    assert other.encode("<think>9", allow_special=True) == TOKENIZER.encode("<think>9", allow_special=True)


def test_digits_stay_apart():
    assert len(TOKENIZER.encode("2048")) == 4


def test_incomplete_characters_are_held_back():
    decoder = StreamDecoder(TOKENIZER)
    pieces = [decoder.push(token) for token in TOKENIZER.encode("é€")]
    assert "�" not in "".join(pieces) and "".join(pieces) == "é€"


def test_saved_tokenizers_load_here_and_in_transformers(tmp_path):
    from transformers import AutoTokenizer

    TOKENIZER.save(tmp_path)
    loaded = Tokenizer.load(tmp_path)
    assert loaded.digest == TOKENIZER.digest and loaded.bos_token_id == 0 and loaded.eos_token_id == 1
    other = AutoTokenizer.from_pretrained(tmp_path)
    assert other("the 47 fish", add_special_tokens=False).input_ids == TOKENIZER.encode("the 47 fish")
    assert other.eos_token_id == 1


def test_begin_and_end_are_read_from_the_object_spelling(tmp_path):
    raw = Tokenizer.train(TEXTS, 300, ["<s>", "</s>", "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"])
    raw.save(tmp_path)
    config = {"bos_token": {"content": "<s>"}, "eos_token": {"content": "</s>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert (Tokenizer.load(tmp_path).bos_token_id, Tokenizer.load(tmp_path).eos_token_id) == (0, 1)


def test_bad_tokenizers_are_refused(tmp_path):
    with pytest.raises(TokenizerError, match=r"no tokenizer\.json"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(TokenizerError, match="damaged"):
        Tokenizer.load(tmp_path)
    with pytest.raises(TokenizerError, match="too small"):
        Tokenizer.train(TEXTS, 200)
    with pytest.raises(TokenizerError, match="no text"):
        Tokenizer.train([], 400)
