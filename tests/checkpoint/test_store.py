import json
import math
import multiprocessing
import os
import random
import resource
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.checkpoint.store import (
    capture_random_state,
    check_same_config,
    flatten_optimizer_state,
    load_checkpoint,
    load_latest,
    restore_optimizer_state,
    restore_random_state,
    save_checkpoint,
)
from shoal.errors import CheckpointError, DiskFullError
from shoal.training.muon import Muon

FORK = multiprocessing.get_context("fork")
DTYPES = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.float8_e4m3fn,
]


def bits(tensor: Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def test_every_dtype_and_shape_comes_back_bit_for_bit(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    tensors = {
        str(dtype): torch.randint(0, 255, (3, 16), generator=generator, dtype=torch.uint8).view(dtype)
        if dtype != torch.bool
        else torch.rand(3, 5, generator=generator) > 0.5
        for dtype in DTYPES
    }
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 4), "turned": torch.arange(6).view(2, 3).T}
    loaded = load_checkpoint(save_checkpoint(tmp_path, 7, tensors, {})).tensors
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert (loaded[name].dtype, loaded[name].shape) == (tensor.dtype, tensor.shape)
        assert bits(loaded[name]) == bits(tensor)


def test_tied_tensors_are_stored_once_and_tied_again(tmp_path: Path) -> None:
    weight = torch.arange(5000.0)
    tensors = {"embed": weight, "head": weight, "tail": weight[4000:], "parameter": nn.Parameter(torch.ones(2))}
    path = save_checkpoint(tmp_path, 1, tensors, {})
    assert (path / "tensors.safetensors").stat().st_size < 1.5 * weight.nbytes
    loaded = load_checkpoint(path).tensors
    assert loaded["embed"].data_ptr() == loaded["head"].data_ptr()
    assert torch.equal(loaded["tail"], weight[4000:])


def test_plain_values_come_back_exactly(tmp_path: Path) -> None:
    state = {
        "tokens": 2**53 + 1,
        "loss": 0.1 + 0.2,
        "nothing": None,
        "infinite": math.inf,
        "nested": {"list": [1, "ü"]},
    }
    checkpoint = load_checkpoint(save_checkpoint(tmp_path, 123, {}, state))
    assert (checkpoint.step, checkpoint.state) == (123, state)
    assert checkpoint.path.name == "step-00000123"


def test_only_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (5, 20, 100):
        save_checkpoint(tmp_path, step, {"x": torch.tensor(step)}, {}, keep=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000020", "step-00000100"]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 5, {"x": torch.tensor(1)}, {})
    save_checkpoint(tmp_path, 5, {"x": torch.tensor(2)}, {})
    latest = load_latest(tmp_path)
    assert latest is not None and int(latest.tensors["x"]) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]


def test_no_checkpoint_is_none(tmp_path: Path) -> None:
    assert load_latest(tmp_path) is None
    assert load_latest(tmp_path / "never-made") is None


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str, damage: str
) -> None:
    for step in (1, 2):
        save_checkpoint(tmp_path, step, {"x": torch.full((50,), step)}, {"value": step})
    path = tmp_path / "step-00000002" / file
    content = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
    latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 1
    assert "damaged checkpoint" in capsys.readouterr().err
    with pytest.raises(CheckpointError, match="step-00000002"):
        load_checkpoint(tmp_path / "step-00000002")


def test_when_all_are_damaged_nothing_is_silently_started_over(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {}, {})
    (path / "state.json").write_text("{}2")
    with pytest.raises(CheckpointError, match="none of the 1 checkpoints"):
        load_latest(tmp_path)


def test_a_manifest_cannot_point_outside_its_directory(tmp_path: Path) -> None:
    path = save_checkpoint(tmp_path, 1, {}, {})
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["sha256"] = {"../../etc/passwd": "0" * 64, "state.json": "0" * 64}
    (path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="does not list"):
        load_checkpoint(path)


def _save_forever(directory: Path, first: int) -> None:
    for step in range(first, first + 100_000):
        save_checkpoint(directory, step, {"x": torch.full((20_000,), step)}, {"step": step}, keep=1)


def test_a_kill_at_any_moment_leaves_a_usable_checkpoint(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 0, {"x": torch.zeros(20_000, dtype=torch.long)}, {"step": 0}, keep=1)
    source, step = random.Random(1), 0
    for _ in range(4):
        # Saving the newest step again also kills in the middle of a replacement.
        child = FORK.Process(target=_save_forever, args=(tmp_path, step))
        child.start()
        time.sleep(source.uniform(0.05, 0.15))
        child.kill()
        child.join()
        latest = load_latest(tmp_path)
        assert latest is not None and latest.step >= step
        assert latest.tensors["x"].unique().tolist() == [latest.step] == [latest.state["step"]]
        step = latest.step
    save_checkpoint(tmp_path, step + 1, {}, {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == [f"step-{step + 1:08d}"]


def test_a_kill_during_replacement_leaves_the_old_one_usable(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 3, {"x": torch.tensor(3)}, {}).rename(tmp_path / "step-00000003.old")
    latest = load_latest(tmp_path)
    assert latest is not None and latest.step == 3
    save_checkpoint(tmp_path, 4, {}, {})
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000004"]


def _save_with_little_room(directory: Path) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
    try:
        save_checkpoint(directory, 2, {"x": torch.zeros(20_000)}, {})
    except DiskFullError as error:
        os._exit(42 if "free space" in str(error) else 1)
    os._exit(2)


def test_no_room_leaves_nothing_half_written(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, 1, {"x": torch.tensor(1)}, {})
    child = FORK.Process(target=_save_with_little_room, args=(tmp_path,))
    child.start()
    child.join()
    assert child.exitcode == 42
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match="cannot write"):
        save_checkpoint(tmp_path / "file", 1, {}, {})


def test_what_cannot_be_stored_is_refused_and_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="complex128"):
        save_checkpoint(tmp_path, 1, {"x": torch.zeros(2, dtype=torch.complex128)}, {})
    with pytest.raises(CheckpointError, match="JSON"):
        save_checkpoint(tmp_path, 1, {}, {"x": object()})
    assert list(tmp_path.iterdir()) == []


