"""Checkpoints: written beside their place and renamed into it, and checked when read.

A folder holds weights, EMA and optimiser state as safetensors, the rest as JSON, and a manifest
with the SHA-256 of each file. Nothing is pickled.
"""

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

from sfumato.files import WRITE_ERRORS
from sfumato.training.folder import step_name

TENSORS = ("weights", "ema", "optimizer")
MANIFEST = "manifest.json"


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message says which, and what is left."""


@dataclass(frozen=True)
class Snapshot:
    """What a run needs to go on as if it had never stopped; whole tensors, on the CPU."""

    step: int  # optimiser steps taken
    weights: Mapping[str, Tensor]
    ema: Mapping[str, Tensor]
    optimizer: Mapping[str, Tensor]
    state: Mapping[str, Any]  # JSON: counters, position in the data, loss scale


def write_checkpoint(root: Path, snapshot: Snapshot) -> Path:
    """Write a snapshot as root/step-NNNNNN, or nothing at all.

    Raises:
        CheckpointError: if the disk is full or cannot be written.
    """
    place = root / step_name(snapshot.step)
    beside = root / f".{place.name}.tmp-{os.getpid()}"
    try:
        shutil.rmtree(beside, ignore_errors=True)
        beside.mkdir(parents=True)
        for name, tensors in zip(
            TENSORS, (snapshot.weights, snapshot.ema, snapshot.optimizer), strict=True
        ):
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, beside / f"{name}.safetensors"
            )
        state = {"step": snapshot.step, **snapshot.state}
        (beside / "state.json").write_text(json.dumps(state, indent=2) + "\n")
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)}
            for file in sorted(beside.iterdir())
        }
        (beside / MANIFEST).write_text(json.dumps({"files": files}, indent=2) + "\n")
        for file in beside.iterdir():
            _sync(file)
        if place.exists():
            _remove(place)
        beside.rename(place)
        _sync(root)
    except WRITE_ERRORS as error:
        shutil.rmtree(beside, ignore_errors=True)
        # safetensors' own error has no errno.
        full = os.strerror(errno.ENOSPC) in str(error)
        reason = "no space left on the disk" if full else str(error)
        raise CheckpointError(
            f"checkpoint {place} could not be written: {reason}; nothing half-written is left. "
            f"{_last_good(root)} Free some space and run the same command again"
        ) from error
    return place


def read_checkpoint(place: Path) -> Snapshot:
    """Read a checkpoint after checking every byte against its manifest.

    Raises:
        CheckpointError: naming the file that differs, and the last checkpoint that is good.
    """
    fault = find_fault(place)
    if fault:
        raise CheckpointError(
            f"checkpoint {place} is damaged: {fault}. {_last_good(place.parent)} To go on from "
            f"there, remove {place} and run the same command again"
        )
    weights, ema, optimizer = (load_file(place / f"{name}.safetensors") for name in TENSORS)
    state = json.loads((place / "state.json").read_text())
    return Snapshot(state.pop("step"), weights, ema, optimizer, state)


def read_shown_weights(place: Path) -> Mapping[str, Tensor]:
    """Return the weights to validate and export: the EMA where there is one.

    Raises:
        CheckpointError: as `read_checkpoint`.
    """
    snapshot = read_checkpoint(place)
    return snapshot.ema or snapshot.weights


def find_fault(place: Path) -> str | None:
    """Say what is wrong with a checkpoint, or None."""
    try:
        files = json.loads((place / MANIFEST).read_text())["files"]
        expected = {name: (entry["bytes"], entry["sha256"]) for name, entry in files.items()}
    except (OSError, ValueError, KeyError) as error:
        return f"{MANIFEST} cannot be read ({error})"
    for name, (size, digest) in expected.items():
        file = place / name
        if not file.exists():
            return f"{name} is missing"
        if file.stat().st_size != size:
            return f"{name} has {file.stat().st_size} bytes instead of {size}"
        if _sha256(file) != digest:
            return f"{name} differs from its SHA-256 in {MANIFEST}"
    return None


def list_checkpoints(root: Path) -> list[Path]:
    """Return the finished checkpoints, oldest first; a copy under another name is none of them."""
    places = [path for path in root.glob("step-*") if path.is_dir()]
    return sorted((path for path in places if path.name[5:].isdecimal()), key=step_of)


def best_step(root: Path) -> int | None:
    """Return the step of the lowest validation loss, as the newest checkpoint knows it.

    None where no loss was measured, or that checkpoint is not there any more.
    """
    found = list_checkpoints(root)
    best = json.loads((found[-1] / "state.json").read_text()).get("best") if found else None
    return best[0] if best and best[0] in map(step_of, found) else None


def step_of(place: Path) -> int:
    """Return the step that a checkpoint's folder is named after."""
    return int(place.name.removeprefix("step-"))


def fingerprint(place: Path) -> str | None:
    """Return the SHA-256 of the manifest, which no other checkpoint shares; None without one."""
    manifest = place / MANIFEST
    return _sha256(manifest) if manifest.exists() else None


def tidy(root: Path, keep: int | None = None, *, spare: int | None = None) -> None:
    """Remove what a killed writer left and, if `keep` is given, all but the newest `keep`.

    Args:
        spare: a step that stays in any case.
    """
    for path in root.glob(".step-*.tmp-*"):
        shutil.rmtree(path, ignore_errors=True)
    for place in list_checkpoints(root)[:-keep] if keep else []:
        if step_of(place) != spare:
            _remove(place)


def _remove(place: Path) -> None:
    # Under its own name a half-removed checkpoint would look like a damaged one.
    hidden = place.with_name(f".{place.name}.tmp-{os.getpid()}-old")
    place.rename(hidden)
    shutil.rmtree(hidden)


def _last_good(root: Path) -> str:
    for place in reversed(list_checkpoints(root)):
        if find_fault(place) is None:
            return f"The last good checkpoint is {place}."
    return "There is no other good checkpoint."


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
