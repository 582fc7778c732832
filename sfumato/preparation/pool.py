"""Pool of worker processes on this machine; a dead one is replaced, and its shard is handed back.

A worker ends with the process that started it, even if that one is killed.
"""

import multiprocessing
import os
import pickle
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.context import SpawnProcess
from typing import Any, final

from sfumato.preparation.engine import Crew, Died, Event, Failed, Made, Ticked, attempt

_PAUSE = 0.2  # seconds between messages of rows that are done
_index = 0  # of the worker that this process is


def worker_index() -> int:
    """Return which worker of its machine this process is, from 0; 0 outside of a pool."""
    return _index


@dataclass(frozen=True)
class _Worker:
    process: SpawnProcess
    pipe: Connection


@final
class Pool(Crew):
    """Worker processes, each started when there is a shard for it."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._idle: list[int] = []
        self._workers: dict[int, _Worker] = {}  # by index
        self._shards: dict[int, int] = {}  # of busy workers, by index

    def start(self, number: int, item: Any) -> None:
        index = self._idle.pop() if self._idle else self._grow()
        self._shards[index] = number
        try:
            self._workers[index].pipe.send(item)
        except OSError:
            return  # it died while it was idle, which `wait` sees

    def wait(self) -> list[Event]:
        pipes = {self._workers[index].pipe: index for index in self._shards}
        return [self._receive(pipes[pipe]) for pipe in wait(pipes) if isinstance(pipe, Connection)]

    def close(self) -> None:
        for worker in self._workers.values():
            worker.process.kill()
        for worker in self._workers.values():
            worker.process.join()
            worker.pipe.close()

    def _grow(self) -> int:
        index = next(index for index in range(len(self._workers) + 1) if index not in self._workers)
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(theirs, self._function, index), daemon=True)
        process.start()
        theirs.close()
        self._workers[index] = _Worker(process, ours)
        return index

    def _receive(self, index: int) -> Event:
        worker, number = self._workers[index], self._shards[index]
        try:
            news: Ticked | Made | Failed = worker.pipe.recv()
        except (EOFError, OSError, pickle.UnpicklingError):
            worker.process.join()
            worker.pipe.close()
            del self._workers[index], self._shards[index]
            return number, Died(_fate(worker.process.exitcode))
        if not isinstance(news, Ticked):
            del self._shards[index]
            self._idle.append(index)
        return number, news


def _fate(code: int | None) -> str:
    if code is None or code >= 0:
        return f"exit code {code}"
    try:
        return f"killed by {signal.Signals(-code).name}"
    except ValueError:
        return f"killed by signal {-code}"


def _serve(pipe: Connection, function: Callable[..., Any], index: int) -> None:
    """Make shards until the first process closes the pipe."""
    global _index
    _index = index
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches all; the first process ends us
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            item = pipe.recv()
        except EOFError:
            return
        ticks = _Ticks(pipe)
        made = attempt(function, item, ticks.add)
        ticks.send()
        pipe.send(made)


@final
class _Ticks:
    """Rows that are done, told now and then: a message for each would slow the first process."""

    def __init__(self, pipe: Connection) -> None:
        self._pipe, self._count, self._told = pipe, 0, time.monotonic()

    def add(self, count: int) -> None:
        self._count += count
        if time.monotonic() - self._told > _PAUSE:
            self.send()

    def send(self) -> None:
        self._pipe.send(Ticked(self._count))
        self._count, self._told = 0, time.monotonic()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None, "a worker is a child"
    parent.join()
    os._exit(1)
