"""Shortest ways through a small grid with walls. Difficulty is the side of the grid."""

import random
from collections import deque
from collections.abc import Mapping, Sequence

from shoal.rl.tasks.task import Problem

MOVES: Mapping[str, tuple[int, int]] = {"R": (0, 1), "D": (1, 0), "L": (0, -1), "U": (-1, 0)}
WALL_SHARE = 0.3


class GridPath:
    """From the top left to the bottom right; any shortest sequence of moves is right."""

    name = "grid_path"
    description = "find a shortest way through a small maze, as moves R, D, L and U."
    difficulties = range(3, 9)
    default_difficulty = 5
    constant_answer_bound = 0.20

    def generate(self, rng: random.Random, difficulty: int) -> Problem:
        """A random grid that can be crossed."""
        while True:
            rows = tuple(
                "".join("#" if rng.random() < WALL_SHARE else "." for _ in range(difficulty)) for _ in range(difficulty)
            )
            path = shortest_path(rows)
            if path is not None:
                break
        prompt = f"Find a shortest path from the top left to the bottom right, moving R, D, L or U through '.': {' / '.join(rows)}"
        return Problem(
            family=self.name,
            difficulty=difficulty,
            prompt=prompt,
            answer=path,
            facts={"rows": rows, "length": len(path)},
        )

    def verify(self, problem: Problem, answer: str) -> bool:
        """The moves stay on open squares, arrive, and are as few as possible."""
        moves = answer.replace(" ", "").replace(",", "").upper() if len(answer) <= 300 else ""
        rows: Sequence[str] = problem.facts["rows"]
        if len(moves) != problem.facts["length"] or any(move not in MOVES for move in moves):
            return False
        row = column = 0
        for move in moves:
            row, column = row + MOVES[move][0], column + MOVES[move][1]
            if not _is_open(rows, row, column):
                return False
        return (row, column) == (len(rows) - 1, len(rows) - 1)

    def worked(self, problem: Problem) -> str:
        """The squares of a shortest path, one after another."""
        row = column = 0
        lines = ["0,0"]
        for move in problem.answer:
            row, column = row + MOVES[move][0], column + MOVES[move][1]
            lines.append(f"{move} {row},{column}")
        return "\n".join(lines)

    def key(self, problem: Problem) -> str:
        """The grid."""
        return f"{self.name}:{problem.facts['rows']}"


def shortest_path(rows: Sequence[str]) -> str | None:
    """The first shortest path in the order R, D, L, U, by breadth-first search; None when there is no way."""
    if not _is_open(rows, 0, 0):
        return None
    goal = (len(rows) - 1, len(rows) - 1)
    queue, path_to = deque([(0, 0)]), {(0, 0): ""}
    while queue:
        place = queue.popleft()
        if place == goal:
            return path_to[place]
        for move, (down, right) in MOVES.items():
            following = (place[0] + down, place[1] + right)
            if _is_open(rows, *following) and following not in path_to:
                path_to[following] = path_to[place] + move
                queue.append(following)
    return None


def _is_open(rows: Sequence[str], row: int, column: int) -> bool:
    return 0 <= row < len(rows) and 0 <= column < len(rows) and rows[row][column] == "."