def test_resume_under_another_configuration_names_every_difference(tmp_path: Path) -> None:
    saved = {"model": {"hidden_size": 64, "betas": [0.9, 0.95]}, "steps": 10}
    check_same_config(saved, {"model": {"hidden_size": 64, "betas": (0.9, 0.95)}, "steps": 10})
    with pytest.raises(CheckpointError) as caught:
        check_same_config(saved, {"model": {"hidden_size": 96, "betas": [0.9, 0.95]}, "seed": 1})
    for part in ("model.hidden_size was 64, is 96", "steps was 10, is 'absent'", "seed was 'absent', is 1"):
        assert part in str(caught.value)
    save_checkpoint(tmp_path, 1, {}, {"identity": saved})
    with pytest.raises(CheckpointError, match=r"model\.hidden_size"):
        load_latest(tmp_path, config={**saved, "model": {"hidden_size": 65, "betas": [0.9, 0.95]}})


class TwoRules:
    """A little model whose matrices are moved by one optimizer and the rest by another."""

    def __init__(self, kind: str) -> None:
        torch.manual_seed(0)
        self.model = nn.ModuleDict({"a": nn.Linear(4, 3), "b": nn.Linear(3, 2)})
        self.named = dict(self.model.named_parameters())
        matrices = [p for p in self.named.values() if p.ndim == 2]
        rest = [p for p in self.named.values() if p.ndim < 2]
        if kind == "muon":
            self.rules: list[Any] = [Muon(matrices, lr=0.1), torch.optim.AdamW(rest, lr=0.1, fused=True)]
        elif kind == "sgd":
            self.rules = [torch.optim.SGD(self.named.values(), lr=0.1, momentum=0.9)]
        else:
            groups = [{"params": matrices, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]
            self.rules = [torch.optim.AdamW(groups, lr=0.1, betas=(0.9, 0.95), fused=kind == "fused", amsgrad=True)]

    def step(self) -> None:
        self.model.zero_grad()
        x = torch.randn(5, 4) * random.random()
        self.model["b"](self.model["a"](x)).square().mean().backward()
        for rule in self.rules:
            rule.step()


@pytest.mark.parametrize("kind", ["plain", "fused", "muon", "sgd"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path: Path, kind: str) -> None:
    run = TwoRules(kind)
    random.seed(3)
    for _ in range(3):
        run.step()
    tensors: dict[str, Tensor] = {f"model.{name}": value for name, value in run.model.state_dict().items()}
    values = []
    for index, rule in enumerate(run.rules):
        moments, plain = flatten_optimizer_state(rule, run.named)
        tensors |= {f"{index}.{name}": tensor for name, tensor in moments.items()}
        values.append(plain)
    random_tensors, random_values = capture_random_state()
    tensors |= {f"random.{name}": tensor for name, tensor in random_tensors.items()}
    save_checkpoint(tmp_path, 3, tensors, {"optimizers": values, "random": random_values})
    for _ in range(3):
        run.step()

    found = load_latest(tmp_path)
    assert found is not None
    again = TwoRules(kind)
    for rule in again.rules:
        rule.param_groups[0]["lr"] = 99.0
    again.model.load_state_dict({name[6:]: t for name, t in found.tensors.items() if name.startswith("model.")})
    for index, rule in enumerate(again.rules):
        moments = {name[2:]: t for name, t in found.tensors.items() if name.startswith(f"{index}.")}
        restore_optimizer_state(rule, again.named, moments, found.state["optimizers"][index])
    restore_random_state(
        {name[7:]: t for name, t in found.tensors.items() if name.startswith("random.")}, found.state["random"]
    )
    for _ in range(3):
        again.step()
    for name, parameter in run.named.items():
        assert torch.equal(parameter, again.named[name]), name


def test_optimizer_state_follows_names_and_not_positions() -> None:
    first = TwoRules("plain")
    first.step()
    moments, values = flatten_optimizer_state(first.rules[0], first.named)
    second = TwoRules("plain")
    for group in second.rules[0].param_groups:
        group["params"].reverse()
    restore_optimizer_state(second.rules[0], second.named, moments, json.loads(json.dumps(values)))
    for name, parameter in second.named.items():
        assert torch.equal(second.rules[0].state[parameter]["exp_avg"], moments[f"{name}/exp_avg"])
    assert second.rules[0].param_groups[0]["betas"] == (0.9, 0.95)


def test_an_optimizer_over_other_parameters_is_refused() -> None:
    run = TwoRules("plain")
    run.step()
    moments, values = flatten_optimizer_state(run.rules[0], run.named)
    fewer = torch.optim.AdamW([run.named["a.weight"]], lr=0.1)
    with pytest.raises(CheckpointError, match=r"a\.bias"):
        restore_optimizer_state(fewer, run.named, moments, values)
    with pytest.raises(CheckpointError, match=r"\[3, 4\] that the model does not name"):
        flatten_optimizer_state(run.rules[0], {})
