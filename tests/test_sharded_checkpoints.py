"""Sharded checkpoints: each process writes its share, and any number of them reads the whole."""

import errno
import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from runs import in_processes, kill, on_event
from safetensors import safe_open
from split import assert_same_tensors, place_of, split, write_split
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from sfumato.config import TrainingConfig
from sfumato.evaluation.evaluate import scaled
from sfumato.files import RECORD
from sfumato.training import shards
from sfumato.training.checkpoint import (
    CheckpointError,
    Snapshot,
    find_fault,
    list_checkpoints,
    read_checkpoint,
    read_shown_weights,
    tidy,
    write_checkpoint,
    write_sharded,
)
from sfumato.training.sharding import SHARDED_BYTES, writes_shards
from sfumato.weights import Shards, Share, shard_files, shard_names, write_shard

FILE_EVENTS = {"open", "os.mkdir", "os.rmdir", "os.remove", "os.rename", "os.scandir"}
KILLED = -9
FIRST, SECOND = shard_names(2)


def make(step: int, size: int = 5) -> Snapshot:
    rng = torch.Generator().manual_seed(step)
    weights = {
        "matrix": torch.randn(size, 3, generator=rng),
        "row": torch.randn(1, 4, generator=rng),  # fewer rows than processes
        "kernel": torch.randn(size + 2, 2, 3, 3, generator=rng),
        "half": torch.randn(size, generator=rng).bfloat16(),
    }
    moments = {f"exp_avg/{name}": tensor.square() for name, tensor in weights.items()}
    return Snapshot(
        step=step,
        weights=weights,
        ema={name: tensor / 2 for name, tensor in weights.items()},
        optimizer={**moments, "step/row": torch.tensor(float(step))},
        state={"ema_updates": step, "data": {"epoch": 1, "position": 3}, "scaler": {}},
        objective={"old/row": torch.ones(1, 4), "collection/empty": torch.empty(0, 2)},
    )


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with checkpoints of steps 1 and 2 that two processes wrote; copy it."""
    root = tmp_path_factory.mktemp("written") / "checkpoints"
    for step in (1, 2):
        assert write_split(root, make(step), 2) == [0, 0]
    return root


@pytest.fixture
def root(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "checkpoints"))


@pytest.mark.parametrize("world", [1, 3, 4])
def test_any_number_of_processes_writes_the_same_tensors(tmp_path: Path, world: int) -> None:
    assert write_split(tmp_path, make(1), world) == [0] * world
    place = place_of(tmp_path, 1)
    files = {path.name for path in place.iterdir()}
    assert files == {*shard_names(world), "state.json", "manifest.json", RECORD}
    assert_same_tensors(read_checkpoint(place), make(1))
    sizes = [0] * world
    for rank, file in enumerate(shard_files(place)):
        with safe_open(file, "pt") as tensors:
            sizes[rank] = sum(tensors.get_tensor(name).nbytes for name in tensors.keys())  # noqa: SIM118
    kinds = (vars(make(1))[kind] for kind in ("weights", "ema", "optimizer", "objective"))
    assert sum(sizes) == sum(each.nbytes for kind in kinds for each in kind.values())


def test_a_part_is_read_alone(root: Path) -> None:
    """Every range of rows, within one file and across two."""
    tensors, expected = Shards(shard_files(place_of(root, 1))), make(1).weights
    for name in ("matrix", "kernel"):
        whole = expected[name]
        assert tensors.shape(f"weights/{name}") == whole.shape
        for start in range(len(whole) + 1):
            for count in range(len(whole) - start + 1):
                offsets, sizes = [start, *[0] * (whole.ndim - 1)], [count, *whole.shape[1:]]
                part = tensors.read(f"weights/{name}", offsets, sizes)
                assert torch.equal(part, whole[start : start + count])
    corner = tensors.read("weights/kernel", [2, 1, 0, 1], [3, 1, 2, 2])
    assert torch.equal(corner, expected["kernel"][2:5, 1:2, 0:2, 1:3])


def test_torch_reads_the_files(root: Path) -> None:
    """HuggingFaceStorageReader of torch.distributed.checkpoint fills tensors of the same names."""
    expected = {f"weights/{name}": tensor for name, tensor in make(2).weights.items()}
    found = {name: torch.zeros_like(tensor) for name, tensor in expected.items()}
    reader = HuggingFaceStorageReader(str(place_of(root, 2)))
    load(found, storage_reader=reader, no_dist=True)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor)


def test_the_averaged_weights_are_shown(root: Path, tmp_path: Path) -> None:
    shown = read_shown_weights(place_of(root, 1))
    assert torch.equal(shown["matrix"], make(1).ema["matrix"])
    without = Snapshot(3, make(1).weights, {}, {}, {})
    assert write_split(tmp_path / "without", without, 2) == [0, 0]
    shown = read_shown_weights(place_of(tmp_path / "without", 3))
    assert torch.equal(shown["matrix"], make(1).weights["matrix"])


def test_adapters_are_scaled(tmp_path: Path) -> None:
    names = ("unet.to_q.lora_A.default.weight", "unet.to_q.lora_B.default.weight")
    adapters: dict[str, Tensor] = {names[0]: torch.ones(4, 3), names[1]: torch.full((5, 4), 3.0)}
    assert write_split(tmp_path, Snapshot(1, adapters, {}, {}, {}), 2) == [0, 0]
    found = scaled(read_shown_weights(place_of(tmp_path, 1)), 0.5)
    assert torch.equal(found[names[0]], adapters[names[0]])
    assert torch.equal(found[names[1]], adapters[names[1]] / 2)


def test_both_layouts_lie_side_by_side(root: Path) -> None:
    write_checkpoint(root, make(3))
    assert [find_fault(path) for path in list_checkpoints(root)] == [None] * 3
    assert write_split(root, make(3, size=7), 2) == [0, 0]  # in place of the other layout
    assert_same_tensors(read_checkpoint(place_of(root, 3)), make(3, size=7))
    write_checkpoint(root, make(3))
    assert_same_tensors(read_checkpoint(place_of(root, 3)), make(3))
    tidy(root, keep=1)
    assert [path.name for path in root.iterdir()] == ["step-000003"]


@pytest.mark.parametrize("name", [FIRST, SECOND, "state.json"])
@pytest.mark.parametrize("fault", ["differs", "bytes instead", "missing", "no file"])
def test_a_bad_file_is_refused_by_name(root: Path, name: str, fault: str) -> None:
    place = place_of(root, 2)
    file = place / name
    match fault:
        case "differs":
            content = bytearray(file.read_bytes())
            content[len(content) // 2] ^= 1
            file.write_bytes(content)
        case "bytes instead":
            os.truncate(file, file.stat().st_size - 3)
        case "missing":
            file.unlink()
        case _:
            file.unlink()
            file.mkdir()
    for read in (read_checkpoint, read_shown_weights):
        with pytest.raises(CheckpointError) as error:
            read(place)
        assert name in str(error.value)
        assert fault in str(error.value)
        assert f"The last good checkpoint is {place_of(root, 1)}." in str(error.value)
        assert f"remove {place} and run the same command again" in str(error.value)
    shutil.rmtree(place)
    assert_same_tensors(read_checkpoint(list_checkpoints(root)[-1]), make(1))


def test_a_manifest_that_lacks_a_shard_is_refused(root: Path) -> None:
    file = place_of(root, 2) / "manifest.json"
    content = json.loads(file.read_text())
    for name in (FIRST, SECOND):
        less = {other: entry for other, entry in content["files"].items() if other != name}
        file.write_text(json.dumps({"files": less}))
        assert find_fault(place_of(root, 2)) == f"manifest.json does not list {name}"


def test_any_flipped_byte_of_the_manifest_is_refused(root: Path) -> None:
    file = place_of(root, 1) / "manifest.json"
    good = file.read_bytes()
    for position in range(0, len(good), 2):
        changed = bytearray(good)
        changed[position] ^= 1
        file.write_bytes(changed)
        assert find_fault(place_of(root, 1)) is not None, position


def test_each_process_checks_its_part(root: Path) -> None:
    """Together they check every file; a fault is found by the one that has the file."""
    place = place_of(root, 2)
    for name, finder in ((FIRST, 0), (SECOND, 1)):
        good = (place / name).read_bytes()
        (place / name).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
        with pytest.raises(CheckpointError, match=f"{name} differs"):
            read_checkpoint(place, slice(finder, None, 2))
        read_checkpoint(place, slice(1 - finder, None, 2))
        (place / name).write_bytes(good)
    read_checkpoint(place, slice(3, None, 4))  # more processes than files
    (place / SECOND).unlink()
    with pytest.raises(CheckpointError, match=f"{SECOND} is missing"):
        read_checkpoint(place, slice(0, None, 2))  # what is missing is seen by all


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_at_every_file_operation(tmp_path: Path, killed: int) -> None:
    """One process is killed before its n-th operation on a file, for every n."""
    first = tmp_path / "first"
    assert write_split(first, make(1), 2) == [0, 0]
    seen: list[int] = []
    newest = make(1)
    for number in range(1, 100):
        root = Path(shutil.copytree(first, tmp_path / str(number)))
        codes = write_split(
            root,
            make(2),
            2,
            lambda rank, n=number: on_event(n, kill, FILE_EVENTS) if rank == killed else None,
        )
        places = list_checkpoints(root)
        assert [find_fault(place) for place in places] == [None] * len(places)
        newest = read_checkpoint(places[-1])
        assert_same_tensors(newest, make(newest.step))
        tidy(root)
        assert sorted(path.name for path in root.iterdir()) == [path.name for path in places]
        if codes == [0, 0]:
            break
        assert codes[killed] == KILLED
        seen.append(newest.step)
    assert newest.step == 2
    assert seen == sorted(seen)  # once it has its name, it stays
    assert set(seen) == ({1, 2} if killed == 0 else {1})
    assert len(seen) > (20 if killed == 0 else 1)


@pytest.mark.parametrize("rank", [0, 1])
def test_killed_in_the_middle_of_a_file(
    root: Path, monkeypatch: pytest.MonkeyPatch, rank: int
) -> None:
    def write_half(file: Path, shares: Mapping[str, Share]) -> None:
        write_shard(file, shares)
        if file.name == shard_names(2)[rank]:
            os.truncate(file, file.stat().st_size // 2)
            kill()

    monkeypatch.setattr(shards, "write_shard", write_half)
    assert write_split(root, make(3), 2)[rank] == KILLED
    assert list_checkpoints(root) == [place_of(root, 1), place_of(root, 2)]
    monkeypatch.undo()
    assert write_split(root, make(3), 2) == [0, 0]
    tidy(root)
    assert sorted(path.name for path in root.iterdir()) == [f"step-00000{n}" for n in (1, 2, 3)]
    assert_same_tensors(read_checkpoint(place_of(root, 3)), make(3))


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "no space is left on the disk"),
        (OSError(errno.EIO, "Input/output error", "/somewhere/x"), "Input/output error"),
    ],
)
def test_a_failing_disk_is_told_on_every_process(
    root: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    rank: int,
    error: OSError,
    reason: str,
) -> None:
    def fail(file: Path, shares: Mapping[str, Share]) -> None:
        write_shard(file, shares)
        if file.name == shard_names(2)[rank]:
            raise error

    monkeypatch.setattr(shards, "write_shard", fail)
    assert write_split(root, make(3), 2) == [1, 1]
    said = capfd.readouterr().err
    for text in (f"{place_of(root, 3)} could not be written: ", reason):
        assert said.count(text) >= 2, text
    # It reads whole checkpoints to know.
    assert said.count(f"The last good checkpoint is {place_of(root, 2)}.") == 1
    assert sorted(path.name for path in root.iterdir()) == ["step-000001", "step-000002"]


def test_a_share_that_the_disk_does_not_list_yet_is_in_the_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on NFS, for some seconds, where another machine wrote it."""
    whole, hidden = Path.iterdir, shard_names(2)[1]
    monkeypatch.setattr(Path, "iterdir", lambda p: (f for f in whole(p) if f.name != hidden))
    assert write_split(tmp_path, make(1), 2) == [0, 0]
    monkeypatch.undo()
    assert find_fault(place_of(tmp_path, 1)) is None
    assert_same_tensors(read_checkpoint(place_of(tmp_path, 1)), make(1))


