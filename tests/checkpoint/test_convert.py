import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from shoal.checkpoint.convert import convert, units_of
from shoal.checkpoint.hf_config import config_to_hf
from shoal.checkpoint.hf_format import load_config, load_model, save_model
from shoal.checkpoint.quantised import Scheme, quantization_config
from shoal.checkpoint.tensor_file import TensorFile
from shoal.config import ModelConfig
from shoal.errors import CheckpointError, ConfigError
from shoal.model.transformer import Transformer, initialise
from shoal.quant import fp8, int4, int8

CONFIG = ModelConfig(
    vocab_size=96,
    hidden_size=144,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=272,
    q_lora_rank=80,
    kv_lora_rank=48,
    qk_nope_head_dim=16,
    qk_rope_head_dim=8,
    v_head_dim=24,
    n_routed_experts=3,
    num_experts_per_tok=2,
    moe_intermediate_size=160,
    num_nextn_predict_layers=1,
)
SCHEMES = {
    "bf16": Scheme(weights="bf16"),
    "fp8": Scheme(weights="fp8"),
    "fp8 ue8m0": Scheme(weights="fp8", power_of_two=True),
    "int8": Scheme(weights="int8"),
    "int4": Scheme(weights="int4", group=32),
    "all int4": Scheme(weights="int4", group=64, head=True, embedding=True),
    "all int8": Scheme(weights="int8", head=True, embedding=True),
}
UP = "layers.1.mlp.experts.gate_up_proj"


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    directory = tmp_path_factory.mktemp("source") / "model"
    model = Transformer(CONFIG)
    initialise(model, 3)
    save_model(directory, CONFIG, model.state_dict(), dtype=torch.float32, max_shard_bytes=200_000)
    (directory / "tokenizer_config.json").write_text("{}")
    return directory


def converted(source, target, scheme):
    return convert(source, target, CONFIG, scheme, command=scheme.command(str(source), str(target)))


def meant(weight, scheme):
    """What a matrix of the scheme's own format stands for, straight from the definitions."""
    if scheme.weights == "bf16":
        return weight.bfloat16().float()
    if scheme.weights == "fp8":
        return fp8.dequantise_blocks(*fp8.quantise_blocks(weight, power_of_two=scheme.power_of_two)).bfloat16().float()
    if scheme.weights == "int8":
        return int8.dequantise(*int8.quantise(weight))
    return int4.dequantise(*int4.quantise(weight, scheme.group), scheme.group)


@pytest.mark.parametrize("name", SCHEMES)
def test_a_converted_model_reads_as_the_format_defines_it(source, tmp_path, name):
    scheme = SCHEMES[name]
    converted(source, tmp_path / "out", scheme)
    _, before = load_model(source, dtype=torch.float32)
    config, after = load_model(tmp_path / "out", dtype=torch.float32)
    assert config == CONFIG and after.keys() == before.keys()
    low = before["layers.0.input_layernorm.weight"].bfloat16().float()
    assert torch.equal(after["layers.0.input_layernorm.weight"], low)
    for part in (slice(0, 160), slice(160, 320)):
        assert torch.equal(after[UP][1, part], meant(before[UP][1, part], scheme))
    o_proj = "mtp.0.block.self_attn.o_proj.weight"
    assert torch.equal(after[o_proj], meant(before[o_proj], scheme))
    kv_b = "layers.0.self_attn.kv_b_proj.weight"
    wanted = meant(before[kv_b], scheme) if scheme.weights == "fp8" else before[kv_b].bfloat16().float()
    assert torch.equal(after[kv_b], wanted)
    head = meant(before["lm_head.weight"], scheme) if scheme.head else before["lm_head.weight"].bfloat16().float()
    assert torch.equal(after["lm_head.weight"], head)
    embedding = before["embed_tokens.weight"]
    wanted = int8.dequantise(*int8.quantise(embedding)) if scheme.embedding else embedding.bfloat16().float()
    assert torch.equal(after["embed_tokens.weight"], wanted)


def test_an_fp8_model_turns_into_int4_without_its_float_form_on_disk(source, tmp_path):
    converted(source, tmp_path / "fp8", SCHEMES["fp8"])
    converted(tmp_path / "fp8", tmp_path / "int4", SCHEMES["int4"])
    _, middle = load_model(tmp_path / "fp8", dtype=torch.float32)
    _, after = load_model(tmp_path / "int4", dtype=torch.float32)
    assert torch.equal(after[UP][2, :160], meant(middle[UP][2, :160], SCHEMES["int4"]))


