"""The task families, by name."""

from shoal.rl.tasks.chain_sum import ChainSum
from shoal.rl.tasks.task import Problem, Task

TASKS: dict[str, Task] = {task.name: task for task in (ChainSum(),)}

__all__ = ["TASKS", "Problem", "Task"]