def test_a_folder_that_cannot_be_made_is_told_on_every_process(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "step-000001").write_text("a file is in the way")
    assert write_split(tmp_path, make(1), 2) == [1, 1]
    assert capfd.readouterr().err.count("step-000001 is a file, and Sfumato replaces") >= 2
    assert (tmp_path / "step-000001").read_text() == "a file is in the way"


def test_writing_makes_no_second_copy(tmp_path: Path) -> None:
    """While each process writes, its memory grows by a tenth of its share at most."""
    large = Snapshot(1, {str(i): torch.ones(256, 4096) for i in range(24)}, {}, {}, {})

    def write(rank: int) -> None:
        dist.init_process_group("gloo")
        write_sharded(tmp_path / "warm", split(make(1), rank, 2), dist.group.WORLD)
        part = split(large, rank, 2)
        held = sum(each.value.nbytes for each in part.shares.values())
        assert held == 48 * 2**20
        Path("/proc/self/clear_refs").write_text("5")  # the peak is what is held now
        before = peak_memory()
        write_sharded(tmp_path / "large", part, dist.group.WORLD)
        assert peak_memory() - before < 0.1 * held

    in_processes(2, write)
    found = read_checkpoint(place_of(tmp_path / "large", 1))
    assert torch.equal(found.weights["7"], large.weights["7"])


def peak_memory() -> int:
    """Return the most bytes of memory that this process has had."""
    (peak,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(peak) * 1024


@pytest.mark.parametrize(
    ("chosen", "nbytes", "expected"),
    [
        (None, SHARDED_BYTES, False),
        (None, SHARDED_BYTES + 1, True),
        (True, 1, True),
        (False, 10 * SHARDED_BYTES, False),
    ],
)
def test_large_states_are_sharded(chosen: bool | None, nbytes: int, expected: bool) -> None:
    assert writes_shards(TrainingConfig(sharded_checkpoints=chosen), nbytes) is expected
