"""A reasoning-gym family (Apache-2.0) as a task. Runs in a worker only.

Several of its scorers evaluate the answer (`eval`, sympy's `parse_expr`), one pays for any answer that merely contains the
right one, and its puzzle24 never looks at the numbers it gave (seen in 0.1.25). So it only ever runs in a process that the
pool kills, full marks are all that counts as right here, and `shoal task check gym:NAME` says which exploits pass.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import reasoning_gym

SIZE = 1 << 30
"""Items are made on demand, so a large dataset costs nothing."""

_options: dict[str, str] = {"name": ""}
name = "reasoning-gym"


def configure(name: str) -> None:
    """Choose the family."""
    _options["name"] = name
    globals()["name"] = f"gym:{name}"
    _dataset(0)


def problems(seed: int) -> Iterator[dict[str, Any]]:
    """Endless problems; an item can be made again from its seed and place."""
    data = _dataset(seed)
    for index in range(SIZE):
        item = data[index]
        yield {"prompt": item["question"], "answer": str(item["answer"]), "seed": seed, "index": index}


def verify(problem: Mapping[str, Any], answer: str) -> float:
    """The family's own score, brought down to right (1) or not (0)."""
    data = _dataset(int(problem["seed"]))
    return float(data.score_answer(answer, data[int(problem["index"])]) >= 1.0)


def _dataset(seed: int) -> Any:
    return reasoning_gym.create_dataset(_options["name"], seed=seed, size=SIZE)
