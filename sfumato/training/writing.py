"""Checkpoints written while training goes on: one thread, at most one checkpoint under way."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import final

from sfumato.config import TrainingConfig
from sfumato.training.checkpoint import Snapshot, tidy, write_checkpoint


@final
class CheckpointWriter:
    """Writes snapshots and removes the oldest, in a thread or, if so configured, at once.

    Args:
        root: the folder of checkpoints.
        active: False on processes that write nothing.

    Attributes:
        seconds: that the thread took for the last checkpoint, beside training.
    """

    def __init__(self, root: Path, config: TrainingConfig, *, active: bool) -> None:
        self._root = root
        self._keep = config.keep_checkpoints
        self._active = active
        self._pool = ThreadPoolExecutor(1, "checkpoint") if config.async_checkpoints else None
        self._writing: Future[None] | None = None
        self.seconds = 0.0

    def write(self, snapshot: Snapshot, *, spare: int | None) -> None:
        """Write a snapshot, or begin to; `wait` comes before the next.

        Args:
            spare: a step that is not removed in any case.

        Raises:
            CheckpointError: if it is written at once, and cannot be.
        """
        assert self._writing is None, "the last one is still under way"
        if not self._active:
            return
        if self._pool is None:
            self._write(snapshot, spare)
        else:
            self._writing = self._pool.submit(self._write_beside, snapshot, spare)

    def wait(self) -> None:
        """Wait until what was begun is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let what is under way come to its end, whatever happens inside."""
        try:
            yield
        finally:
            if self._pool is not None:
                self._pool.shutdown()

    def _write(self, snapshot: Snapshot, spare: int | None) -> None:
        write_checkpoint(self._root, snapshot)
        tidy(self._root, self._keep, spare=spare)

    def _write_beside(self, snapshot: Snapshot, spare: int | None) -> None:
        started = time.monotonic()
        self._write(snapshot, spare)
        self.seconds = time.monotonic() - started
