"""Sharded checkpoints: each process writes its share, and any number of them reads it."""

from pathlib import Path

import pytest
import torch
from runs import command, in_processes, last_state, start_cli
from toy import use_toy

from sfumato.training.checkpoint import Snapshot

SHARDED = ("training.strategy=fsdp", "training.sharded_checkpoints=true")


@pytest.fixture(autouse=True)
def toy(monkeypatch: pytest.MonkeyPatch) -> None:
    use_toy(monkeypatch)


def assert_same_tensors(found: Snapshot, expected: Snapshot) -> None:
    assert (found.step, found.state) == (expected.step, expected.state)
    for part in ("weights", "ema", "optimizer", "objective"):
        left, right = vars(found)[part], vars(expected)[part]
        assert set(left) == set(right)
        assert [name for name in left if not torch.equal(left[name], right[name])] == [], part


@pytest.mark.parametrize("world", [2, 4])
def test_sharded_equals_whole(tmp_path: Path, world: int) -> None:
    for name, sharded in (("whole", "false"), ("run", "true")):
        settings = ["training.strategy=fsdp", f"training.sharded_checkpoints={sharded}"]
        run = command(
            tmp_path, name, *settings, "training.max_steps=2", "training.micro_batch_size=1"
        )
        in_processes(world, lambda _, run=run: start_cli(run))
    assert_same_tensors(last_state(tmp_path / "run"), last_state(tmp_path / "whole"))
