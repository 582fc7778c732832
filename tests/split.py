"""Sharded checkpoints for tests: a snapshot that is split over processes, as FSDP splits it."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from runs import codes_of

from sfumato.training.checkpoint import OWN, TENSORS, Snapshot, write_sharded
from sfumato.training.folder import step_name
from sfumato.weights import Share


def split(snapshot: Snapshot, rank: int, world: int) -> Snapshot:
    """Return the snapshot of one process: rows of each tensor, and all of what has no rows."""
    shares = {}
    for kind in (*TENSORS, OWN):
        for name, tensor in vars(snapshot)[kind].items():
            rows = -(-len(tensor) // world) if tensor.ndim else 0
            part = tensor[rank * rows : (rank + 1) * rows] if tensor.ndim else tensor
            start = min(rank * rows, len(tensor)) if tensor.ndim else 0
            offsets = [start, *[0] * (tensor.ndim - 1)][: tensor.ndim]
            shares[f"{kind}/{name}"] = Share(part.contiguous().clone(), offsets, tensor.shape)
    return replace(snapshot, weights={}, ema={}, optimizer={}, objective={}, shares=shares)


def write_split(
    root: Path,
    snapshot: Snapshot,
    world: int,
    before: Callable[[int], object] = lambda rank: None,
) -> list[int]:
    """Write a sharded checkpoint by `world` processes; return their exit codes.

    Args:
        before: is called with the rank, in each process.
    """

    def write(rank: int) -> None:
        dist.init_process_group("gloo")
        part = split(snapshot, rank, world)
        before(rank)
        write_sharded(root, part, dist.group.WORLD)
        dist.destroy_process_group()

    return codes_of(world, write)


def place_of(root: Path, step: int) -> Path:
    return root / step_name(step)


def assert_same_tensors(found: Snapshot, expected: Snapshot) -> None:
    """Assert that two snapshots are bitwise equal."""
    assert (found.step, found.state) == (expected.step, expected.state)
    for part in (*TENSORS, OWN):
        left, right = vars(found)[part], vars(expected)[part]
        assert set(left) == set(right)
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype, (part, name)
            assert torch.equal(left[name], tensor), (part, name)
