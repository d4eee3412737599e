"""The processes of a `torchrun`, and how they talk: JSON and tensors over torch.distributed, nothing pickled.

Rank 0 leads: it decides, tells the others what to do, and they do it together. Whatever is said is bytes whose length was
said before; tensors travel as safetensors.
"""

import datetime
import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

LONGEST_WAIT = datetime.timedelta(days=7)
"""Followers wait for the leader while it measures, writes reports, or reads."""


class Ranks:
    """This process among the others."""

    def __init__(self, mesh: DeviceMesh) -> None:
        self.mesh, self.rank, self.size = mesh, dist.get_rank(), dist.get_world_size()

    def tell(self, **message: Any) -> None:
        """The leader says to everybody what comes next."""
        data = _bytes(json.dumps(message).encode())
        dist.broadcast(torch.tensor([len(data)]), 0)
        dist.broadcast(data, 0)

    def hear(self) -> dict[str, Any]:
        """A follower waits for what the leader says."""
        length = torch.zeros(1, dtype=torch.long)
        dist.broadcast(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
        message: dict[str, Any] = json.loads(data.numpy().tobytes())
        return message

    def send(self, tensors: Mapping[str, Tensor], to: int) -> None:
        """The leader gives tensors to one follower."""
        data = _bytes(safetensors.torch.save({name: tensor.contiguous() for name, tensor in tensors.items()}))
        dist.send(torch.tensor([len(data)]), to)
        dist.send(data, to)

    def receive(self) -> dict[str, Tensor]:
        """What the leader sends."""
        length = torch.zeros(1, dtype=torch.long)
        dist.recv(length, 0)
        data = torch.empty(int(length), dtype=torch.uint8)
        dist.recv(data, 0)
        return safetensors.torch.load(data.numpy().tobytes())

    def gather(self, value: Any) -> list[Any]:
        """JSON values of all ranks, in their order, on every rank."""
        data = _bytes(json.dumps(value).encode())
        lengths = [torch.zeros(1, dtype=torch.long) for _ in range(self.size)]
        dist.all_gather(lengths, torch.tensor([len(data)]))
        longest = int(max(lengths))
        padded = torch.zeros(longest, dtype=torch.uint8)
        padded[: len(data)] = data
        parts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)]
        dist.all_gather(parts, padded)
        return [json.loads(part[: int(length)].numpy().tobytes()) for part, length in zip(parts, lengths)]

    def share(self, tensor: Tensor) -> None:
        """The leader's numbers become everybody's, in place."""
        dist.broadcast(tensor, 0)

    def add_up(self, tensor: Tensor) -> Tensor:
        """Sum over the ranks, in place."""
        dist.all_reduce(tensor)
        return tensor


def torchrun_size() -> int:
    """How many processes torchrun started, this one among them; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@contextmanager
def torchrun_ranks() -> Iterator[Ranks | None]:
    """Join the others for as long as the block lasts; None when torchrun did not start several processes.

    When the leader leaves, for whatever reason, it tells the others to stop.
    """
    if torchrun_size() < 2:
        yield None
        return
    dist.init_process_group("gloo", timeout=LONGEST_WAIT)
    try:
        ranks = Ranks(init_device_mesh("cpu", (dist.get_world_size(),)))
        try:
            yield ranks
            if ranks.rank > 0:
                dist.barrier()
        finally:
            if ranks.rank == 0:
                ranks.tell(do="stop")
                dist.barrier()  # nobody hangs up while another one is still listening
    finally:
        dist.destroy_process_group()


def _bytes(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)
