"""Pages of the latent pool and who holds them: plain counting, no tensors.

A page is 64 positions of every layer. Somebody who writes to a page is its only holder; a page that is shared is full and
never written again, so nothing has to be copied on write. What is free and what is held always add up to the pool.

The prefix cache is one holder among others, but marked: a page that nobody else holds is idle, and can be had back.
"""

from collections.abc import Iterable


class PagePool:
    """Reference counts of `num_pages` pages. All operations take constant time per page."""

    def __init__(self, num_pages: int) -> None:
        if num_pages < 1:
            raise ValueError(f"num_pages={num_pages} must be at least 1")
        self.num_pages = num_pages
        self._holders = [0] * num_pages
        self._free = list(range(num_pages - 1, -1, -1))
        self._is_cached = bytearray(num_pages)
        self.num_idle = 0
        """Pages that only the prefix cache holds."""

    @property
    def num_free(self) -> int:
        return len(self._free)

    @property
    def num_in_use(self) -> int:
        """Pages that a sequence holds."""
        return self.num_pages - len(self._free) - self.num_idle

    def allocate(self, count: int) -> list[int]:
        """Pages that nobody held, each now held once.

        Raises:
            MemoryError: fewer are free; none is taken.
        """
        if count > len(self._free):
            raise MemoryError(f"{count} pages wanted, {len(self._free)} free")
        pages = [self._free.pop() for _ in range(count)]
        for page in pages:
            self._holders[page] = 1
        return pages

    def share(self, pages: Iterable[int]) -> None:
        """Hold pages once more that somebody holds."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is free and cannot be shared")
            self.num_idle -= self.is_idle(page)
            self._holders[page] += 1

    def release(self, pages: Iterable[int]) -> None:
        """Let go of pages; who was the last holder frees them."""
        for page in pages:
            if self._holders[page] < 1:
                raise ValueError(f"page {page} is free already")
            self._holders[page] -= 1
            if self._holders[page] == 0:
                self._free.append(page)
            self.num_idle += self.is_idle(page)

    def cache(self, page: int) -> None:
        """Hold a page in the name of the prefix cache, which holds each page once at most."""
        if self._is_cached[page]:
            raise ValueError(f"page {page} is cached already")
        self.share([page])
        self._is_cached[page] = True

    def uncache(self, page: int) -> None:
        """End the prefix cache's hold."""
        if not self._is_cached[page]:
            raise ValueError(f"page {page} is not cached")
        self.num_idle -= self.is_idle(page)
        self._is_cached[page] = False
        self.release([page])

    def is_idle(self, page: int) -> bool:
        """Whether only the prefix cache holds the page."""
        return self._holders[page] == 1 and bool(self._is_cached[page])

    def holders(self, page: int) -> int:
        """How many hold the page."""
        return self._holders[page]
