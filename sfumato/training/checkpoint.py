"""Checkpoints: written whole, in a thread if so configured, and checked byte by byte when read.

A folder holds weights, EMA and optimiser state as safetensors, the rest as JSON, and a manifest
with the SHA-256 of each file. An objective's own tensors are one more file. Nothing is pickled.
"""

import json
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.config import TrainingConfig
from sfumato.files import clear_unfinished, new_folder, read_object, remove_folder, sha256_of
from sfumato.records import Count, read_record
from sfumato.training.folder import step_name

TENSORS = ("weights", "ema", "optimizer")
OWN = "objective"  # tensors that only some objectives have
STATE, MANIFEST = "state.json", "manifest.json"
_OLDER = (MANIFEST, MANIFEST, STATE, *(f"{name}.safetensors" for name in (*TENSORS, OWN)))


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names it and the last good one."""


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on as if it had never stopped; whole tensors, on the CPU."""

    step: int  # optimiser steps taken
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # JSON: counters, position in the data, loss scale
    objective: Mapping[str, Tensor] = field(default_factory=dict)  # old policy, collected rows


@dataclass(frozen=True)
class _File:
    bytes: int
    sha256: str


@dataclass(frozen=True)
class _Manifest:
    files: dict[str, _File]


@dataclass(frozen=True)
class _State:
    """What is read of state.json without its run: the step, the best with its loss, the guards."""

    step: Count
    best: tuple[Count, float] | None = None
    guards: dict[str, Any] = field(default_factory=dict)


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot as root/step-NNNNNN, or nothing at all.

    A checkpoint of the same step is replaced. After a kill `tidy` brings it back.

    Raises:
        CheckpointError: if the disk is full or cannot be written.
    """
    path = root / step_name(snapshot.step)
    try:
        with new_folder(path, older=_OLDER, failure=CheckpointError) as folder:
            _write(folder, snapshot)
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_last_good(root)}") from error
    return path


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name in (*TENSORS, *([OWN] if snapshot.objective else [])):
        tensors = {key: value.contiguous() for key, value in vars(snapshot)[name].items()}
        save_file(tensors, folder / f"{name}.safetensors")
    state = {"step": snapshot.step, **snapshot.state}
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    files = {
        file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)}
        for file in sorted(folder.iterdir())
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def read_checkpoint(path: Path) -> Snapshot:
    """Read a checkpoint after checking every byte against its manifest.

    Raises:
        CheckpointError: naming the file that differs, and the last checkpoint that is good.
    """
    _refuse_damage(path)
    try:
        weights, ema, optimizer = (load_file(path / f"{name}.safetensors") for name in TENSORS)
        own = path / f"{OWN}.safetensors"
        objective = load_file(own) if own.exists() else {}
    except SafetensorError as error:
        raise CheckpointError(f"{path} holds no safetensors ({error}); remove it") from error
    _read_state(path)  # refuses a wrong type of what every reader uses
    state = read_object(path / STATE, _advice(path), failure=CheckpointError)
    return Snapshot(state.pop("step"), weights, ema, optimizer, state, objective)


def read_shown_weights(path: Path) -> Mapping[str, Tensor]:
    """Return the weights to validate and export: the EMA where there is one.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    snapshot = read_checkpoint(path)
    return snapshot.ema or snapshot.weights


def _refuse_damage(path: Path, *read: str) -> None:
    if fault := find_fault(path, *read):
        raise CheckpointError(
            f"checkpoint {path} is damaged: {fault}. {_last_good(path.parent)} To go on from "
            f"there, remove {path} and run the same command again"
        )


def find_fault(path: Path, *read: str) -> str | None:
    """Say what is wrong with a checkpoint, or None; only the named files are read, or else all."""
    try:
        files = read_record(path / MANIFEST, _Manifest, "remove the checkpoint").files
    except ValueError as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name in (*(f"{name}.safetensors" for name in TENSORS), STATE):
        if name not in files:
            return f"{MANIFEST} does not list {name}"
    for name, entry in files.items():
        file = path / name
        if Path(name).name != name or (file.exists() and not file.is_file()):
            return f"{MANIFEST} lists {name!r}, which is no file of the checkpoint"
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != entry.bytes:
            return f"{name} has {file.stat().st_size} bytes instead of {entry.bytes}"
        found = sha256_of(file) if not read or name in read else entry.sha256
        if found != entry.sha256:
            return f"{name} differs from its SHA-256 in {MANIFEST}: {found}, not {entry.sha256}"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; a copy under another name is none of them."""
    steps = [path for path in root.glob("step-*") if path.name[5:].isdecimal()]
    return sorted((path for path in steps if path.is_dir()), key=step_of)


def best_step(root: Path) -> int | None:
    """Return the step of the lowest validation loss that the newest checkpoint records.

    None if no loss was measured, or the best checkpoint was removed.
    """
    checkpoints = list_checkpoints(root)
    best = _read_state(checkpoints[-1]).best if checkpoints else None
    return best[0] if best and best[0] in map(step_of, checkpoints) else None


def guards_of(path: Path) -> Mapping[str, Any]:
    """Return the state of the guards that a checkpoint records."""
    return _read_state(path).guards


def step_of(path: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(path.name.removeprefix("step-"))


def fingerprint(path: Path) -> str | None:
    """Return the SHA-256 of the manifest, which no other checkpoint shares; None without one."""
    manifest = path / MANIFEST
    return sha256_of(manifest) if manifest.is_file() else None


def tidy(root: Path, keep: int | None = None, *, spare: int | None = None) -> None:
    """Finish or undo what a killed writer began; remove old checkpoints.

    A link, or a checkpoint that somebody put files into, stays.

    Args:
        keep: how many of the newest stay; None keeps all.
        spare: a step that stays in any case.
    """
    for stale in root.glob(".step-*.tmp-*"):
        clear_unfinished(root / stale.name[1:].partition(".tmp-")[0])
    for path in list_checkpoints(root)[:-keep] if keep else []:
        if step_of(path) != spare:
            try:
                remove_folder(path, older=_OLDER)
            except ValueError as error:
                print(f"an old checkpoint is not removed: {error}", file=sys.stderr)


def _read_state(path: Path) -> _State:
    _refuse_damage(path, STATE)
    return read_record(path / STATE, _State, _advice(path), failure=CheckpointError)


def _advice(path: Path) -> str:
    return f"remove {path} and run the same command again"


def _last_good(root: Path) -> str:
    for path in reversed(list_checkpoints(root)):
        if find_fault(path) is None:
            return f"The last good checkpoint is {path}."
    return "There is no other good checkpoint."


@final
class CheckpointWriter:
    """Writer of checkpoints: in a thread, at most one at a time, or at once if so configured.

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
        """Write a snapshot, or begin to, and remove old checkpoints; `wait` before the next.

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
        """Wait until the checkpoint under way is on disk.

        Raises:
            CheckpointError: if it could not be written.
        """
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()

    @contextmanager
    def closing(self) -> Iterator[None]:
        """Let the checkpoint under way come to its end, whatever happens inside."""
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
