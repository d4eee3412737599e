import json

import pytest

from shoal.checkpoint.hf_config import config_to_hf
from shoal.errors import ConfigError
from shoal.planner.published_models import rival
from shoal.presets import PRESETS, v3
from shoal.recipes.planning import MAX_CONFIG_BYTES, open_model


def write(path, values):
    path.write_text(json.dumps(values), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize("name", list(PRESETS))
def test_a_published_config_gives_the_same_counts_as_the_preset(tmp_path, name):
    opened = open_model(write(tmp_path / "config.json", config_to_hf(PRESETS[name])))
    known = rival(name)
    assert (opened.total_params, opened.active_params) == (known.total_params, known.active_params)
    assert opened.kv_bytes_per_token() == known.kv_bytes_per_token()


def test_a_model_directory_is_its_config(tmp_path):
    write(tmp_path / "config.json", config_to_hf(v3()))
    assert open_model(str(tmp_path)).total_params == 671_026_419_200


def test_v32s_config_json_brings_its_indexer(tmp_path):
    values = config_to_hf(v3()) | {
        "model_type": "deepseek_v32",
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
    }
    opened, known = open_model(write(tmp_path / "config.json", values)), rival("v3.2")
    assert opened.total_params == known.total_params
    assert opened.kv_bytes(1_000_000) == known.kv_bytes(1_000_000)
    assert opened.decode_flops(100_000) == known.decode_flops(100_000)


def test_a_dense_family_that_shoal_cannot_compute_can_still_be_counted(tmp_path):
    values = {"model_type": "qwen2", "vocab_size": 152064, "hidden_size": 8192, "num_hidden_layers": 80}
    values |= {"num_attention_heads": 64, "num_key_value_heads": 8, "intermediate_size": 29568}
    values |= {"max_position_embeddings": 32768, "rms_norm_eps": 1e-6, "sliding_window": 131072, "hidden_act": "silu"}
    opened = open_model(write(tmp_path / "config.json", values))
    assert opened.kv_bytes_per_token() == 327_680
    assert opened.total_params == pytest.approx(rival("qwen2.5-72b").total_params, rel=1e-4)


@pytest.mark.parametrize(
    "content, part",
    [
        ("not json", "is not JSON"),
        ("[1]", "one JSON object"),
        ('{"model_type": "deepseek_v3"}', "lacks vocab_size"),
        ('{"model_type": "gpt9"}', "is not supported"),
        ('{"model_type": "deepseek_v32"}', "index_n_heads"),
        ('{"model_type": "deepseek_v4"}', "by name: v4-pro"),
        (json.dumps(config_to_hf(v3()) | {"hidden_size": -1}), "hidden_size=-1 must be at least 1"),
        (json.dumps(config_to_hf(v3()) | {"hidden_size": "7168"}), "hidden_size='7168'"),
        (json.dumps(config_to_hf(v3()) | {"num_experts_per_tok": 999}), "num_experts_per_tok=999"),
        ("[" * 100_000, "is not JSON"),
        (" " * (MAX_CONFIG_BYTES + 1), "larger than 1 MiB"),
    ],
)
def test_a_config_json_that_cannot_be_is_refused_by_name(tmp_path, content, part):
    path = tmp_path / "config.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(ConfigError, match=part) as caught:
        open_model(str(path))
    assert str(path) in str(caught.value)


def test_a_name_nobody_knows_lists_what_is_known():
    with pytest.raises(ConfigError, match="did you mean 'v2_lite'"):
        open_model("v2_lit")