def test_the_report_holds_the_error_of_each_unit_and_its_worst_tensor(source, tmp_path):
    report = converted(source, tmp_path / "out", SCHEMES["int4"])
    _, before = load_model(source, dtype=torch.float32)
    _, after = load_model(tmp_path / "out", dtype=torch.float32)
    names = [name for name in before if name.startswith("layers.1.")]
    wrong = sum(float((after[name] - before[name]).square().sum()) for name in names)
    size = sum(float(before[name].square().sum()) for name in names)
    unit = report["units"]["layer 1"]
    assert unit["relative_error"] == pytest.approx((wrong / size) ** 0.5, rel=1e-5)
    assert unit["worst"]["relative_error"] >= unit["relative_error"]
    assert list(report["units"]) == ["embedding", "layer 0", "layer 1", "head", "prediction 0"]
    assert json.loads((tmp_path / "out" / "conversion.json").read_text()) == report
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()


def test_four_bit_words_are_those_of_compressed_tensors():
    pytest.importorskip("compressed_tensors", reason="the dev extra has compressed-tensors")
    from compressed_tensors.compressors import pack_to_int32, unpack_from_int32

    code = torch.randint(-8, 8, (5, 44), generator=torch.Generator().manual_seed(1), dtype=torch.int8)
    assert torch.equal(int4.to_words(code), pack_to_int32(code, 4))
    assert torch.equal(unpack_from_int32(int4.to_words(code), 4, torch.Size(code.shape)), code)
    assert torch.equal(int4.from_words(pack_to_int32(code, 4), 44), code)


@pytest.mark.parametrize("name", ["int8", "all int8", "int4", "all int4"])
def test_the_quantization_config_is_one_that_compressed_tensors_takes(name):
    pytest.importorskip("compressed_tensors", reason="the dev extra has compressed-tensors")
    from compressed_tensors.quantization import QuantizationConfig

    scheme = SCHEMES[name]
    found = QuantizationConfig.model_validate(quantization_config(scheme))
    weights = found.config_groups["group_0"].weights
    assert (weights.num_bits, weights.symmetric) == (8 if scheme.weights == "int8" else 4, True)
    assert weights.group_size == (scheme.group if scheme.weights == "int4" else None)


def test_a_conversion_killed_at_any_unit_goes_on_and_gives_the_same_files(source, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    scheme = SCHEMES["int4"]
    converted(source, whole, scheme)
    made = []

    class Killed(Exception):
        pass

    def stop_after(unit):
        made.append(unit)
        if len(made) in (1, 3):
            raise Killed

    for _ in range(2):
        with pytest.raises(Killed):
            convert(source, cut, CONFIG, scheme, command=scheme.command(str(source), str(whole)), done=stop_after)
        assert not cut.exists()
    stamp = (tmp_path / ".cut.converting" / "model-00001-of-00005.safetensors").stat().st_mtime_ns
    convert(source, cut, CONFIG, scheme, command=scheme.command(str(source), str(whole)))
    assert (cut / "model-00001-of-00005.safetensors").stat().st_mtime_ns == stamp
    assert sorted(path.name for path in cut.iterdir()) == sorted(path.name for path in whole.iterdir())
    for path in whole.iterdir():
        assert path.read_bytes() == (cut / path.name).read_bytes(), path.name
    assert not list(tmp_path.glob(".cut*"))


def test_an_attempt_with_other_settings_begins_anew(source, tmp_path):
    with pytest.raises(ZeroDivisionError):
        convert(source, tmp_path / "out", CONFIG, SCHEMES["int8"], command="", done=lambda unit: 1 // 0)
    report = converted(source, tmp_path / "out", SCHEMES["int4"])
    assert report["scheme"]["weights"] == "int4"
    _, after = load_model(tmp_path / "out", dtype=torch.float32)
    _, before = load_model(source, dtype=torch.float32)
    assert torch.equal(after[UP][0, :160], meant(before[UP][0, :160], SCHEMES["int4"]))


def test_another_layout_version_is_refused_with_the_command_that_rebuilds(source, tmp_path):
    target = tmp_path / "out"
    converted(source, target, SCHEMES["int4"])
    report = json.loads((target / "conversion.json").read_text())
    report["layout_version"] = 2
    (target / "conversion.json").write_text(json.dumps(report))
    with pytest.raises(CheckpointError, match=r"layout version 2.*shoal convert .*source.* --weights int4 --group 32"):
        load_model(target)


def test_an_altered_file_is_refused_with_the_command_that_rebuilds(source, tmp_path):
    target = tmp_path / "out"
    converted(source, target, SCHEMES["int8"])
    path = target / "model-00002-of-00005.safetensors"
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)
    with pytest.raises(
        CheckpointError, match=r"model-00002.* is damaged.*Build it again: shoal convert .*--weights int8"
    ):
        load_model(target)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": "int3"}, "int3.*bf16, fp8, int8, int4"),
        ({"weights": "int4", "group": 48}, "group=48.*32, 64, 128"),
        ({"weights": "int8", "calibrated": True}, "leave the calibration out"),
        ({"weights": "fp8", "head": True}, "published fp8 keeps them"),
        ({"weights": "int4", "power_of_two": True}, "belong to fp8"),
    ],
)
def test_schemes_that_cannot_be_say_what_can(change, message):
    with pytest.raises(ConfigError, match=message):
        Scheme(**change)


