"""The next large parameter, read while the last one is being laid out.

Opening a large model is two kinds of work that do not wait for the same thing: reading files and putting stacks of experts
together, and writing them into memory that the system first has to find.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from types import TracebackType

from torch import Tensor

from shoal.checkpoint.stored_weights import StoredWeights
from shoal.kernels.packed import Codes

LARGE = 1 << 25
"""Numbers of a parameter that is worth reading ahead; one of them at a time is in memory before it is needed."""


class ReadAhead:
    """A source of weights like the one it reads from; large parameters come soonest in the order of the model."""

    def __init__(self, weights: StoredWeights) -> None:
        self._weights = weights
        large = weights.large_names(LARGE)
        self._after = dict(pairwise(large))
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="read-ahead")
        self._coming: dict[str, Future[Tensor | Codes]] = {}

    def __enter__(self) -> "ReadAhead":
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, at: TracebackType | None) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, name: str) -> Tensor | Codes:
        """One parameter; what will be asked for next is begun."""
        coming = self._coming.pop(name, None)
        found = coming.result() if coming else self._weights(name)
        following = self._after.get(name)
        if following and following not in self._coming:
            self._coming[following] = self._thread.submit(self._weights, following)
        return found
