"""The task families, by name."""

from shoal.rl.tasks.addition import Addition
from shoal.rl.tasks.arrows import Arrows
from shoal.rl.tasks.chain_sum import ChainSum
from shoal.rl.tasks.countdown import Countdown
from shoal.rl.tasks.cups import Cups
from shoal.rl.tasks.dial import Dial
from shoal.rl.tasks.grid_path import GridPath
from shoal.rl.tasks.knights import Knights
from shoal.rl.tasks.multiplication import Multiplication
from shoal.rl.tasks.parity import Parity
from shoal.rl.tasks.remainder import Remainder
from shoal.rl.tasks.sorting import Sorting
from shoal.rl.tasks.task import Problem, Task

FAMILIES: tuple[Task, ...] = (
    ChainSum(),
    Addition(),
    Multiplication(),
    Countdown(),
    Parity(),
    Sorting(),
    Knights(),
    GridPath(),
    Cups(),
    Arrows(),
    Dial(),
    Remainder(),
)

TASKS: dict[str, Task] = {task.name: task for task in FAMILIES}

__all__ = ["TASKS", "Problem", "Task"]
