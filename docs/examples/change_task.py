"""How much change comes back: 37 cents paid with a dollar leave 63."""

import random

exploits = ["0", "100", "change"]


def problems(seed):
    """Endless questions; `worked` is the reasoning that a base made from scratch may read."""
    rng = random.Random(seed)
    while True:
        price, paid = rng.randint(1, 99), rng.choice([50, 100])
        if price < paid:
            rest = paid - price
            worked = (
                f"{paid}-{price // 10 * 10}={paid - price // 10 * 10}\n{paid - price // 10 * 10}-{price % 10}={rest}"
            )
            yield {
                "prompt": f"It costs {price}, you pay {paid}. How much comes back?",
                "answer": str(rest),
                "worked": worked,
                "price": price,
                "paid": paid,
            }


def verify(problem, answer):
    """True or False, or a score from 0 to 1. ValueError (here from int) means that the answer cannot be read."""
    return int(answer) == problem["paid"] - problem["price"]


def brute_force(problem):
    """All right answers, found the slow way: `shoal task check` compares it with `verify`."""
    return [str(rest) for rest in range(101) if problem["price"] + rest == problem["paid"]]
