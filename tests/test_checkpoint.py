"""Checkpoints: whole or not there, checked byte by byte, and never pickled."""

import errno
import json
import os
import shutil
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import in_child, kill, on_event
from safetensors import SafetensorError

from sfumato.files import RECORD
from sfumato.training import checkpoint
from sfumato.training.checkpoint import (
    CheckpointError,
    Snapshot,
    find_fault,
    fingerprint,
    list_checkpoints,
    read_checkpoint,
    read_shown_weights,
    tidy,
    write_checkpoint,
)

FILES = ("weights.safetensors", "ema.safetensors", "optimizer.safetensors", "state.json")
FILE_EVENTS = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.scandir"}
KILLED = -9


def make(step: int, size: int = 40) -> Snapshot:
    rng = torch.Generator().manual_seed(step)
    weights = {
        name: torch.randn(size, size, generator=rng) for name in ("up.weight", "down.weight")
    }
    moments = {f"exp_avg/{name}": tensor.square() for name, tensor in weights.items()}
    return Snapshot(
        step=step,
        weights=weights,
        ema={name: tensor / 2 for name, tensor in weights.items()},
        optimizer={**moments, "step/up.weight": torch.tensor(float(step))},
        state={"ema_updates": step, "data": {"epoch": 1, "position": 3}, "scaler": {}},
    )


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Return a folder with a good checkpoint of step 1."""
    root = tmp_path / "checkpoints"
    write_checkpoint(root, make(1))
    return root


def assert_equal(found: Snapshot, expected: Snapshot) -> None:
    assert (found.step, found.state) == (expected.step, expected.state)
    for part in ("weights", "ema", "optimizer"):
        left, right = vars(found)[part], vars(expected)[part]
        assert left.keys() == right.keys()
        for name, tensor in right.items():
            assert left[name].dtype == tensor.dtype
            assert torch.equal(left[name], tensor)


def test_round_trip(tmp_path: Path) -> None:
    odd = {
        "bf16": torch.randn(3, 4).bfloat16(),
        "transposed": torch.randn(5, 6).T,
        "scalar": torch.tensor(3.0),
        "tiny": torch.tensor([1e-45, -0.0, float("inf")]),
    }
    snapshot = Snapshot(7, odd, {}, odd, {"data": {"epoch": 0, "position": 9}, "scaler": {"s": 2}})
    place = write_checkpoint(tmp_path / "new" / "checkpoints", snapshot)
    assert place.name == "step-000007"
    assert_equal(read_checkpoint(place), snapshot)
    assert read_shown_weights(place).keys() == odd.keys()  # without EMA, the weights


def test_the_averaged_weights_are_shown(root: Path) -> None:
    shown = read_shown_weights(root / "step-000001")
    assert torch.equal(shown["up.weight"], make(1).ema["up.weight"])


def test_the_same_step_again_replaces_it(root: Path) -> None:
    again = make(1, size=3)
    write_checkpoint(root, again)
    assert_equal(read_checkpoint(root / "step-000001"), again)
    assert [path.name for path in root.iterdir()] == ["step-000001"]


def test_nothing_is_pickled(root: Path) -> None:
    """Read every file by its format's own description: JSON, or a JSON header and raw numbers."""
    place, expected = root / "step-000001", make(1)
    assert {path.name for path in place.iterdir()} == {*FILES, "manifest.json", RECORD}
    for name in ("state.json", "manifest.json"):
        json.loads((place / name).read_text())
    content = (place / "weights.safetensors").read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header, body = json.loads(content[8 : 8 + length]), content[8 + length :]
    assert header.keys() - {"__metadata__"} == expected.weights.keys()
    for name, tensor in expected.weights.items():
        start, stop = header[name]["data_offsets"]
        numbers = np.frombuffer(body[start:stop], dtype=np.float32).reshape(header[name]["shape"])
        np.testing.assert_array_equal(numbers, tensor.numpy())


