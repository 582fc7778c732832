"""What was loaded last, kept for the threads that want it next."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from typing import Generic, TypeVar, final

Value = TypeVar("Value")
_LOCKS = 16  # threads that load different keys rarely wait for each other


@final
class Recent(Generic[Value]):
    """Load values by key and keep the latest; one thread loads while others wait for it."""

    def __init__(
        self, load: Callable[[int], Value], weigh: Callable[[Value], int], limit: int
    ) -> None:
        """Keep values whose weights sum up to `limit` at most, and the latest in any case."""
        self._load = load
        self._weigh = weigh
        self._limit = limit
        self._weight = 0
        self._kept: OrderedDict[int, Value] = OrderedDict()
        self._lock = threading.Lock()
        self._loading = tuple(threading.Lock() for _ in range(_LOCKS))

    def get(self, key: int) -> Value:
        """Return the value of a key; what loading raises is raised, and nothing is kept."""
        found = self._look(key)
        if found is not None:
            return found[0]
        with self._loading[key % _LOCKS]:
            found = self._look(key)
            if found is not None:
                return found[0]
            value = self._load(key)
            self._keep(key, value)
            return value

    def _look(self, key: int) -> tuple[Value] | None:
        with self._lock:
            if key not in self._kept:
                return None
            self._kept.move_to_end(key)
            return (self._kept[key],)

    def _keep(self, key: int, value: Value) -> None:
        with self._lock:
            self._kept[key] = value
            self._weight += self._weigh(value)
            while self._weight > self._limit and len(self._kept) > 1:
                self._weight -= self._weigh(self._kept.popitem(last=False)[1])
