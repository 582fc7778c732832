"""Functions that make shards, for workers of engines: a worker imports them by name."""

import os
import signal
import time
from pathlib import Path
from typing import Any

from sfumato.preparation.pack import make_tar


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


def dying_make_tar(mark: Path, job: Any, shard: Any, tick: Any) -> Any:
    """Make a tar; the first worker of tar 1 is killed after three rows."""
    rows = [0]

    def counting(count: int) -> None:
        rows[0] += count
        tick(count)
        if shard.name == "000001" and rows[0] == 3:
            die_once(mark)

    return make_tar(job, shard, counting)
