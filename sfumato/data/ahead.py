"""Threads that work ahead of a loop, in its order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")
R = TypeVar("R")


def ahead(
    function: Callable[[T], R], items: Iterable[T], workers: int, count: int
) -> Generator[R, None, None]:
    """Yield a function's result for each item, in order; threads work at most `count` ahead.

    Without workers, the calling thread does the work.
    """
    if not workers:
        yield from map(function, items)
        return
    threads = ThreadPoolExecutor(workers)
    pending: deque[Future[R]] = deque()
    try:
        for item in items:
            pending.append(threads.submit(function, item))
            if len(pending) > count:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        threads.shutdown(cancel_futures=True)
