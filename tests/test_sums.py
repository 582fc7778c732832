"""What is read is what was written: caches, tars and checkpoints by their SHA-256."""

import hashlib
import json
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from prepared import (
    pictures,
    shard_files,
    toy_identity,
    toy_states,
    write_cache,
    write_prepared,
)
from safetensors.torch import save_file
from toy import ToyModel

from sfumato.compose import compose_train
from sfumato.config import (
    DataConfig,
    ModelConfig,
    SamplerConfig,
    ShardDataConfig,
    SupervisedConfig,
    TrainConfig,
)
from sfumato.data.epochs import RowPick
from sfumato.data.prepared import tars
from sfumato.data.prepared.folder import CACHE, EMPTY, INDEX, SHARDS
from sfumato.data.prepared.format import PreparedError
from sfumato.data.prepared.open import first_samples, open_shards
from sfumato.data.sample import Sample
from sfumato.data.stream import OrderedStream
from sfumato.models.model import TextToImageModel
from sfumato.run.open_data import open_stream
from sfumato.training.checkpoint import (
    CheckpointError,
    Snapshot,
    best_step,
    read_checkpoint,
    read_shown_weights,
    write_checkpoint,
)
from sfumato.training.state import load_weights

COUNT = 12  # samples, four a shard
Damage = Callable[[Path], None]


def flip(place: float, bit: int = 0) -> Damage:
    """Return what flips a bit at a place between 0, the first byte, and 1, the last."""

    def damage(file: Path) -> None:
        content = bytearray(file.read_bytes())
        content[int(place * (len(content) - 1))] ^= 1 << bit
        file.write_bytes(content)

    return damage


def cut(count: int) -> Damage:
    """Return what cuts the last bytes off."""
    return lambda file: os.truncate(file, file.stat().st_size - count)


