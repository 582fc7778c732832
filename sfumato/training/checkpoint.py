"""Checkpoints: written whole, in a thread if so configured, and checked byte by byte when read.

A folder holds weights, EMA and optimiser state as safetensors, the rest as JSON, and a manifest
with the SHA-256 of each file. An objective's own tensors are one more file. Nothing is pickled.
A sharded checkpoint has one file of tensors for each process that wrote it, and reads the same.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, distributed

from sfumato.config import TrainingConfig
from sfumato.files import (
    clear_unfinished,
    new_folder,
    read_object,
    remove_folder,
    sha256_of,
    writing,
)
from sfumato.records import Count, read_record
from sfumato.training.folder import step_name
from sfumato.weights import SHARD, Shards, Share, shard_files, shard_names

TENSORS = ("weights", "ema", "optimizer")
OWN = "objective"  # tensors that only some objectives have
STATE, MANIFEST = "state.json", "manifest.json"
_OLDER = (MANIFEST, MANIFEST, STATE, *(f"{name}.safetensors" for name in (*TENSORS, OWN)))


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names it and the last good one."""


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on as if it had never stopped; whole tensors, on the CPU.

    Attributes:
        shares: of a snapshot that each process writes: this process's parts of all tensors, by
            kind and name. Then the other tensors are left out.
    """

    step: int  # optimiser steps taken
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # JSON: counters, position in the data, loss scale
    objective: Mapping[str, Tensor] = field(default_factory=dict)  # old policy, collected rows
    shares: Mapping[str, Share] = field(default_factory=dict)


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
    with _naming_last_good(root), new_folder(path, older=_OLDER, failure=CheckpointError) as folder:
        _write(folder, snapshot)
    return path


@contextmanager
def _naming_last_good(root: Path) -> Iterator[None]:
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{error}. {_last_good(root)}") from error


def _write(folder: Path, snapshot: Snapshot) -> None:
    for name in (*TENSORS, *([OWN] if snapshot.objective else [])):
        tensors = {key: value.contiguous() for key, value in vars(snapshot)[name].items()}
        save_file(tensors, folder / f"{name}.safetensors")
    _write_state(folder, snapshot, {})


def _write_state(folder: Path, snapshot: Snapshot, sums: Mapping[str, str]) -> None:
    """Write the state, and the manifest last.

    Args:
        sums: SHA-256 of files, by name, that are known.
    """
    state = {"step": snapshot.step, **snapshot.state}
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")
    # A disk that machines share may not list yet what others wrote.
    paths = sorted({*(folder / name for name in sums), *folder.iterdir()})
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": sums.get(path.name) or sha256_of(path)}
        for path in paths
    }
    (folder / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")


def write_sharded(root: Path, snapshot: Snapshot, group: Any) -> None:
    """Write a snapshot of shares as root/step-NNNNNN, or nothing; all processes must call it.

    The first process of the group makes the folder and its manifest.

    Args:
        group: of all processes; nothing else may use it meanwhile.

    Raises:
        CheckpointError: on every process, if the disk is full or cannot be written; the first one
            names the last good checkpoint.
    """
    from sfumato.training.shards import save_shares  # its package is slow to import

    path = root / step_name(snapshot.step)
    # One process looks for it, as that reads whole checkpoints.
    naming = nullcontext() if distributed.get_rank(group) else _naming_last_good(root)
    with naming, writing(path, CheckpointError), ExitStack() as folders:
        made = new_folder(path, older=_OLDER, failure=CheckpointError)
        save_shares(
            snapshot.shares,
            lambda: folders.enter_context(made),
            lambda folder, sums: _write_state(folder, snapshot, sums),
            group,
        )


def read_checkpoint(path: Path, part: slice = slice(None)) -> Snapshot:
    """Read a checkpoint after checking every byte against its manifest.

    Args:
        part: of the files of a sharded checkpoint: other processes check the others.

    Raises:
        CheckpointError: naming the file that differs, and the last checkpoint that is good.
    """
    shards = shard_files(path)
    _refuse_damage(path, *([STATE, *(file.name for file in shards[part])] if shards else []))
    try:
        if shards:
            tensors = Shards(shards)
            weights, ema, optimizer = (tensors.under(f"{name}/") for name in TENSORS)
            objective = tensors.under(f"{OWN}/")
        else:
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
    shards = next(filter(None, map(SHARD.fullmatch, files)), None)
    tensors = shard_names(int(shards[2])) if shards else [f"{name}.safetensors" for name in TENSORS]
    for name in (*tensors, STATE):
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
        active: False on processes that write their shares at most.
        group: returns a group of all processes, for shares.

    Attributes:
        seconds: that the thread took for the last checkpoint, beside training.
    """

    def __init__(
        self,
        root: Path,
        config: TrainingConfig,
        *,
        active: bool,
        group: Callable[[], Any] = lambda: None,
    ) -> None:
        self._root = root
        self._group = group
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
        if not (self._active or snapshot.shares):
            return
        group = self._group() if snapshot.shares else None
        if self._pool is None:
            self._write(snapshot, spare, group)
        else:
            self._writing = self._pool.submit(self._write_beside, snapshot, spare, group)

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

    def _write(self, snapshot: Snapshot, spare: int | None, group: Any) -> None:
        if snapshot.shares:
            write_sharded(self._root, snapshot, group)
        else:
            write_checkpoint(self._root, snapshot)
        if self._active:
            tidy(self._root, self._keep, spare=spare)

    def _write_beside(self, snapshot: Snapshot, spare: int | None, group: Any) -> None:
        started = time.monotonic()
        self._write(snapshot, spare, group)
        self.seconds = time.monotonic() - started
