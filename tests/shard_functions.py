"""Functions that make shards, for workers of engines: a worker imports them by name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from sfumato.preparation.engine import map_shards


def double(item: int, tick: Any) -> int:
    tick(1)
    return 2 * item


def first_last(item: int, tick: Any) -> int:
    """Take longest for the first item."""
    time.sleep(1.0 if item == 0 else 0.0)
    return item


def refusing(item: int, tick: Any) -> int:
    if item == 3:
        raise ValueError("the shard 3 is bad")
    return item


def failing(item: int, tick: Any) -> int:
    raise KeyError(f"oh {item}")


def die_once(mark: Path) -> None:
    """End this process as `kill -9` does, unless one died before."""
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


def dying_once(mark: Path, item: int, tick: Any) -> int:
    tick(1)
    if item == 1:
        die_once(mark)
    return double(item, tick)


def always_dying(item: int, tick: Any) -> int:
    if item == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return item


def beating(folder: Path, item: int, tick: Any) -> int:
    """Write to a file for ever."""
    while True:
        with (folder / str(item)).open("a") as file:
            file.write(".")
        time.sleep(0.02)


class Dying:
    """A function of which one worker is killed while it makes a shard, at some tick."""

    def __init__(self, function: Any, shard: str, ticks: int, mark: Path) -> None:
        self._function, self._shard, self._ticks, self._mark = function, shard, ticks, mark

    def __call__(self, item: Any, tick: Any) -> Any:
        left = [self._ticks]

        def counting(count: int) -> None:
            tick(count)
            left[0] -= 1
            if str(item) == self._shard and left[0] == 0:
                die_once(self._mark)

        return self._function(item, counting)


def let_die(monkeypatch: Any, module: Any, shard: str, ticks: int, mark: Path) -> None:
    """Let a worker of a stage die once."""

    def dying(function: Any, *arguments: Any, **others: Any) -> Any:
        return map_shards(Dying(function, shard, ticks, mark), *arguments, **others)

    monkeypatch.setattr(module, "map_shards", dying)