DAMAGES = {
    "first byte": flip(0),
    "header": flip(0.02, 3),
    "middle": flip(0.5, 7),
    "last byte": flip(1),
    "short by a byte": cut(1),
    "short by many": cut(300),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_prepared(tmp_path, pictures(COUNT))
    write_cache(tmp_path, toy_identity())
    return tmp_path


def opened(
    folder: Path, *, workers: int = 0, cached: bool = False, verify: bool = False
) -> OrderedStream[RowPick, Sample]:
    config = ShardDataConfig(path=str(folder), workers=workers, shuffle=False, cached=cached)
    return open_shards(config, height=16, width=16, seed=0, identity=toy_identity(), verify=verify)


def sha256(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


# --- Caches and tars


@pytest.mark.parametrize("workers", [0, 3])
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("part", ["moments", "text", "tar"])
def test_a_damaged_shard_is_refused_where_it_is_read(
    folder: Path, part: str, damage: str, workers: int
) -> None:
    """Its sums and the way on are named; what was read before it is as it was."""
    identity = toy_identity()
    cache = identity.moments_folder if part == "moments" else identity.text_folder
    is_tar = part == "tar"
    good = opened(folder, cached=not is_tar).next(4, 0, 4)
    # The shard is damaged while the run reads: its size was right when the run began.
    stream = opened(folder, workers=workers, cached=not is_tar, verify=is_tar)
    file = folder / SHARDS / "00001.tar" if is_tar else shard_files(folder / CACHE / cache)[1]
    expected = sha256(file)
    DAMAGES[damage](file)
    assert len(good) == len(stream.next(4, 0, 4))
    for _ in range(2):
        with pytest.raises(PreparedError) as error:
            stream.next(4, 0, 4)
        for named in (str(file), sha256(file), expected, f"sfumato prepare verify {folder}"):
            assert named in str(error.value)
    assert not stream.skipped, "nothing is left out in its place"


@pytest.mark.parametrize("damage", ["first byte", "middle", "last byte"])
@pytest.mark.parametrize("part", ["moments", "text", "tar"])
def test_damage_of_the_same_size_is_found_by_another_run(
    folder: Path, part: str, damage: str
) -> None:
    identity = toy_identity()
    cache = identity.moments_folder if part == "moments" else identity.text_folder
    is_tar = part == "tar"
    file = folder / SHARDS / "00002.tar" if is_tar else shard_files(folder / CACHE / cache)[2]
    DAMAGES[damage](file)
    with pytest.raises(PreparedError, match=file.name):
        opened(folder, workers=2, cached=not is_tar, verify=is_tar).next(COUNT, 0, COUNT)


def test_tars_are_read_for_their_sums_only_if_that_is_asked_for(folder: Path) -> None:
    tar = folder / SHARDS / "00001.tar"
    data = tar.read_bytes()
    tar.write_bytes(data[:-1] + b"\1")  # behind all pictures
    assert len(opened(folder).next(COUNT, 0, COUNT)) == COUNT
    with pytest.raises(PreparedError, match=r"00001\.tar is damaged or was changed"):
        opened(folder, verify=True).next(COUNT, 0, COUNT)


@pytest.mark.parametrize("cached", [False, True])
def test_a_file_is_read_once_for_its_sum_in_a_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, cached: bool
) -> None:
    """However many threads, epochs and readers there are; a file that changed is read again."""
    read: Counter[str] = Counter()

    def counted(path: Path) -> str:
        read[f"{path.parent.name}/{path.name}"] += 1
        return sha256(path)

    monkeypatch.setattr(tars, "sha256_of", counted)
    config = ShardDataConfig(path=str(folder), workers=4, cached=cached, repeats=2, buffer=3)
    given = {"height": 16, "width": 16, "identity": toy_identity(), "verify": True}
    for seed in (0, 1):
        stream = open_shards(config, seed=seed, **given)
        for _ in range(4):
            stream.next(COUNT, 0, COUNT)
    first_samples(config, 8, **given)
    identity = toy_identity()
    folders = (identity.moments_folder, identity.text_folder) if cached else ("shards",)
    suffix = "safetensors" if cached else "tar"
    assert read == {f"{each}/0000{i}.{suffix}": 1 for each in folders for i in range(3)}
    file = folder / CACHE / identity.text_folder / "00000.safetensors"
    file = file if cached else folder / SHARDS / "00000.tar"
    os.utime(file, ns=(1, 1))
    open_shards(config, seed=0, **given).next(COUNT, 0, COUNT)
    assert read.pop(f"{file.parent.name}/{file.name}") == 2 and set(read.values()) == {1}


def test_states_of_the_empty_prompt_have_a_sum(folder: Path) -> None:
    text = toy_identity().text_folder
    file = folder / CACHE / text / EMPTY
    content = json.loads((folder / INDEX).read_text())
    (folder / INDEX).write_text(json.dumps(content | {"empty": {text: sha256(file)}}))
    opened(folder, cached=True).next(1, 0, 1)
    other = {name: tensor + 1 for name, tensor in toy_states("").items()}
    save_file(other, file)
    with pytest.raises(PreparedError, match=rf"{EMPTY} is damaged or was changed"):
        opened(folder, cached=True)
    del content["empty"]  # an index of an earlier version has none
    (folder / INDEX).write_text(json.dumps(content))
    opened(folder, cached=True).next(1, 0, 1)


def test_the_setting_reaches_the_stream(folder: Path) -> None:
    flip(0.5)(folder / SHARDS / "00000.tar")
    config = TrainConfig(objective=SupervisedConfig(), sampler=SamplerConfig(height=16, width=16))
    for verify in (False, True):
        shards = ShardDataConfig(path=str(folder), workers=0)
        config.data = DataConfig(shards=shards, verify=verify)
        stream = open_stream(config, None)
        if verify:
            with pytest.raises(PreparedError, match=r"00000\.tar is damaged"):
                stream.next(COUNT, 0, COUNT)
        else:
            stream.next(COUNT, 0, COUNT)


def test_verify_of_pictures_that_have_no_sums_is_refused(tmp_path: Path) -> None:
    given = ["model.pretrained=M", "objective=supervised", f"data.images.path={tmp_path}"]
    with pytest.raises(ValueError, match=r"data\.verify=true .* data\.shards\.path"):
        compose_train([*given, "data.verify=true"])


# --- Checkpoints


def make(step: int, **state: object) -> Snapshot:
    torch.manual_seed(step)
    weights = {name: torch.randn(20, 20) for name in ("up", "down")}
    return Snapshot(
        step=step,
        weights=weights,
        ema={name: tensor / 2 for name, tensor in weights.items()},
        optimizer={f"exp_avg/{name}": tensor.square() for name, tensor in weights.items()},
        state={"ema_updates": step, "data": {"position": 3}, "scaler": {}, **state},
    )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("file", ["weights", "ema", "optimizer", "state"])
@pytest.mark.parametrize("read", [read_checkpoint, read_shown_weights])
def test_a_damaged_checkpoint_is_refused_by_whoever_reads_it(
    tmp_path: Path, read: Callable[[Path], object], file: str, damage: str
) -> None:
    """Training that goes on reads all of it, sampling, evaluation and export the weights."""
    write_checkpoint(tmp_path, make(1))
    path = write_checkpoint(tmp_path, make(2, padding="x" * 400))
    place = path / (f"{file}.safetensors" if file != "state" else "state.json")
    expected, size = sha256(place), place.stat().st_size
    DAMAGES[damage](place)
    with pytest.raises(CheckpointError) as error:
        read(path)
    said = str(error.value)
    assert place.name in said and f"last good checkpoint is {tmp_path / 'step-000001'}" in said
    same_size = place.stat().st_size == size
    sums = (sha256(place), expected) if same_size else (str(place.stat().st_size), str(size))
    assert all(each in said for each in sums)
    assert f"remove {path} and run the same command again" in said


def test_the_best_step_is_read_of_a_whole_record(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, make(3))
    path = write_checkpoint(tmp_path, make(4, best=[3, 0.5]))
    assert best_step(tmp_path) == 3
    place = path / "state.json"
    place.write_text(place.read_text().replace("3,", "4,", 1))
    with pytest.raises(CheckpointError, match=r"state\.json differs from its SHA-256"):
        best_step(tmp_path)


# --- Checkpoints of another model


def toy_model() -> TextToImageModel:
    torch.manual_seed(0)
    return ToyModel(ModelConfig())


def changed(kind: str, weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    first = next(iter(weights))
    if kind == "wider":
        return {name: torch.cat([tensor, tensor]) for name, tensor in weights.items()}
    if kind == "one row less":
        return weights | {first: weights[first][:-1]}
    if kind == "prefix":
        return {f"module.{name}": tensor for name, tensor in weights.items()}
    if kind == "missing":
        return {name: tensor for name, tensor in weights.items() if name != first}
    assert kind == "unexpected"
    return weights | {"extra.weight": torch.ones(2)}


@pytest.mark.parametrize(
    ("kind", "count", "cause"),
    [
        ("wider", None, "of another width or a LoRA of another rank"),
        ("one row less", 1, "of another width or a LoRA of another rank"),
        ("prefix", None, "'module.', as DistributedDataParallel writes them"),
        ("missing", 1, "The file is incomplete"),
        ("unexpected", 1, "extra.weight"),
    ],
)
def test_weights_of_another_model_are_refused_by_name_and_shape(
    kind: str, count: int | None, cause: str
) -> None:
    model = toy_model()
    own = {name: p.detach().clone() for name, p in model.trainable().items()}
    with pytest.raises(CheckpointError) as error:
        load_weights(model, changed(kind, own), "runs/a/checkpoints/step-000002")
    said = str(error.value)
    assert said.startswith("runs/a/checkpoints/step-000002 does not fit the network: ")
    assert f"{count or len(own)} weights are" in said and cause in said
    assert "Restore the model's settings in config.yaml" in said
    named = [name for name in changed(kind, own) if name in said]
    assert 1 <= len(named) <= 3 or kind == "missing"
    for name, parameter in model.trainable().items():
        assert torch.equal(parameter, own[name]), "nothing was written"
    load_weights(model, {name: tensor + 1 for name, tensor in own.items()}, "a checkpoint")
    assert all(torch.equal(p, own[name] + 1) for name, p in model.trainable().items())


# --- Threads


LEFT_BEHIND = """
import os, sys, torch
from sfumato.config import TrainingConfig
from sfumato.training.distribution import Distribution
from torch.nn.parallel import DistributedDataParallel

def threads():
    names = [open(f"/proc/self/task/{task}/comm").read() for task in os.listdir("/proc/self/task")]
    return sorted(name.strip() for name in names if "gloo" in name or "tcpstore" in name)

distribution = Distribution(TrainingConfig())
network = DistributedDataParallel(torch.nn.Linear(2, 2))
network(torch.ones(1, 2)).sum().backward()
distribution.gather([distribution.mean({"a": 1.0})])
assert threads()
del network
distribution.close()
print(threads())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="threads are listed in /proc")
def test_no_thread_of_the_process_group_outlives_it() -> None:
    """A thread in C++ that runs while Python ends can abort the process, after all is done."""
    own = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    run = subprocess.run(
        [sys.executable, "-c", LEFT_BEHIND],
        env={**os.environ, **own, "MASTER_PORT": "0", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.stdout.splitlines()[-1:] == ["[]"], run.stderr
    assert run.returncode == 0
