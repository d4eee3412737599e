import json
import multiprocessing
import os
import resource
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from shoal.checkpoint.hf_format import load_config, load_model, load_state, save_model, stream_state
from shoal.checkpoint.hf_layout import layout, repeated_keys
from shoal.checkpoint.weight_files import dequantise_blocks
from shoal.config import ModelConfig
from shoal.errors import CheckpointError, DiskFullError
from shoal.model.transformer import Transformer, initialise

FORK = multiprocessing.get_context("fork")
SHAPE: dict[str, Any] = {
    "vocab_size": 29,
    "hidden_size": 12,
    "intermediate_size": 20,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "q_lora_rank": 10,
    "kv_lora_rank": 8,
    "qk_nope_head_dim": 6,
    "qk_rope_head_dim": 4,
    "v_head_dim": 5,
}
EXPERTS: dict[str, Any] = {"n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 7}
GROUPED: dict[str, Any] = {
    **{key: value for key, value in SHAPE.items() if not key.endswith(("_rank", "_head_dim"))},
    "attention": "gqa",
    "num_key_value_heads": 1,
    "head_dim": 6,
}
CONFIGS = {
    "experts and prediction": ModelConfig(**SHAPE, **EXPERTS, num_nextn_predict_layers=2, n_shared_experts=2),
    "dense and tied": ModelConfig(**SHAPE, tie_word_embeddings=True, num_nextn_predict_layers=1),
    "no query compression": ModelConfig(**{**SHAPE, "q_lora_rank": None}, **EXPERTS, n_shared_experts=0),
    "softmax": ModelConfig(
        **SHAPE, **EXPERTS, scoring_func="softmax", topk_method="group_limited_greedy", n_group=2, norm_topk_prob=False
    ),
    "grouped attention": ModelConfig(**GROUPED, **EXPERTS),
}
MAIN = CONFIGS["experts and prediction"]


def state_of(config: ModelConfig, seed: int = 0) -> dict[str, Tensor]:
    model = Transformer(config)
    initialise(model, seed)
    for name, buffer in model.named_buffers():
        if name.endswith("correction_bias"):
            buffer.copy_(torch.linspace(-1, 1, len(buffer)) / 3)
    return model.state_dict()


def save_main(directory: Path, **options: Any) -> Path:
    save_model(directory / "model", MAIN, state_of(MAIN), dtype=torch.float32, **options)
    return directory / "model"


def rewrite(directory: Path, **changes: Tensor | None) -> None:
    """Change single tensors of a saved model, as another program would."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for key, tensor in changes.items():
        tensors.pop(key, None)
        if tensor is not None:
            tensors[key] = tensor
    save_file(tensors, path)
    (directory / "checksums.json").unlink(missing_ok=True)


@pytest.mark.parametrize("name", CONFIGS)
def test_the_table_names_exactly_the_tensors_of_the_model(name: str) -> None:
    wanted = {key: tuple(tensor.shape) for key, tensor in Transformer(CONFIGS[name]).state_dict().items()}
    assert {entry.name: entry.shape for entry in layout(CONFIGS[name])} == wanted


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("max_shard_bytes", [5_000_000_000, 2_000])
def test_saved_and_loaded_is_the_same_bit_for_bit(tmp_path: Path, name: str, max_shard_bytes: int) -> None:
    config, state = CONFIGS[name], state_of(CONFIGS[name])
    save_model(tmp_path / "m", config, state, dtype=torch.float32, max_shard_bytes=max_shard_bytes)
    loaded_config, loaded = load_model(tmp_path / "m")
    assert loaded_config == config
    assert loaded.keys() == state.keys()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in state.items())
    assert (tmp_path / "m" / "model.safetensors.index.json").exists() == (max_shard_bytes == 2_000)


def test_published_keys_are_per_expert_and_prediction_layers_repeat_embedding_and_head(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    state = state_of(MAIN)
    with safe_open(directory / "model.safetensors", framework="pt") as file:
        up = file.get_tensor("model.layers.1.mlp.experts.3.up_proj.weight")
        assert torch.equal(up, state["layers.1.mlp.experts.gate_up_proj"][3, 7:])
        down = file.get_tensor("model.layers.3.mlp.experts.2.down_proj.weight")
        assert torch.equal(down, state["mtp.1.block.mlp.experts.down_proj"][2])
        gate = file.get_tensor("model.layers.0.mlp.gate_proj.weight")
        assert torch.equal(gate, state["layers.0.mlp.gate_up_proj.weight"][:20])
        norm = file.get_tensor("model.layers.2.shared_head.norm.weight")
        assert torch.equal(norm, state["mtp.0.shared_head_norm.weight"])
        for key, original in repeated_keys(MAIN).items():
            assert torch.equal(file.get_tensor(key), file.get_tensor(original))
        assert file.metadata() == {"format": "pt"}
    assert len(repeated_keys(MAIN)) == 4


def test_index_lists_every_key_once_with_the_total_size(tmp_path: Path) -> None:
    directory = save_main(tmp_path, max_shard_bytes=3_000)
    index = json.loads((directory / "model.safetensors.index.json").read_text())
    total = 0
    for path in directory.glob("*.safetensors"):
        tensors = load_file(path)
        assert all(index["weight_map"].pop(key) == path.name for key in tensors)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= 3_000 or len(tensors) == 1
        total += size
    assert index["weight_map"] == {} and index["metadata"]["total_size"] == total


def test_balance_bias_stays_float32_when_the_rest_is_bfloat16(tmp_path: Path) -> None:
    state = state_of(MAIN)
    save_model(tmp_path / "m", MAIN, state)
    for wanted in (None, torch.bfloat16, torch.float32):
        loaded = load_state(tmp_path / "m", MAIN, dtype=wanted)
        bias = loaded.pop("layers.1.mlp.gate.e_score_correction_bias")
        assert torch.equal(bias, state["layers.1.mlp.gate.e_score_correction_bias"])
        dtypes = {tensor.dtype for name, tensor in loaded.items() if "correction_bias" not in name}
        assert dtypes == {wanted or torch.bfloat16}
    assert torch.equal(loaded["norm.weight"], state["norm.weight"].bfloat16().float())


def test_fp8_blocks_are_multiplied_out_at_their_cut_off_edges_too(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    generator = torch.Generator().manual_seed(3)
    stored = torch.randn(20, 12, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 2, generator=generator) + 0.5
    wanted = torch.empty(20, 12)
    for row in range(20):
        for column in range(12):
            wanted[row, column] = float(stored[row, column].float()) * float(scale[row // 8, column // 8])
    key = "model.layers.0.mlp.up_proj.weight"
    rewrite(directory, **{key: stored, f"{key}_scale_inv": scale})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [8, 8]}
    (directory / "config.json").write_text(json.dumps(config))
    _, loaded = load_model(directory, dtype=torch.float32)
    assert torch.equal(loaded["layers.0.mlp.gate_up_proj.weight"][20:], wanted.bfloat16().float())
    with pytest.raises(CheckpointError, match=r"blocks \(8, 8\) want \[3, 2\]"):
        dequantise_blocks(stored, scale.T, (8, 8))
    rewrite(directory, **{f"{key}_scale_inv": None})
    with pytest.raises(CheckpointError, match="without its"):
        load_model(directory)


def test_a_checkpoint_without_its_promised_prediction_layers_is_read_and_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = save_main(tmp_path)
    keys = [
        key
        for key in load_file(directory / "model.safetensors")
        if key.startswith(("model.layers.2.", "model.layers.3."))
    ]
    rewrite(directory, **dict.fromkeys(keys))
    config, loaded = load_model(directory)
    assert config == MAIN.replace(num_nextn_predict_layers=0)
    assert not any(name.startswith("mtp.") for name in loaded)
    assert "reading without them" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model.norm.weight": None}, r"missing model\.norm\.weight, left over nothing"),
        ({"model.layers.0.mlp.bias": torch.zeros(3)}, r"left over model\.layers\.0\.mlp\.bias"),
        ({"model.norm.weight": torch.zeros(13)}, r"model\.norm\.weight in .* has shape \[13\].* wants \[12\]"),
        (
            {"model.layers.1.mlp.experts.4.up_proj.weight": torch.zeros(7, 12)},
            r"left over model\.layers\.1\.mlp\.experts\.4",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_before_anything_is_read(
    tmp_path: Path, changes: dict[str, Tensor | None], message: str
) -> None:
    directory = save_main(tmp_path)
    rewrite(directory, **changes)
    with pytest.raises(CheckpointError, match=message):
        next(stream_state(directory, MAIN))


def test_frequency_tables_of_old_files_are_left_out(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    rewrite(directory, **{"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(2)})
    assert load_state(directory, MAIN).keys() == state_of(MAIN).keys()


@pytest.mark.parametrize("verify", [True, False])
def test_a_truncated_file_is_noticed(tmp_path: Path, verify: bool) -> None:
    path = save_main(tmp_path) / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is damaged"):
        load_model(path.parent, verify=verify)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_an_altered_file_is_noticed_by_its_checksum(tmp_path: Path, name: str) -> None:
    path = save_main(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[-2] ^= 32
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"damaged|cannot be read"):
        load_model(path.parent)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    directory = save_main(tmp_path, max_shard_bytes=3_000)
    victim = sorted(directory.glob("model-*.safetensors"))[1]
    victim.unlink()
    for verify in (True, False):
        with pytest.raises(CheckpointError, match=f"{victim.name} is missing"):
            load_model(directory, verify=verify)


@pytest.mark.parametrize("name", ["../../secret.safetensors", "weights.bin"])
def test_an_index_cannot_point_elsewhere(tmp_path: Path, name: str) -> None:
    directory = save_main(tmp_path)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"model.norm.weight": name}}))
    with pytest.raises(CheckpointError, match="no safetensors file beside it"):
        load_model(directory)


def test_pickled_weights_are_refused_with_a_hint(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    (directory / "checksums.json").unlink()
    with pytest.raises(CheckpointError, match="can run code"):
        load_model(directory)


def test_what_is_no_model_directory_is_said(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="does not exist"):
        load_config(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "config.json").write_text("[1]")
    with pytest.raises(CheckpointError, match="JSON object"):
        load_config(tmp_path)


class Card:
    """Something saved beside the weights."""

    def save(self, directory: Path) -> None:
        (directory / "tokenizer.json").write_text("{}")


def test_saving_again_replaces_the_model_and_keeps_what_is_beside_it(tmp_path: Path) -> None:
    directory = save_main(tmp_path, max_shard_bytes=3_000, beside=[Card()])
    (directory / "notes.md").write_text("mine")
    other = state_of(MAIN, seed=1)
    save_model(directory, MAIN, other, dtype=torch.float32)
    assert torch.equal(load_model(directory)[1]["norm.weight"], other["norm.weight"])
    names = {path.name for path in directory.iterdir()}
    assert names == {"config.json", "checksums.json", "model.safetensors", "tokenizer.json", "notes.md"}
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_after_an_interrupted_replacement_the_message_says_where_the_old_model_is(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    directory.rename(tmp_path / "model.old")
    with pytest.raises(CheckpointError, match=r"the model before it is in .*model\.old"):
        load_model(directory)
    save_main(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_a_directory_that_holds_something_else_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(CheckpointError, match="no model; name an empty"):
        save_model(tmp_path, MAIN, state_of(MAIN))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "photos").mkdir()
    with pytest.raises(CheckpointError, match="no model; name an empty"):
        save_model(tmp_path, MAIN, state_of(MAIN))
    with pytest.raises(CheckpointError, match="is a file"):
        save_model(tmp_path / "thesis.txt", MAIN, state_of(MAIN))
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_a_state_that_does_not_fit_its_config_is_refused(tmp_path: Path) -> None:
    state = state_of(MAIN)
    with pytest.raises(CheckpointError, match=r"missing norm\.weight, left over extra"):
        save_model(
            tmp_path / "m",
            MAIN,
            {**{k: v for k, v in state.items() if k != "norm.weight"}, "extra": state["norm.weight"]},
        )
    with pytest.raises(CheckpointError, match=r"norm\.weight has shape \[1\]"):
        save_model(tmp_path / "m", MAIN, {**state, "norm.weight": torch.ones(1)})
    assert list(tmp_path.iterdir()) == []


def test_a_mixture_that_no_family_describes_says_that_only_shoal_opens_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = ModelConfig(**SHAPE, **EXPERTS, scoring_func="softmax")
    save_model(tmp_path / "m", config, state_of(config), dtype=torch.float32)
    assert "only Shoal opens: no published family joins softmax scores and noaux_tc" in capsys.readouterr().err.replace(
        "\n", " "
    )
    assert load_model(tmp_path / "m")[0] == config


def _save_with_little_room(directory: Path, state: dict[str, Tensor]) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, 3_000))
    try:
        save_model(directory, MAIN, state, dtype=torch.float32)
    except DiskFullError:
        os._exit(42)
    os._exit(1)


def test_no_room_leaves_the_old_model_untouched(tmp_path: Path) -> None:
    directory = save_main(tmp_path)
    child = FORK.Process(target=_save_with_little_room, args=(directory, state_of(MAIN, seed=5)))
    child.start()
    child.join()
    assert child.exitcode == 42
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert torch.equal(load_model(directory)[1]["norm.weight"], state_of(MAIN)["norm.weight"])