def test_a_target_that_exists_is_left_alone(source, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="exists already"):
        converted(source, tmp_path / "out", SCHEMES["int4"])
    assert (tmp_path / "out" / "thesis.txt").read_text() == "mine"


def test_scales_that_do_not_fit_are_named(source, tmp_path):
    from safetensors.torch import load_file, save_file

    target = tmp_path / "out"
    converted(source, target, SCHEMES["int4"])
    path = target / "model-00003-of-00005.safetensors"
    tensors = load_file(path)
    key = "model.layers.1.self_attn.o_proj.weight_scale"
    tensors[key] = tensors[key][:, :1].contiguous()
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=r"o_proj\.weight: .* do not make 144 x 48 weights in groups of 32"):
        load_model(target, verify=False)


def test_headers_that_point_outside_the_file_are_refused(tmp_path):
    header = {"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
    for change in ({"data_offsets": [0, 99]}, {"shape": [5]}, {"shape": [-4]}, {"dtype": "F7"}, {"data_offsets": None}):
        text = json.dumps({"a": {**header["a"], **change}}).encode()
        (tmp_path / "x.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + b"\0" * 16)
        with pytest.raises(CheckpointError, match="damaged"):
            TensorFile(tmp_path / "x.safetensors")
    (tmp_path / "x.safetensors").write_bytes(b"\xff" * 12)
    with pytest.raises(CheckpointError, match="damaged"):
        TensorFile(tmp_path / "x.safetensors")


def test_units_cover_every_published_tensor_once(source):
    keys = [key for unit in units_of(CONFIG) for key in unit.shapes]
    with_repeats = {key for path in source.glob("*.safetensors") for key in TensorFile(path).specs}
    assert len(keys) == len(set(keys)) and set(keys) == with_repeats
    assert load_config(source) == CONFIG


MEASURED = """
import resource, sys
from pathlib import Path
from shoal.checkpoint.convert import convert
from shoal.checkpoint.hf_format import load_config
from shoal.checkpoint.quantised import Scheme
source, target = Path(sys.argv[1]), Path(sys.argv[2])
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
peaks = [peak()]
convert(source, target, load_config(source), Scheme(weights="int8"), command="x", done=lambda unit: peaks.append(peak()))
print(peaks[-1] - peaks[0])
"""


def test_memory_is_bounded_by_a_tensor_and_not_by_the_model(tmp_path):
    """Weights are holes in a sparse file: 0.2 GB that take no disk. One tensor in float32 is 17 MB."""
    config = CONFIG.replace(
        hidden_size=512, intermediate_size=8192, num_hidden_layers=8, n_routed_experts=None, num_nextn_predict_layers=0
    )
    header, offset = {}, 0
    for unit in units_of(config):
        for key, shape in unit.shapes.items():
            size = 2 * torch.Size(shape).numel()
            header[key] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [offset, offset + size]}
            offset += size
    text = json.dumps(header).encode()
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "config.json").write_text(json.dumps(config_to_hf(config)))
    with (tmp_path / "in" / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)
    command = [sys.executable, "-c", MEASURED, str(tmp_path / "in"), str(tmp_path / "out")]
    grown = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1])
    assert offset > 200e6 and grown < 150e6


WRITER = """
import sys
from pathlib import Path
import torch
from shoal.checkpoint.convert import convert
from shoal.checkpoint.hf_format import load_config
from shoal.checkpoint.quantised import Scheme
source, target = Path(sys.argv[1]), Path(sys.argv[2])
import time
convert(source, target, load_config(source), Scheme(weights="int8"), command="x", done=lambda unit: time.sleep(0.2))
"""


def test_a_real_kill_leaves_nothing_at_the_target_and_the_next_run_completes(source, tmp_path):
    target = tmp_path / "out"
    command = [sys.executable, "-c", WRITER, str(source), str(target)]
    process = subprocess.Popen(command, start_new_session=True)
    first = tmp_path / ".out.converting" / "model-00001-of-00005.safetensors"
    deadline_s = time.monotonic() + 60
    while not first.exists() and time.monotonic() < deadline_s:
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert first.exists() and not target.exists()
    report = convert(source, target, CONFIG, Scheme(weights="int8"), command="x")
    assert len(report["units"]) == 5 and Path(target / "config.json").is_file()
    load_model(target)
