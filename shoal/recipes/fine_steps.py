"""Worked solutions in finer steps than a family's own (`rl/tasks/`), for a small model that is to be right.

A family's own solution leaves a reinforcement-learning run something to find. These leave nothing to guess: a line needs one
small sum or one look back, and a search is written out.
"""

from collections.abc import Callable, Iterator, Sequence

from shoal.rl.tasks import Problem, Task
from shoal.rl.tasks.grid_path import MOVES


def fine_steps(task: Task, problem: Problem) -> tuple[str, str]:
    """The finest solution there is, and the answer it comes to: one of several, perhaps."""
    if problem.family in _STEPS:
        return _STEPS[problem.family](problem)
    return task.worked(problem), problem.answer


def _multiplication(problem: Problem) -> tuple[str, str]:
    """One product per pair of digits, each added to what there is."""
    first, second = (str(problem.facts[name]) for name in ("first", "second"))
    lines: list[str] = []
    total = None
    for left in _places(first):
        for right in _places(second):
            lines.append(f"{left}*{right}={left * right}")
            if total is not None:
                lines.append(f"{total}+{left * right}={total + left * right}")
            total = left * right + (total or 0)
    return "\n".join(lines), problem.answer


def _places(digits: str) -> list[int]:
    """What each digit stands for, tens before ones: 407 is 400 and 7."""
    return [int(digit) * 10**place for place, digit in zip(range(len(digits) - 1, -1, -1), digits) if digit != "0"]


def _countdown(problem: Problem) -> tuple[str, str]:
    """Of two numbers what they make together; of three, each in turn is left for the end: what must the others make?"""
    numbers, target = problem.facts["numbers"], problem.facts["target"]
    lines: list[str] = []
    if len(numbers) == 2:
        for made, value in _combinations(numbers):
            lines.append(f"{made}={value} {'yes' if value == target else 'no'}")
            if value == target:
                return "\n".join(lines), made
    if len(numbers) == 3:
        for place, last in enumerate(numbers):
            pair = numbers[:place] + numbers[place + 1 :]
            makes = {value: made for made, value in _combinations(pair)}
            wanted = _wanted(target, last)
            hit = next((value for value in wanted if value in makes), None)
            lines.append(" ".join(f"{made}={value}" for value, made in makes.items()))
            asked = " ".join(f"{sum}={value}" for value, sum in wanted.items())
            lines.append(f"{asked} {'no' if hit is None else 'yes'}")
            if hit is not None:
                sign = {"-": "+", "+": "-", "/": "*"}[wanted[hit].removeprefix(str(target))[0]]
                return "\n".join(lines), f"({makes[hit]}){sign}{last}"
    return "", problem.answer


def _combinations(pair: Sequence[int]) -> Iterator[tuple[str, int]]:
    """What two numbers make by one sign, nothing below zero."""
    larger, smaller = max(pair), min(pair)
    yield f"{larger}+{smaller}", larger + smaller
    yield f"{larger}-{smaller}", larger - smaller
    yield f"{larger}*{smaller}", larger * smaller


def _wanted(target: int, last: int) -> dict[int, str]:
    """What others must make so that the target is reached with `last`, and the sum that says so."""
    wanted = {target - last: f"{target}-{last}", target + last: f"{target}+{last}"}
    return wanted | ({target // last: f"{target}/{last}"} if target % last == 0 else {})


def _grid_path(problem: Problem) -> tuple[str, str]:
    """A wave from the goal, each square with the move that leads there; then the moves from the start."""
    rows = problem.facts["rows"]
    goal = (len(rows) - 1, len(rows) - 1)
    towards: dict[tuple[int, int], str] = {goal: ""}
    wave, lines = [goal], []
    while (0, 0) not in towards:
        reached = []
        for row, column in wave:
            for move, (down, right) in MOVES.items():
                place = (row - down, column - right)
                inside = 0 <= place[0] <= goal[0] and 0 <= place[1] <= goal[1]
                if inside and rows[place[0]][place[1]] == "." and place not in towards:
                    towards[place] = move
                    reached.append(place)
        wave = reached
        lines.append(" ".join(f"{row},{column}{towards[row, column]}" for row, column in wave))
    walk, answer, (row, column) = [], "", (0, 0)
    while move := towards[row, column]:
        walk.append(f"{row},{column}{move}")
        answer += move
        row, column = row + MOVES[move][0], column + MOVES[move][1]
    return "\n".join([*lines, " ".join(walk)]), answer


_STEPS: dict[str, Callable[[Problem], tuple[str, str]]] = {
    "multiplication": _multiplication,
    "countdown": _countdown,
    "grid_path": _grid_path,
}
