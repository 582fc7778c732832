"""State of the files that a job starts from, to notice when they change."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from sfumato.config import ShardDataConfig, ShardSourceConfig
from sfumato.data.paths import expand_pattern
from sfumato.data.prepared.folder import INDEX, open_folder
from sfumato.launch.jobs import STARTS, Job, value_of
from sfumato.training.checkpoint import fingerprint, list_checkpoints
from sfumato.training.folder import RunFolder


def starts_from(job: Job) -> dict[str, str]:
    """Return the paths that a job starts from, each with a hash of its state.

    A run's state is its last checkpoint, prepared data's is its samples; of other files it is their
    sizes and times. Missing paths are left out.
    """
    states = {}
    if job.command == "train":
        shards = job.settings.data.shards
        for source in (shards, *shards.sources.values()):
            states |= _samples_of(source, shards) if source.path else {}
    for key in STARTS.get(job.command, ()):
        path = value_of(job.settings, key)
        if path is not None and (state := _state_of(path)) is not None:
            states[path] = state
    return states


def _state_of(name: str) -> str | None:
    """Return the state of a path or of all that a pattern matches; None if there is nothing."""
    path = Path(name).expanduser().absolute()
    for folder in (path, *path.parents):
        if checkpoints := list_checkpoints(RunFolder(folder).checkpoints):
            inside = (each for each in checkpoints if path.is_relative_to(each))
            return fingerprint(next(inside, checkpoints[-1])) or ""
    try:
        tops = [path] if path.exists() else list(expand_pattern(str(path), "the path"))
    except ValueError:  # the command that reads the files refuses the path
        return None
    state = hashlib.sha256()
    for file in sorted(file for top in tops for file in _files(top)):
        about = file.stat()
        state.update(f"{file}\0{about.st_size}\0{about.st_mtime_ns}\n".encode())
    return state.hexdigest() if tops else None


def _files(top: Path) -> Iterator[Path]:
    if not top.is_dir():
        yield top
    for folder, _, names in os.walk(top, followlinks=True):
        yield from (Path(folder, name) for name in names)


def _samples_of(source: ShardSourceConfig, shards: ShardDataConfig) -> dict[str, str]:
    """Return the prepared folder of a job, with a hash of the samples that the job reads."""
    folder = open_folder(str(source.path), shards)
    if folder.store is None and not (folder.path / INDEX).exists():
        return {}
    index = folder.index()
    samples = [index.kept.get(source.selection), [tar.sha256 for tar in index.tars]]
    return {str(source.path): hashlib.sha256(json.dumps(samples).encode()).hexdigest()}
