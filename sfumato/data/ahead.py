"""Threads that work ahead of a loop, in its order."""

import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Generic, TypeVar, final

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


@final
class Forerunner(Generic[T]):
    """Threads that do early, in the order given, what will be asked for; they end with the process.

    A ValueError of the work is left to who asks.
    """

    def __init__(self, work: Callable[[T], object], workers: int) -> None:
        """Start no thread before there is work."""
        self._work = work
        self._workers = workers
        self._changed = threading.Condition()
        self._pending: dict[str, deque[T]] = {}

    def expect(self, who: str, items: Sequence[T]) -> None:
        """Replace what is still to be done for somebody."""
        with self._changed:
            started = bool(self._pending)
            self._pending[who] = deque(items)
            self._changed.notify_all()
        for _ in range(0 if started else self._workers):
            threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        while threading.main_thread().is_alive():
            item = self._next()
            try:
                self._work(item)
            except ValueError:
                continue

    def _next(self) -> T:
        with self._changed:
            while True:
                for who, items in self._pending.items():
                    if items:
                        self._pending[who] = self._pending.pop(who)  # others come first next time
                        return items.popleft()
                self._changed.wait()