def test_order_and_number_kept(tmp_path: Path) -> None:
    for step in (999_999, 2, 1_000_000, 30):
        write_checkpoint(tmp_path, make(step, size=1))
    tidy(tmp_path, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-999999", "step-1000000"]
    tidy(tmp_path)
    assert len(list_checkpoints(tmp_path)) == 2


def test_a_copy_under_another_name_is_no_checkpoint(root: Path) -> None:
    shutil.copytree(root / "step-000001", root / "step-000001.bak")
    write_checkpoint(root, make(2))
    assert list_checkpoints(root) == [root / "step-000001", root / "step-000002"]
    tidy(root, keep=1)
    assert (root / "step-000001.bak").exists()
    assert fingerprint(root / "step-000002") != fingerprint(root / "step-000001.bak")


def test_killed_at_every_file_operation(tmp_path: Path) -> None:
    """Write step 2 and remove step 1, killed before the n-th operation on a file, for every n."""

    def replace(number: int, root: Path) -> None:
        on_event(number, kill, FILE_EVENTS)
        write_checkpoint(root, make(2))
        tidy(root, keep=1)

    write_checkpoint(tmp_path / "first", make(1))
    seen = set()
    for number in range(1, 200):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", root)
        code = in_child(lambda number=number, root=root: replace(number, root))
        places = list_checkpoints(root)
        assert [find_fault(place) for place in places] == [None] * len(places)
        newest = read_checkpoint(places[-1])
        assert_equal(newest, make(newest.step))
        tidy(root)
        assert sorted(path.name for path in root.iterdir()) == [path.name for path in places]
        if code == 0:
            break
        assert code == KILLED
        seen.add(tuple(path.name for path in places))
    assert number > 20
    assert seen == {("step-000001",), ("step-000001", "step-000002"), ("step-000002",)}


def test_a_step_that_is_written_again_survives_a_kill(tmp_path: Path) -> None:
    """Write step 1 again, killed before the n-th operation on a file, for every n."""
    old, new = make(1), make(1, size=3)

    def rewrite(number: int, root: Path) -> None:
        on_event(number, kill, FILE_EVENTS)
        write_checkpoint(root, new)

    write_checkpoint(tmp_path / "first", old)
    seen = []
    for number in range(1, 200):
        root = tmp_path / str(number)
        shutil.copytree(tmp_path / "first", root)
        code = in_child(lambda number=number, root=root: rewrite(number, root))
        tidy(root)
        assert [path.name for path in root.iterdir()] == ["step-000001"]
        weights = read_checkpoint(root / "step-000001").weights["up.weight"]
        assert any(torch.equal(weights, each.weights["up.weight"]) for each in (old, new))
        seen.append(len(weights))
        if code == 0:
            break
        assert code == KILLED
    assert seen == sorted(seen, reverse=True)
    assert set(seen) == {40, 3}


@pytest.mark.parametrize("name", FILES[:3])
def test_killed_in_the_middle_of_a_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    save = checkpoint.save_file

    def save_half(tensors: dict[str, torch.Tensor], file: Path) -> None:
        save(tensors, file)
        if file.name == name:
            os.truncate(file, file.stat().st_size // 2)
            kill()

    monkeypatch.setattr(checkpoint, "save_file", save_half)
    assert in_child(lambda: write_checkpoint(root, make(2))) == KILLED
    assert list_checkpoints(root) == [root / "step-000001"]
    assert len(list(root.iterdir())) == 2
    monkeypatch.undo()
    write_checkpoint(root, make(2))
    tidy(root)
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000002"]


@pytest.mark.parametrize("name", FILES)
def test_one_flipped_byte_is_refused_by_name(root: Path, name: str) -> None:
    file = write_checkpoint(root, make(2)) / name
    good = file.read_bytes()
    positions = np.random.default_rng(0).integers(0, len(good), 5)
    for position in [0, len(good) // 2, len(good) - 1, *positions]:
        file.write_bytes(flip(good, position))
        with pytest.raises(CheckpointError) as error:
            read_checkpoint(root / "step-000002")
        assert f"{name} differs" in str(error.value)
        assert f"The last good checkpoint is {root / 'step-000001'}." in str(error.value)
    file.write_bytes(good)
    assert find_fault(root / "step-000002") is None


def test_any_flipped_byte_of_the_manifest_is_refused(root: Path) -> None:
    file = root / "step-000001" / "manifest.json"
    good = file.read_bytes()
    for position in range(0, len(good), 3):
        file.write_bytes(flip(good, position))
        assert find_fault(root / "step-000001") is not None, position
    with pytest.raises(CheckpointError, match=r"manifest\.json.*no other good checkpoint"):
        read_checkpoint(root / "step-000001")


def flip(content: bytes, position: int) -> bytes:
    changed = bytearray(content)
    changed[position] ^= 1
    return bytes(changed)


@pytest.mark.parametrize("name", [*FILES, "manifest.json"])
def test_a_short_or_missing_file_is_refused_by_name(root: Path, name: str) -> None:
    file = root / "step-000001" / name
    os.truncate(file, file.stat().st_size - 3)
    assert name in (find_fault(root / "step-000001") or "")
    file.unlink()
    assert name in (find_fault(root / "step-000001") or "")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """Return a file system of 512 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=512k", "tmpfs", str(place)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a small file system can be mounted by root only")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_full_disk(small_disk: Path) -> None:
    """Leave room for nothing, for part of a file, and for some of the files."""
    root = small_disk / "checkpoints"
    write_checkpoint(root, make(1))
    filler = small_disk / "filler"
    for kilobytes in (0, 8, 20, 32, 44):
        free = shutil.disk_usage(small_disk).free
        filler.write_bytes(b"x" * (free - kilobytes * 1024))
        with pytest.raises(CheckpointError) as error:
            write_checkpoint(root, make(2))
        assert "no space is left on the disk; nothing half-written is left" in str(error.value)
        assert f"The last good checkpoint is {root / 'step-000001'}." in str(error.value)
        assert [path.name for path in root.iterdir()] == ["step-000001"]
        filler.unlink()
    assert_equal(read_checkpoint(root / "step-000001"), make(1))
    write_checkpoint(root, make(2))
    assert_equal(read_checkpoint(root / "step-000002"), make(2))


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space is left on the disk"),
        (OSError(errno.EIO, "Input/output error", "/somewhere/x"), "Input/output error"),
        (
            SafetensorError("I/O error: No space left on device (os error 28)"),
            "no space is left on the disk",
        ),
    ],
)
def test_a_failing_disk(
    root: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, reason: str
) -> None:
    save = checkpoint.save_file

    def fail_late(tensors: dict[str, torch.Tensor], file: Path) -> None:
        if file.name == "optimizer.safetensors":
            raise error
        save(tensors, file)

    monkeypatch.setattr(checkpoint, "save_file", fail_late)
    with pytest.raises(CheckpointError) as caught:
        write_checkpoint(root, make(2))
    assert reason in str(caught.value)
    assert ("no space" in str(caught.value)) == ("no space" in reason)
    assert [path.name for path in root.iterdir()] == ["step-000001"]
    assert find_fault(root / "step-000001") is None
